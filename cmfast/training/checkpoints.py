"""The checkpoints of a run: one directory per step, which is there whole or not at all.

    RUN/checkpoints/step-00001000/
        model.safetensors           the weights, as `cmfast.load` reads them where they are those of a `UNetModel`
        average-0.9999.safetensors  each average likewise
        state.pt                    optimizer, generators of every rank, position in the data; and the settings

A directory is written under another name, flushed to the disk, then renamed: a crash, a kill or a full disk at any
moment leaves the checkpoints that were there as they were.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = ".unfinished-"


def folder(run: Path) -> Path:
    """Where the checkpoints of a run are."""
    return run / "checkpoints"


def place(run: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return folder(run) / f"step-{step:08d}"


def number(checkpoint: Path) -> int:
    """The step of a checkpoint, of which the directory is given."""
    return int(checkpoint.name.removeprefix("step-"))


def saved(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each checkpoint, the oldest first."""
    if not folder(run).is_dir():
        return []
    found = (path for path in folder(run).iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted((number(path), path) for path in found)


def newest(run: Path) -> Path | None:
    """The last checkpoint of a run; None if it has none."""
    found = saved(run)
    return found[-1][1] if found else None


def check_links(run: Path, found: Path) -> None:
    """A checkpoint lies in its run, and so do its files. The run itself may be a link, as to a larger disk.

    Raises: ValueError: something in it is a link to elsewhere, where others may write.
    """
    home = Path(os.path.realpath(run))
    for path in (found, *sorted(found.iterdir())):
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(home):
            raise ValueError(f"{path} is a link out of the run, to {target}: put the file itself there")


def save(run: Path, step: int, write: Callable[[Path], None], *, keep: int | None = None) -> Path:
    """The directory of a step that has none, filled by `write`; then of all checkpoints the last `keep` stay.

    Raises: OSError: it could not be written, such as on a full disk. What was there before is there still.
    """
    home, done = folder(run), place(run, step)
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(_UNFINISHED + "*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = home / f"{_UNFINISHED}{step:08d}"
    temporary.mkdir()
    try:
        write(temporary)
        for path in sorted(temporary.iterdir()):
            _flush(path)
        _flush(temporary)
        os.replace(temporary, done)
        _flush(home)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, path in saved(run)[:-keep] if keep else []:
        _remove(path)
    return done


def _remove(path: Path) -> None:
    """Under another name first, so that half of it is never taken for a checkpoint."""
    other = path.with_name(f"{_UNFINISHED}{path.name}")
    os.replace(path, other)
    shutil.rmtree(other, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
