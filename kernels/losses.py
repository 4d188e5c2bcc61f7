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
    load_level,
    load_state,
    offsets,
    skip_and_out,
    store_state,
    unclipped,
)
from cmfast.kernels.launch import Plan, dense, gradients, outputs, plan, scaling

Grads = tuple[Tensor | None, ...]

NORMS = ("l1", "l2", "huber")
#: How a kernel makes weights of noise levels; given weights are number 0.
WEIGHTINGS = ("given", "uniform", "snr", "snr+1", "karras", "truncated-snr")
#: A sample of up to so many elements is summed by one program, in blocks of WHOLE_BLOCK; a longer one by several.
WHOLE = 32768
WHOLE_BLOCK = 4096
#: Blocks that one of several programs sums, at most, where a sample has no more than PARTS of them.
STEPS = 8
#: Partial sums of a sample, at most.
PARTS = 1024
#: Programs that keep a GPU busy.
ENOUGH = 512

_L1, _L2, _HUBER = (tl.constexpr(i) for i in range(3))
_GIVEN, _UNIFORM, _SNR, _SNR_PLUS_1, _KARRAS, _TRUNCATED_SNR = (tl.constexpr(i) for i in range(6))


@triton.jit
def _weight(weight, row, weight_sigma_data, WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr):
    """A sample's weight: given, or from its noise level by snr = 1 / sigma^2."""
    level = load_level(weight, row, PER_ROW)
    if WEIGHTING == _GIVEN:
        return level
    elif WEIGHTING == _UNIFORM:
        return tl.zeros_like(level) + 1.0
    else:
        snr = tl.div_rn(1.0, level * level)
        if WEIGHTING == _SNR:
            return snr
        elif WEIGHTING == _SNR_PLUS_1:
            return snr + 1.0
        elif WEIGHTING == _KARRAS:
            return snr + tl.div_rn(1.0, weight_sigma_data * weight_sigma_data)
        else:
            return tl.where(snr < 1.0, 1.0, snr)


