"""Steps of the probability-flow ODE from network outputs; D is never stored.

Each `name_fwd` takes what `cmfast.reference.name` takes; each `name_bwd` the gradients of its results, and returns
those of the inputs that `needed` names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import (
    denoised,
    input_scale,
    load_grad,
    load_level,
    load_state,
    load_unclipped,
    per_level,
    skip_and_out,
    store_noise_level,
    store_state,
    through_clip,
    tile_offsets,
    unclipped,
)
from cmfast.kernels.launch import dense, empty, gradients, outputs, plan, scaling

Grads = tuple[Tensor | None, ...]


@triton.jit(do_not_specialize=["blocks"])
def _euler_step_fwd_kernel(
    x_next_ptr, model_input_ptr, c_noise_ptr, model_output_ptr, x_t_ptr, sigma_ptr, next_sigma_ptr,
    planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, WITH_STATE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x' = x_t + (x_t - D) (σ' - σ) / σ, and c_in(σ') x'                         Karras et al. 2022, algorithm 1
    x_next_ptr   [B, N]  state dtype, out if WITH_STATE    model_input_ptr            [B, N]  model dtype, out
    c_noise_ptr  [B]     float32, out                      model_output_ptr           [B, N]  model dtype
    x_t_ptr      [B, N]  state dtype                       sigma_ptr, next_sigma_ptr  [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: 2m + 2s bytes per element, 2m + s if not WITH_STATE. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    f, state = load_state(model_output_ptr, model_at, mask), load_state(x_t_ptr, at, mask)
    level, next_level = load_level(sigma_ptr, row, PER_ROW), load_level(next_sigma_ptr, row, PER_ROW)
    c_skip, c_out = skip_and_out(level, sigma_data, boundary, PLAIN)
    # d (sigma' - sigma) = (x - D) (sigma' - sigma) / sigma
    e = state - denoised(f, state, c_skip, c_out, PLAIN, CLIP)
    value = state + per_level(e, next_level - level, level)
    if WITH_STATE:
        store_state(x_next_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(next_level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, next_level, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _euler_step_bwd_kernel(
    grad_output_ptr, grad_x_ptr, grad_next_ptr, grad_input_ptr, model_output_ptr, x_t_ptr, sigma_ptr, next_sigma_ptr,
    planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    NEED_OUTPUT: tl.constexpr, NEED_X: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dD = -r g, dF = c_out dD, dx_t = g + r g + c_skip dD; r = (σ' - σ) / σ, g = dx' + c_in(σ') d(c_in x')
    grad_output_ptr            [B, N]  model dtype, out    grad_x_ptr                 [B, N]  state dtype, out
    grad_next_ptr              [B, N]  state dtype         grad_input_ptr             [B, N]  model dtype
    model_output_ptr, x_t_ptr  [B, N]  read if CLIP        sigma_ptr, next_sigma_ptr  [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: 2m + 2s bytes per element, 3m + 3s if CLIP. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    level, next_level = load_level(sigma_ptr, row, PER_ROW), load_level(next_sigma_ptr, row, PER_ROW)
    c_skip, c_out = skip_and_out(level, sigma_data, boundary, PLAIN)
    c_in = input_scale(next_level, sigma_data, PLAIN)
    g = load_grad(grad_next_ptr, grad_input_ptr, at, model_at, mask, c_in, HAS_STATE, HAS_INPUT)
    g_e = per_level(g, next_level - level, level)
    g_denoised = -g_e
    if CLIP:
        value = load_unclipped(model_output_ptr, x_t_ptr, at, model_at, mask, c_skip, c_out, PLAIN)
        g_denoised = through_clip(g_denoised, value)
    if NEED_OUTPUT:
        store_state(grad_output_ptr, model_at, c_out * g_denoised, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, g + g_e + c_skip * g_denoised, mask)


def euler_step_fwd(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    with_state: bool = True,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    model_output, x_t = dense(model_output), dense(x_t)
    x_next = empty(x_t) if with_state else None
    model_input = empty(model_output, dtype)
    tiles = plan(x_t, model_output, sigma, next_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _euler_step_fwd_kernel, *outputs(x_t, x_next), model_input, c_noise, model_output, x_t, *tiles.levels,
        **scaling(sigma_data, boundary), CLIP=clip, WITH_STATE=with_state,
    )
    return (model_input, c_noise) if x_next is None else (x_next, model_input, c_noise)


def euler_step_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> Grads:
    grad_next, grad_input, *_ = grads
    if (grad_next is None and grad_input is None) or not any(needed[:2]):
        return (None,) * 4
    model_output, x_t = dense(model_output), dense(x_t)
    grad_next = None if grad_next is None else dense(grad_next, x_t)
    grad_input = None if grad_input is None else dense(grad_input, model_output)
    grad_output, grad_x = gradients(needed, model_output, x_t)
    tiles = plan(x_t, model_output, sigma, next_sigma)
    tiles.run(
        _euler_step_bwd_kernel, *outputs(x_t, grad_output, grad_x, grad_next, grad_input),
        model_output, x_t, *tiles.levels, **scaling(sigma_data, boundary), CLIP=clip,
        HAS_STATE=grad_next is not None, HAS_INPUT=grad_input is not None, NEED_OUTPUT=needed[0], NEED_X=needed[1],
    )
    return grad_output, grad_x, None, None


def heun_predictor_fwd(*tensors: Tensor, **options) -> tuple[Tensor, ...]:
    """An Euler step that keeps its network input alone."""
    return euler_step_fwd(*tensors, with_state=False, **options)


def heun_predictor_bwd(needed: tuple[bool, ...], grads: Grads, *tensors: Tensor, **options) -> Grads:
    return euler_step_bwd(needed, (None, *grads), *tensors, **options)


@triton.jit(do_not_specialize=["blocks"])
def _corrector_fwd_kernel(
    x_next_ptr, model_input_ptr, c_noise_ptr, model_output_ptr, model_output_2_ptr, x_t_ptr,
    sigma_ptr, sigma_2_ptr, next_sigma_ptr, planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, MIDPOINT: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x' = x_t + (σ' - σ) d_2, d_2 = (x_2 - D_2) / σ_2; Heun: (d + d_2) / 2    DPM-Solver-2, Karras et al. 2022
    x_next_ptr   [B, N]  state dtype, out    model_input_ptr                [B, N]  model dtype, out
    c_noise_ptr  [B]     float32, out        model_output(_2)_ptr           [B, N]  model dtype
    x_t_ptr      [B, N]  state dtype         sigma(_2)_ptr, next_sigma_ptr  [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: 3m + 2s bytes per element. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    f, f_2 = load_state(model_output_ptr, model_at, mask), load_state(model_output_2_ptr, model_at, mask)
    state = load_state(x_t_ptr, at, mask)
    level, level_2 = load_level(sigma_ptr, row, PER_ROW), load_level(sigma_2_ptr, row, PER_ROW)
    next_level = load_level(next_sigma_ptr, row, PER_ROW)
    # Where sigma_2 = 0 Heun's method has no second slope: an Euler step. A midpoint is never 0.
    ends = level_2 == 0.0
    safe = level_2 if MIDPOINT else tl.where(ends, 1.0, level_2)
    # With e = x - D, the slope d = e / sigma is never formed: its steps are e times ratios of noise levels.
    c_skip, c_out = skip_and_out(level, sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(safe, sigma_data, boundary, PLAIN)
    e = state - denoised(f, state, c_skip, c_out, PLAIN, CLIP)
    state_2 = state + per_level(e, level_2 - level, level)
    e_2 = state_2 - denoised(f_2, state_2, c_skip_2, c_out_2, PLAIN, CLIP)
    change_2 = per_level(e_2, next_level - level, safe)
    if MIDPOINT:
        value = state + change_2
    else:
        change = per_level(e, next_level - level, level)
        value = state + 0.5 * (change + tl.where(ends, change, change_2))
    store_state(x_next_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(next_level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, next_level, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _corrector_bwd_kernel(
    grad_output_ptr, grad_output_2_ptr, grad_x_ptr, grad_next_ptr, grad_input_ptr,
    model_output_ptr, model_output_2_ptr, x_t_ptr, sigma_ptr, sigma_2_ptr, next_sigma_ptr,
    planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, MIDPOINT: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    NEED_OUTPUT: tl.constexpr, NEED_OUTPUT_2: tl.constexpr, NEED_X: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dF, dF_2 and dx_t from g = dx' + c_in(σ') d(c_in x'); x' as below
    grad_output(_2)_ptr            [B, N]  model dtype, out    grad_x_ptr                     [B, N]  state dtype, out
    grad_next_ptr                  [B, N]  state dtype         grad_input_ptr                 [B, N]  model dtype
    model_output(_2)_ptr, x_t_ptr  [B, N]  read if CLIP        sigma(_2)_ptr, next_sigma_ptr  [B]     float32
    Grid (rows * planes * blocks,). Traffic: 3m + 2s bytes per element, 5m + 3s if CLIP. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    level, level_2 = load_level(sigma_ptr, row, PER_ROW), load_level(sigma_2_ptr, row, PER_ROW)
    next_level = load_level(next_sigma_ptr, row, PER_ROW)
    c_in = input_scale(next_level, sigma_data, PLAIN)
    g = load_grad(grad_next_ptr, grad_input_ptr, at, model_at, mask, c_in, HAS_STATE, HAS_INPUT)
    ends = level_2 == 0.0
    safe = level_2 if MIDPOINT else tl.where(ends, 1.0, level_2)
    c_skip, c_out = skip_and_out(level, sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(safe, sigma_data, boundary, PLAIN)
    # x' = x + (k r e + k_2 r_2 e_2), e = x - D, e_2 = x_2 - D_2, x_2 = x + r_mid e
    g_e_2 = per_level(g, next_level - level, safe)
    if MIDPOINT:
        g_e = tl.zeros_like(g)
    else:
        g_e_2 = tl.where(ends, 0.0, 0.5) * g_e_2
        g_e = per_level(tl.where(ends, 1.0, 0.5) * g, next_level - level, level)
    g_denoised_2 = -g_e_2
    if CLIP:
        f, f_2 = load_state(model_output_ptr, model_at, mask), load_state(model_output_2_ptr, model_at, mask)
        state = load_state(x_t_ptr, at, mask)
        e = state - denoised(f, state, c_skip, c_out, PLAIN, CLIP)
        state_2 = state + per_level(e, level_2 - level, level)
        g_denoised_2 = through_clip(g_denoised_2, unclipped(f_2, state_2, c_skip_2, c_out_2, PLAIN))
    g_x_2 = g_e_2 + c_skip_2 * g_denoised_2
    g_e += per_level(g_x_2, level_2 - level, level)
    g_denoised = -g_e
    if CLIP:
        g_denoised = through_clip(g_denoised, unclipped(f, state, c_skip, c_out, PLAIN))
    if NEED_OUTPUT:
        store_state(grad_output_ptr, model_at, c_out * g_denoised, mask)
    if NEED_OUTPUT_2:
        store_state(grad_output_2_ptr, model_at, c_out_2 * g_denoised_2, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, g + g_x_2 + g_e + c_skip * g_denoised, mask)


def midpoint_corrector_fwd(
    model_output: Tensor,
    model_output_mid: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    mid_sigma: Tensor,
    next_sigma: Tensor,
    *,
    midpoint: bool = True,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    model_output, x_t = dense(model_output), dense(x_t)
    model_output_mid = dense(model_output_mid, model_output)
    x_next, model_input = empty(x_t), empty(model_output, dtype)
    tiles = plan(x_t, model_output, sigma, mid_sigma, next_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _corrector_fwd_kernel, x_next, model_input, c_noise, model_output, model_output_mid, x_t, *tiles.levels,
        **scaling(sigma_data, boundary), CLIP=clip, MIDPOINT=midpoint,
    )
    return x_next, model_input, c_noise


def midpoint_corrector_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    model_output: Tensor,
    model_output_mid: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    mid_sigma: Tensor,
    next_sigma: Tensor,
    *,
    midpoint: bool = True,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    dtype: torch.dtype | None,
) -> Grads:
    grad_next, grad_input, *_ = grads
    if (grad_next is None and grad_input is None) or not any(needed[:3]):
        return (None,) * 6
    model_output, x_t = dense(model_output), dense(x_t)
    model_output_mid = dense(model_output_mid, model_output)
    grad_next = None if grad_next is None else dense(grad_next, x_t)
    grad_input = None if grad_input is None else dense(grad_input, model_output)
    grad_output, grad_output_mid, grad_x = gradients(needed, model_output, model_output_mid, x_t)
    tiles = plan(x_t, model_output, sigma, mid_sigma, next_sigma)
    tiles.run(
        _corrector_bwd_kernel, *outputs(x_t, grad_output, grad_output_mid, grad_x, grad_next, grad_input),
        model_output, model_output_mid, x_t, *tiles.levels, **scaling(sigma_data, boundary), CLIP=clip,
        MIDPOINT=midpoint,
        HAS_STATE=grad_next is not None, HAS_INPUT=grad_input is not None,
        NEED_OUTPUT=needed[0], NEED_OUTPUT_2=needed[1], NEED_X=needed[2],
    )
    return grad_output, grad_output_mid, grad_x, None, None, None


def heun_corrector_fwd(
    model_output: Tensor, model_output_next: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options
) -> tuple[Tensor, ...]:
    """The corrector whose second slope is taken at the end of the step, and averaged with the first."""
    tensors = model_output, model_output_next, x_t, sigma, next_sigma, next_sigma
    return midpoint_corrector_fwd(*tensors, midpoint=False, **options)


def heun_corrector_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    model_output: Tensor,
    model_output_next: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    **options,
) -> Grads:
    tensors = model_output, model_output_next, x_t, sigma, next_sigma, next_sigma
    return midpoint_corrector_bwd(needed, grads, *tensors, midpoint=False, **options)[:5]
