"""Group normalisation with a bias and a sum before it, scale and shift, SiLU and dropout after it: the forward pass.

Statistics are float32, of differences to a mean: first to one that is good to rounding, whose rest is then taken out.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import as_float32, load_state, store_state
from cmfast.kernels.group_norm_tiles import (
    beside,
    cut,
    fold_jit,
    group_means,
    kept,
    load_affine,
    of_channels,
    part_tile,
    room,
    sigmoid,
    slab_tile,
    tile_jit,
    tile_offsets,
)
from cmfast.kernels.launch import dense, empty, outputs


@triton.jit
def _load_total(total_ptr, x_ptr, residual_ptr, x_bias, at, mask, X_BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """x and what is added to it; with a residual the sum is rounded and stored. 0 where there is no element."""
    value = load_state(x_ptr, at, mask)
    if X_BIAS:
        value = tl.where(mask, value + x_bias[None, :], 0.0)
    if RESIDUAL:
        rounded = (value + load_state(residual_ptr, at, mask)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _finish(
    y_ptr, at, mask, z, index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """y of a tile: SiLU and dropout of z."""
    if SILU:
        z = z * sigmoid(z)
    if DROPOUT:
        z *= kept(
            index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
            SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
        )
    store_state(y_ptr, at, z, mask)


@tile_jit
def _group_norm_whole_kernel(
    y_ptr, total_ptr, moments_ptr, x_ptr, residual_ptr,
    x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, index_ptr,
    eps, scale_stride, shift_stride, seed, seed_high, draw, least, keep_scale,
    X_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, PIXELS: tl.constexpr,
    SLAB: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """y = dropout(silu(z)), z = ((t - mean) rstd w + b) (1 + s) + h, t = x + x_bias + residual       Wu & He 2018
    y_ptr, total_ptr, x_ptr, residual_ptr  [B, C, HW]  or channels_last if LAST; y, t out, t if RESIDUAL
    moments_ptr  [B, G, 2]  float32, out: mean, rstd    scale_ptr, shift_ptr  [B, C]  if FILM, rows a stride apart
    x_bias_ptr   [C]  if X_BIAS                         weight_ptr, bias_ptr  [C]
    index_ptr, seed, draw  what dropout draws from      least, keep_scale     of dropout
    Grid (B * slabs,), a slab being SLAB channels of all pixels. Traffic: 2m bytes per element, 4m if RESIDUAL.
    """
    row, first, live, start, at = slab_tile(C, PIXELS, SLAB, ROWS, CHANNELS, LAST)
    channel, pixel = first + tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    mask = (pixel < PIXELS)[:, None] & live[None, :]
    x_bias = load_state(x_bias_ptr, channel, live) if X_BIAS else tl.zeros((CHANNELS,), tl.float32)
    value = _load_total(total_ptr + start, x_ptr + start, residual_ptr + start, x_bias, at, mask, X_BIAS, RESIDUAL)
    count = tl.full((), PIXELS * GROUP, tl.float32)
    center = of_channels(group_means(tl.sum(value, 0), count, GROUP, GROUPS, CHANNELS), GROUP, GROUPS, CHANNELS)
    value = tl.where(mask, value - center[None, :], 0.0)
    rest = of_channels(group_means(tl.sum(value, 0), count, GROUP, GROUPS, CHANNELS), GROUP, GROUPS, CHANNELS)
    value -= rest[None, :]
    squares = tl.sum(tl.where(mask, value * value, 0.0), 0)
    variance = group_means(squares, count, GROUP, GROUPS, CHANNELS)
    rstd = of_channels(tl.div_rn(1.0, tl.sqrt_rn(variance + as_float32(eps))), GROUP, GROUPS, CHANNELS)
    moments = moments_ptr + (row * (C // GROUP) + channel // GROUP) * 2
    leads = live & (tl.arange(0, CHANNELS) % GROUP == 0)
    tl.store(moments, center + rest, mask=leads)
    tl.store(moments + 1, rstd, mask=leads)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
    )
    z = value * (rstd * gain)[None, :] + offset[None, :]
    _finish(
        y_ptr + start, at, mask, z, index_ptr, row, pixel, first, C, seed, seed_high, draw, least, keep_scale,
        SILU, DROPOUT, SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
    )


@triton.jit
def _group_norm_statistics_kernel(
    partial_ptr, total_ptr, x_ptr, residual_ptr, x_bias_ptr, tiles, parts, channels, pixels,
    X_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """Mean and sum of squared differences to it of t, for each channel in a part of the map
    partial_ptr  [B, parts, 2, C]  float32, out     total_ptr   [B, C, HW]  t = x + x_bias + residual, out if RESIDUAL
    x_ptr, residual_ptr  [B, C, HW]                 x_bias_ptr  [C]  if X_BIAS
    Grid (B * parts * tiles,). Traffic: m bytes per element, 3m if RESIDUAL.
    """
    row, part, start, first = part_tile(tiles, parts, ROWS, STEPS, CHANNELS)
    channel = first + tl.arange(0, CHANNELS)
    live = channel < channels
    x_bias = load_state(x_bias_ptr, channel, live) if X_BIAS else tl.zeros((CHANNELS,), tl.float32)
    # Differences are to the mean of the first tile, whose pixels there are always some of.
    pixel = start + tl.arange(0, ROWS)
    mask = (pixel < pixels)[:, None] & live[None, :]
    at = tile_offsets(row, pixel, channel, channels, pixels, LAST)
    value = _load_total(total_ptr, x_ptr, residual_ptr, x_bias, at, mask, X_BIAS, RESIDUAL)
    # By one division for all channels. Any number near the mean serves as center.
    center = tl.sum(value, 0) * tl.div_rn(1.0, tl.minimum(pixels - start, ROWS).to(tl.float32))
    value = tl.where(mask, value - center[None, :], 0.0)
    sums, squares = value, value * value
    for step in tl.range(1, STEPS, num_stages=3):
        pixel = start + step * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & live[None, :]
        at = tile_offsets(row, pixel, channel, channels, pixels, LAST)
        value = _load_total(total_ptr, x_ptr, residual_ptr, x_bias, at, mask, X_BIAS, RESIDUAL)
        value = tl.where(mask, value - center[None, :], 0.0)
        sums += value
        squares += value * value
    total = tl.sum(sums, 0)
    mean = total * tl.div_rn(1.0, tl.minimum(pixels - start, ROWS * STEPS).to(tl.float32))
    to = (row * parts + part) * 2 * channels + channel
    tl.store(partial_ptr + to, center + mean, mask=live)
    tl.store(partial_ptr + (to + channels), tl.sum(squares, 0) - mean * total, mask=live)


@fold_jit
def _group_norm_fold_kernel(
    affine_ptr, moments_ptr, partial_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    groups, parts, channels, pixels, eps, scale_stride, shift_stride,
    X_BIAS: tl.constexpr, FILM: tl.constexpr, GROUP: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """m = mean - x_bias, a = rstd w (1 + s), o = b (1 + s) + h, so that z = (x - m) a + o; of all parts and channels of
    a group: mean, and variance by Chan et al. 1979
    affine_ptr   [B, 3, C]         float32, out: m, a, o    moments_ptr           [B, G, 2]  float32, out: mean, rstd
    partial_ptr  [B, parts, 2, C]  float32                  scale_ptr, shift_ptr  [B, C]     if FILM
    x_bias_ptr   [C]  if X_BIAS: what partial_ptr has not   weight_ptr, bias_ptr  [C]
    Grid (B * groups,). Traffic: 8 bytes for each part and channel.
    """
    program = tl.program_id(0)
    row, group = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    k, part = tl.arange(0, CHANNELS), tl.arange(0, PARTS)
    of_part = tl.where(part < parts, tl.minimum(pixels - part * PART, PART), 0).to(tl.float32)[:, None]
    at = (row * parts + part)[:, None] * 2 * channels + group * GROUP
    center, rest, squares = 0.0, 0.0, 0.0
    for start in range(0, GROUP, CHANNELS):
        mask = (part < parts)[:, None] & (start + k < GROUP)[None, :]
        mean = load_state(partial_ptr, at + (start + k)[None, :], mask)
        if X_BIAS:
            mean += load_state(x_bias_ptr, group * GROUP + start + k, start + k < GROUP)[None, :]
        count = tl.where(mask, of_part, 0.0)
        if start == 0:
            center = tl.div_rn(tl.sum(mean * count), tl.sum(count))
        mean -= center
        rest += tl.sum(mean * count)
        squares += tl.sum(load_state(partial_ptr, at + channels + (start + k)[None, :], mask) + mean * mean * count)
    total = tl.cast(tl.cast(pixels, tl.int64) * GROUP, tl.float32)
    mean = tl.div_rn(rest, total)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares - mean * rest, total) + as_float32(eps)))
    moments = moments_ptr + (row * groups + group) * 2
    tl.store(moments, center + mean)
    tl.store(moments + 1, rstd)
    for start in range(0, GROUP, CHANNELS):
        live, channel = start + k < GROUP, group * GROUP + start + k
        gain, offset = load_affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
        )
        x_bias = load_state(x_bias_ptr, channel, live) if X_BIAS else tl.zeros((CHANNELS,), tl.float32)
        to = row * 3 * channels + channel
        tl.store(affine_ptr + to, center + mean - x_bias, mask=live)
        tl.store(affine_ptr + (to + channels), rstd * gain, mask=live)
        tl.store(affine_ptr + (to + channels + channels), offset, mask=live)


@tile_jit
def _group_norm_apply_kernel(
    y_ptr, x_ptr, affine_ptr, index_ptr, tiles, parts, channels, pixels, seed, seed_high, draw, least, keep_scale,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    GROUP: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """y = dropout(silu(z)), z = (x - m) a + o
    y_ptr, x_ptr  [B, C, HW]  or channels_last if LAST; y out      affine_ptr  [B, 3, C]  float32: m, a, o
    index_ptr, seed, draw  what dropout draws from                 least, keep_scale      of dropout
    Grid (B * parts * tiles,). Traffic: 2m bytes per element.
    """
    row, _, start, first = part_tile(tiles, parts, ROWS, STEPS, CHANNELS)
    channel = first + tl.arange(0, CHANNELS)
    live = channel < channels
    of = row * 3 * channels + channel
    mean, gain = load_state(affine_ptr, of, live), load_state(affine_ptr, of + channels, live)
    offset = load_state(affine_ptr, of + channels + channels, live)
    for step in tl.range(STEPS, num_stages=3):
        pixel = start + step * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & live[None, :]
        at = tile_offsets(row, pixel, channel, channels, pixels, LAST)
        z = (load_state(x_ptr, at, mask) - mean[None, :]) * gain[None, :] + offset[None, :]
        _finish(
            y_ptr, at, mask, z, index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
            SILU, DROPOUT, SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
        )


def group_norm_silu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    draw: Any,
    *,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, ...]:
    """y, the sum where there is a residual, and mean and rstd [B, G, 2] for the backward pass."""
    x = dense(x)
    residual = None if residual is None else dense(residual, x)
    y, total = empty(x), None if residual is None else empty(x)
    moments = room(x, x.shape[0], num_groups, 2)
    results = (y, moments) if total is None else (y, total, moments)
    if not x.numel():
        return results
    parameters, options = beside(x, weight, bias, scale, shift, draw, dropout, silu)
    *affine, index = parameters
    added = outputs(x, residual, None if x_bias is None else x_bias.contiguous())
    tiles = cut(x, num_groups, False, draw is not None)
    if tiles.slab:
        tiles.run(
            _group_norm_whole_kernel, y, *outputs(x, total), moments, x, *added, *parameters,
            eps=float(eps), **options, X_BIAS=x_bias is not None, RESIDUAL=residual is not None,
        )
        return results
    film = {key: options.pop(key) for key in ("scale_stride", "shift_stride", "FILM")}
    partial, coefficients = room(x, x.shape[0], tiles.parts, 2, x.shape[1]), room(x, x.shape[0], 3, x.shape[1])
    # A bias is part of a sum that is stored; alone it moves the means, which is the fold's to do.
    early, late = (x_bias is not None and (residual is None) == alone for alone in (False, True))
    tiles.run(
        _group_norm_statistics_kernel, partial, *outputs(x, total), x, *added,
        X_BIAS=early, RESIDUAL=residual is not None,
    )
    tiles.fold(
        _group_norm_fold_kernel, coefficients, moments, partial, added[1], *affine,
        eps=float(eps), **film, X_BIAS=late,
    )
    tiles.run(_group_norm_apply_kernel, y, x if total is None else total, coefficients, index, **options)
    return results
