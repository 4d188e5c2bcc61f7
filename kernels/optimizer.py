"""RAdam and Adam over lists of tensors: the norm of the gradients in two launches, then the step in two.

The step's first launch makes its scalars, from the device's own step count; the second does everything else.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.averages import average
from cmfast.kernels.common import as_float32, lerp, load_state, store_state
from cmfast.kernels.launch import BLOCK, launch, power_of_two
from cmfast.kernels.pointers import piece, tables, tensor_at

#: Partial sums of a norm that one program folds, about, and how many keep a GPU busy.
PARTS, ENOUGH = 8192, 1024
#: Scalars of a step: skip, factor of the gradients, decay of the parameters, size, eps, whether it adapts.
SCALARS = 6


@triton.jit
def _norm_kernel(
    table_ptr, owners_ptr, partial_ptr,
    GRADIENT: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sums of g^2 over STEPS blocks
    table_ptr    [pieces, 3]  int64: g      owners_ptr  [programs]  int32
    partial_ptr  [programs]   float32, out
    Grid (programs,). Traffic: g's bytes per element. Accumulates in float32.
    """
    row_ptr, start, count = piece(table_ptr, owners_ptr, 1, ALIGNED, STEPS * BLOCK)
    gradient_ptr = tensor_at(row_ptr, 0, GRADIENT, ALIGNED)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        g = load_state(gradient_ptr, at, at < count)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_fold_kernel(norm_ptr, partial_ptr, scale_ptr, parts, HAS_SCALE: tl.constexpr, PARTS: tl.constexpr):
    """sqrt(sum of the parts), divided by the size of the scale if HAS_SCALE
    norm_ptr  []  float32, out    partial_ptr  [parts]  float32    scale_ptr  []  float32
    Grid (1,). Traffic: 4 bytes per part. Accumulates in float32.
    """
    part = tl.arange(0, PARTS)
    norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + part, mask=part < parts, other=0.0)))
    if HAS_SCALE:
        norm = tl.div_rn(norm, tl.abs(tl.load(scale_ptr).to(tl.float32)))
    tl.store(norm_ptr, norm)


def grad_norm(gradients: list[Tensor], *, grad_scale: Tensor | None = None) -> Tensor:
    """Of dense gradients."""
    elements = sum(g.numel() for g in gradients)
    steps = 1
    while elements > steps * BLOCK * PARTS or (steps < 8 and elements > 2 * steps * BLOCK * ENOUGH):
        steps *= 2
    found = tables([gradients], steps * BLOCK)
    parts = sum(table.programs for table in found)
    partial = torch.empty(parts, dtype=torch.float32, device=gradients[0].device)
    norm = torch.empty((), dtype=torch.float32, device=gradients[0].device)
    first = 0
    for table in found:
        table.run(_norm_kernel, partial[first:], GRADIENT=table.type(0), STEPS=steps, BLOCK=BLOCK)
        first += table.programs
    scale = norm if grad_scale is None else grad_scale
    launch(
        _norm_fold_kernel, 1, norm, partial, scale, parts, HAS_SCALE=grad_scale is not None,
        PARTS=max(power_of_two(parts), 2), warps=8,
    )  # fmt: skip
    return norm


@triton.jit
def _as_float64(bits):
    """The float64 of these bits, an integer: a number with a fraction comes as float32."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent in float64, for a whole exponent up to 2^24, at which the count of a float32 stops."""
    result = tl.full((), 1.0, tl.float64)
    for bit in tl.static_range(25):
        result = tl.where((exponent >> bit) & 1 != 0, result * base, result)
        base = base * base
    return result


