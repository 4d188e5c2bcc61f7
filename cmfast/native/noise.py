"""Normal numbers and noise levels from counters on a CPU: by the functions of noise.c."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from cmfast import native
from cmfast.reference import Draw, Grid, Levels, philox
from cmfast.reference.draw import level_draw

#: Levels from which on all threads draw them.
LEAST = 1 << 10


class _Functions:
    """Those of noise.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in noise.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
        draw = pointer, ctypes.c_ulong, ctypes.c_uint

        self.normal = function("noise_normal", pointer, *draw, *[number] * 2, flag)
        levels = *[pointer] * 2, *[number] * 2, *[real] * 5
        self.levels = function("noise_levels", *[pointer] * 3, *draw, *levels, number, flag)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)
#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def normal(
    seed: int | Tensor, index: Tensor, shape: tuple[int, ...], draw: int | Tensor, cpu: str | None = None
) -> Tensor:
    """`reference.normal` in float32, [B, *shape] of index [B]: hardly a number is another, and then the next one; with
    the same bits in any batch."""
    out = torch.empty(len(index), *shape, dtype=torch.float32, device="cpu")
    index, *numbers = words(Draw(seed, index, draw))
    sizes = len(index), math.prod(shape), torch.get_num_threads()
    functions(cpu).normal(out.data_ptr(), index.data_ptr(), *numbers, *sizes)
    return out


def levels(draw: Draw, of: Levels, cpu: str | None = None) -> tuple[Tensor, ...]:
    """`reference.draw_levels` in float32 [B]: the same of a table, which is float32, and others within rounding."""
    table = thresholds = None
    intervals, stride, mean, std, below = 1, 1, 0.0, 0.0, (0.0, 0.0, 0.0)
    if isinstance(of, Grid):
        table, thresholds = of.table.contiguous(), of.thresholds
        thresholds = None if thresholds is None else thresholds.contiguous()
        intervals, stride, count = of.intervals, of.stride, 1 + of.stride
    else:
        mean, std, below, count = of.mean, of.std, of.below or below, 1 if of.below is None else 2
    index, *numbers = words(draw._replace(draw=level_draw(draw)))
    made = tuple(torch.empty(len(index), dtype=torch.float32, device="cpu") for _ in range(count))
    functions(cpu).levels(
        *(made[i].data_ptr() if i < count else None for i in range(3)), index.data_ptr(), *numbers,
        None if table is None else table.data_ptr(), None if thresholds is None else thresholds.data_ptr(),
        intervals, stride, mean, std, *below, len(index), native.threads(len(index), LEAST),
    )  # fmt: skip
    return made


def words(draw: Draw) -> tuple[Tensor, int, int]:
    """Samples [B], and seed and number of a draw on a CPU as C takes them."""
    seed, number = (philox.number(each) for each in (draw.seed, draw.draw))
    return draw.index.to(torch.int64).contiguous(), seed & (2**64 - 1), number & (2**32 - 1)
