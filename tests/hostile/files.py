"""Broken and hostile files by name: how each is made, what opens it, and what is said of it then."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cmfast.checkpoint import CheckpointError


class Kind(NamedTuple):
    """make: (folder, canary) -> the path to open. said: in the message. bomb: would fill memory, or take for ever."""

    make: Callable[[Path, Path], Path]
    said: str
    error: type[Exception] | tuple[type[Exception], ...]
    bomb: bool


#: `group: what` -> one of them; and what opens those of a group.
KINDS: dict[str, Kind] = {}
OPENERS: dict[str, Callable[[Path], object]] = {}
ERRORS = {"pt": CheckpointError, "safetensors": CheckpointError, "diffusers": CheckpointError}


def kind(name: str, said: str, error: Any = None, *, bomb: bool = False) -> Callable:
    """Add what the decorated function makes, under `group: what`."""

    def add(make: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        assert name not in KINDS
        KINDS[name] = Kind(make, said, error or ERRORS.get(name.split(":")[0], ValueError), bomb)
        return make

    return add


def opens(*groups: str) -> Callable:
    """The decorated function opens these."""

    def add(function: Callable[[Path], object]) -> Callable[[Path], object]:
        OPENERS.update(dict.fromkeys(groups, function))
        return function

    return add


def written(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


#: Bytes that a bomb becomes.
BOMB = 2**31 - 2**24


class Payload:
    """What runs where it is unpickled: it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def flipped(content: bytes, at: int) -> bytes:
    at %= len(content)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def deflated(size: int, start: bytes = b"") -> bytes:
    """A raw deflate stream of `start` and then zeros, `size` bytes in all, made without making those."""
    chunk = 2**24
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = squeeze.compress(start + bytes(chunk - len(start))) + squeeze.flush(zlib.Z_FULL_FLUSH)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(chunk)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    assert size % chunk == 0
    return first + block * (size // chunk - 1) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def archive(path: Path, members: dict[str, bytes | tuple[bytes, int]], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip file; of a member given as (deflate stream, size), that stream."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            if isinstance(content, bytes):
                file.writestr(name, content)
                continue
            stream, size = content
            info = zipfile.ZipInfo(name)
            info.header_offset = file.fp.tell()
            info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, 0
            info.compress_size, info.file_size = len(stream), size
            file.fp.write(info.FileHeader(zip64=False) + stream)
            file.filelist.append(info)
            file.NameToInfo[name] = info
            file.start_dir = file.fp.tell()
            file._didModify = True
    return path


def repacked(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip file with its members changed, or without those of which None is made."""
    with zipfile.ZipFile(path) as file:
        members = {name: change(name, file.read(name)) for name in file.namelist()}
    return archive(path, {name: content for name, content in members.items() if content is not None}, method)
