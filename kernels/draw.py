"""A training batch at noise levels that are drawn with the noise, in one launch.

`draw_pair_fwd` takes what `cmfast.reference.draw_pair` takes. Every program draws its sample's levels itself: that is
one more counter, and for levels by thresholds a search among them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import as_float32, input_scale, load_state, store_noise_level, store_state, tile_offsets
from cmfast.kernels.group_norm_tiles import sigmoid
from cmfast.kernels.launch import dense, empty, outputs, plan, scaling
from cmfast.kernels.normal import Noise, _counter
from cmfast.kernels.philox import box_muller, load_word, noise_tile, words

# Besides seeds and draws, the number of intervals varies: as training goes on.
levels_jit = triton.jit(do_not_specialize=["blocks", "seed", "seed_high", "draw", "intervals"])


@triton.jit
def _exponential(x):
    """e^x to a few units in the last place, from e^-87 to e^88, which are the ends: the hardware's exponential of the
    part below ln 2."""
    x = tl.minimum(tl.maximum(x, -87.0), 88.0)
    count = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
    rest = (x - count * 0.693145751953125) - count * 1.42860682030941723e-06
    return tl.exp(rest) * ((count.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _index(word, thresholds_ptr, intervals, LEVELS: tl.constexpr, SEARCH: tl.constexpr):
    """Which interval a word chooses, int64: all alike, or as many as there are thresholds at or below it."""
    value = word.to(tl.int64)
    if LEVELS == "alike":
        return (value * intervals) >> 32
    else:
        index = value * 0
        for step in tl.static_range(SEARCH):
            last = index + ((1 << (SEARCH - 1 - step)) - 1)
            exists = last + 1 < intervals
            threshold = tl.load(thresholds_ptr + last, mask=exists, other=0)
            index = tl.where(exists & (threshold <= value), last + 1, index)
        return index


@triton.jit
def _draw_levels(
    table_ptr, thresholds_ptr, index_ptr, row, seed, seed_high, draw, intervals, mean, std, factor, k, b,
    LEVELS: tl.constexpr, STRIDE: tl.constexpr, SEARCH: tl.constexpr,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
):
    """sigma, next_sigma and the level between of a row's sample, float32; those that there are not are sigma."""
    # The draw of levels, as in `reference.draw`.
    number = 0xFFFFFFFD - load_word(draw, DRAW_TENSOR)
    w, w_2, _, _ = words(index_ptr, row, row * 0, seed, seed_high, number, SEED_TENSOR, False)
    if LEVELS == "alike" or LEVELS == "thresholds":
        at = table_ptr + _index(w, thresholds_ptr, intervals, LEVELS, SEARCH) * STRIDE
        return tl.load(at).to(tl.float32), tl.load(at + STRIDE).to(tl.float32), tl.load(at + STRIDE // 2).to(tl.float32)
    else:
        z, _ = box_muller(w, w_2)
        sigma = _exponential(as_float32(mean) + as_float32(std) * z)
        below = sigma
        if LEVELS == "below":
            factor, k, b = as_float32(factor), as_float32(k), as_float32(b)
            below = tl.maximum(sigma * (1.0 - factor * (1.0 + k * sigmoid(-b * sigma))), 0.0)
        return sigma, below, sigma


@levels_jit
def _draw_pair_fwd_kernel(
    x_t_ptr, model_input_ptr, c_noise_ptr, x_t_2_ptr, model_input_2_ptr, c_noise_2_ptr,
    sigma_ptr, next_sigma_ptr, mid_sigma_ptr, x_start_ptr, noise_ptr, index_ptr, table_ptr, thresholds_ptr,
    planes, blocks, pixels, seed, seed_high, draw, intervals, mean, std, factor, k, b, sigma_data,
    PLAIN: tl.constexpr, PAIR: tl.constexpr, LEVELS: tl.constexpr, STRIDE: tl.constexpr, SEARCH: tl.constexpr,
    DRAWN: tl.constexpr, SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """x_t = x_start + σ ε and, if PAIR, x_t2 = x_start + σ' ε, and c_in x; σ, σ' and ε from Philox4x32-10
    x_t(_2)_ptr      [B, N]  state dtype, out    model_input(_2)_ptr            [B, N]  model dtype, out
    c_noise(_2)_ptr  [B]     float32, out        (next_, mid_)sigma_ptr         [B]     float32, out, data units
    x_start_ptr      [B, N]  state dtype         index_ptr                      [B]     noise_ptr [B, N] if not DRAWN
    table_ptr        [STRIDE intervals + 1] floating                 thresholds_ptr  [intervals - 1]  int64
    Grid (rows * planes * blocks,). Traffic: m + 2s bytes per element, 2m + 3s if PAIR. Computes in float32.
    """
    row, at, model_at, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    level, next_level, mid_level = _draw_levels(
        table_ptr, thresholds_ptr, index_ptr, row, seed, seed_high, draw, intervals, mean, std, factor, k, b,
        LEVELS, STRIDE, SEARCH, SEED_TENSOR, DRAW_TENSOR,
    )
    eps = noise_tile(
        noise_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
        DRAWN, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    start = load_state(x_start_ptr, at, mask)
    value = start + level * eps
    store_state(x_t_ptr, at, value, mask)
    store_state(model_input_ptr, model_at, input_scale(level, sigma_data, PLAIN) * value, mask)
    store_noise_level(c_noise_ptr, row, planes, blocks, level, PLAIN, PER_ROW)
    if PAIR:
        value = start + next_level * eps
        store_state(x_t_2_ptr, at, value, mask)
        store_state(model_input_2_ptr, model_at, input_scale(next_level, sigma_data, PLAIN) * value, mask)
        store_noise_level(c_noise_2_ptr, row, planes, blocks, next_level, PLAIN, PER_ROW)
    if tl.program_id(0) % (planes * blocks) == 0:
        tl.store(sigma_ptr + row, level)
        if LEVELS != "lognormal":
            tl.store(next_sigma_ptr + row, next_level)
        if STRIDE == 2:
            tl.store(mid_sigma_ptr + row, mid_level)


def _how(levels: Any, spare: Tensor) -> tuple[int, tuple[Tensor, Tensor], dict[str, Any]]:
    """How many levels are drawn, the tables they are drawn from, and how, by name."""
    scalars: dict[str, Any] = {
        "intervals": 1, "mean": 0.0, "std": 0.0, "factor": 0.0, "k": 0.0, "b": 0.0, "STRIDE": 1, "SEARCH": 0}
    if hasattr(levels, "table"):
        intervals, thresholds = levels.intervals, levels.thresholds
        scalars |= {"intervals": intervals, "STRIDE": levels.stride, "LEVELS": "alike"}
        if thresholds is not None:
            scalars |= {"LEVELS": "thresholds", "SEARCH": (intervals - 1).bit_length()}
        tables = levels.table.contiguous(), spare if thresholds is None else thresholds.contiguous()
        return 1 + levels.stride, tables, scalars
    scalars |= {"mean": float(levels.mean), "std": float(levels.std), "LEVELS": "lognormal"}
    if levels.below is not None:
        scalars |= {name: float(value) for name, value in levels.below._asdict().items()}
        scalars["LEVELS"] = "below"
    return 1 if levels.below is None else 2, (spare, spare), scalars


def draw_pair_fwd(
    x_start: Tensor,
    draw: Any,
    levels: Any,
    *,
    pair: bool,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> tuple[Tensor, ...]:
    """One point or two, three tensors each, then the levels."""
    x_start = dense(x_start)
    batch, device = x_start.shape[0], x_start.device
    points = [
        (empty(x_start), empty(x_start, dtype, memory_format), torch.empty(batch, dtype=torch.float32, device=device))
        for _ in range(1 + pair)
    ]
    count, tables, how = _how(levels, x_start)
    sigmas = [torch.empty(batch, dtype=torch.float32, device=device) for _ in range(count)]
    source = Noise(draw, x_start, points[0][1])
    tiles = plan(x_start, points[0][1], rows=True, planes=source.planes)._replace(per_row=True)
    tiles.run(
        _draw_pair_fwd_kernel, *points[0], *points[-1], *outputs(x_start, *sigmas, *[None] * (3 - count)),
        x_start, source.pointers[0], draw.index.contiguous(), *tables,
        **_counter(draw.seed, draw.draw), **how, **scaling(sigma_data), PAIR=pair, DRAWN=source.drawn,
    )
    return *(part for point in points for part in point), *sigmas
