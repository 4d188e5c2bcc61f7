"""Tables of addresses, by which one launch works on any number of tensors.

Tensors that belong together (a parameter, its gradient, its averages) make a piece: a row [count, first program,
addresses ...] of a table. A second table says which row each program works on. Where all addresses of a piece are
multiples of 16 bytes, its elements up to a multiple of 16 make one piece, accessed 16 bytes at a time, and what is left
another, that is taken up by a launch for the unaligned.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.launch import launch

#: What addresses and counts of aligned pieces are multiples of: bytes, and elements.
ALIGNMENT = 16
#: Sets of tables that are kept, for calls with the same tensors.
KEPT = 32

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_dtype = attrgetter("dtype")


@triton.jit
def piece(table_ptr, owners_ptr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row of the table, its first element and the piece's count, all int64."""
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(owners_ptr + program).to(tl.int64) * (COLUMNS + 2)
    count = tl.load(row_ptr)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    return row_ptr, (program.to(tl.int64) - tl.load(row_ptr + 1)) * BLOCK, count


@triton.jit
def tensor_at(row_ptr, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the piece's part of the tensor in a column, whose elements are of a type."""
    # The hint must stand on the pointer: on the number it is lost in the cast.
    pointer = tl.load(row_ptr + (COLUMN + 2)).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


class Table(NamedTuple):
    """Pieces of tensors whose columns have the same dtypes, all aligned or all not."""

    rows: Tensor  # int64 [pieces, 2 + columns]
    owners: Tensor  # int32 [programs]
    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    #: Memory of the host that an upload in a captured graph reads at every replay.
    staging: tuple[Tensor, ...]

    @property
    def programs(self) -> int:
        return self.owners.shape[0]

    def type(self, column: int) -> Any:
        """Triton's type of a column."""
        return _TYPES[self.dtypes[column]]

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch one program for each block."""
        launch(kernel, self.programs, self.rows, self.owners, *arguments, **constants, ALIGNED=self.aligned)


_known: OrderedDict[tuple[Any, ...], list[Table]] = OrderedDict()
#: Held while `_known` is read and written, not while tables are built.
_lock = threading.Lock()
#: What captured graphs read, which must stay where it is.
_captured: list[list[Table]] = []


def tables(lists: list[list[Tensor]], block: int) -> list[Table]:
    """The tables for lists [columns][tensors] of dense tensors, in which element i of each column belongs together.

    They are built where an address, a size or a dtype is new, and else those of the last such call.
    """
    flat = list(chain.from_iterable(lists))
    key = (
        block, len(lists), flat[0].device, tuple(map(Tensor.data_ptr, flat)), tuple(map(Tensor.numel, lists[0])),
        tuple(map(_dtype, flat)),
    )  # fmt: skip
    capturing = _capturing(flat[0].device)
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
    if found is None:
        found = list(_built(lists, block))
        # In a capture the upload is only noted: until a replay there is nothing in such a table for other calls.
        if not capturing:
            with _lock:
                _known[key] = found
                while len(_known) > KEPT:
                    _known.popitem(last=False)
    if capturing:
        _captured.append(found)
    return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _built(lists: list[list[Tensor]], block: int) -> Iterator[Table]:
    pieces: dict[tuple[Any, ...], list[list[int]]] = {}
    for tensors in zip(*lists):
        dtypes = tuple(map(_dtype, tensors))
        addresses, count = [x.data_ptr() for x in tensors], tensors[0].numel()
        whole = 0 if any(address % ALIGNMENT for address in addresses) else count // ALIGNMENT * ALIGNMENT
        if whole:
            pieces.setdefault((dtypes, True), []).append([whole, *addresses])
        if count > whole:
            rest = [address + whole * dtype.itemsize for address, dtype in zip(addresses, dtypes)]
            pieces.setdefault((dtypes, False), []).append([count - whole, *rest])
    for (dtypes, aligned), rows in pieces.items():
        blocks = torch.tensor([-(-row[0] // block) for row in rows], device="cpu")
        first = (blocks.cumsum(0) - blocks).tolist()
        table = torch.tensor(
            [[count, start, *addresses] for (count, *addresses), start in zip(rows, first)], device="cpu"
        )
        owners = torch.arange(len(rows), dtype=torch.int32, device="cpu").repeat_interleave(blocks)
        uploads = [_upload(x, lists[0][0].device) for x in (table, owners)]
        (there, here), (owners_there, owners_here) = uploads
        yield Table(there, owners_there, dtypes, aligned, (here, owners_here))


def _upload(x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A copy on the device that nothing waits for, and what it is copied from."""
    if device.type == "cpu":
        return x, x
    here = x.pin_memory()
    return here.to(device, non_blocking=True), here
