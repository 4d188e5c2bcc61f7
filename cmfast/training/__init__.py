"""Training: one step without waiting, and a loop around it whose runs can be interrupted anywhere."""

from cmfast.training.config import TrainOptions
from cmfast.training.lock import Locked
from cmfast.training.loop import NaNLoss, Trainer
from cmfast.training.step import Pending, Reading, TrainStep
from cmfast.training.stop import Stopped

__all__ = ["Locked", "NaNLoss", "Pending", "Reading", "Stopped", "TrainOptions", "TrainStep", "Trainer"]
