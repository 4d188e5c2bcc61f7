"""What a training step draws: noise levels, and batches noised at them, all from counters and in one launch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.native import noise as native_noise
from cmfast.ops import _check
from cmfast.ops._dispatch import INTEGERS, plain_on_cpu, use_kernel
from cmfast.ops.noise import add_noise, add_noise_pair
from cmfast.reference import Below, Draw, Grid, Levels, LogNormal


class Drawn(NamedTuple):
    """Points of trajectories at drawn levels.

    first, second: (x, network input, c_noise) at sigma, and at next_sigma if both were asked for. sigma, next_sigma,
    mid_sigma: [B]; the last is the level between, of a grid of stride 2.
    """

    first: tuple[Tensor, Tensor, Tensor]
    second: tuple[Tensor, Tensor, Tensor] | None
    sigma: Tensor
    next_sigma: Tensor | None
    mid_sigma: Tensor | None


def _check_levels(levels: object, device: torch.device) -> None:
    if isinstance(levels, LogNormal):
        _check.finite("levels.mean", levels.mean)
        _check.number("levels.std", levels.std)
        if levels.below is not None and not isinstance(levels.below, Below):
            raise TypeError(f"levels.below must be a Below, or None, got {levels.below!r}")
        for name, value in () if levels.below is None else levels.below._asdict().items():
            _check.finite(f"levels.below.{name}", value)
        return
    if not isinstance(levels, Grid):
        raise TypeError(f"levels must be a Grid or a LogNormal, got {type(levels).__name__}")
    table, stride, thresholds = levels
    _check.float_tensor("levels.table", table)
    if stride not in (1, 2) or table.ndim != 1 or levels.intervals < 1 or table.shape[0] % stride != 1 % stride:
        raise ValueError(f"levels.table must be [stride N + 1] with N >= 1, got {list(table.shape)}, stride {stride}")
    if thresholds is not None:
        if thresholds.dtype != torch.int64 or thresholds.shape != (levels.intervals - 1,):
            came = f"{thresholds.dtype} {list(thresholds.shape)}"
            raise ValueError(f"levels.thresholds must be int64 [{levels.intervals - 1}], got {came}")
    for name, tensor in (("table", table), ("thresholds", thresholds)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"levels.{name} is on {tensor.device}, the batch on {device}: move one of them")


def draw_levels(draw: Draw, levels: Levels, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Noise levels [B] of the samples of a draw, from (seed, index[b], draw number) alone: those of `draw_pair`.

    sigma; next_sigma, of a `Grid` and of a `LogNormal` with a level below; the level between, of a grid of stride 2.
    All in `dtype`, in data units.

    Raises: TypeError, ValueError: an argument of the wrong type, shape or device; the message names it.

    >>> draw_levels(Draw(0, torch.arange(3)), Grid(torch.tensor([80.0, 0.002])))
    (tensor([80., 80., 80.]), tensor([0.0020, 0.0020, 0.0020]))
    """
    draw = _check.counter("draw", draw)
    _check_levels(levels, draw.index.device)
    if dtype not in _check.DTYPES:
        raise TypeError(f"dtype must be floating, got {dtype}")
    return _draw_levels(draw, levels, dtype)


def _draw_levels(draw: Draw, levels: Levels, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """By C where it serves, on a CPU."""
    table, thresholds = (levels.table, levels.thresholds) if isinstance(levels, Grid) else (None, None)
    tables = [] if table is None else [table]
    integers = [x for x in (*draw, thresholds) if isinstance(x, Tensor)]
    there = dtype == torch.float32 and plain_on_cpu(tables) and plain_on_cpu(integers, INTEGERS)
    recorded = table is not None and torch.is_grad_enabled() and table.requires_grad
    if not there or recorded or native.watched() or native_noise.refusal() is not None:
        return reference.draw_levels(draw, levels, dtype)
    return native_noise.levels(draw, levels)


def draw_pair(
    x_start: Tensor,
    draw: Draw,
    levels: Levels,
    *,
    pair: bool = True,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Drawn:
    """Draws levels and noise, and puts x_start there: x_start + sigma noise and x_start + next_sigma noise.

    Everything follows from (draw.seed, draw.index[b], draw.draw): the noise is that of `normal` under this draw, the
    levels are those of `draw_levels`. On a GPU it is one launch, which nothing on the host takes part in.

    Args: x_start [B, ...]; pair: False leaves out the second point; sigma_data, dtype and memory_format of the network
        inputs as in `add_noise`.
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> drawn = draw_pair(torch.zeros(2, 3, 8, 8), Draw(0, torch.arange(2)), Grid(torch.tensor([80.0, 2.0, 0.002])))
    >>> drawn.first[0].shape, drawn.sigma.shape, drawn.mid_sigma
    (torch.Size([2, 3, 8, 8]), torch.Size([2]), None)
    """
    _check.float_tensor("x_start", x_start)
    draw = _check.draw_for("draw", draw, x_start, "x_start")
    _check_levels(levels, x_start.device)
    _check.flag("pair", pair)
    _check.sigma_data_value(sigma_data)
    _check.input_format(x_start, dtype, memory_format)
    if pair and isinstance(levels, LogNormal) and levels.below is None:
        raise ValueError("pair=True needs a second level: give the LogNormal one below, or pair=False")
    options: dict[str, Any] = {"sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    tables = (levels.table, levels.thresholds) if isinstance(levels, Grid) else ()
    recorded = torch.is_grad_enabled() and x_start.requires_grad
    if not recorded and use_kernel("draw_pair", x_start, draw, *tables, dtypes=(dtype,)):
        from cmfast.kernels.draw import draw_pair_fwd

        parts = draw_pair_fwd(x_start, draw, levels, pair=pair, **options)
        return _drawn(parts[:3], parts[3:6] if pair else None, parts[3 + 3 * pair :])
    # Differentiable, and on a CPU in C.
    drawn = _draw_levels(draw, levels, _check.sigma_dtype(x_start))
    if pair:
        first, second = add_noise_pair(x_start, draw, drawn[0], drawn[1], **options)
    else:
        first, second = add_noise(x_start, draw, drawn[0], **options), None
    return _drawn(first, second, drawn)


def _drawn(first: Any, second: Any, levels: tuple[Tensor, ...]) -> Drawn:
    sigma, next_sigma, mid_sigma, *_ = *levels, None, None
    return Drawn(first, second, sigma, next_sigma, mid_sigma)
