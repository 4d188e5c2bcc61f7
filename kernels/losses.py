"""Distances of two batches, per sample, from the batches or straight from network outputs.

Partial sums go to memory and a second launch folds them, in a fixed order: the same input gives the same bits. Short
samples need no second launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import (
    as_float32,
    load_level,
    load_state,
    load_unclipped,
    offsets,
    place,
    skip_and_out,
    store_state,
    tile_offsets,
)
from cmfast.kernels.launch import Plan, dense, gradients, outputs, plan, power_of_two, scaling

Grads = tuple[Tensor | None, ...]

#: A sample of up to so many elements is summed by one program, in blocks of WHOLE_BLOCK; a longer one by several.
WHOLE = 32768
WHOLE_BLOCK = 4096
#: Blocks that one of several programs sums, at most, where a sample has no more than PARTS of them.
STEPS = 8
#: Partial sums of a sample, at most.
PARTS = 1024
#: Programs that keep a GPU busy.
ENOUGH = 512


@triton.jit
def _weight(weight_ptr, row, weight_sigma_data, WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr):
    """A sample's weight: given, or from its noise level by snr = 1 / sigma^2."""
    level = load_level(weight_ptr, row, PER_ROW)
    if WEIGHTING == "given":
        return level
    elif WEIGHTING == "uniform":
        return tl.zeros_like(level) + 1.0
    else:
        snr = tl.div_rn(1.0, level * level)
        if WEIGHTING == "snr":
            return snr
        elif WEIGHTING == "snr+1":
            return snr + 1.0
        elif WEIGHTING == "karras":
            weight_sigma_data = as_float32(weight_sigma_data)
            return snr + tl.div_rn(1.0, weight_sigma_data * weight_sigma_data)
        else:
            return tl.where(snr < 1.0, 1.0, snr)


@triton.jit
def _finish(
    loss_ptr, distance_ptr, weight_ptr, total, row, elements, huber_c, weight_sigma_data,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr,
):
    """The distance and the loss of a row from its sum."""
    if NORM == "huber":
        huber_c = as_float32(huber_c)
        # sqrt(s + c^2) - c without the cancellation.
        root = tl.sqrt_rn(total + huber_c * huber_c) + huber_c
        safe = (root > 0.0) & (root < float("inf"))
        value = tl.where(safe, tl.div_rn(total, tl.where(safe, root, 1.0)), root)
    else:
        value = tl.div_rn(total, as_float32(elements))
    tl.store(distance_ptr + row, value)
    tl.store(loss_ptr + row, value * _weight(weight_ptr, row, weight_sigma_data, WEIGHTING, PER_ROW))


