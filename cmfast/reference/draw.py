"""Noise levels of training drawn from counters, and batches noised at them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype
from cmfast.reference.noise import Draw, add_noise, add_noise_pair, normal
from cmfast.reference.philox import draw_words

#: The draw number of levels that go with noise of draw number 0: noise counts up, levels count down.
LEVEL_DRAW = 0xFFFFFFFD


class Grid(NamedTuple):
    """Levels from a table: sigma = table[stride i] and next_sigma = table[stride (i + 1)] of an index i that is drawn.

    table: float [stride N + 1] for N indices, on the device. thresholds: None where all indices are alike; else int64
    [N - 1], not falling: i is the number of thresholds at or below a 32-bit word, so that they are 2^32 P(index <= i).
    """

    table: Tensor
    stride: int = 1
    thresholds: Tensor | None = None

    @property
    def intervals(self) -> int:
        """N, the number of indices."""
        return (self.table.shape[0] - 1) // self.stride


class Below(NamedTuple):
    """A second level r(t) = max(0, t (1 - factor (1 + k sigmoid(-b t)))): Geng et al. 2024."""

    factor: float
    k: float = 8.0
    b: float = 1.0


class LogNormal(NamedTuple):
    """sigma = exp(mean + std z), z ~ N(0, 1): Karras et al. 2022; and the level `below` it, if there is one."""

    mean: float = -1.2
    std: float = 1.2
    below: Below | None = None


Levels = Grid | LogNormal


def level_below(sigma: Tensor, below: Below) -> Tensor:
    """r(sigma), of its shape and dtype, for the numbers of `below`."""
    return (sigma * (1 - _part(sigma, below))).clamp(min=0)


def level_gap(sigma: Tensor, below: Below) -> Tensor:
    """sigma - r(sigma), with r of `below`, without the cancellation: positive also where the two are the same
    number."""
    return (sigma * _part(sigma, below).clamp(max=1)).clamp(min=torch.finfo(sigma.dtype).tiny)


def _part(sigma: Tensor, below: Below) -> Tensor:
    return below.factor * (1 + below.k * torch.sigmoid(-below.b * sigma))


def level_draw(draw: Draw) -> int | Tensor:
    """The draw number of its levels. In int64: fewer bits would wrap."""
    return LEVEL_DRAW - (draw.draw.to(torch.int64) if isinstance(draw.draw, Tensor) else draw.draw)


def draw_index(draw: Draw, grid: Grid) -> Tensor:
    """The index on `grid` of each sample's pair, int64 [B], from (draw.seed, draw.index[b], draw.draw) alone."""
    word = draw_words(draw.seed, draw.index, level_draw(draw), 1)[0][:, 0]
    if grid.thresholds is None:
        return (word * grid.intervals) >> 32
    return torch.searchsorted(grid.thresholds, word, right=True)


def draw_levels(draw: Draw, levels: Levels, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The levels [B] of each sample: sigma, next_sigma where there is one, and where stride = 2 the one between."""
    if isinstance(levels, Grid):
        at = draw_index(draw, levels) * levels.stride
        table = levels.table.to(dtype)
        between = (table[at + 1],) if levels.stride == 2 else ()
        return table[at], table[at + levels.stride], *between
    z = normal(draw.seed, draw.index, (), draw=level_draw(draw), dtype=dtype)
    sigma = torch.exp(levels.mean + levels.std * z)
    return (sigma,) if levels.below is None else (sigma, level_below(sigma, levels.below))


def draw_pair(
    x_start: Tensor,
    draw: Draw,
    levels: Levels,
    *,
    pair: bool = True,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, ...]:
    """`add_noise` at drawn levels, or with `pair` `add_noise_pair`; then the levels."""
    drawn = draw_levels(draw, levels, compute_dtype(x_start))
    options: dict[str, Any] = {"sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    if pair:
        return *add_noise_pair(x_start, draw, drawn[0], drawn[1], **options), *drawn
    return *add_noise(x_start, draw, drawn[0], **options), *drawn
