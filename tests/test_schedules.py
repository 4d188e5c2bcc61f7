import math

import pytest
import torch

from cmfast import schedules


def test_karras_ends_are_exact():
    sigmas = schedules.karras_sigmas(18, sigma_min=0.01, sigma_max=50.0, dtype=torch.float64)
    assert sigmas[0].item() == pytest.approx(50.0, rel=1e-12) and sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.01, rel=1e-12)
    assert schedules.karras_sigma(39, 40) == 0.002 and schedules.karras_sigma(0, 40) == 80.0
    assert (sigmas.diff() < 0).all()


def test_one_level():
    assert schedules.karras_sigmas(1).tolist() == [80.0, 0.0]


@pytest.mark.parametrize("n", [0, -1])
def test_karras_refuses(n):
    with pytest.raises(ValueError, match="num_scales"):
        schedules.karras_sigmas(n)


GRIDS = {
    "karras_sigma": lambda **grid: schedules.karras_sigma(1, 3, **grid),
    "karras_sigmas": lambda **grid: schedules.karras_sigmas(3, **grid),
    "multistep_sigmas": lambda **grid: schedules.multistep_sigmas((0, 2), 3, **grid),
    "nearest_ts": lambda **grid: schedules.nearest_ts([1.0], 3, **grid),
    "step_sigmas": lambda **grid: schedules.step_sigmas(2, **grid),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_what_makes_no_grid(grid):
    for name, bad in (("sigma_min", [math.nan, -1.0, "a"]), ("sigma_max", [math.nan, math.inf, 0.0]), ("rho", [0, -7])):
        for value in bad:
            with pytest.raises(ValueError, match=f"{name} must be .*, got '?{value}"):
                GRIDS[grid](**{name: value})
    for value in (80.0, 90.0):
        with pytest.raises(ValueError, match=f"sigma_min must be below sigma_max, got {value} and 80.0"):
            GRIDS[grid](sigma_min=value)


@pytest.mark.parametrize("index", [-1, 2.5, math.nan])
def test_no_level_of_the_grid(index):
    with pytest.raises(ValueError, match=f"index must be from 0 to 2, got {index}"):
        schedules.karras_sigma(index, 3)
    assert schedules.karras_sigma(0.5, 3) > schedules.karras_sigma(1, 3)


def test_numbers_of_levels_are_whole():
    for make in (schedules.karras_sigmas, lambda n: schedules.nearest_ts([1.0], n), schedules.step_sigmas):
        with pytest.raises(TypeError, match=r"(num_scales|steps) must be a whole number, got 2\.5"):
            make(2.5)
    for make in (lambda n: schedules.nearest_ts([1.0], n), lambda n: schedules.multistep_sigmas((0, 1), n)):
        with pytest.raises(ValueError, match="num_scales must be 1 or more, got -4"):
            make(-4)


def test_every_form_of_two_steps_is_the_same():
    assert schedules.step_sigmas(2) == schedules.multistep_sigmas((0, 22, 39))[:-1]
    assert schedules.step_sigmas(2) == pytest.approx([80.0, 1.38237], rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4, 39])
def test_step_sigmas(steps):
    sigmas = schedules.step_sigmas(steps)
    assert len(sigmas) == steps and sigmas[0] == 80.0
    assert all(a > b > 0.002 for a, b in zip(sigmas, [*sigmas[1:], 0.0021]))


@pytest.mark.parametrize(
    "ts, message",
    [((0, 40), "from 0 to 39; got 40"), ((-1, 39), "got -1"), ((0,), "two indices"), ((0, 22, 22), "increase")],
)
def test_bad_ts(ts, message):
    with pytest.raises(ValueError, match=message):
        schedules.multistep_sigmas(ts, 40)


@pytest.mark.parametrize("steps", [0, 40])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="1 to 39"):
        schedules.step_sigmas(steps)


def test_ancestral_levels():
    """Down and up together make the variance of the next level."""
    down, up = schedules.ancestral_levels(3.0, 1.2)
    assert math.hypot(down, up) == pytest.approx(1.2) and up == pytest.approx(1.2 * math.sqrt(9 - 1.44) / 3)
    assert schedules.ancestral_levels(3.0, 0.0) == (0.0, 0.0)


def test_lognormal():
    noise = torch.tensor([-1.0, 0.0, 2.0])
    expected = [math.exp(-1.2 + 1.2 * n) for n in noise.tolist()]
    assert schedules.lognormal_sigmas(noise).tolist() == pytest.approx(expected)


def test_unknown_modes_list_the_known():
    with pytest.raises(ValueError, match="fixed/progdist"):
        schedules.ema_and_scales("adaptive", 0.9, "fixed", 2, 200, 1000, 100)


def test_a_start_ema_of_zero_stays_zero():
    """The default of the original's scripts: their logarithm of it is minus infinity, and the rate 0 at every step."""
    at_step = schedules.ema_and_scales("adaptive", 0.0, "progressive", 2, 150, 1000, 100)
    assert [at_step(step) for step in (0, 999)] == [(0.0, 2), (0.0, 151)]


def test_scales_that_fall_end_at_the_least():
    at_step = schedules.ema_and_scales("fixed", 0.9, "progressive", 10, 2, 1000, 1)
    assert [at_step(step)[1] for step in (0, 1000, 2000)] == [10, 3, 2]


def test_progdist_halves_then_lingers():
    at_step = schedules.ema_and_scales("fixed", 0.0, "progdist", 16, 16, 10**6, 100)
    scales = [at_step(step)[1] for step in range(0, 1000, 100)]
    assert scales == [16, 8, 4, 2, 2, 1, 1, 1, 1, 1]
