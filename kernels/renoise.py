"""A step of multistep consistency sampling, with noise that is given or drawn in the kernel.

`renoise_fwd` takes what `cmfast.reference.renoise` takes; `renoise_bwd` the gradients of its results, and returns those
of the inputs that `needed` names.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import (
    as_float32,
    clamp,
    input_scale,
    load_both,
    load_grad,
    load_level,
    load_unclipped,
    skip_and_out,
    store_noise_level,
    store_state,
    through_clip,
    tile_offsets,
    unclipped,
)
from cmfast.kernels.launch import dense, empty, gradients, outputs, plan, scaling
from cmfast.kernels.normal import Noise, drawing_jit
from cmfast.kernels.philox import noise_tile

Grads = tuple[Tensor | None, ...]


@triton.jit
def _noise_scale(next_level, sigma_min):
    """sqrt(sigma'^2 - sigma_min^2) as a product of differences: exactly zero at sigma_min, zero below, NaN of NaN."""
    sigma_min = as_float32(sigma_min)
    square = (next_level - sigma_min) * (next_level + sigma_min)
    return tl.sqrt_rn(tl.where(square < 0.0, 0.0, square))


@drawing_jit
def _renoise_fwd_kernel(
    x_next_ptr, model_input_ptr, c_noise_ptr, model_output_ptr, x_t_ptr, noise_ptr, index_ptr,
    sigma_ptr, next_sigma_ptr, planes, blocks, pixels, seed, seed_high, draw, sigma_min, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x' = D + √(σ'² - σ_min²) ε, D clamped if CLIP, and c_in(σ') x'            Song et al. 2023, algorithm 1
    x_next_ptr                 [B, N]  state dtype, out    model_input_ptr   [B, N]  model dtype, out
    c_noise_ptr                [B]     float32, out        model_output_ptr  [B, N]  model dtype
    x_t_ptr                    [B, N]  state dtype         noise_ptr         [B, N]  or if DRAWN index_ptr [B]
    sigma_ptr, next_sigma_ptr  [B]     float32
    Grid (rows * planes * blocks,). Traffic: 2m + 3s bytes per element, 2m + 2s if DRAWN. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    # While these are on their way, noise is made.
    f, x = load_both(model_output_ptr, x_t_ptr, at, model_at, mask, PLAIN)
    level, next_level = load_level(sigma_ptr, row, PER_ROW), load_level(next_sigma_ptr, row, PER_ROW)
    eps = noise_tile(
        noise_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    c_skip, c_out = skip_and_out(level, sigma_data, boundary, PLAIN)
    value = unclipped(f, x, c_skip, c_out, PLAIN)
    value = (clamp(value) if CLIP else value) + _noise_scale(next_level, sigma_min) * eps
    store_state(x_next_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(next_level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, next_level, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _renoise_bwd_kernel(
    grad_output_ptr, grad_x_ptr, grad_noise_ptr, grad_next_ptr, grad_input_ptr, model_output_ptr, x_t_ptr,
    sigma_ptr, next_sigma_ptr, planes, blocks, pixels, sigma_min, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    NEED_OUTPUT: tl.constexpr, NEED_X: tl.constexpr, NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dε = √(σ'² - σ_min²) g, dF = c_out g, dx_t = c_skip g, the last two 0 if clamped; g = dx' + c_in(σ') d(c_in x')
    grad_output_ptr            [B, N]  model dtype, out    grad_x_ptr, grad_noise_ptr  [B, N]  state, noise dtype, out
    grad_next_ptr              [B, N]  state dtype         grad_input_ptr              [B, N]  model dtype
    model_output_ptr, x_t_ptr  [B, N]  read if CLIP        sigma_ptr, next_sigma_ptr   [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: 2m + 3s bytes per element, 3m + 4s if CLIP. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    next_level = load_level(next_sigma_ptr, row, PER_ROW)
    c_in = input_scale(next_level, sigma_data, PLAIN)
    g = load_grad(grad_next_ptr, grad_input_ptr, at, model_at, mask, c_in, HAS_STATE, HAS_INPUT)
    if NEED_NOISE:
        store_state(grad_noise_ptr, at, _noise_scale(next_level, sigma_min) * g, mask)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    if CLIP:
        g = through_clip(g, load_unclipped(model_output_ptr, x_t_ptr, at, model_at, mask, c_skip, c_out, PLAIN))
    if NEED_OUTPUT:
        store_state(grad_output_ptr, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, c_skip * g, mask)


def renoise_fwd(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Any,
    *,
    sigma_min: float,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    model_output, x_t = dense(model_output), dense(x_t)
    x_next, model_input = empty(x_t), empty(model_output, dtype)
    source = Noise(noise, x_t, model_output)
    tiles = source.plan(x_t, model_output, sigma, next_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _renoise_fwd_kernel, x_next, model_input, c_noise, model_output, x_t, *source.pointers, *tiles.levels,
        **source.options, sigma_min=float(sigma_min), **scaling(sigma_data, boundary), CLIP=clip,
    )
    return x_next, model_input, c_noise


def renoise_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Any,
    *,
    sigma_min: float,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> Grads:
    grad_next, grad_input, *_ = grads
    need_output, need_x, _, _, need_noise = needed
    if (grad_next is None and grad_input is None) or not (need_output or need_x or need_noise):
        return (None,) * 5
    model_output, x_t = dense(model_output), dense(x_t)
    grad_next = None if grad_next is None else dense(grad_next, x_t)
    grad_input = None if grad_input is None else dense(grad_input, model_output)
    grad_output, grad_x = gradients(needed, model_output, x_t)
    grad_noise = empty(x_t, noise.dtype) if need_noise else None
    tiles = plan(x_t, model_output, sigma, next_sigma)
    tiles.run(
        _renoise_bwd_kernel, *outputs(x_t, grad_output, grad_x, grad_noise, grad_next, grad_input),
        model_output, x_t, *tiles.levels, sigma_min=float(sigma_min), **scaling(sigma_data, boundary), CLIP=clip,
        HAS_STATE=grad_next is not None, HAS_INPUT=grad_input is not None, NEED_OUTPUT=need_output, NEED_X=need_x,
        NEED_NOISE=need_noise,
    )
    return grad_output, grad_x, None, None, grad_noise
