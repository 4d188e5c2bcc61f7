"""Averages of parameters: all of them, and a copy in another dtype, from one read of the parameters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import lerp, load_state, store_state
from cmfast.kernels.launch import BLOCK
from cmfast.kernels.pointers import piece, tables, tensor_at


@triton.jit
def average(
    row_ptr, rates_ptr, at, mask, parameter,
    AVERAGE: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Move K averages, whose columns start at FIRST, towards a parameter."""
    for k in tl.static_range(K):
        average_ptr = tensor_at(row_ptr, FIRST + k, AVERAGE, ALIGNED)
        # In the dtype of the rates: of a rate near 1, float32 has lost what matters.
        weight = (1.0 - tl.load(rates_ptr + k)).to(tl.float32)
        value = load_state(average_ptr, at, mask)
        store_state(average_ptr, at, lerp(value, parameter, weight), mask)


@triton.jit
def _ema_update_kernel(
    table_ptr, owners_ptr, rates_ptr,
    PARAMETER: tl.constexpr, AVERAGE: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr, K: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    """a_k <- a_k + (1 - rate_k) (p - a_k); the copy becomes p
    table_ptr   [pieces, 2 + columns]  int64: p, a_0 .. a_{K-1}, and the copy if HAS_COPY
    owners_ptr  [programs]  int32      rates_ptr  [K]  float64 or float32
    Grid (programs,). Traffic: p + 2 K a bytes per element, + the copy's. Computes in float32.
    """
    row_ptr, start, count = piece(table_ptr, owners_ptr, 1 + K + HAS_COPY, ALIGNED, BLOCK)
    at = start + tl.arange(0, BLOCK)
    mask = at < count
    parameter = load_state(tensor_at(row_ptr, 0, PARAMETER, ALIGNED), at, mask)
    average(row_ptr, rates_ptr, at, mask, parameter, AVERAGE, 1, K, ALIGNED)
    if HAS_COPY:
        store_state(tensor_at(row_ptr, 1 + K, COPY, ALIGNED), at, parameter, mask)


def ema_update_(
    parameters: list[Tensor], averages: list[list[Tensor]], rates: Tensor, *, copies: list[Tensor] | None = None
) -> None:
    """Of dense tensors that lie alike in memory; the averages of one parameter have one dtype."""
    lists = [parameters, *averages, *([copies] if copies is not None else [])]
    for table in tables(lists, BLOCK):
        table.run(
            _ema_update_kernel, rates, PARAMETER=table.type(0), AVERAGE=table.type(1 if averages else 0),
            COPY=table.type(-1), HAS_COPY=copies is not None, K=len(averages), BLOCK=BLOCK,
        )  # fmt: skip