# A schedule may change them at every step.
@triton.jit(do_not_specialize=["beta_1", "beta_2"])
def _scalars_kernel(
    scalars_ptr, step_ptr, lr_ptr, scale_ptr, found_ptr, norm_ptr, lr, weight_decay, max_norm, eps, beta_1, beta_2,
    RECTIFIED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, HAS_LR: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, HAS_NORM: tl.constexpr, CLIP: tl.constexpr,
):
    """What a step does to every element, as scalars; step + 1 if it is not skipped
                                           RAdam: Liu et al. 2019, algorithm 2; Adam: Kingma & Ba 2015, algorithm 1
    scalars_ptr  [6]  float32, out    step_ptr   []  float32, in and out
    lr_ptr       []   if HAS_LR       scale_ptr  []  if HAS_SCALE: gradients are divided by it
    found_ptr    []   if HAS_FOUND: not 0 skips    norm_ptr  []  if HAS_NORM: not finite skips
    beta_1, beta_2    bits of float64
    Grid (1,). Traffic: these scalars. rho and powers of beta in float64, where float32 misses the threshold rho > 5.
    """
    lr, weight_decay, max_norm, eps = as_float32(lr), as_float32(weight_decay), as_float32(max_norm), as_float32(eps)
    skip = tl.full((), 0.0, tl.float32)
    if HAS_FOUND:
        skip = tl.where(tl.load(found_ptr).to(tl.float32) == 0.0, 0.0, 1.0)
    factor = tl.full((), -1.0 if MAXIMIZE else 1.0, tl.float32)
    if HAS_SCALE:
        factor = tl.div_rn(factor, tl.load(scale_ptr).to(tl.float32))
    if HAS_NORM:
        norm = tl.load(norm_ptr).to(tl.float32)
        # Neither infinite nor NaN.
        skip = tl.where(tl.abs(norm) < float("inf"), skip, 1.0)
        if CLIP:
            factor *= tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0)
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    t = tl.load(step_ptr) + 1.0
    beta_2 = _as_float64(beta_2)
    beta_1_t, beta_2_t = _power(_as_float64(beta_1), t.to(tl.int32)), _power(beta_2, t.to(tl.int32))
    root = tl.sqrt_rn((1.0 - beta_2_t).to(tl.float32))
    size = tl.div_rn(lr, (1.0 - beta_1_t).to(tl.float32))
    adapts = t > 0.0
    if RECTIFIED:
        limit = 2.0 / (1.0 - beta_2) - 1.0
        rho = limit - 2.0 * t.to(tl.float64) * beta_2_t / (1.0 - beta_2_t)
        adapts = rho > 5.0
        square = (rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho)
        rectification = tl.sqrt_rn(tl.where(adapts, square, 1.0).to(tl.float32))
        size = tl.where(adapts, size * rectification * root, size)
    else:
        # m / (sqrt(v / c) + eps) = sqrt(c) m / (sqrt(v) + sqrt(c) eps)
        size = size * root
        eps = eps * root
    tl.store(scalars_ptr, skip)
    tl.store(scalars_ptr + 1, factor)
    tl.store(scalars_ptr + 2, 1.0 - lr * weight_decay if DECOUPLED else 1.0)
    tl.store(scalars_ptr + 3, size)
    tl.store(scalars_ptr + 4, eps)
    tl.store(scalars_ptr + 5, adapts.to(tl.float32))
    tl.store(step_ptr, t - skip)


