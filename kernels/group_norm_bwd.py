"""Group normalisation with all that stands around it: the backward pass.

With xhat = (t - mean) rstd, z = xhat w (1 + s) + b (1 + s) + h and dz = dy dropout silu'(z): sums over the pixels of
a channel S1 = sum dz and S2 = sum dz xhat give the gradients of weight, bias, scale and shift, and their sums over a
group of m elements, A = sum w (1 + s) S1 and B = sum w (1 + s) S2, that of t:

    dt = rstd (w (1 + s) dz - A / m - xhat B / m) + the gradient that t has from elsewhere

xhat, z and the dropout mask are made again, from t, mean and rstd.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import load_state, store_state
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
    sigmoid_and_rest,
    slab_tile,
    tile_jit,
    tile_offsets,
)
from cmfast.kernels.launch import dense, empty, outputs


@triton.jit
def _load_moments(moments_ptr, x_bias_ptr, row, channel, live, channels, X_BIAS: tl.constexpr, GROUP: tl.constexpr):
    """mean - x_bias and rstd of each channel."""
    moments = moments_ptr + (row * (channels // GROUP) + channel // GROUP) * 2
    mean, rstd = tl.load(moments, mask=live, other=0.0), tl.load(moments + 1, mask=live, other=0.0)
    if X_BIAS:
        mean -= load_state(x_bias_ptr, channel, live)
    return mean, rstd


@triton.jit
def _load_slopes(
    grad_ptr, x_ptr, at, mask, mean, rstd, gain, offset, index_ptr, row, pixel, first, channels,
    seed, seed_high, draw, least, keep_scale,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """dz and xhat of a tile; 0 where there is no element."""
    xhat = tl.where(mask, (load_state(x_ptr, at, mask) - mean[None, :]) * rstd[None, :], 0.0)
    dz = load_state(grad_ptr, at, mask)
    if DROPOUT:
        dz *= kept(
            index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
            SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
        )
    if SILU:
        z = xhat * gain[None, :] + offset[None, :]
        s, rest = sigmoid_and_rest(z)
        dz *= s * (1.0 + z * rest)
    return dz, xhat


@triton.jit
def _store_parameter_grads(
    grad_scale_ptr, grad_shift_ptr, per_sample_ptr, weight_ptr, bias_ptr, scale_ptr, row, channel, live, channels,
    scale_stride, s_1, s_2, FILM: tl.constexpr,
):
    """ds = w S2 + b S1, dh = S1; and a sample's part of dw = (1 + s) S2 and db = (1 + s) S1."""
    at = row * channels + channel
    factor = tl.zeros_like(s_1) + 1.0
    if FILM:
        # Read again: kept, it would take registers of every thread all along.
        factor += load_state(scale_ptr, row * scale_stride + channel, live)
        weight, bias = load_state(weight_ptr, channel, live), load_state(bias_ptr, channel, live)
        store_state(grad_scale_ptr, at, weight * s_2 + bias * s_1, live)
        store_state(grad_shift_ptr, at, s_1, live)
    tl.store(per_sample_ptr + (at + row * channels), factor * s_2, mask=live)
    tl.store(per_sample_ptr + (at + row * channels + channels), factor * s_1, mask=live)


@triton.jit
def _store_grad(
    grad_x_ptr, grad_total_ptr, at, mask, dz, xhat, rstd, gain, mean_1, mean_2, TOTAL: tl.constexpr
):
    """dt of a tile from A / m and B / m of its channels; returned before it is rounded, 0 where there is no element."""
    grad = rstd[None, :] * (gain[None, :] * dz - mean_1[None, :] - xhat * mean_2[None, :])
    if TOTAL:
        grad += load_state(grad_total_ptr, at, mask)
    store_state(grad_x_ptr, at, grad, mask)
    return tl.where(mask, grad, 0.0)


