"""Training: one step without waiting, and a loop around it whose runs can be interrupted anywhere."""

from cmfast.training.config import TrainOptions
from cmfast.training.loop import NaNLoss, Trainer
from cmfast.training.step import Pending, Reading, TrainStep

__all__ = ["NaNLoss", "Pending", "Reading", "TrainOptions", "TrainStep", "Trainer"]