@triton.jit
def _step_kernel(
    table_ptr, owners_ptr, scalars_ptr, rates_ptr, weight_1, beta_2, weight_2, weight_decay,
    PARAMETER: tl.constexpr, MOMENT: tl.constexpr, GRADIENT: tl.constexpr, AVERAGE: tl.constexpr, COPY: tl.constexpr,
    HAS_COPY: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    """m <- m + (1 - beta1) (g - m), v <- beta2 v + (1 - beta2) g^2, p <- decay p - size m / (sqrt(v) + eps), averages
    table_ptr    [pieces, 2 + columns]  int64: p, m, v, g, a_0 .. a_{K-1}, and the copy if HAS_COPY
    owners_ptr   [programs]  int32      scalars_ptr  [6]  float32, of _scalars_kernel
    rates_ptr    [K]  float64 or float32
    Grid (programs,). Traffic: 7 x 4 + 8 K bytes per element in float32, + the copy's; none where the step is skipped.
    Computes in float32.
    """
    weight_1, beta_2 = as_float32(weight_1), as_float32(beta_2)
    weight_2, weight_decay = as_float32(weight_2), as_float32(weight_decay)
    row_ptr, start, count = piece(table_ptr, owners_ptr, 4 + K + HAS_COPY, ALIGNED, BLOCK)
    at = start + tl.arange(0, BLOCK)
    # A skipped step touches nothing.
    mask = at < tl.where(tl.load(scalars_ptr) == 0.0, count, 0)
    parameter_ptr = tensor_at(row_ptr, 0, PARAMETER, ALIGNED)
    m_ptr = tensor_at(row_ptr, 1, MOMENT, ALIGNED)
    v_ptr = tensor_at(row_ptr, 2, MOMENT, ALIGNED)
    p = load_state(parameter_ptr, at, mask)
    m = load_state(m_ptr, at, mask)
    v = load_state(v_ptr, at, mask)
    g = load_state(tensor_at(row_ptr, 3, GRADIENT, ALIGNED), at, mask) * tl.load(scalars_ptr + 1) + weight_decay * p
    m = lerp(m, g, weight_1)
    v = beta_2 * v + weight_2 * g * g
    store_state(m_ptr, at, m, mask)
    store_state(v_ptr, at, v, mask)
    divisor = tl.where(tl.load(scalars_ptr + 5) > 0.0, tl.sqrt_rn(v) + tl.load(scalars_ptr + 4), 1.0)
    p = tl.load(scalars_ptr + 2) * p - tl.div_rn(tl.load(scalars_ptr + 3) * m, divisor)
    # What is averaged and copied is the parameter as it is stored.
    p = p.to(PARAMETER)
    tl.store(parameter_ptr + at, p, mask=mask)
    p = p.to(tl.float32)
    average(row_ptr, rates_ptr, at, mask, p, AVERAGE, 4, K, ALIGNED)
    if HAS_COPY:
        store_state(tensor_at(row_ptr, 4 + K, COPY, ALIGNED), at, p, mask)


def radam_ema_(*arguments: Any, **options: Any) -> Tensor:
    return _step(True, *arguments, **options)


def adam_ema_(*arguments: Any, **options: Any) -> Tensor:
    return _step(False, *arguments, **options)


def _bits(value: float) -> int:
    """Of a float64, as an integer."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _step(
    rectified: bool,
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    averages: list[list[Tensor]],
    rates: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_norm: float | None,
    copies: list[Tensor] | None,
) -> Tensor:
    """Of dense tensors that lie alike in memory; both moments, and the averages, of a parameter have one dtype."""
    scalars = torch.empty(SCALARS, dtype=torch.float32, device=step.device)
    given = [x if isinstance(x, Tensor) else scalars for x in (lr, grad_scale, found_inf, grad_norm)]
    launch(
        _scalars_kernel, 1, scalars, step, *given, 0.0 if isinstance(lr, Tensor) else float(lr), float(weight_decay),
        float(max_norm or 0), float(eps), *map(_bits, betas), RECTIFIED=rectified, DECOUPLED=decoupled_weight_decay,
        MAXIMIZE=maximize, HAS_LR=isinstance(lr, Tensor), HAS_SCALE=grad_scale is not None,
        HAS_FOUND=found_inf is not None, HAS_NORM=grad_norm is not None,
        CLIP=max_norm is not None and max_norm < float("inf"), warps=1,
    )  # fmt: skip
    weights = 1.0 - betas[0], float(betas[1]), 1.0 - betas[1], 0.0 if decoupled_weight_decay else float(weight_decay)
    lists = [parameters, exp_avgs, exp_avg_sqs, gradients, *averages, *([copies] if copies is not None else [])]
    for table in tables(lists, BLOCK):
        table.run(
            _step_kernel, scalars, rates, *weights, PARAMETER=table.type(0), MOMENT=table.type(1),
            GRADIENT=table.type(3), AVERAGE=table.type(4 if averages else 0), COPY=table.type(-1),
            HAS_COPY=copies is not None, K=len(averages), BLOCK=BLOCK,
        )  # fmt: skip
    return scalars[0]
