"""docs/steps.md is true: each row's forms are one schedule, and each form leads to the others."""

import ast
import re
from pathlib import Path

import pytest

from cmfast import Sampler, schedules

TABLE = Path(__file__).resolve().parents[1] / "docs" / "steps.md"
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split("|")]
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| `(steps|ts|sigmas|sampler)=", line)
]


def levels(cell):
    return [float(number) for number in re.findall(r"\d[\d.]*", cell)]


@pytest.mark.parametrize("arguments, ts, timesteps, sigmas", ROWS, ids=[row[0] for row in ROWS])
def test_a_row(arguments, ts, timesteps, sigmas):
    options = {
        part.arg: ast.literal_eval(part.value) for part in ast.parse(f"f({arguments[1:-1]})").body[0].value.keywords
    }
    sampler = Sampler(lambda x, sigma: x, image_shape=(1, 4, 4), **options)
    assert sampler.sigmas == pytest.approx(levels(sigmas), rel=1e-3, abs=5e-4)
    if "sampler" in options:
        return
    indices = tuple(int(index) for index in ts[1:-1].split(","))
    assert sampler.ts == indices
    from_ts = Sampler(lambda x, sigma: x, image_shape=(1, 4, 4), ts=indices)
    assert from_ts.sigmas == pytest.approx(sampler.sigmas, rel=1e-3)
    assert schedules.nearest_ts(from_ts.sigmas) == indices

    pytest.importorskip("diffusers")
    from cmfast.compat.diffusers import CMStochasticIterativeScheduler, steps

    named = ast.literal_eval(re.match(r"`(.*?)`", timesteps)[1])
    assert steps.ts_from_timesteps(named) == indices and steps.timesteps_from_ts(indices) == named
    assert steps.sigmas_from_timesteps(named) == pytest.approx(from_ts.sigmas, rel=1e-6)
    assert list(steps.timesteps_from_sigmas(from_ts.sigmas)) == named
    from diffusers import CMStochasticIterativeScheduler as Theirs

    for scheduler in (Theirs(), CMStochasticIterativeScheduler()):
        ways = [{"timesteps": named}]
        if "num_inference_steps" in timesteps:
            ways.append({"num_inference_steps": int(timesteps.rstrip("`")[-1])})
        for way in ways:
            scheduler.set_timesteps(**way)
            assert scheduler.sigmas[: len(named)].tolist() == pytest.approx(from_ts.sigmas, rel=1e-4)


def test_the_table_was_found():
    assert len(ROWS) == 10


@pytest.mark.parametrize("num_scales", [2, 12, 40, 151])
@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 3.0}], ids=["default", "other"])
def test_nearest_ts_inverts_the_grid(num_scales, options):
    ts = tuple(range(num_scales))
    assert schedules.nearest_ts(schedules.multistep_sigmas(ts, num_scales, **options), num_scales, **options) == ts


def test_nearest_ts_of_levels_beside_the_grid():
    assert schedules.nearest_ts([1000.0, 1.4, 0.0]) == (0, 22, 39)
    assert schedules.nearest_ts([80.0, 1.42]) == (0, 22, 39) and schedules.nearest_ts([]) == (39,)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigmas must be positive"):
            schedules.nearest_ts([bad])
    with pytest.raises(ValueError, match="sigmas must decrease, got"):
        schedules.nearest_ts([1.0, 2.0])
