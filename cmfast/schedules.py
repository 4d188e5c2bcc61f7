"""Noise levels of sampling and training, and the curricula of consistency training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmfast.levels import Sigmas, read_levels
from cmfast.ops import WEIGHTINGS, _check, loss_weight

__all__ = [
    "WEIGHTINGS",
    "ancestral_levels",
    "ema_and_scales",
    "karras_sigma",
    "karras_sigmas",
    "lognormal_sigmas",
    "loss_weight",
    "multistep_sigmas",
    "nearest_ts",
    "step_sigmas",
]

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0

_Level = TypeVar("_Level", float, Tensor)


def _check_range(sigma_min: float, sigma_max: float, rho: float) -> None:
    """The ends of a grid and its rho; those of a model may be tensors, which are not read."""
    if any(isinstance(value, Tensor) for value in (sigma_min, sigma_max, rho)):
        return
    _check.number("sigma_min", sigma_min)
    _check.positive("sigma_max", sigma_max)
    _check.positive("rho", rho)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")


def karras_sigma(
    index: Tensor | float,
    num_scales: int,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor | float:
    """Level `index` of num_scales: (smax^(1/rho) + i / (N - 1) (smin^(1/rho) - smax^(1/rho)))^rho.

    Karras et al. 2022, eq. 5: index 0 is sigma_max, N - 1 is sigma_min; a number or a tensor, fractions allowed.

    Raises: ValueError: a number that is no index of the grid, or sigma_min, sigma_max and rho that make none.
    """
    _check_range(sigma_min, sigma_max, rho)
    if not isinstance(index, Tensor) and not 0 <= index <= num_scales - 1:
        raise ValueError(f"index must be from 0 to {num_scales - 1}, got {index}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    fraction = index / max(num_scales - 1, 1)
    if not isinstance(fraction, Tensor):
        # The ends exactly, so that a level can be compared with sigma_min.
        if fraction in (0, 1):
            return sigma_min if fraction else sigma_max
    return (high + fraction * (low - high)) ** rho


def karras_sigmas(
    num_scales: int,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    append_zero: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """`num_scales` levels from sigma_max down to sigma_min, and 0 if `append_zero`: [N + 1] or [N].

    Raises: ValueError: num_scales below 1, or sigma_min, sigma_max and rho that make no grid. TypeError: num_scales
        that is no whole number.

    dtype, device: of the result. sigma_min, sigma_max and rho shape the grid.

    >>> karras_sigmas(3).tolist()
    [80.0, 2.5152..., 0.002..., 0.0]
    """
    num_scales = _check.whole("num_scales", num_scales, least=1)
    index = torch.arange(num_scales, dtype=torch.float64, device="cpu")
    sigmas: Any = karras_sigma(index, num_scales, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    if append_zero:
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    # The default device, by a question that Dynamo traces.
    made: Tensor = sigmas.to(dtype=dtype, device=torch.empty(0).device if device is None else device)
    return made


def multistep_sigmas(
    ts: Sequence[int],
    num_scales: int = 40,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    increasing: bool = True,
) -> list[float]:
    """Noise levels of grid indices `ts`, as openai/consistency_models names the steps of multistep sampling.

    sigma_min, sigma_max, rho: of the grid, in data units.

    Raises: ValueError: an index that is not on the grid of num_scales levels, fewer than two, or with `increasing`
        indices that do not increase (the original takes any); or sigma_min, sigma_max and rho that make no grid.
        TypeError: num_scales or an index that is no whole number.

    >>> [round(sigma, 3) for sigma in multistep_sigmas((0, 22, 39), 40)]
    [80.0, 1.382, 0.002]
    """
    num_scales = _check.whole("num_scales", num_scales, least=1)
    if isinstance(ts, str):
        raise TypeError(f"ts must be whole numbers, such as (0, 22, 39), got {ts!r}")
    ts = [_check.whole("ts", t) for t in ts]
    bad = [t for t in ts if not 0 <= t <= num_scales - 1]
    if bad:
        raise ValueError(f"ts are indices of {num_scales} levels, from 0 to {num_scales - 1}; got {bad[0]}")
    if len(ts) < 2:
        raise ValueError(f"ts needs two indices or more, the last of which is where sampling ends; got {list(ts)}")
    if increasing and any(b <= a for a, b in zip(ts, ts[1:], strict=False)):
        raise ValueError(f"ts must increase, got {list(ts)}")
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    return [float(karras_sigma(t, num_scales, **options)) for t in ts]


def nearest_ts(
    sigmas: Sigmas,
    num_scales: int = 40,
    *,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> tuple[int, ...]:
    """The indices of the grid of num_scales levels nearest to `sigmas`, and where sampling ends: of `multistep_sigmas`
    the inverse. Nearest in sigma^(1/rho), in which the grid from sigma_max to sigma_min is even.

    Raises: ValueError: a level that is negative, NaN or infinite, levels that do not decrease, num_scales below 1, or
        sigma_min, sigma_max and rho that make no grid. TypeError: sigmas or num_scales that are none.

    >>> nearest_ts([80, 1.382], 40)
    (0, 22, 39)
    """
    _check_range(sigma_min, sigma_max, rho)
    levels, num_scales = read_levels(sigmas, least=0), _check.whole("num_scales", num_scales, least=1)
    if any(b >= a for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"sigmas must decrease, got {levels}")
    high, low, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_scales - 1
    fractions = [(high - sigma ** (1 / rho)) / (high - low) for sigma in levels]
    indices = [min(max(round(fraction * last), 0), last) for fraction in fractions]
    return tuple(indices if indices and indices[-1] == last else [*indices, last])


def step_sigmas(
    steps: int, *, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> list[float]:
    """The levels at which multistep sampling in `steps` network calls evaluates the model.

    On the original's grid of 40 levels (sigma_min, sigma_max, rho): index 0 for one step; 0 and 22 for two (Song et al.
    2023 found it by search on ImageNet-64); evenly spaced indices, i 39 / steps rounded, for more.

    Raises: ValueError: steps not from 1 to 39, or sigma_min, sigma_max and rho that make no grid. TypeError: steps that
        are no whole number.

    >>> [round(sigma, 3) for sigma in step_sigmas(2)]
    [80.0, 1.382]
    """
    if not 1 <= _check.whole("steps", steps) <= 39:
        raise ValueError(f"steps must be from 1 to 39 for multistep sampling, got {steps}")
    ts = [0, 22] if steps == 2 else [round(i * 39 / steps) for i in range(steps)]
    return multistep_sigmas([*ts, 39], 40, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)[:-1]


def ancestral_levels(sigma: _Level, next_sigma: _Level) -> tuple[_Level, _Level]:
    """(sigma_down, sigma_up): step down to the first, then add noise of the second, and land at next_sigma.

    With r = next_sigma / sigma, at most 1: next_sigma r and next_sigma sqrt(1 - r^2). Numbers or tensors.
    """
    ratio: Any = next_sigma / sigma
    ratio = ratio.clamp(max=1) if isinstance(ratio, Tensor) else min(ratio, 1.0)
    return next_sigma * ratio, next_sigma * (1 - ratio**2) ** 0.5


def lognormal_sigmas(noise: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """exp(mean + std noise): the training noise levels of Karras et al. 2022, table 1, from standard normals [B]."""
    return torch.exp(mean + std * noise)


def ema_and_scales(
    target_ema_mode: str,
    start_ema: float,
    scale_mode: str,
    start_scales: int,
    end_scales: int,
    total_steps: int,
    distill_steps_per_iter: int,
) -> Callable[[int], tuple[float, int]]:
    """step -> (EMA rate of the target, number of scales): the four schedules of Song et al. 2023, as coded.

    `fixed`/`fixed`: start_ema, start_scales. `fixed`/`progressive`: N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2)
    - 1) + 1. `adaptive`/`progressive`: the same N and mu(k) = mu0^(s0 / (N - 1)). `fixed`/`progdist`: scales
    halve every distill_steps_per_iter steps, with twice as long for the last two stages, and the target never moves.

    target_ema_mode, scale_mode: the pair before the colon. start_ema is mu0, start_scales s0, end_scales s1,
    total_steps K.

    Raises: ValueError: another pair of modes, of which the message lists the known ones; or no steps to go by.

    >>> ema_and_scales("adaptive", 0.95, "progressive", 2, 150, 1000, 0)(0)
    (0.9025, 2)
    """
    modes = (target_ema_mode, scale_mode)
    known = [("fixed", "fixed"), ("fixed", "progressive"), ("adaptive", "progressive"), ("fixed", "progdist")]
    if modes not in known:
        pairs = ", ".join("/".join(pair) for pair in known)
        raise ValueError(f"unknown target_ema_mode/scale_mode {'/'.join(map(str, modes))}; known: {pairs}")
    if scale_mode == "progressive":
        _check.positive("total_steps", total_steps)
    if scale_mode == "progdist":
        _check.positive("distill_steps_per_iter", distill_steps_per_iter)

    def progressive(step: int) -> int:
        growth = (step / total_steps) * ((end_scales + 1) ** 2 - start_scales**2)
        # Scales that fall go on falling behind total_steps.
        return max(math.ceil(math.sqrt(max(growth + start_scales**2, 0)) - 1), 1)

    def progdist(step: int) -> int:
        scales = max(start_scales // (1 << int(step // distill_steps_per_iter)), 2)
        if scales > 2:
            return scales
        # Two scales, then one, each held for twice the stage length from the step at which two is reached.
        late = max(step - distill_steps_per_iter * (math.log2(start_scales) - 1), 0)
        return max(2 // (1 << int(late // (distill_steps_per_iter * 2))), 1)

    def at_step(step: int) -> tuple[float, int]:
        if modes == ("fixed", "fixed"):
            return float(start_ema), int(start_scales)
        if modes == ("fixed", "progdist"):
            return 1.0, progdist(step)
        scales = progressive(step)
        ema = start_ema if target_ema_mode == "fixed" else start_ema ** (start_scales / scales)
        return float(ema), scales + 1

    return at_step
