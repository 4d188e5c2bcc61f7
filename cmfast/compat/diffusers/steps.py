"""What diffusers calls timesteps, in noise levels and in the original's `ts`.

A consistency model's grid has 40 levels, from sigma_max at index 0 to sigma_min at index 39. diffusers' timesteps are
indices of it in descending order, of which the last is evaluated first:

    timesteps=[22, 0] of diffusers  =  ts=(0, 22, 39) of the original  =  sigmas=[80, 1.382]  =  steps=2 of cmfast
"""

from __future__ import annotations

from collections.abc import Sequence

from cmfast import schedules

NUM_TRAIN_TIMESTEPS = 40


def default_timesteps(num_inference_steps: int, *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> list[int]:
    """The timesteps that diffusers takes for num_inference_steps: multiples of 40 // steps, not those of `steps` here.

    Raises: ValueError: the number is not from 1 to num_train_timesteps.

    >>> default_timesteps(1), default_timesteps(2)
    ([0], [20, 0])
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(f"num_inference_steps must be from 1 to {num_train_timesteps}, got {num_inference_steps}")
    ratio = num_train_timesteps // num_inference_steps
    return [i * ratio for i in reversed(range(num_inference_steps))]


def ts_from_timesteps(timesteps: Sequence[int], *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> tuple[int, ...]:
    """The original's `ts`: the indices in the order of evaluation, and the last index, where sampling ends.

    timesteps: a list, an array or a tensor [N]; num_train_timesteps: levels of the scheduler's grid, 40 in all
    published models.

    Raises: ValueError: timesteps that do not descend, or are not on the grid but for its end, which ts have anyway.

    >>> ts_from_timesteps([22, 0])
    (0, 22, 39)
    """
    last = num_train_timesteps - 1
    return (*reversed(_checked(timesteps, last - 1)), last)


def _checked(timesteps: Sequence[int], highest: int) -> list[int]:
    """The timesteps as integers. Raises: ValueError: they do not descend from `highest` or less to 0 or more."""
    came = list(timesteps)
    indices = [int(timestep) for timestep in came]
    descending = all(a > b for a, b in zip(indices, indices[1:]))
    if not indices or indices != came or not descending or indices[0] > highest or indices[-1] < 0:
        wanted = f"indices of the grid from {highest} to 0, descending, as in [22, 0]"
        raise ValueError(f"timesteps must be {wanted}; got {came}")
    return indices


def timesteps_from_ts(ts: Sequence[int], *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> list[int]:
    """diffusers' timesteps for the original's `ts`.

    Raises: ValueError: ts that do not increase to num_train_timesteps - 1.

    >>> timesteps_from_ts((0, 22, 39))
    [22, 0]
    """
    last = num_train_timesteps - 1
    if len(ts) < 2 or any(b <= a for a, b in zip(ts, ts[1:])) or ts[0] < 0 or ts[-1] != last:
        raise ValueError(f"ts must increase from 0 or more to {last}, as in (0, 22, {last}); got {list(ts)}")
    return list(ts[-2::-1])


def sigmas_from_timesteps(
    timesteps: Sequence[int],
    *,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
) -> list[float]:
    """The noise levels of timesteps at which the model is evaluated, in data units: `sigmas` of `cmfast.Sampler`.

    timesteps: as of `ts_from_timesteps`, and the last of the grid too. num_train_timesteps, sigma_min, sigma_max, rho:
    of the scheduler's grid.

    Raises: ValueError: timesteps that do not descend, or are not on the grid.

    >>> [round(sigma, 3) for sigma in sigmas_from_timesteps([22, 0])]
    [80.0, 1.382]
    """
    indices = _checked(timesteps, num_train_timesteps - 1)
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    return [float(schedules.karras_sigma(i, num_train_timesteps, **options)) for i in reversed(indices)]


def timesteps_from_sigmas(
    sigmas: Sequence[float],
    *,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
) -> list[int]:
    """diffusers' timesteps for noise levels (sigmas) that lie on its grid, to three digits or better.

    num_train_timesteps, sigma_min, sigma_max, rho: of that grid.

    Raises: ValueError: a level that is not on the grid, with the nearest one that is; or levels that do not descend.

    >>> timesteps_from_sigmas([80, 1.382])
    [22, 0]
    """
    options = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    count = num_train_timesteps
    grid = [float(schedules.karras_sigma(i, count, **options)) for i in range(count)]
    timesteps = []
    for sigma in sigmas:
        index = min(range(count), key=lambda i: abs(grid[i] - sigma))
        if abs(grid[index] - sigma) > 1e-3 * grid[index]:
            raise ValueError(f"sigma {sigma} is not one of the {count} levels: the nearest is {grid[index]}")
        timesteps.append(index)
    timesteps.reverse()
    return _checked(timesteps, count - 1)
