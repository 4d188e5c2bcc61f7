"""Noising, with noise that is given or drawn in the kernel.

Each `name_fwd` takes what `cmfast.reference.name` takes; each `name_bwd` the gradients of its results, and returns
those of the inputs that `needed` names.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import (
    input_scale,
    load_grad,
    load_level,
    load_state,
    store_noise_level,
    store_state,
    tile_offsets,
)
from cmfast.kernels.launch import dense, empty, outputs, plan, scaling
from cmfast.kernels.normal import Noise, drawing_jit
from cmfast.kernels.philox import noise_tile

Grads = tuple[Tensor | None, ...]


@drawing_jit
def _add_noise_fwd_kernel(
    x_t_ptr, model_input_ptr, c_noise_ptr, x_start_ptr, noise_ptr, index_ptr, sigma_ptr, input_sigma_ptr,
    planes, blocks, pixels, seed, seed_high, draw, sigma_data,
    PLAIN: tl.constexpr, HAS_START: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x_t = x_start + σ ε, or σ ε if not HAS_START, and c_in(σ_in) x_t               Song et al. 2023, algorithm 3
    x_t_ptr      [B, N]  state dtype, out             model_input_ptr             [B, N]  model dtype, out
    c_noise_ptr  [B]     float32, out                 sigma_ptr, input_sigma_ptr  [B]     float32, data units
    x_start_ptr  [B, N]  state dtype, if HAS_START    noise_ptr                   [B, N]  or if DRAWN index_ptr [B]
    Grid (rows * planes * blocks,). Traffic: m + 3s bytes per element; s less if DRAWN, s less if not HAS_START.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    # While these are on their way, noise is made.
    start = load_state(x_start_ptr, at, mask) if HAS_START else 0.0
    level, scale = load_level(input_sigma_ptr, row, PER_ROW), load_level(sigma_ptr, row, PER_ROW)
    eps = noise_tile(
        noise_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    value = scale * eps
    if HAS_START:
        value += start
    store_state(x_t_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, level, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _add_noise_bwd_kernel(
    grad_x_ptr, grad_noise_ptr, grad_state_ptr, grad_input_ptr, sigma_ptr, input_sigma_ptr,
    planes, blocks, pixels, sigma_data,
    PLAIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    NEED_X: tl.constexpr, NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx_start = g, dε = σ g; g = dx_t + c_in(σ_in) d(c_in x_t)
    grad_x_ptr                  [B, N]  state dtype, out    grad_noise_ptr  [B, N]  noise dtype, out
    grad_state_ptr              [B, N]  state dtype         grad_input_ptr  [B, N]  model dtype
    sigma_ptr, input_sigma_ptr  [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: m + 3s bytes per element. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    c_in = input_scale(load_level(input_sigma_ptr, row, PER_ROW), sigma_data, PLAIN)
    g = load_grad(grad_state_ptr, grad_input_ptr, at, model_at, mask, c_in, HAS_STATE, HAS_INPUT)
    if NEED_X:
        store_state(grad_x_ptr, at, g, mask)
    if NEED_NOISE:
        store_state(grad_noise_ptr, at, load_level(sigma_ptr, row, PER_ROW) * g, mask)


def _add_noise_fwd(
    x: Tensor | None,
    noise: Any,
    sigma: Tensor,
    input_sigma: Tensor,
    x_t: Tensor,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Into x_t: x + sigma noise, or sigma noise where there is no x."""
    model_input = empty(x_t, dtype, memory_format)
    source = Noise(noise, x_t, model_input)
    tiles = source.plan(x_t, model_input, sigma, input_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _add_noise_fwd_kernel, x_t, model_input, c_noise, *outputs(x_t, x), *source.pointers, *tiles.levels,
        **source.options, **scaling(sigma_data), HAS_START=x is not None,
    )
    return x_t, model_input, c_noise


