"""The files of `cm.train_util`: their names, written so that a crash leaves the last good ones, read without code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.compat.openai import dist_util, logger
from cmfast.whole import written_whole


def parse_resume_step_from_filename(filename: str) -> int:
    """The number of `path/to/modelNNNNNN.pt`; 0 for other names."""
    _, found, rest = filename.rpartition("model")
    number = rest.partition(".")[0]
    return int(number) if found and number.isdecimal() else 0


def get_blob_logdir() -> str:
    """Where checkpoints go: the folder of the logger."""
    folder = logger.get_dir()
    assert folder is not None
    return folder


def find_resume_checkpoint() -> str | None:
    """None. To go on from the newest checkpoint by itself, put a function that finds it in its place."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float) -> str | None:
    """The file of an average beside `main_checkpoint`; None if it does not exist."""
    return None if main_checkpoint is None else beside(main_checkpoint, f"ema_{rate}_{step:06d}.pt")


def beside(path: str, name: str) -> str | None:
    """The file called `name` in the folder of `path`; None if it does not exist."""
    other = os.path.join(os.path.dirname(path), name)
    return other if os.path.exists(other) else None


def save(state: Any, name: str) -> None:
    """`torch.save` to a file in `get_blob_logdir`, which appears whole or not at all.

    Raises: OSError: it could not be written, such as on a full disk; a file of that name stays as it was.
    """
    path = Path(hooks().get_blob_logdir(), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # PyTorch's writer, where the disk is full
            raise OSError(f"cannot write {path}: {error}") from error


def read(path: str, device: torch.device | str | None = None) -> Any:
    """What `torch.save` wrote, in memory of its own; default: on this process's device."""
    return dist_util.load_state_dict(path, map_location=dist_util.dev() if device is None else device, mmap=False)


def load_into(model: nn.Module, path: str) -> None:
    """Load a state dict from a file. Raises: ValueError: it is not one of this network; the message names the file."""
    try:
        model.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"{path} does not fit the network that the arguments describe: {first}") from error


def check_same_shapes(name: str, model: nn.Module, like: Sequence[Tensor]) -> None:
    """ValueError unless `model` has parameters of the shapes of `like`, those of the network that is trained."""
    shapes = [list(parameter.shape) for parameter in model.parameters()]
    wanted = [list(parameter.shape) for parameter in like]
    if shapes != wanted:
        differing = next(((a, b) for a, b in zip(shapes, wanted, strict=False) if a != b), (len(shapes), len(wanted)))
        raise ValueError(f"{name} is another network than model: a parameter {differing[0]} against {differing[1]}")


def hooks() -> Any:
    """`cm.train_util`, whose functions users may replace, find_resume_checkpoint above all."""
    from cmfast.compat.openai import train_util

    return train_util
