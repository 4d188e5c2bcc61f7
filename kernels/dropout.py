"""Dropout of a batch from counters: the masks of `cmfast.reference.dropout_mask`, made where they are used."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import load_state, store_state
from cmfast.kernels.group_norm_tiles import dropping, kept
from cmfast.kernels.launch import CONTIGUOUS, dense, empty, launch, layout, power_of_two
from cmfast.kernels.normal import _counter

#: Elements of a program, and its channels: four share a counter, and side by side in memory there may be more.
BLOCK = 1024
PLANES, LAST = 4, 64

varying_jit = triton.jit(do_not_specialize=["blocks", "seed", "seed_high", "draw", "least"])


@varying_jit
def _dropout_fwd_kernel(
    y_ptr, x_ptr, index_ptr, parts, blocks, channels, pixels, seed, seed_high, draw, least, keep_scale,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """y = x / (1 - p) where a word of Philox4x32-10 is `least` or more, else 0         Srivastava et al. 2014
    y_ptr, x_ptr  [B, C, P]  state dtype, pixels before channels if STATE_LAST
    index_ptr     [B]        integers    least, keep_scale  of p, the smallest word that is kept and 1 / (1 - p)
    Grid (rows * blocks * parts,): parts of the channels, blocks of the pixels. Traffic: 2s bytes per element.
    """
    program = tl.program_id(0)
    first = (program % parts).to(tl.int64) * CHANNELS
    block = (program // parts % blocks).to(tl.int64)
    row = (program // parts // blocks).to(tl.int64)
    pixel = block * ROWS + tl.arange(0, ROWS)
    channel = first + tl.arange(0, CHANNELS)
    base = row * channels * pixels
    if STATE_LAST:
        at = base + pixel[:, None] * channels + channel[None, :]
    else:
        at = base + channel[None, :] * pixels + pixel[:, None]
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    factor = kept(
        index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
        SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
    )
    store_state(y_ptr, at, load_state(x_ptr, at, mask) * factor, mask)


def dropout_fwd(x: Tensor, p: float, draw: Any) -> Tensor:
    """Of the gradient of y, this is the gradient of x."""
    x = dense(x)
    y = empty(x)
    batch, channels = x.shape[:2]
    pixels = x.numel() // max(batch * channels, 1)
    last = layout(x) != CONTIGUOUS
    count = min(LAST, max(PLANES, power_of_two(channels))) if last else PLANES
    rows = BLOCK // count
    parts, blocks = -(-channels // count), -(-pixels // rows)
    if x.numel():
        launch(
            _dropout_fwd_kernel, batch * parts * blocks, y, x, draw.index.contiguous(), parts, blocks, channels, pixels,
            **_counter(draw.seed, draw.draw), **dropping(p), STATE_LAST=last, ROWS=rows, CHANNELS=count,
        )
    return y