def _add_noise_bwd(
    need_x: bool,
    need_noise: bool,
    grads: Grads,
    like: Tensor,
    noise: Any,
    sigma: Tensor,
    input_sigma: Tensor,
    sigma_data: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the noise from those of the state and of the network input."""
    grad_state, grad_input, *_ = grads
    if (grad_state is None and grad_input is None) or not (need_x or need_noise):
        return None, None
    like = dense(like)
    grad_state = None if grad_state is None else dense(grad_state, like)
    grad_input = None if grad_input is None else dense(grad_input)
    grad_x = empty(like) if need_x else None
    grad_noise = empty(like, noise.dtype) if need_noise else None
    tiles = plan(like, grad_input, sigma, input_sigma)
    tiles.run(
        _add_noise_bwd_kernel, *outputs(like, grad_x, grad_noise, grad_state, grad_input), *tiles.levels,
        **scaling(sigma_data),
        HAS_STATE=grad_state is not None, HAS_INPUT=grad_input is not None, NEED_X=need_x, NEED_NOISE=need_noise,
    )
    return grad_x, grad_noise


def init_noise_fwd(
    noise: Any,
    sigma: Tensor,
    *,
    shape: tuple[int, ...] | None,
    state_dtype: torch.dtype,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(noise, Tensor):
        x_t = empty(dense(noise))
    else:
        x_t = torch.empty((noise.index.shape[0], *(shape or ())), dtype=state_dtype, device=noise.index.device)
    return _add_noise_fwd(None, noise, sigma, sigma, x_t, sigma_data, dtype, memory_format)


def init_noise_bwd(
    needed: tuple[bool, ...], grads: Grads, noise: Any, sigma: Tensor, *, sigma_data: float | None, **_: Any
) -> Grads:
    return _add_noise_bwd(False, needed[0], grads, noise, noise, sigma, sigma, sigma_data)[1], None


def add_noise_fwd(
    x_start: Tensor,
    noise: Any,
    sigma: Tensor,
    input_sigma: Tensor | None,
    *,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x_start = dense(x_start)
    level = sigma if input_sigma is None else input_sigma
    return _add_noise_fwd(x_start, noise, sigma, level, empty(x_start), sigma_data, dtype, memory_format)


def add_noise_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    x_start: Tensor,
    noise: Any,
    sigma: Tensor,
    input_sigma: Tensor | None,
    *,
    sigma_data: float | None,
    **_: Any,
) -> Grads:
    level = sigma if input_sigma is None else input_sigma
    grad_x, grad_noise = _add_noise_bwd(needed[0], needed[1], grads, x_start, noise, sigma, level, sigma_data)
    return grad_x, grad_noise, None, None


@drawing_jit
def _add_noise_pair_fwd_kernel(
    x_t_ptr, model_input_ptr, c_noise_ptr, x_t_2_ptr, model_input_2_ptr, c_noise_2_ptr,
    x_start_ptr, noise_ptr, index_ptr, sigma_ptr, next_sigma_ptr,
    planes, blocks, pixels, seed, seed_high, draw, sigma_data,
    PLAIN: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x_t = x_start + σ ε, x_t2 = x_start + σ' ε, and c_in x of both           Song et al. 2023, algorithm 3
    x_t(_2)_ptr      [B, N]  state dtype, out    model_input(_2)_ptr        [B, N]  model dtype, out
    c_noise(_2)_ptr  [B]     float32, out        sigma_ptr, next_sigma_ptr  [B]     float32, data units
    x_start_ptr      [B, N]  state dtype         noise_ptr                  [B, N]  or if DRAWN index_ptr [B]
    Grid (rows * planes * blocks,). Traffic: 2m + 4s bytes per element, 2m + 3s if DRAWN. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    start = load_state(x_start_ptr, at, mask)
    level, next_level = load_level(sigma_ptr, row, PER_ROW), load_level(next_sigma_ptr, row, PER_ROW)
    eps = noise_tile(
        noise_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    value, value_2 = start + level * eps, start + next_level * eps
    store_state(x_t_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, level, PLAIN, PER_ROW)
    store_state(x_t_2_ptr, at, value_2, mask)
    store_state(model_input_2_ptr, model_at, input_scale(next_level, sigma_data, PLAIN) * value_2, mask)
    store_noise_level(c_noise_2_ptr, row, planes, blocks, next_level, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _add_noise_pair_bwd_kernel(
    grad_x_ptr, grad_noise_ptr, grad_state_ptr, grad_input_ptr, grad_state_2_ptr, grad_input_2_ptr,
    sigma_ptr, next_sigma_ptr, planes, blocks, pixels, sigma_data,
    PLAIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    HAS_STATE_2: tl.constexpr, HAS_INPUT_2: tl.constexpr, NEED_X: tl.constexpr, NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx_start = g + g_2, dε = σ g + σ' g_2; each g = dx_t + c_in d(c_in x_t) of its point
    grad_x_ptr                 [B, N]  state dtype, out    grad_noise_ptr      [B, N]  noise dtype, out
    grad_state(_2)_ptr         [B, N]  state dtype         grad_input(_2)_ptr  [B, N]  model dtype
    sigma_ptr, next_sigma_ptr  [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: 2m + 4s bytes per element. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    level, next_level = load_level(sigma_ptr, row, PER_ROW), load_level(next_sigma_ptr, row, PER_ROW)
    g, g_2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        g += load_state(grad_state_ptr, at, mask)
    if HAS_INPUT:
        g += input_scale(level, sigma_data, PLAIN) * load_state(grad_input_ptr, model_at, mask)
    if HAS_STATE_2:
        g_2 += load_state(grad_state_2_ptr, at, mask)
    if HAS_INPUT_2:
        g_2 += input_scale(next_level, sigma_data, PLAIN) * load_state(grad_input_2_ptr, model_at, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, g + g_2, mask)
    if NEED_NOISE:
        store_state(grad_noise_ptr, at, level * g + next_level * g_2, mask)


def add_noise_pair_fwd(
    x_start: Tensor,
    noise: Any,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, ...]:
    """The two points, one after the other: six tensors."""
    x_start = dense(x_start)
    states = empty(x_start), empty(x_start)
    inputs = empty(x_start, dtype, memory_format), empty(x_start, dtype, memory_format)
    source = Noise(noise, x_start, inputs[0])
    tiles = source.plan(x_start, inputs[0], sigma, next_sigma)
    c_noises = tiles.level_out(x_start), tiles.level_out(x_start)
    points = tuple(zip(states, inputs, c_noises, strict=True))
    tiles.run(
        _add_noise_pair_fwd_kernel, *points[0], *points[1], x_start, *source.pointers, *tiles.levels,
        **source.options, **scaling(sigma_data),
    )
    return *points[0], *points[1]


def add_noise_pair_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    x_start: Tensor,
    noise: Any,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None,
    **_: Any,
) -> Grads:
    states, inputs = (grads[0], grads[3]), (grads[1], grads[4])
    if all(grad is None for grad in (*states, *inputs)) or not any(needed[:2]):
        return (None,) * 4
    like = dense(x_start)
    given_states = [None if grad is None else dense(grad, like) for grad in states]
    model = next((dense(grad) for grad in inputs if grad is not None), None)
    given_inputs = [None if grad is None else dense(grad, model) for grad in inputs]
    grad_x = empty(like) if needed[0] else None
    grad_noise = empty(like, noise.dtype) if needed[1] else None
    tiles = plan(like, model, sigma, next_sigma)
    pairs = [grad for pair in zip(given_states, given_inputs, strict=True) for grad in pair]
    has = {f"HAS_{name}": grad is not None for name, grad in zip(("STATE", "INPUT", "STATE_2", "INPUT_2"), pairs)}
    tiles.run(
        _add_noise_pair_bwd_kernel, *outputs(like, grad_x, grad_noise, *pairs), *tiles.levels,
        **scaling(sigma_data), **has, NEED_X=needed[0], NEED_NOISE=needed[1],
    )
    return grad_x, grad_noise, None, None
