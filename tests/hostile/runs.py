"""Runs that are resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cmfast
from cmfast.checkpoint import CheckpointError
from cmfast.data import ImageData
from cmfast.objectives import EDM
from cmfast.training import Trainer, TrainOptions
from tests.hostile.files import Payload, kind, opens

OPTIONS = TrainOptions(steps=2, batch_size=2, learning_rate=1e-3, averages=("0.9",), optimizer="adam")


def trainer(run: Path, **more: Any) -> Trainer:
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x)

    model = cmfast.Denoiser(Small(), cmfast.Preconditioner.edm(), image_shape=(3, 4, 4))
    return Trainer(model, EDM(), ImageData(torch.zeros(4, 3, 4, 4)), OPTIONS, run, **more)


def checkpoint(folder: Path) -> Path:
    trainer(folder / "run").run(progress=False)
    return folder / "run" / "checkpoints" / "step-00000002"


def rewritten(name: str, change: Callable[[dict], Any]) -> Callable[[Path, Path], Path]:
    """A run with a file of its checkpoint changed, as tensors or as a state."""

    def make(folder: Path, canary: Path) -> Path:
        path = checkpoint(folder) / name
        if name.endswith(".pt"):
            torch.save(change(torch.load(path)), path)
        else:
            save_file(change(load_file(path)), path)
        return folder / "run"

    return make


def without(*names: str) -> Callable[[dict], dict]:
    return lambda values: {key: value for key, value in values.items() if key not in names}


def deep(*path: Any, value: Any) -> Callable[[dict], dict]:
    def change(state: dict) -> dict:
        state = copy.deepcopy(state)
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return state

    return change


MODEL, AVERAGE, STATE = "model.safetensors", "average-0.9.safetensors", "state.pt"
for what, name, change, said in [
    ("a tensor missing", MODEL, without("conv.bias"), "there is no conv.bias in model.safetensors"),
    ("one number for a tensor", MODEL, lambda t: t | {"conv.bias": torch.zeros(1)}, r"conv.bias in .* \[1\], expected"),
    ("integer weights", MODEL, lambda t: t | {"conv.bias": torch.zeros(3, dtype=torch.int32)}, "int32"),
    ("an average of other shape", AVERAGE, lambda t: {k: v[:1].clone() for k, v in t.items()}, r"\[1, 3, 3, 3\]"),
    ("an average with other names", AVERAGE, lambda t: {f"x.{k}": v for k, v in t.items()}, "there is no network.conv"),
    ("a state that is a list", STATE, lambda s: [s], "state.pt has no step"),
    ("a state of another step", STATE, lambda s: s | {"step": 7}, "state.pt is of step 7"),
    ("a step that is text", STATE, lambda s: s | {"step": "2"}, "has no step"),
    ("no settings", STATE, without("settings"), "has no settings"),
    ("settings without options", STATE, lambda s: s | {"settings": {}}, "has no options"),
    ("no optimizer", STATE, without("optimizer"), "has no optimizer"),
    ("an optimizer of other parameters", STATE, deep("optimizer", "state", 99, value={"step": 1}), "damaged"),
    ("moments of other shape", STATE, deep("optimizer", "state", 0, "exp_avg", value=torch.zeros(2)), "exp_avg of"),
    ("an optimizer without groups", STATE, deep("optimizer", "param_groups", value=[]), "damaged"),
    ("averages of other rates", STATE, deep("averages", "rates", value=["0.5"]), "averages with rates"),
    ("no generators", STATE, lambda s: s | {"random": [{}]}, "damaged"),
    ("a generator cut short", STATE, lambda s: s | {"random": [{"cpu": torch.zeros(3, dtype=torch.uint8)}]}, "damaged"),
]:
    kind(f"run: {what}", said)(rewritten(name, change))
for name in (MODEL, AVERAGE, STATE):

    @kind(f"run: {name} cut short", "damaged")
    def _(folder, canary, name=name):
        path = checkpoint(folder) / name
        path.write_bytes(path.read_bytes()[:-40])
        return folder / "run"

    @kind(f"run: {name} is empty", "damaged|is empty")
    def _(folder, canary, name=name):
        (checkpoint(folder) / name).write_bytes(b"")
        return folder / "run"

    @kind(f"run: {name} is gone", "no such|damaged", (FileNotFoundError, CheckpointError))
    def _(folder, canary, name=name):
        (checkpoint(folder) / name).unlink()
        return folder / "run"

    @kind(f"run: {name} is a link to elsewhere", "is a link out of the run")
    def _(folder, canary, name=name):
        path = checkpoint(folder) / name
        path.rename(folder / name)
        path.symlink_to(folder / name)
        return folder / "run"


@kind("run: hostile pickle for a state", "could run any code")
def _(folder, canary):
    torch.save({"step": 2, "settings": Payload(canary)}, checkpoint(folder) / STATE)
    return folder / "run"


@kind("run: a checkpoint that is a link to elsewhere", "is a link out of the run")
def _(folder, canary):
    path = checkpoint(folder)
    path.rename(folder / path.name)
    path.symlink_to(folder / path.name)
    return folder / "run"


@opens("run")
def resume(path: Path) -> object:
    return trainer(path, resume=True)
