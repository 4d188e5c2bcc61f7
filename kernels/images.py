"""From the data range to pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import load_state, offsets, pixel_value, store_state, tile
from cmfast.kernels.launch import CONTIGUOUS, dense, layout, plan


def pixels_of(*batches: Tensor) -> tuple[Tensor, bool]:
    """Room for the pixels [B, ..., C] of dense batches [B, C, ...], and whether a kernel must reorder: it need not
    where all have their channels last, or one channel."""
    x = batches[0]
    out = torch.empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=torch.uint8, device=x.device)
    ordered = x.shape[1] == 1 or x.numel() == x.shape[0] * x.shape[1] or all(layout(b) != CONTIGUOUS for b in batches)
    return out, not ordered


@triton.jit(do_not_specialize=["blocks"])
def _to_uint8_fwd_kernel(
    out_ptr, x_ptr, planes, blocks, pixels,
    NEAREST: tl.constexpr, OUT_LAST: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """127.5 (x + 1), clamped to [0, 255]; cut off, or rounded if NEAREST
    out_ptr  [B, N]  uint8, out    x_ptr  [B, N]  state dtype
    Grid (rows * planes * blocks,). Traffic: s + 1 bytes per element. Computes in float32.
    """
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    value = load_state(x_ptr, offsets(row, plane, pixel, planes, pixels, STATE_LAST), mask)
    store_state(out_ptr, offsets(row, plane, pixel, planes, pixels, OUT_LAST), pixel_value(value, NEAREST), mask)


def to_uint8_fwd(x: Tensor, *, rounding: str) -> Tensor:
    x = dense(x)
    out, mixed = pixels_of(x)
    plan(x, None, planes=mixed).run(_to_uint8_fwd_kernel, out, x, NEAREST=rounding == "nearest", OUT_LAST=mixed)
    return out
