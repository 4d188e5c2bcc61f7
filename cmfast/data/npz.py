"""What a .npz file says of an array in it, looked at before memory is given to it."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from typing import IO, NamedTuple

import numpy as np

#: Bytes of a header: numpy's own limit, which it looks at when it has read one of whatever length.
HEADER = 10_000
#: What is compressed may become so many times larger, or `FREE` bytes, whatever it was. Black images become 1,000 times
#: larger; photographs and digits, 10.
RATIO, FREE = 200, 2**30


class Member(NamedTuple):
    """An array in a .npz file: as a member of the archive, and what its own header says.

    offset: of its first number, from the start of the member.
    """

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    offset: int

    @property
    def stored(self) -> bool:
        """Whether it lies in the file as it is in memory."""
        return self.info.compress_type == zipfile.ZIP_STORED


def member(archive: zipfile.ZipFile, name: str) -> Member:
    """An array by its name in `np.load`.

    Raises: ValueError: its header is damaged or says something else than the archive, or it becomes larger than what
        this machine has or than an array can that was compressed to so few bytes; and what to do.
    """
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"{name} is no array: there is no {name}.npy in it") from None
    with archive.open(info) as file:
        shape, columns_first, dtype = _header(file, name)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not loaded (allow_pickle=False)")
    size = math.prod(shape) * dtype.itemsize
    there = info.file_size - offset
    if min(shape, default=0) < 0 or size != there:
        raise ValueError(f"the header of {name} says {list(shape)} {dtype}, {size:,} bytes, and there are {there:,}")
    whole = os.fstat(archive.fp.fileno()).st_size  # type: ignore[union-attr]  # an open archive has a file
    if info.compress_type == zipfile.ZIP_STORED:
        if info.file_size > whole:
            raise ValueError(f"{name} is said to have {info.file_size:,} bytes, and the file has {whole:,}")
        return Member(info, shape, columns_first, dtype, offset)  # mapped, and so read as it is used
    compressed = min(info.compress_size, whole)
    if size > max(FREE, RATIO * compressed):
        raise ValueError(
            f"{name} would become {size:,} bytes from {compressed:,}: no images do that. If these are some, save them "
            "by np.savez, uncompressed"
        )
    memory = _memory()
    if size > memory:
        raise ValueError(
            f"{name} takes {size:,} bytes, and this machine has {memory:,.0f}: save it by np.savez, uncompressed, and "
            "it is read as it is needed"
        )
    return Member(info, shape, columns_first, dtype, offset)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, columns first, dtype). Raises: ValueError."""
    start = file.read(12)
    if start[:6] != np.lib.format.MAGIC_PREFIX or len(start) < 12:
        raise ValueError(f"{name} is no array: it begins with {start!r}")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name} is in format {version[0]}.{version[1]} of numpy, known are 1.0, 2.0 and 3.0")
    length = struct.unpack("<H", start[8:10])[0] if version == (1, 0) else struct.unpack("<I", start[8:12])[0]
    if length > HEADER:
        raise ValueError(f"the header of {name} has {length:,} bytes, expected {HEADER:,} or fewer")
    file.seek(8)
    formats = np.lib.format
    # What 3.0 has besides are names of fields in UTF-8.
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    try:
        return read(file)
    except (MemoryError, RecursionError) as error:  # of Python's parser
        raise ValueError(f"the header of {name} is damaged ({type(error).__name__})") from error


def _memory() -> float:
    """Bytes of this machine's memory; infinity where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf
