"""The scalings around the network, fused: its input from the state, D and pixels from its output.

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
    load_level,
    load_state,
    offsets,
    pixel_value,
    skip_and_out,
    store_noise_level,
    store_state,
    through_clip,
    tile,
    unclipped,
)
from cmfast.kernels.images import pixels_of
from cmfast.kernels.launch import dense, empty, gradients, outputs, plan, scaling


@triton.jit(do_not_specialize=["blocks"])
def _scale_input_kernel(
    x, sigma, model_input, c_noise, sigma_data, planes, blocks, pixels,
    PLAIN: tl.constexpr, WITH_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    state = load_state(x, offsets(row, plane, pixel, planes, pixels, STATE_LAST), mask)
    level = load_level(sigma, row, PER_ROW)
    scaled = input_scale(level, sigma_data, PLAIN) * state
    store_state(model_input, offsets(row, plane, pixel, planes, pixels, MODEL_LAST), scaled, mask)
    if WITH_NOISE:
        store_noise_level(c_noise, level, row, planes, blocks, PLAIN, PER_ROW)


def scale_input_fwd(
    x: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    model_input = empty(x, dtype, memory_format)
    tiles = plan(x, model_input, sigma)
    c_noise = tiles.level_out(x)
    tiles.run(
        _scale_input_kernel, x, *tiles.levels, model_input, c_noise, scaling(sigma_data)[0],
        PLAIN=sigma_data is None, WITH_NOISE=True,
    )
    return model_input, c_noise.expand(x.shape[0])


def scale_input_bwd(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor | None, ...]:
    if grads[0] is None or not needed[0]:
        return None, None
    grad = dense(grads[0])
    grad_x = empty(dense(x))
    tiles = plan(grad, grad_x, sigma)
    tiles.run(
        _scale_input_kernel, grad, *tiles.levels, grad_x, *outputs(grad_x, None), scaling(sigma_data)[0],
        PLAIN=sigma_data is None, WITH_NOISE=False,
    )
    return grad_x, None


@triton.jit(do_not_specialize=["blocks"])
def _denoise_fwd_kernel(
    model_output, x, sigma, out, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, CLIP: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    f = load_state(model_output, offsets(row, plane, pixel, planes, pixels, MODEL_LAST), mask)
    state = f if PLAIN else load_state(x, at, mask)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    store_state(out, at, denoised(f, state, c_skip, c_out, PLAIN, CLIP), mask)


def denoise_fwd(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
) -> Tensor:
    model_output, x_t = dense(model_output), dense(x_t)
    out = empty(x_t)
    tiles = plan(x_t, model_output, sigma)
    tiles.run(
        _denoise_fwd_kernel, model_output, x_t, *tiles.levels, out, *scaling(sigma_data, boundary),
        PLAIN=sigma_data is None, CLIP=clip,
    )
    return out


@triton.jit(do_not_specialize=["blocks"])
def _denoise_bwd_kernel(
    grad, model_output, x, sigma, grad_output, grad_x, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, NEED_OUTPUT: tl.constexpr, NEED_X: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    g = load_state(grad, at, mask)
    if CLIP:
        f = load_state(model_output, model_at, mask)
        state = f if PLAIN else load_state(x, at, mask)
        g = through_clip(g, unclipped(f, state, c_skip, c_out, PLAIN), CLIP)
    if NEED_OUTPUT:
        store_state(grad_output, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x, at, c_skip * g, mask)


def denoise_bwd(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
) -> tuple[Tensor | None, ...]:
    if grads[0] is None or not any(needed[:2]):
        return None, None, None
    model_output, x_t = dense(model_output), dense(x_t)
    grad = dense(grads[0], x_t)
    grad_output, grad_x = gradients(needed, model_output, x_t)
    tiles = plan(x_t, model_output, sigma)
    tiles.run(
        _denoise_bwd_kernel, grad, model_output, x_t, *tiles.levels, *outputs(grad, grad_output, grad_x),
        *scaling(sigma_data, boundary), PLAIN=sigma_data is None, CLIP=clip, NEED_OUTPUT=needed[0], NEED_X=needed[1],
    )
    return grad_output, grad_x, None


@triton.jit(do_not_specialize=["blocks"])
def _denoise_to_uint8_kernel(
    model_output, x, sigma, out, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, NEAREST: tl.constexpr, OUT_LAST: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    f = load_state(model_output, offsets(row, plane, pixel, planes, pixels, MODEL_LAST), mask)
    state = f if PLAIN else load_state(x, offsets(row, plane, pixel, planes, pixels, STATE_LAST), mask)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    value = pixel_value(denoised(f, state, c_skip, c_out, PLAIN, True), NEAREST)
    store_state(out, offsets(row, plane, pixel, planes, pixels, OUT_LAST), value, mask)


def denoise_to_uint8_fwd(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    boundary: float,
    rounding: str,
) -> Tensor:
    model_output, x_t = dense(model_output), dense(x_t)
    out, mixed = pixels_of(x_t, model_output)
    tiles = plan(x_t, model_output, sigma, planes=mixed)
    tiles.run(
        _denoise_to_uint8_kernel, model_output, x_t, *tiles.levels, out, *scaling(sigma_data, boundary),
        PLAIN=sigma_data is None, NEAREST=rounding == "nearest", OUT_LAST=mixed,
    )
    return out