@triton.jit
def _chunk(planes, blocks, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """This program's row, plane and first pixel: STEPS blocks, one after the other."""
    program = tl.program_id(0)
    plane = (program % planes).to(tl.int64)
    block = program // planes % blocks
    row = (program // planes // blocks).to(tl.int64)
    return row, plane, block.to(tl.int64) * (BLOCK * STEPS)


@triton.jit
def _finish(total, loss, distance, weight, row, elements, huber_c, weight_sigma_data, NORM: tl.constexpr,
            WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr):
    """The distance and the loss of a row from its sum."""
    if NORM == _HUBER:
        # sqrt(s + c^2) - c without the cancellation.
        root = tl.sqrt_rn(total + huber_c * huber_c) + huber_c
        safe = (root > 0.0) & (root < float("inf"))
        value = tl.where(safe, tl.div_rn(total, tl.where(safe, root, 1.0)), root)
    else:
        value = tl.div_rn(total, elements)
    tl.store(distance + row, value)
    tl.store(loss + row, value * _weight(weight, row, weight_sigma_data, WEIGHTING, PER_ROW))


@triton.jit
def _fold_kernel(
    partial, loss, distance, weight, elements, huber_c, weight_sigma_data, parts,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(partial + row * parts + part, mask=part < parts, other=0.0))
    _finish(total, loss, distance, weight, row, elements, huber_c, weight_sigma_data, NORM, WEIGHTING, PER_ROW)


@triton.jit
def _difference(
    f, x, f_2, x_2, row, plane, pixel, mask, planes, pixels, c_skip, c_out, c_skip_2, c_out_2,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr,
):
    """D - D_target, each of them given as x and x_2 or made of network outputs."""
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    if FROM_OUTPUT:
        output = load_state(f, model_at, mask)
        state = output if PLAIN else load_state(x, at, mask)
        value = unclipped(output, state, c_skip, c_out, PLAIN)
    else:
        value = load_state(x, at, mask)
    if TARGET_FROM_OUTPUT:
        output_2 = load_state(f_2, model_at, mask)
        state_2 = output_2 if PLAIN else load_state(x_2, at, mask)
        target = unclipped(output_2, state_2, c_skip_2, c_out_2, PLAIN)
    else:
        target = load_state(x_2, at, mask)
    return value - target


@triton.jit(do_not_specialize=["blocks"])
def _loss_fwd_kernel(
    f, x, f_2, x_2, sigma, next_sigma, weight, partial, loss, distance,
    elements, huber_c, weight_sigma_data, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr, FINISH: tl.constexpr, STEPS: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, first = _chunk(planes, blocks, BLOCK, STEPS)
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(load_level(next_sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        pixel = first + step * BLOCK + tl.arange(0, BLOCK)
        delta = _difference(
            f, x, f_2, x_2, row, plane, pixel, pixel < pixels, planes, pixels, c_skip, c_out, c_skip_2, c_out_2,
            PLAIN, FROM_OUTPUT, TARGET_FROM_OUTPUT, STATE_LAST, MODEL_LAST,
        )
        if NORM == _L1:
            total += tl.abs(delta)
        else:
            total += delta * delta
    if FINISH:
        _finish(
            tl.sum(total), loss, distance, weight, row, elements, huber_c, weight_sigma_data, NORM, WEIGHTING, PER_ROW
        )
    else:
        tl.store(partial + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["blocks"])
def _loss_bwd_kernel(
    grad, f, x, f_2, x_2, sigma, next_sigma, weight, distance, grad_f, grad_x, grad_f_2, grad_x_2,
    elements, huber_c, weight_sigma_data, sigma_data, boundary, planes, blocks, pixels,
    PLAIN: tl.constexpr, FROM_OUTPUT: tl.constexpr, TARGET_FROM_OUTPUT: tl.constexpr,
    NORM: tl.constexpr, WEIGHTING: tl.constexpr,
    NEED_F: tl.constexpr, NEED_X: tl.constexpr, NEED_F_2: tl.constexpr, NEED_X_2: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    row, plane, first = _chunk(planes, blocks, BLOCK, 1)
    pixel = first + tl.arange(0, BLOCK)
    mask = pixel < pixels
    c_skip, c_out = skip_and_out(load_level(sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    c_skip_2, c_out_2 = skip_and_out(load_level(next_sigma, row, PER_ROW), sigma_data, boundary, PLAIN)
    delta = _difference(
        f, x, f_2, x_2, row, plane, pixel, mask, planes, pixels, c_skip, c_out, c_skip_2, c_out_2,
        PLAIN, FROM_OUTPUT, TARGET_FROM_OUTPUT, STATE_LAST, MODEL_LAST,
    )
    scale = tl.load(grad + row).to(tl.float32) * _weight(weight, row, weight_sigma_data, WEIGHTING, PER_ROW)
    if NORM == _L1:
        g = tl.div_rn(scale, elements) * tl.where(delta > 0.0, 1.0, tl.where(delta < 0.0, -1.0, delta))
    elif NORM == _L2:
        g = tl.div_rn(2.0 * scale, elements) * delta
    else:
        # Zero where x = y and c = 0, where the square root has no slope.
        root = tl.load(distance + row) + huber_c
        g = tl.where(root == 0.0, 0.0, tl.div_rn(scale, tl.where(root == 0.0, 1.0, root))) * delta
    at = offsets(row, plane, pixel, planes, pixels, STATE_LAST)
    model_at = offsets(row, plane, pixel, planes, pixels, MODEL_LAST)
    if NEED_F:
        store_state(grad_f, model_at, c_out * g, mask)
    if NEED_X:
        store_state(grad_x, at, c_skip * g if FROM_OUTPUT else g, mask)
    if NEED_F_2:
        store_state(grad_f_2, model_at, -c_out_2 * g, mask)
    if NEED_X_2:
        store_state(grad_x_2, at, -c_skip_2 * g if TARGET_FROM_OUTPUT else -g, mask)


class _Pair:
    """Two batches to compare, in common layouts: x and x_2, each with a network output or without."""

    def __init__(self, f: Tensor | None, x: Tensor, f_2: Tensor | None, x_2: Tensor) -> None:
        self.x = dense(x)
        self.x_2 = dense(x_2, self.x)
        self.model = None if f is None else dense(f)
        self.model_2 = None if f_2 is None else dense(f_2, self.model)
        self.tensors = outputs(self.x, self.model, self.x, self.model_2, self.x_2)
        self.options = {"FROM_OUTPUT": f is not None, "TARGET_FROM_OUTPUT": f_2 is not None}
        self.elements = self.x.numel() // max(self.x.shape[0], 1)

    def plan(self, *levels: Tensor) -> Plan:
        return plan(self.x, self.model, *levels, rows=True)


def _summing(tiles: Plan) -> Plan:
    """The plan of a sum: one program for a whole sample if that is short, else few blocks each, and many programs."""
    if tiles.planes == 1 and tiles.pixels <= WHOLE:
        block = min(WHOLE_BLOCK, max(128, 1 << (tiles.pixels - 1).bit_length()))
        steps = max(1, -(-tiles.pixels // block))
        return tiles._replace(block=block, steps=steps, warps=max(tiles.warps, block // 256))
    blocks = tiles.planes * tiles.blocks
    steps = max(min(STEPS, tiles.rows * blocks // ENOUGH), blocks // PARTS, 1)
    return tiles._replace(steps=1 << (steps - 1).bit_length())


def _loss_fwd(
    pair: _Pair, levels: tuple[Tensor, Tensor, Tensor], sizes: tuple[float, float, float, float], **options: Any
) -> tuple[Tensor, Tensor]:
    """The losses and distances [B]. levels: sigma, next_sigma, and the weight or what it is made of; sizes: huber_c,
    weight_sigma_data, sigma_data, boundary."""
    tiles = _summing(pair.plan(*levels))
    parts = tiles.planes * tiles.blocks
    loss, distance = (torch.empty(tiles.batch, dtype=torch.float32, device=pair.x.device) for _ in range(2))
    partial = loss if parts == 1 else loss.new_empty(tiles.batch * parts)
    # A sample is the blocks of all its planes, which are one row's programs, one after the other.
    tiles.run(
        _loss_fwd_kernel, *pair.tensors, *tiles.levels, partial, loss, distance, float(pair.elements), *sizes,
        **pair.options, **options, FINISH=parts == 1, STEPS=tiles.steps,
    )
    if parts > 1:
        tiles.fold(
            _fold_kernel, partial, loss, distance, tiles.levels[2], float(pair.elements), *sizes[:2], parts,
            NORM=options["NORM"], WEIGHTING=options["WEIGHTING"], PARTS=1 << (parts - 1).bit_length(),
        )
    return loss, distance


def _loss_bwd(
    needed: tuple[bool, bool, bool, bool],
    grad: Tensor,
    pair: _Pair,
    levels: tuple[Tensor, Tensor, Tensor],
    distance: Tensor,
    sizes: tuple[float, float, float, float],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of f, x, f_2 and x_2 from that of the losses [B]."""
    if not any(needed):
        return (None,) * 4
    grads = gradients(needed, *pair.tensors)
    tiles = pair.plan(*levels)
    need = dict(zip(("NEED_F", "NEED_X", "NEED_F_2", "NEED_X_2"), needed, strict=True))
    tiles.run(
        _loss_bwd_kernel, grad.contiguous(), *pair.tensors, *tiles.levels, distance, *outputs(pair.x, *grads),
        float(pair.elements), *sizes, **pair.options, **options, **need,
    )
    return tuple(grads)


def _weight_grad(grad: Tensor, distance: Tensor, weight: Tensor) -> Tensor:
    """The gradient of given weights, a scalar or [B]."""
    return (grad * distance).sum_to_size(weight.shape).to(weight.dtype)


def weighted_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor, *, norm: str, huber_c: float
) -> tuple[Tensor, Tensor]:
    """The losses and, for the backward pass, the distances."""
    options = {"PLAIN": True, "NORM": NORMS.index(norm), "WEIGHTING": 0}
    return _loss_fwd(_Pair(None, x, None, target), (weight,) * 3, (float(huber_c), 1.0, 1.0, 0.0), **options)


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
    options = {"PLAIN": True, "NORM": NORMS.index(norm), "WEIGHTING": 0}
    _, grad_x, _, grad_target = _loss_bwd(
        (False, needed[0], False, needed[1]), grad, _Pair(None, x, None, target), (weight,) * 3, distance,
        (float(huber_c), 1.0, 1.0, 0.0), **options,
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
) -> tuple[_Pair, tuple[Tensor, Tensor, Tensor], tuple[float, float, float, float], dict[str, Any]]:
    """What both passes give to a kernel."""
    from_output = x_t2 is not None
    pair = _Pair(model_output, x_t, target if from_output else None, x_t2 if from_output else target)
    levels = sigma, sigma if next_sigma is None else next_sigma, sigma if isinstance(weight, str) else weight
    sizes = float(huber_c), float(weight_sigma_data), *scaling(sigma_data, boundary)
    weighting = weight if isinstance(weight, str) else "given"
    options = {
        "PLAIN": sigma_data is None, "NORM": NORMS.index(norm), "WEIGHTING": WEIGHTINGS.index(weighting)
    }
    return pair, levels, sizes, options


def consistency_loss_fwd(*arguments: Any, **sizes: Any) -> tuple[Tensor, Tensor]:
    """The losses and, for the backward pass, the distances."""
    pair, levels, numbers, options = _consistency(*arguments, **sizes)
    return _loss_fwd(pair, levels, numbers, **options)


def consistency_loss_bwd(
    needed: tuple[bool, ...], grads: Grads, *arguments: Any, saved: tuple[Tensor, ...], **sizes: Any
) -> Grads:
    (grad, *_), (distance,) = grads, saved
    if grad is None:
        return (None,) * 7
    pair, levels, numbers, options = _consistency(*arguments, **sizes)
    weight, x_t2 = arguments[4], arguments[5]
    need_output, need_x, _, need_target, need_weight, need_x_t2, _ = needed
    wanted = need_output, need_x, *((need_target, need_x_t2) if x_t2 is not None else (False, need_target))
    grad_output, grad_x, *grad_targets = _loss_bwd(wanted, grad, pair, levels, distance, numbers, **options)
    grad_target, grad_x_t2 = grad_targets if x_t2 is not None else (grad_targets[1], None)
    grad_weight = _weight_grad(grad, distance, weight) if need_weight else None
    return grad_output, grad_x, None, grad_target, grad_weight, grad_x_t2, None
