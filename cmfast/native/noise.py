"""Normal numbers from counters on a CPU: by the function of noise.c."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from cmfast import native
from cmfast.reference import Draw, philox


@functools.cache
def functions(cpu: str | None = None) -> Any:
    """That of noise.c for a CPU, with arguments as there. Raises: Unavailable: it cannot be had here."""
    words, sizes = (ctypes.c_ulong, ctypes.c_uint), (ctypes.c_long, ctypes.c_long)
    kinds = ctypes.c_void_p, ctypes.c_void_p, *words, *sizes, ctypes.c_int
    return native.function(native.library(cpu), "noise_normal", *kinds)


@functools.cache
def refusal() -> str | None:
    """Why the function cannot be had here; None if it can."""
    return native.refusal(functions)


def normal(
    seed: int | Tensor, index: Tensor, shape: tuple[int, ...], draw: int | Tensor, cpu: str | None = None
) -> Tensor:
    """`reference.normal` in float32, [B, *shape] of index [B]: hardly a number is another, and then the next one; with
    the same bits in any batch."""
    out = torch.empty(len(index), *shape, dtype=torch.float32, device="cpu")
    index, *numbers = words(Draw(seed, index, draw))
    sizes = len(index), math.prod(shape), torch.get_num_threads()
    functions(cpu)(out.data_ptr(), index.data_ptr(), *numbers, *sizes)
    return out


def words(draw: Draw) -> tuple[Tensor, int, int]:
    """Samples [B], and seed and number of a draw on a CPU as C takes them."""
    seed, number = (philox.number(each) for each in (draw.seed, draw.draw))
    return draw.index.to(torch.int64).contiguous(), seed & (2**64 - 1), number & (2**32 - 1)