@tile_jit
def _group_norm_whole_bwd_kernel(
    grad_x_ptr, grad_scale_ptr, grad_shift_ptr, per_sample_ptr, x_bias_partial_ptr, grad_ptr, grad_total_ptr, x_ptr,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, index_ptr,
    scale_stride, shift_stride, seed, seed_high, draw, least, keep_scale,
    X_BIAS: tl.constexpr, TOTAL: tl.constexpr, NEED_X_BIAS: tl.constexpr,
    FILM: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
    C: tl.constexpr, PIXELS: tl.constexpr,
    SLAB: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """All gradients of a slab: the formulas at the top of this file
    grad_x_ptr, grad_ptr, x_ptr     [B, C, HW]  dt out, dy, x or t        moments_ptr         [B, G, 2]  float32
    grad_total_ptr                  [B, C, HW]  if TOTAL                  x_bias_ptr          [C]  if X_BIAS
    grad_scale_ptr, grad_shift_ptr  [B, C]     out if FILM                weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    per_sample_ptr                  [B, 2, C]  float32, out: dw, db       index_ptr, seed, draw, ...: as forward
    x_bias_partial_ptr              [B, 1, C]  float32, out if NEED_X_BIAS
    Grid (B * slabs,). Traffic: 3m bytes per element, 4m if TOTAL.
    """
    row, first, live, start, at = slab_tile(C, PIXELS, SLAB, ROWS, CHANNELS, LAST)
    channel, pixel = first + tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    mask = (pixel < PIXELS)[:, None] & live[None, :]
    mean, rstd = _load_moments(moments_ptr, x_bias_ptr, row, channel, live, C, X_BIAS, GROUP)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
    )
    dz, xhat = _load_slopes(
        grad_ptr + start, x_ptr + start, at, mask, mean, rstd, gain, offset, index_ptr, row, pixel, first, C,
        seed, seed_high, draw, least, keep_scale, SILU, DROPOUT, SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
    )
    s_1, s_2 = tl.sum(dz, 0), tl.sum(dz * xhat, 0)
    count = tl.full((), PIXELS * GROUP, tl.float32)
    mean_1 = of_channels(group_means(gain * s_1, count, GROUP, GROUPS, CHANNELS), GROUP, GROUPS, CHANNELS)
    mean_2 = of_channels(group_means(gain * s_2, count, GROUP, GROUPS, CHANNELS), GROUP, GROUPS, CHANNELS)
    grad = _store_grad(
        grad_x_ptr + start, grad_total_ptr + start, at, mask, dz, xhat, rstd, gain, mean_1, mean_2, TOTAL
    )
    if NEED_X_BIAS:
        tl.store(x_bias_partial_ptr + row * C + channel, tl.sum(grad, 0), mask=live)
    _store_parameter_grads(
        grad_scale_ptr, grad_shift_ptr, per_sample_ptr, weight_ptr, bias_ptr, scale_ptr, row, channel, live, C,
        scale_stride, s_1, s_2, FILM,
    )


@tile_jit
def _group_norm_sums_kernel(
    partial_ptr, grad_ptr, x_ptr, moments_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, index_ptr,
    tiles, parts, channels, pixels, scale_stride, shift_stride, seed, seed_high, draw, least, keep_scale,
    X_BIAS: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """S1 and S2 of each channel in a part of the map
    partial_ptr  [B, parts, 2, C]  float32, out    grad_ptr, x_ptr  [B, C, HW]  dy, and x or t; the others as above
    Grid (B * parts * tiles,). Traffic: 2m bytes per element.
    """
    row, part, start, first = part_tile(tiles, parts, ROWS, STEPS, CHANNELS)
    channel = first + tl.arange(0, CHANNELS)
    live = channel < channels
    mean, rstd = _load_moments(moments_ptr, x_bias_ptr, row, channel, live, channels, X_BIAS, GROUP)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
    )
    sums_1, sums_2 = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in tl.range(STEPS, num_stages=3):
        pixel = start + step * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & live[None, :]
        at = tile_offsets(row, pixel, channel, channels, pixels, LAST)
        dz, xhat = _load_slopes(
            grad_ptr, x_ptr, at, mask, mean, rstd, gain, offset, index_ptr, row, pixel, first, channels,
            seed, seed_high, draw, least, keep_scale, SILU, DROPOUT, SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
        )
        sums_1 += dz
        sums_2 += dz * xhat
    to = (row * parts + part) * 2 * channels + channel
    tl.store(partial_ptr + to, tl.sum(sums_1, 0), mask=live)
    tl.store(partial_ptr + (to + channels), tl.sum(sums_2, 0), mask=live)


