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
    clamp,
    input_scale,
    load_both,
    load_level,
    load_state,
    load_unclipped,
    offsets,
    pixel_value,
    skip_and_out,
    store_noise_level,
    store_state,
    through_clip,
    tile,
    tile_offsets,
    unclipped,
)
from cmfast.kernels.images import pixels_of
from cmfast.kernels.launch import dense, empty, gradients, outputs, plan, scaling


@triton.jit(do_not_specialize=["blocks"])
def _scale_input_fwd_kernel(
    model_input_ptr, c_noise_ptr, x_ptr, sigma_ptr, planes, blocks, pixels, sigma_data,
    PLAIN: tl.constexpr, WITH_NOISE: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """c_in(σ) x, and c_noise = 250 ln σ if WITH_NOISE    Song et al. 2023, appendix C
    model_input_ptr  [B, N]  model dtype, out    c_noise_ptr  [B]  float32, out
    x_ptr            [B, N]  state dtype         sigma_ptr    [B]  float32, data units
    Grid (rows * planes * blocks,). Traffic: m + s bytes per element. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    level = load_level(sigma_ptr, row, PER_ROW)
    store_state(model_input_ptr, model_at, input_scale(level, sigma_data, PLAIN) * load_state(x_ptr, at, mask), mask)
    if WITH_NOISE:
        store_noise_level(c_noise_ptr, row, planes, blocks, level, PLAIN, PER_ROW)


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
        _scale_input_fwd_kernel, model_input, c_noise, x, *tiles.levels, **scaling(sigma_data), WITH_NOISE=True
    )
    return model_input, c_noise


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
    # A product with c_in again, whose tensors lie the other way round.
    tiles = plan(grad, grad_x, sigma)
    tiles.run(
        _scale_input_fwd_kernel, grad_x, *outputs(grad_x, None), grad, *tiles.levels, **scaling(sigma_data),
        WITH_NOISE=False,
    )
    return grad_x, None


@triton.jit(do_not_specialize=["blocks"])
def _denoise_fwd_kernel(
    denoised_ptr, model_output_ptr, x_t_ptr, sigma_ptr, planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """D = c_skip(σ) x_t + c_out(σ) F, clamped if CLIP              Song et al. 2023, eq. 5
    denoised_ptr  [B, N]  state dtype, out    model_output_ptr  [B, N]  model dtype
    x_t_ptr       [B, N]  state dtype         sigma_ptr         [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: m + 2s bytes per element. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    f, x = load_both(model_output_ptr, x_t_ptr, at, model_at, mask, PLAIN)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    value = unclipped(f, x, c_skip, c_out, PLAIN)
    store_state(denoised_ptr, at, clamp(value) if CLIP else value, mask)


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
    denoised = empty(x_t)
    tiles = plan(x_t, model_output, sigma)
    tiles.run(
        _denoise_fwd_kernel, denoised, model_output, x_t, *tiles.levels, **scaling(sigma_data, boundary), CLIP=clip
    )
    return denoised


@triton.jit(do_not_specialize=["blocks"])
def _denoise_bwd_kernel(
    grad_output_ptr, grad_x_ptr, grad_ptr, model_output_ptr, x_t_ptr, sigma_ptr, planes, blocks, pixels,
    sigma_data, boundary,
    PLAIN: tl.constexpr, CLIP: tl.constexpr, NEED_OUTPUT: tl.constexpr, NEED_X: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dF = c_out(σ) dD, dx_t = c_skip(σ) dD; if CLIP, dD = 0 where |D| > 1    Song et al. 2023, eq. 5
    grad_output_ptr   [B, N]  model dtype, out        grad_x_ptr  [B, N]  state dtype, out
    grad_ptr          [B, N]  state dtype             sigma_ptr   [B]     float32, data units
    model_output_ptr  [B, N]  model dtype, if CLIP    x_t_ptr     [B, N]  state dtype, if CLIP
    Grid (rows * planes * blocks,). Traffic: m + 2s bytes per element, 2m + 3s if CLIP. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    g = load_state(grad_ptr, at, mask)
    if CLIP:
        g = through_clip(g, load_unclipped(model_output_ptr, x_t_ptr, at, model_at, mask, c_skip, c_out, PLAIN))
    if NEED_OUTPUT:
        store_state(grad_output_ptr, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, c_skip * g, mask)


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
        _denoise_bwd_kernel, *outputs(grad, grad_output, grad_x), grad, model_output, x_t, *tiles.levels,
        **scaling(sigma_data, boundary), CLIP=clip, NEED_OUTPUT=needed[0], NEED_X=needed[1],
    )
    return grad_output, grad_x, None


@triton.jit(do_not_specialize=["blocks"])
def _denoise_to_uint8_fwd_kernel(
    out_ptr, model_output_ptr, x_t_ptr, sigma_ptr, planes, blocks, pixels, sigma_data, boundary,
    PLAIN: tl.constexpr, NEAREST: tl.constexpr, OUT_LAST: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """127.5 (D + 1), D clamped to [-1, 1]; cut off, or rounded if NEAREST    D: Song et al. 2023, eq. 5
    out_ptr  [B, N]  uint8, out     model_output_ptr  [B, N]  model dtype
    x_t_ptr  [B, N]  state dtype    sigma_ptr         [B]     float32, data units
    Grid (rows * planes * blocks,). Traffic: m + s + 1 bytes per element. Computes in float32.
    """
    row, plane, pixel, mask = tile(planes, blocks, pixels, BLOCK)
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    f, x = load_both(model_output_ptr, x_t_ptr, at, model_at, mask, PLAIN)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    value = clamp(unclipped(f, x, c_skip, c_out, PLAIN))
    store_state(out_ptr, offsets(row, plane, pixel, planes, pixels, OUT_LAST), pixel_value(value, NEAREST), mask)


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
        _denoise_to_uint8_fwd_kernel, out, model_output, x_t, *tiles.levels, **scaling(sigma_data, boundary),
        NEAREST=rounding == "nearest", OUT_LAST=mixed,
    )
    return out
