"""One process at a time writes a run: a lock on a file in its folder, which the kernel lets go of with the process."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

NAME = ".lock"
#: What a file system without locks says.
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


class Locked(ValueError):
    """Another process writes this run; the message says which."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if need be. The file stays: taking it away would let two in.

    A process that is killed holds it no longer: the run can be resumed at once. Without `fcntl` (Windows) there is no
    lock; on a file system that knows none there is a warning in its place.

    Raises: Locked: another process has it, on this machine or one that shares the disk. OSError: no file can be made.
    """
    run.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(run / NAME, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    _held.add(handle)
    try:
        _take(handle, run)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _take(handle: int, run: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NONE:
            warnings.warn(
                f"{run} is on a file system without locks ({error}): see to it that no other process trains there",
                stacklevel=5,
            )
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "its number is not known yet"
        raise Locked(
            f"{run} is being trained by another process ({holder}): wait for its end, or choose another folder"
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _let_go() -> None:
    """In a child, such as a worker that decodes images: it would keep the lock when its parent is killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
