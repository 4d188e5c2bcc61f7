"""Objectives on a toy network, for the tests of them."""

import torch

from cmfast import Denoiser, Preconditioner, ops
from cmfast.objectives import OBJECTIVES
from tests.toy import ToyNetwork

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
Y = torch.tensor([0, 1, 2, 3, 4, 5])
DRAW = ops.Draw(2**40 + 7, torch.tensor([3, 1, 2**33, 8, 11, 100]), 5)


def make(name, **options):
    """An objective that needs no LPIPS."""
    cls = OBJECTIVES[name]
    return cls(**({"loss_norm": "huber"} if hasattr(cls, "loss_norm") else {}) | options)


def toy(seed, preconditioning="consistency"):
    torch.manual_seed(seed)
    return Denoiser(ToyNetwork(), Preconditioner.by_name(preconditioning))


def models(objective):
    """Model, target and teacher."""
    return toy(0, objective.preconditioning), toy(1, objective.preconditioning), toy(2, "edm")


def loss(objective, model, x, draw=DRAW, *, step=0, labels=Y, target=None, teacher=None, **options):
    arguments = {"labels": labels, "target_model": target, "teacher_model": teacher, **options}
    return objective.loss(model, x, stage=objective.stage(step), draw=draw, **arguments)