@fold_jit
def _group_norm_fold_bwd_kernel(
    means_ptr, grad_scale_ptr, grad_shift_ptr, per_sample_ptr, partial_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    groups, parts, channels, pixels, scale_stride, shift_stride,
    FILM: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """A / m and B / m of a group, and the gradients of the parameters
    means_ptr                       [B, G, 2]  float32, out    per_sample_ptr  [B, 2, C]         float32, out: dw, db
    grad_scale_ptr, grad_shift_ptr  [B, C]     out if FILM     partial_ptr     [B, parts, 2, C]  float32: S1, S2
    Grid (B * groups,). Traffic: 8 bytes for each part and channel.
    """
    program = tl.program_id(0)
    row, group = (program // groups).to(tl.int64), (program % groups).to(tl.int64)
    k, part = tl.arange(0, CHANNELS), tl.arange(0, PARTS)
    at = (row * parts + part)[:, None] * 2 * channels + group * GROUP
    total_1, total_2 = 0.0, 0.0
    for start in range(0, GROUP, CHANNELS):
        live, channel = start + k < GROUP, group * GROUP + start + k
        mask = (part < parts)[:, None] & live[None, :]
        s_1 = tl.sum(load_state(partial_ptr, at + (start + k)[None, :], mask), 0)
        s_2 = tl.sum(load_state(partial_ptr, at + channels + (start + k)[None, :], mask), 0)
        gain, _ = load_affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
        )
        total_1 += tl.sum(gain * s_1)
        total_2 += tl.sum(gain * s_2)
        _store_parameter_grads(
            grad_scale_ptr, grad_shift_ptr, per_sample_ptr, weight_ptr, bias_ptr, scale_ptr, row, channel, live,
            channels, scale_stride, s_1, s_2, FILM,
        )
    count = tl.cast(tl.cast(pixels, tl.int64) * GROUP, tl.float32)
    means = means_ptr + (row * groups + group) * 2
    tl.store(means, tl.div_rn(total_1, count))
    tl.store(means + 1, tl.div_rn(total_2, count))


@tile_jit
def _group_norm_apply_bwd_kernel(
    grad_x_ptr, x_bias_partial_ptr, grad_ptr, grad_total_ptr, x_ptr, means_ptr,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, index_ptr,
    tiles, parts, channels, pixels, scale_stride, shift_stride, seed, seed_high, draw, least, keep_scale,
    X_BIAS: tl.constexpr, TOTAL: tl.constexpr, NEED_X_BIAS: tl.constexpr,
    FILM: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, GROUP: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """dt from A / m and B / m
    grad_x_ptr          [B, C, HW]  out                                   means_ptr  [B, G, 2]  float32: A / m, B / m
    x_bias_partial_ptr  [B, parts, C]  float32, out if NEED_X_BIAS        the others as above
    Grid (B * parts * tiles,). Traffic: 3m bytes per element, 4m if TOTAL.
    """
    row, part, start, first = part_tile(tiles, parts, ROWS, STEPS, CHANNELS)
    channel = first + tl.arange(0, CHANNELS)
    live = channel < channels
    mean, rstd = _load_moments(moments_ptr, x_bias_ptr, row, channel, live, channels, X_BIAS, GROUP)
    mean_1, mean_2 = _load_moments(means_ptr, x_bias_ptr, row, channel, live, channels, False, GROUP)
    gain, offset = load_affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM
    )
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in tl.range(STEPS, num_stages=3):
        pixel = start + step * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & live[None, :]
        at = tile_offsets(row, pixel, channel, channels, pixels, LAST)
        dz, xhat = _load_slopes(
            grad_ptr, x_ptr, at, mask, mean, rstd, gain, offset, index_ptr, row, pixel, first, channels,
            seed, seed_high, draw, least, keep_scale, SILU, DROPOUT, SEED_TENSOR, DRAW_TENSOR, ROWS, CHANNELS,
        )
        grad = _store_grad(grad_x_ptr, grad_total_ptr, at, mask, dz, xhat, rstd, gain, mean_1, mean_2, TOTAL)
        if NEED_X_BIAS:
            sums += grad
    if NEED_X_BIAS:
        tl.store(x_bias_partial_ptr + (row * parts + part) * channels + channel, tl.sum(sums, 0), mask=live)


def group_norm_silu_bwd(
    grad: Tensor,
    grad_total: Tensor | None,
    moments: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    x_bias: Tensor | None,
    draw: Any,
    *,
    num_groups: int,
    silu: bool,
    dropout: float,
    need_x_bias: bool,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of t, weight, bias, scale, shift and x_bias.

    x: what was normalised: t where it was stored, and then no x_bias; moments [B, G, 2]: mean and rstd of its groups.
    """
    x = dense(x)
    grad = dense(grad, x)
    batch, channels = x.shape[:2]
    grad_x = empty(x)
    grad_scale, grad_shift = (None if t is None else t.new_empty(batch, channels) for t in (scale, shift))
    if not x.numel():
        zeros = (t if t is None else torch.zeros_like(t) for t in (weight, bias, scale, shift))
        return grad_x, *zeros, room(x, channels).zero_() if need_x_bias else None
    parameters, options = beside(x, weight, bias, scale, shift, draw, dropout, silu)
    options["X_BIAS"] = x_bias is not None
    known = moments, *outputs(x, None if x_bias is None else x_bias.contiguous()), *parameters
    total = None if grad_total is None else dense(grad_total, x)
    tiles = cut(x, num_groups, True, draw is not None)
    per_sample = room(x, batch, 2, channels)
    x_bias_partial = room(x, batch, tiles.parts, channels) if need_x_bias else None
    last = {"TOTAL": total is not None, "NEED_X_BIAS": need_x_bias}
    small = *outputs(x, grad_scale, grad_shift), per_sample
    spare = outputs(x, x_bias_partial)
    if tiles.slab:
        tiles.run(
            _group_norm_whole_bwd_kernel, grad_x, *small, *spare, grad, *outputs(x, total), x, *known, **options, **last
        )
    else:
        partial, means = room(x, batch, tiles.parts, 2, channels), room(x, batch, num_groups, 2)
        tiles.run(_group_norm_sums_kernel, partial, grad, x, *known, **options)
        tiles.fold(
            _group_norm_fold_bwd_kernel, means, *small, partial, *parameters[:4],
            **{key: options[key] for key in ("scale_stride", "shift_stride", "FILM")},
        )
        tiles.run(
            _group_norm_apply_bwd_kernel, grad_x, *spare, grad, *outputs(x, total), x, means, *known, **options, **last
        )
    grad_weight, grad_bias = per_sample.sum(0).unbind(0)
    grad_x_bias = None if x_bias_partial is None else x_bias_partial.sum((0, 1))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_scale, grad_shift, grad_x_bias
