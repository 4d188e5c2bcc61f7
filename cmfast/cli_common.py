"""What the commands share: values from text, devices, folders, and what an error says to a user."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line starts without torch
    import torch


class Said(Exception):
    """A command has failed, and has said why."""


def for_users(error: Exception) -> str | None:
    """What an error says, where it is no fault of cmfast's own: an argument, a file, what is missing on this machine,
    or memory that ran out."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    from cmfast.data.folder import worker_gone
    from cmfast.errors import Unavailable
    from cmfast.memory import out_of_memory
    from cmfast.ranks import RankError

    if isinstance(error, (RankError, Unavailable)):
        return str(error)
    if not out_of_memory(error):
        return worker_gone(error)
    said = str(error) or type(error).__name__
    # `Sampler` names the batch that fits.
    return said if "does not fit into" in said else f"memory ran out; a smaller batch or microbatch takes less: {said}"


def device_of(name: str | None, local_rank: int | None = None) -> torch.device:
    """The torch.device of that name; a GPU if there is one and no name. Each of several processes takes its own GPU."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name!r}") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to run on the CPU")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} of them here, from cuda:0 on")
    if device.type != "cuda" or device.index is not None or local_rank is None:
        return device
    if local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"there is no GPU for process {local_rank} of this machine: torchrun --nproc-per-node {found}")
    return torch.device("cuda", local_rank)


def folder_of(path: str) -> Path:
    """Raises: NotADirectoryError: there is a file in the place of the folder to write to."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out: {folder} is a file; name a folder")
    return folder


def file_path(text: str) -> str:
    """Of a file or folder. `~` is the home folder: a shell leaves it as it is in `--out=~/x`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")  # which would be the folder one is in
    return os.path.expanduser(text)


def integer(text: str) -> int:
    """A whole number, as large as PyTorch takes them."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {text}")
    return number


def integers(text: str) -> list[int]:
    try:
        return [integer(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        message = f"expected whole numbers of 64 bits with commas between them, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def words(text: str) -> tuple[str, ...]:
    """Rates of averages with commas between them; one may have arguments, `halflife:500000,batch=64`."""
    found: list[str] = []
    for part in text.split(","):
        if found and "=" in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def override(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value read as Python would read a literal, or as `true` or `false`, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
