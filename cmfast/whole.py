"""Files that appear whole or not at all: a crash leaves what was there before."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end; after an exception it is removed.

    It is there and empty, with the permissions that the umask says. Where `path` is a symbolic link, the file that it
    points to is replaced, not the link.

    Raises: FileNotFoundError, IsADirectoryError, PermissionError: `path` cannot be written; OSError from the disk.
    """
    path = Path(os.path.realpath(path))
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write into {folder}")

    # File systems take names of 255 bytes, and a letter may be four.
    unfinished = folder / f".{path.name[:40]}.{uuid.uuid4().hex}.tmp"
    try:
        unfinished.touch()
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # else a crash of the machine may leave the new name with nothing in it
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}") from error  # a full disk, mostly
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. Raises: as of `written_whole`."""
    with written_whole(path) as file:
        file.write_text(text, encoding="utf-8")
