"""What changes while a consistency model trains: how many levels there are, and how far apart a pair of them is.

All of it follows from the step alone, so that every rank comes to the same. The original's curricula are
`schedules.ema_and_scales`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmfast import schedules
from cmfast.ops import Below, Grid, _check

#: ln sigma ~ N(mean, std^2), in iCT and ECT.
MEAN, STD = -1.1, 2.0


def doubling_steps(total_steps: int, start_scales: int, end_scales: int) -> int:
    """K' = floor(K / (log2 floor(s1 / s0) + 1)), the steps of each stage of `doubling_stage`; 1 or more.

    K is total_steps, s0 start_scales, s1 end_scales.

    Raises: TypeError: one that is no whole number. ValueError: one below 1, or s1 below s0.
    """
    _check.whole("total_steps", total_steps, least=1)
    _check.whole("end_scales", end_scales, least=_check.whole("start_scales", start_scales, least=1))
    return max(math.floor(total_steps / (math.log2(end_scales // start_scales) + 1)), 1)


def doubling_stage(step: int, total_steps: int, start_scales: int, end_scales: int) -> tuple[int, int]:
    """The stage and N(step) = min(s0 2^floor(k / K'), s1) + 1: Song & Dhariwal 2023. No stage follows that of s1.

    total_steps, start_scales, end_scales: as of `doubling_steps`, step: from 0. Raises: as there.

    >>> [doubling_stage(step, 800, 10, 1280) for step in (0, 99, 100, 700, 800)]
    [(0, 11), (0, 11), (1, 21), (7, 1281), (7, 1281)]
    """
    length = doubling_steps(total_steps, start_scales, end_scales)
    last = math.ceil(math.log2(end_scales / start_scales))
    stage = min(_check.whole("step", step, least=0) // length, last)
    return stage, min(start_scales * 2**stage, end_scales) + 1


def stage_below(stage: int, *, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Below:
    """The second level of easy consistency tuning: r(t) = max(0, t (1 - q^-(stage + 1) (1 + k sigmoid(-b t)))).

    Geng et al. 2024. The pair comes closer from stage to stage; r = 0 where the bracket is negative.

    Raises: ValueError: a stage, k or b below 0, or q that is not above 1. TypeError: a stage that is no whole number.

    >>> stage_below(0)
    Below(factor=0.5, k=8.0, b=1.0)
    """
    stage = _check.whole("stage", stage, least=0)
    _check.positive("q", q)
    if q <= 1:
        raise ValueError(f"q must be above 1, so that pairs come closer from stage to stage, got {q}")
    _check.number("k", k)
    _check.number("b", b)
    return Below(q ** -(stage + 1.0), k, b)


def _kept(make: Callable[..., Grid]) -> Callable[..., Grid]:
    """A function that makes each grid once. All are kept, as captured graphs read them where they are; a table has a
    few kilobytes. Inside `torch.compile` they are part of the graph, and FakeTensorMode takes its own tensors alone."""
    made = functools.cache(make)
    fake = torch._C._TorchDispatchModeKey.FAKE

    @functools.wraps(make)
    def grid(num_scales: int, **options: Any) -> Grid:
        anew = torch.compiler.is_compiling() or torch._C._get_dispatch_mode(fake) is not None
        return (make if anew else made)(num_scales, **options)

    return grid


@_kept
def karras_grid(
    num_scales: int,
    *,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
    device: torch.device | str = "cpu",
) -> Grid:
    """Neighbours on the Karras grid of num_scales levels, each pair as often: Song et al. 2023. Levels on `device`."""
    return Grid(_table(num_scales, sigma_min, sigma_max, rho, device))


@_kept
def halved_grid(
    num_scales: int,
    *,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
    device: torch.device | str = "cpu",
) -> Grid:
    """The ends and the middle of num_scales intervals, each as often: progressive distillation. Levels on `device`."""
    return Grid(_table(2 * num_scales + 1, sigma_min, sigma_max, rho, device), stride=2)


@_kept
def lognormal_grid(
    num_scales: int,
    *,
    mean: float = MEAN,
    std: float = STD,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
    device: torch.device | str = "cpu",
) -> Grid:
    """Neighbours on the Karras grid as often as a lognormal level falls between them: Song & Dhariwal 2023.

    With levels that rise, p(sigma_i) ~ erf((ln sigma_{i+1} - mean) / (sqrt2 std)) - erf((ln sigma_i - mean) / (sqrt2
    std)). Here they fall: index 0 of num_scales - 1 is the pair at sigma_max. Levels on `device`.
    """
    levels: dict[str, Any] = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    sigmas = schedules.karras_sigmas(num_scales, dtype=torch.float64, append_zero=False, **levels)
    # In the tail of the distribution, which sigma_max lies in, erf is 1 and differences of erfc are exact.
    tail = torch.erfc((sigmas.log() - mean) / (math.sqrt(2) * std))
    cumulative = (tail[1:-1] - tail[0]) / (tail[-1] - tail[0])
    thresholds = (cumulative * 2.0**32).round().to(torch.int64)
    table = _table(num_scales, sigma_min, sigma_max, rho, device)
    return Grid(table, thresholds=thresholds.to(device, non_blocking=True))


def _table(num_scales: int, sigma_min: float, sigma_max: float, rho: float, device: torch.device | str) -> Tensor:
    """The levels of a grid, falling, float32, with its ends exactly as given."""
    num_scales = _check.whole("num_scales", num_scales, least=2)
    levels: dict[str, Any] = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    sigmas = schedules.karras_sigmas(num_scales, dtype=torch.float64, append_zero=False, **levels)
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    # From memory that the device copies from when it gets there, the host goes on.
    return sigmas.float().to(device, non_blocking=True)