@triton.jit
def _fold_kernel(
    loss_ptr, distance_ptr, partial_ptr, weight_ptr, parts, elements, huber_c, weight_sigma_data,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr,
):
    """w S / N, or w (√(S + c²) - c) for the Huber norm; S sums the parts of a sample
    loss_ptr     [B]         float32, out    distance_ptr  [B]  float32, out: the loss without w
    partial_ptr  [B, parts]  float32         weight_ptr    [B]  float32, w or what it is made of
    Grid (B,). Traffic: 4 bytes per part. Accumulates in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(partial_ptr + row * parts + part, mask=part < parts, other=0.0))
    _finish(
        loss_ptr, distance_ptr, weight_ptr, total, row, elements, huber_c, weight_sigma_data, NORM, WEIGHTING, PER_ROW
    )


@triton.jit
def _difference(
    f_ptr, x_ptr, f_2_ptr, x_2_ptr, at, model_at, mask, c_skip, c_out, c_skip_2, c_out_2,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
):
    """D - D_target, each of them given as x and x_2 or made of network outputs."""
    if FROM_OUTPUT:
        value = load_unclipped(f_ptr, x_ptr, at, model_at, mask, c_skip, c_out, PLAIN)
    else:
        value = load_state(x_ptr, at, mask)
    if TARGET_FROM_OUTPUT:
        target = load_unclipped(f_2_ptr, x_2_ptr, at, model_at, mask, c_skip_2, c_out_2, PLAIN)
    else:
        target = load_state(x_2_ptr, at, mask)
    return value - target


@triton.jit(do_not_specialize=["blocks"])
def _loss_fwd_kernel(
    loss_ptr, distance_ptr, partial_ptr, f_ptr, x_ptr, f_2_ptr, x_2_ptr, sigma_ptr, next_sigma_ptr, weight_ptr,
    planes, blocks, pixels, elements, huber_c, weight_sigma_data, sigma_data, boundary,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr, FINISH: tl.constexpr, STEPS: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """w mean |Δ|, w mean Δ² or w (√(‖Δ‖² + c²) - c); Δ = D - D_2, D from f and x or given    Song et al. 2023, eq. 7
    loss_ptr, distance_ptr     [B]     float32, out if FINISH    partial_ptr  [B, parts]  float32, out if not FINISH
    f(_2)_ptr                  [B, N]  model dtype               x(_2)_ptr    [B, N]      state dtype
    sigma_ptr, next_sigma_ptr  [B]     float32, data units       weight_ptr   [B]         float32
    Grid (rows * planes * blocks,). Traffic: 2s bytes per element, m more for each f. Accumulates in float32.
    """
    row, plane, block = place(planes, blocks)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(load_level(next_sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        pixel = block * (BLOCK * STEPS) + step * BLOCK + tl.arange(0, BLOCK)
        at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
        model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
        delta = _difference(
            f_ptr, x_ptr, f_2_ptr, x_2_ptr, at, model_at, pixel < pixels, c_skip, c_out, c_skip_2, c_out_2,
            PLAIN, FROM_OUTPUT, TARGET_FROM_OUTPUT,
        )
        if NORM == "l1":
            total += tl.abs(delta)
        else:
            total += delta * delta
    if FINISH:
        _finish(
            loss_ptr, distance_ptr, weight_ptr, tl.sum(total), row, elements, huber_c, weight_sigma_data,
            NORM, WEIGHTING, PER_ROW,
        )
    else:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["blocks"])
def _loss_bwd_kernel(
    grad_f_ptr, grad_x_ptr, grad_f_2_ptr, grad_x_2_ptr, grad_ptr, f_ptr, x_ptr, f_2_ptr, x_2_ptr,
    sigma_ptr, next_sigma_ptr, weight_ptr, distance_ptr,
    planes, blocks, pixels, elements, huber_c, weight_sigma_data, sigma_data, boundary,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr,
    NEED_F: tl.constexpr, NEED_X: tl.constexpr, NEED_F_2: tl.constexpr, NEED_X_2: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """dΔ = w g sign(Δ) / N, 2 w g Δ / N or w g Δ / √(‖Δ‖² + c²); df = c_out dΔ, dx = c_skip dΔ, the target's negated
    grad_f(_2)_ptr          [B, N]  model dtype, out    grad_x(_2)_ptr                         [B, N]  state dtype, out
    f(_2)_ptr               [B, N]  model dtype         x(_2)_ptr                              [B, N]  state dtype
    grad_ptr, distance_ptr  [B]     float32             sigma_ptr, next_sigma_ptr, weight_ptr  [B]     float32
    Grid (rows * planes * blocks,). Traffic: as forward, and m or s for each gradient. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    c_skip, c_out = skip_and_out(load_level(sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(load_level(next_sigma_ptr, row, PER_ROW), sigma_data, boundary, PLAIN)
    delta = _difference(
        f_ptr, x_ptr, f_2_ptr, x_2_ptr, at, model_at, mask, c_skip, c_out, c_skip_2, c_out_2,
        PLAIN, FROM_OUTPUT, TARGET_FROM_OUTPUT,
    )
    scale = tl.load(grad_ptr + row).to(tl.float32) * _weight(weight_ptr, row, weight_sigma_data, WEIGHTING, PER_ROW)
    if NORM == "l1":
        g = tl.div_rn(scale, as_float32(elements)) * tl.where(delta > 0.0, 1.0, tl.where(delta < 0.0, -1.0, delta))
    elif NORM == "l2":
        g = tl.div_rn(2.0 * scale, as_float32(elements)) * delta
    else:
        # Zero where x = y and c = 0, where the square root has no slope.
        root = tl.load(distance_ptr + row) + as_float32(huber_c)
        g = tl.where(root == 0.0, 0.0, tl.div_rn(scale, tl.where(root == 0.0, 1.0, root))) * delta
    if NEED_F:
        store_state(grad_f_ptr, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x_ptr, at, c_skip * g if FROM_OUTPUT else g, mask)
    if NEED_F_2:
        store_state(grad_f_2_ptr, model_at, -c_out_2 * g, mask)
    if NEED_X_2:
        store_state(grad_x_2_ptr, at, -c_skip_2 * g if TARGET_FROM_OUTPUT else -g, mask)


class _Pair:
    """Two batches to compare, in common layouts: x and x_2, each with a network output or without."""

    def __init__(self, f: Tensor | None, x: Tensor, f_2: Tensor | None, x_2: Tensor) -> None:
        self.x = dense(x)
        self.x_2 = dense(x_2, self.x)
        self.model = None if f is None else dense(f)
        self.model_2 = None if f_2 is None else dense(f_2, self.model)
        self.tensors = outputs(self.x, self.model, self.x, self.model_2, self.x_2)
        self.options = {"FROM_OUTPUT": f is not None, "TARGET_FROM_OUTPUT": f_2 is not None}
        self.elements = float(self.x.numel() // max(self.x.shape[0], 1))

    def plan(self, *levels: Tensor) -> Plan:
        return plan(self.x, self.model, *levels, rows=True)


def _summing(tiles: Plan) -> Plan:
    """The plan of a sum: one program for a whole sample if that is short, else few blocks each, and many programs."""
    if tiles.planes == 1 and tiles.pixels <= WHOLE:
        block = min(WHOLE_BLOCK, max(128, power_of_two(tiles.pixels)))
        steps = max(1, -(-tiles.pixels // block))
        return tiles._replace(block=block, steps=steps, warps=max(tiles.warps, block // 256))
    blocks = tiles.planes * tiles.blocks
    steps = max(min(STEPS, tiles.rows * blocks // ENOUGH), -(-blocks // PARTS), 1)
    return tiles._replace(steps=power_of_two(steps))


def _measure(norm: str, huber_c: float, weighting: str = "given", weight_sigma_data: float = 1.0) -> dict[str, Any]:
    """How a kernel makes distances and weights, by name."""
    return {
        "huber_c": float(huber_c), "weight_sigma_data": float(weight_sigma_data),
        "NORM": norm, "WEIGHTING": weighting,
    }


def _loss_fwd(
    pair: _Pair, levels: tuple[Tensor, Tensor, Tensor], measure: dict[str, Any], scales: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The losses and distances [B]. levels: sigma, next_sigma, and the weight or what it is made of."""
    tiles = _summing(pair.plan(*levels))
    parts = tiles.planes * tiles.blocks
    loss, distance = (torch.empty(tiles.batch, dtype=torch.float32, device=pair.x.device) for _ in range(2))
    partial = loss if parts == 1 else loss.new_empty(tiles.batch * parts)
    # A sample is the blocks of all its planes, which are one row's programs, one after the other.
    tiles.run(
        _loss_fwd_kernel, loss, distance, partial, *pair.tensors, *tiles.levels, elements=pair.elements,
        **measure, **scales, **pair.options, FINISH=parts == 1, STEPS=tiles.steps,
    )
    if parts > 1:
        tiles.fold(
            _fold_kernel, loss, distance, partial, tiles.levels[2], parts, elements=pair.elements, **measure,
            PARTS=power_of_two(parts),
        )
    return loss, distance


def _loss_bwd(
    needed: tuple[bool, bool, bool, bool],
    grad: Tensor,
    pair: _Pair,
    levels: tuple[Tensor, Tensor, Tensor],
    distance: Tensor,
    measure: dict[str, Any],
    scales: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of f, x, f_2 and x_2 from that of the losses [B]."""
    if not any(needed):
        return (None,) * 4
    grads = gradients(needed, *pair.tensors)
    tiles = pair.plan(*levels)
    need = dict(zip(("NEED_F", "NEED_X", "NEED_F_2", "NEED_X_2"), needed, strict=True))
    tiles.run(
        _loss_bwd_kernel, *outputs(pair.x, *grads), grad.contiguous(), *pair.tensors, *tiles.levels, distance,
        elements=pair.elements, **measure, **scales, **pair.options, **need,
    )
    return tuple(grads)


def _weight_grad(grad: Tensor, distance: Tensor, weight: Tensor) -> Tensor:
    """The gradient of given weights, a scalar or [B]."""
    return (grad * distance).sum_to_size(weight.shape).to(weight.dtype)


def weighted_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor, *, norm: str, huber_c: float
) -> tuple[Tensor, Tensor]:
    """The losses and, for the backward pass, the distances."""
    return _loss_fwd(_Pair(None, x, None, target), (weight,) * 3, _measure(norm, huber_c), scaling(None, 0.0))


def weighted_loss_bwd(
    needed: tuple[bool, ...],
    grads: Grads,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    norm: str,
    huber_c: float,
    saved: tuple[Tensor, ...],
) -> Grads:
    (grad, *_), (distance,) = grads, saved
    if grad is None:
        return (None,) * 3
    _, grad_x, _, grad_target = _loss_bwd(
        (False, needed[0], False, needed[1]), grad, _Pair(None, x, None, target), (weight,) * 3, distance,
        _measure(norm, huber_c), scaling(None, 0.0),
    )
    return grad_x, grad_target, _weight_grad(grad, distance, weight) if needed[2] else None


def _consistency(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    target: Tensor,
    weight: Tensor | str,
    x_t2: Tensor | None,
    next_sigma: Tensor | None,
    norm: str,
    huber_c: float,
    weight_sigma_data: float,
    sigma_data: float | None,
    boundary: float,
) -> tuple[_Pair, tuple[Tensor, Tensor, Tensor], dict[str, Any], dict[str, Any]]:
    """What both passes give to a kernel."""
    pair = _Pair(model_output, x_t, None, target) if x_t2 is None else _Pair(model_output, x_t, target, x_t2)
    levels = sigma, sigma if next_sigma is None else next_sigma, sigma if isinstance(weight, str) else weight
    measure = _measure(norm, huber_c, weight if isinstance(weight, str) else "given", weight_sigma_data)
    return pair, levels, measure, scaling(sigma_data, boundary)


def consistency_loss_fwd(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses and, for the backward pass, the distances."""
    return _loss_fwd(*_consistency(*arguments, **options))


def consistency_loss_bwd(
    needed: tuple[bool, ...], grads: Grads, *arguments: Any, saved: tuple[Tensor, ...], **options: Any
) -> Grads:
    (grad, *_), (distance,) = grads, saved
    if grad is None:
        return (None,) * 7
    pair, levels, measure, scales = _consistency(*arguments, **options)
    weight, x_t2 = arguments[4], arguments[5]
    need_output, need_x, _, need_target, need_weight, need_x_t2, _ = needed
    wanted = need_output, need_x, *((need_target, need_x_t2) if x_t2 is not None else (False, need_target))
    grad_output, grad_x, *grad_targets = _loss_bwd(wanted, grad, pair, levels, distance, measure, scales)
    grad_target, grad_x_t2 = grad_targets if x_t2 is not None else (grad_targets[1], None)
    grad_weight = _weight_grad(grad, distance, weight) if need_weight else None
    return grad_output, grad_x, None, grad_target, grad_weight, grad_x_t2, None
