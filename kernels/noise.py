"""Noising, with noise that is given or drawn in the kernel.

Each `name_fwd` takes what `cmfast.reference.name` takes; each `name_bwd` the gradients of its results, and returns
those of the inputs that `needed` names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import (
    add_input_grad,
    denoised,
    input_scale,
    load_level,
    load_state,
    offsets,
    skip_and_out,
    store_noise_level,
    store_state,
    through_clip,
    tile,
    unclipped,
)
from cmfast.kernels.launch import CONTIGUOUS, Plan, dense, empty, gradients, layout, outputs, plan, scaling
from cmfast.kernels.philox import noise_tile, normals

Grads = tuple[Tensor | None, ...]

# Seeds and draws vary without end: they must not make a new kernel each.
_jit = triton.jit(do_not_specialize=["blocks", "seed", "seed_high", "draw"])


def _signed_word(value: int) -> int:
    """The low 32 bits as a signed number, which is a 32-bit argument whatever the value."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _counter(seed: int | Tensor, index: Tensor, draw: int | Tensor) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """Arguments of a kernel that draws."""
    seeds = (seed, 0) if isinstance(seed, Tensor) else (_signed_word(seed), _signed_word(seed >> 32))
    number = draw if isinstance(draw, Tensor) else _signed_word(draw)
    options = {"SEED_TENSOR": isinstance(seed, Tensor), "DRAW_TENSOR": isinstance(draw, Tensor)}
    return (*seeds, number, index.contiguous()), options


@_jit
def _normal_kernel(
    out, seed, seed_high, draw, index, planes, blocks, pixels, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    value = normals(seed, seed_high, draw, index, row, first, SEED_TENSOR, DRAW_TENSOR, BLOCK)
    store_state(out, offsets(row, plane, pixel, planes, pixels, STATE_LAST), value, mask)


def normal_fwd(
    seed: int | Tensor, index: Tensor, shape: tuple[int, ...], *, draw: int | Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty((index.shape[0], *shape), dtype=dtype, device=index.device)
    arguments, options = _counter(seed, index, draw)
    plan(out, None, rows=True).run(_normal_kernel, out, *arguments, **options)
    return out


class _Noise:
    """The noise of a launch: a tensor in the states' layout, or a draw, and the kernel's arguments for either."""

    def __init__(self, noise: Any, state: Tensor, model: Tensor | None) -> None:
        self.drawn = not isinstance(noise, Tensor)
        # A group of four elements must not reach over two channels where these lie apart.
        self.planes = self.drawn and (layout(state) != CONTIGUOUS or (model is not None and layout(model) != CONTIGUOUS))
        if self.planes and math.prod(state.shape[2:]) % 4:
            noise = normal_fwd(noise.seed, noise.index, state.shape[1:], draw=noise.draw, dtype=torch.float32)
            self.drawn = self.planes = False
        if self.drawn:
            counter, self.options = _counter(noise.seed, noise.index, noise.draw)
            self.arguments = (state, *counter)
        else:
            self.options = {"SEED_TENSOR": False, "DRAW_TENSOR": False}
            self.arguments = (dense(noise, state), 0, 0, 0, state)
        self.options["DRAWN"] = self.drawn

    def plan(self, state: Tensor, model: Tensor | None, *levels: Tensor) -> Plan:
        return plan(state, model, *levels, rows=self.drawn, planes=self.planes)


@_jit
def _add_noise_fwd_kernel(
    x, noise, seed, seed_high, draw, index, sigma, input_sigma, x_t, model_input, c_noise, sigma_data,
    planes, blocks, pixels,
    PLAIN: tl.constexpr, HAS_START: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    eps = noise_tile(
        noise, seed, seed_high, draw, index, row, plane, blocks, planes, pixels, at, mask,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    level = load_level(input_sigma, row, PER_ROW)
    value = load_level(sigma, row, PER_ROW) * eps
    if HAS_START:
        value += load_state(x, at, mask)
    store_state(x_t, at, value, mask)
    scaled = input_scale(level, sigma_data, PLAIN) * value
    store_state(model_input, offsets(row, plane, pixel, planes, pixels, MODEL_LAST), scaled, mask)
    store_noise_level(c_noise, level, row, planes, blocks, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _add_noise_bwd_kernel(
    grad_state, grad_input, sigma, input_sigma, grad_x, grad_noise, sigma_data, planes, blocks, pixels,
    PLAIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr, NEED_X: tl.constexpr,
    NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    gx = load_state(grad_state, at, mask) if HAS_STATE else 0.0
    gi = load_state(grad_input, model_at, mask) if HAS_INPUT else 0.0
    c_in = input_scale(load_level(input_sigma, row, PER_ROW), sigma_data, PLAIN)
    g = add_input_grad(gx, gi, c_in, HAS_STATE, HAS_INPUT)
    if NEED_X:
        store_state(grad_x, at, g, mask)
    if NEED_NOISE:
        store_state(grad_noise, at, load_level(sigma, row, PER_ROW) * g, mask)


def _add_noise(
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
    source = _Noise(noise, x_t, model_input)
    tiles = source.plan(x_t, model_input, sigma, input_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _add_noise_fwd_kernel, *outputs(x_t, x), *source.arguments, *tiles.levels, x_t, model_input, c_noise,
        scaling(sigma_data)[0], PLAIN=sigma_data is None, HAS_START=x is not None, **source.options,
    )
    return x_t, model_input, c_noise.expand(x_t.shape[0])


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
        _add_noise_bwd_kernel, *outputs(like, grad_state, grad_input), *tiles.levels,
        *outputs(like, grad_x, grad_noise), scaling(sigma_data)[0], PLAIN=sigma_data is None,
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
        x_t = torch.empty((noise.index.shape[0], *shape), dtype=state_dtype, device=noise.index.device)
    return _add_noise(None, noise, sigma, sigma, x_t, sigma_data, dtype, memory_format)


def init_noise_bwd(
    needed: tuple[bool, ...], grads: Grads, noise: Any, sigma: Tensor, *, sigma_data: float | None, **_: Any
) -> Grads:
    _, grad = _add_noise_bwd(False, needed[0], grads, noise, noise, sigma, sigma, sigma_data)
    return grad, None


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
    return _add_noise(x_start, noise, sigma, level, empty(x_start), sigma_data, dtype, memory_format)


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
    return *_add_noise_bwd(*needed[:2], grads, x_start, noise, sigma, level, sigma_data), None, None


@_jit
def _add_noise_pair_fwd_kernel(
    x, noise, seed, seed_high, draw, index, sigma, next_sigma, x_t, model_input, c_noise,
    x_t_2, model_input_2, c_noise_2, sigma_data, planes, blocks, pixels,
    PLAIN: tl.constexpr, DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    eps = noise_tile(
        noise, seed, seed_high, draw, index, row, plane, blocks, planes, pixels, at, mask,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    start = load_state(x, at, mask)
    level, next_level = load_level(sigma, row, PER_ROW), load_level(next_sigma, row, PER_ROW)
    value, value_2 = start + level * eps, start + next_level * eps
    store_state(x_t, at, value, mask)
    store_state(model_input, model_at, input_scale(level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise, level, row, planes, blocks, PLAIN, PER_ROW)
    store_state(x_t_2, at, value_2, mask)
    store_state(model_input_2, model_at, input_scale(next_level, sigma_data, PLAIN) * value_2, mask)
    store_noise_level(c_noise_2, next_level, row, planes, blocks, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _add_noise_pair_bwd_kernel(
    grad_state, grad_input, grad_state_2, grad_input_2, sigma, next_sigma, grad_x, grad_noise, sigma_data,
    planes, blocks, pixels,
    PLAIN: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    HAS_STATE_2: tl.constexpr, HAS_INPUT_2: tl.constexpr, NEED_X: tl.constexpr, NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    level, next_level = load_level(sigma, row, PER_ROW), load_level(next_sigma, row, PER_ROW)
    g, g_2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        g += load_state(grad_state, at, mask)
    if HAS_INPUT:
        g += input_scale(level, sigma_data, PLAIN) * load_state(grad_input, model_at, mask)
    if HAS_STATE_2:
        g_2 += load_state(grad_state_2, at, mask)
    if HAS_INPUT_2:
        g_2 += input_scale(next_level, sigma_data, PLAIN) * load_state(grad_input_2, model_at, mask)
    if NEED_X:
        store_state(grad_x, at, g + g_2, mask)
    if NEED_NOISE:
        store_state(grad_noise, at, level * g + next_level * g_2, mask)


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
    source = _Noise(noise, x_start, inputs[0])
    tiles = source.plan(x_start, inputs[0], sigma, next_sigma)
    c_noises = tiles.level_out(x_start), tiles.level_out(x_start)
    points = tuple(zip(states, inputs, c_noises, strict=True))
    tiles.run(
        _add_noise_pair_fwd_kernel, x_start, *source.arguments, *tiles.levels, *points[0], *points[1],
        scaling(sigma_data)[0], PLAIN=sigma_data is None, **source.options,
    )
    return tuple(part for x, model_input, c in points for part in (x, model_input, c.expand(x_start.shape[0])))


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
        _add_noise_pair_bwd_kernel, *outputs(like, *pairs), *tiles.levels, *outputs(like, grad_x, grad_noise),
        scaling(sigma_data)[0], PLAIN=sigma_data is None, **has, NEED_X=needed[0], NEED_NOISE=needed[1],
    )
    return grad_x, grad_noise, None, None


@triton.jit
def _noise_scale(next_level, sigma_min):
    """sqrt(sigma'^2 - sigma_min^2) as a product of differences: exactly zero at sigma_min, and zero below."""
    return tl.sqrt_rn(tl.maximum((next_level - sigma_min) * (next_level + sigma_min), 0.0))


@_jit
def _renoise_fwd_kernel(
    model_output, x, noise, seed, seed_high, draw, index, sigma, next_sigma, x_next, model_input, c_noise,
    sigma_min, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, CLIP: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    f = load_state(model_output, model_at, mask)
    state = f if PLAIN else load_state(x, at, mask)
    eps = noise_tile(
        noise, seed, seed_high, draw, index, row, plane, blocks, planes, pixels, at, mask,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    next_level = load_level(next_sigma, row, PER_ROW)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    value = denoised(f, state, c_skip, c_out, PLAIN, CLIP) + _noise_scale(next_level, sigma_min) * eps
    store_state(x_next, at, value, mask)
    store_state(model_input, model_at, input_scale(next_level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise, next_level, row, planes, blocks, PLAIN, PER_ROW)


@triton.jit(do_not_specialize=["blocks"])
def _renoise_bwd_kernel(
    grad_next, grad_input, model_output, x, sigma, next_sigma, grad_output, grad_x, grad_noise,
    sigma_min, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INPUT: tl.constexpr,
    NEED_OUTPUT: tl.constexpr, NEED_X: tl.constexpr, NEED_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    next_level = load_level(next_sigma, row, PER_ROW)
    gx = load_state(grad_next, at, mask) if HAS_STATE else 0.0
    gi = load_state(grad_input, model_at, mask) if HAS_INPUT else 0.0
    g = add_input_grad(gx, gi, input_scale(next_level, sigma_data, PLAIN), HAS_STATE, HAS_INPUT)
    if NEED_NOISE:
        store_state(grad_noise, at, _noise_scale(next_level, sigma_min) * g, mask)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    if CLIP:
        f = load_state(model_output, model_at, mask)
        state = f if PLAIN else load_state(x, at, mask)
        g = through_clip(g, unclipped(f, state, c_skip, c_out, PLAIN), CLIP)
    if NEED_OUTPUT:
        store_state(grad_output, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x, at, c_skip * g, mask)


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
    source = _Noise(noise, x_t, model_output)
    tiles = source.plan(x_t, model_output, sigma, next_sigma)
    c_noise = tiles.level_out(x_t)
    tiles.run(
        _renoise_fwd_kernel, model_output, x_t, *source.arguments, *tiles.levels, x_next, model_input, c_noise,
        float(sigma_min), *scaling(sigma_data, boundary), PLAIN=sigma_data is None, CLIP=clip, **source.options,
    )
    return x_next, model_input, c_noise.expand(x_t.shape[0])


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
        _renoise_bwd_kernel, *outputs(x_t, grad_next, grad_input), model_output, x_t, *tiles.levels,
        *outputs(x_t, grad_output, grad_x, grad_noise), float(sigma_min), *scaling(sigma_data, boundary),
        PLAIN=sigma_data is None, CLIP=clip, HAS_STATE=grad_next is not None, HAS_INPUT=grad_input is not None,
        NEED_OUTPUT=need_output, NEED_X=need_x, NEED_NOISE=need_noise,
    )
    return grad_output, grad_x, None, None, grad_noise
