"""Steps of optimizers and averages on a CPU, in one pass over lists of tensors: by the function of optimizer.c."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cmfast import native

#: Numbers in all tensors from which on all threads go through them.
LEAST = 1 << 15

Tensors = Sequence[Tensor]


class Step(ctypes.Structure):
    """The `step` of optimizer.c."""

    _fields_ = [
        *((name, ctypes.c_double) for name in "divisor sign l2 decay beta1 beta2 size slope eps".split()),
        ("adaptive", ctypes.c_int),
    ]


@functools.cache
def functions(cpu: str | None = None) -> Any:
    """That of optimizer.c for a CPU, with arguments as there. Raises: Unavailable: it cannot be had here."""
    pointer, number = ctypes.c_void_p, ctypes.c_long
    kinds = number, *[pointer] * 3, number, pointer, ctypes.c_int
    return native.function(native.library(cpu), "optimizer_pass", *kinds)


#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def go_through(
    parameters: Tensors,
    averages: Sequence[Tensors],
    weights: Sequence[float],
    step: Step | None = None,
    gradients: Tensors = (),
    exp_avgs: Tensors = (),
    exp_avg_sqs: Tensors = (),
    cpu: str | None = None,
) -> None:
    """A step of the parameters, if there is one, and average + weight (parameter - average) for each of the averages.

    All are float32, and those of a position dense and in one order of memory.
    """
    counts = array.array("l", [x.numel() for x in parameters])
    lists = [parameters, gradients, exp_avgs, exp_avg_sqs] if step else [parameters] * 4
    pointers = array.array("L", [x.data_ptr() for tensors in (*lists, *averages) for x in tensors])
    moves = array.array("d", weights)
    addresses = [each.buffer_info()[0] for each in (counts, pointers, moves)]
    threads = native.threads(sum(counts), LEAST)
    by = None if step is None else ctypes.addressof(step)
    functions(cpu)(len(counts), *addresses[:2], by, len(moves), addresses[2], threads)
