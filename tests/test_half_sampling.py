"""What half precision costs a whole sampling loop: README's table of 40 steps of Heun's method with the bundled model.

Everything is float64 but what a row names; the noise is the same.
"""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cmfast
from cmfast import Denoiser, ops, samplers, schedules
from cmfast.tolerances import FLOOR
from tests.toy import ToyNetwork

README = Path(__file__).resolve().parents[1] / "README.md"
IMAGES, LEVELS = 4, 40
HALF = torch.bfloat16


class Rounded(nn.Module):
    """A network whose input or output is rounded."""

    def __init__(self, network: nn.Module, what: str) -> None:
        super().__init__()
        self.network, self.what, self.num_classes = network, what, network.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x.to(HALF).to(x.dtype) if self.what == "input" else x
        out = self.network(x, t, y)
        return out.to(HALF).to(x.dtype) if self.what == "output" else out


def around(model: Denoiser, network: nn.Module) -> Denoiser:
    return Denoiser(network, model.preconditioner, image_shape=model.image_shape)


def coefficients(model: Denoiser, dtype: torch.dtype) -> cmfast.denoiser.DenoiserFn:
    """D with c_skip, c_out, c_in and c_noise in another dtype."""
    options = {"sigma_data": model.preconditioner.sigma_data, "boundary": model.preconditioner.boundary}

    def denoised(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        c_skip, c_out, c_in = (c.to(dtype).double().view(-1, 1, 1, 1) for c in ops.scalings(sigma, **options))
        c_noise = ops.c_noise(sigma).to(dtype).double().expand(len(x))
        return c_skip * x + c_out * model.network(c_in * x, c_noise, labels)

    return denoised


#: What README's rows call it -> (from the model in float32 and in float64 to one to sample with, dtype of the state).
ROWS = {
    "all of it in float32": (lambda m, wide: m, torch.float32),
    "the network in bfloat16, as `model.bfloat16()`": (lambda m, wide: copy.deepcopy(m).to(HALF), torch.float32),
    "the network in bfloat16, by `cmfast.optimize`": (lambda m, wide: cmfast.optimize(m, HALF), torch.float32),
    "its weights alone": (lambda m, wide: copy.deepcopy(m).to(HALF).double(), torch.float64),
    "its input alone": (lambda m, wide: around(wide, Rounded(wide.network, "input")), torch.float64),
    "its output alone": (lambda m, wide: around(wide, Rounded(wide.network, "output")), torch.float64),
    "the state alone in bfloat16": (lambda m, wide: wide, HALF),
    "coefficients alone in bfloat16": (lambda m, wide: coefficients(wide, HALF), torch.float64),
    "coefficients alone in float32": (lambda m, wide: coefficients(wide, torch.float32), torch.float64),
    "network and state, `model.bfloat16()`": (lambda m, wide: copy.deepcopy(m).to(HALF), HALF),
}


@functools.cache
def bundled() -> tuple[Denoiser, Denoiser]:
    model = cmfast.load().eval().requires_grad_(False)
    return model, copy.deepcopy(model).double()


@functools.cache
def sampled(name: str | None, images: int, steps: int) -> Tensor:
    """[B, 1, 32, 32] in float64; without a name all of it was."""
    model, wide = bundled()
    make, dtype = ROWS[name] if name else (lambda m, wide: wide, torch.float64)
    noise = 80.0 * ops.normal(0, torch.arange(images), model.image_shape, dtype=torch.float64)
    levels = schedules.karras_sigmas(steps).tolist()
    labels = torch.arange(images)
    return samplers.sample_heun(make(model, wide), noise.to(dtype), levels, labels=labels).double()


def errors(name: str, images: int, steps: int) -> tuple[float, int]:
    """Relative root mean square, and the largest difference of pixels in levels."""
    value, exact = sampled(name, images, steps), sampled(None, images, steps)
    rms = ((value - exact).square().mean() / exact.square().mean()).sqrt().item()
    pixels = [ops.to_uint8(x.float()).int() for x in (value, exact)]
    return rms, (pixels[0] - pixels[1]).abs().max().item()


def stated() -> dict[str, tuple[float, int]]:
    """README's table."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+e-\d+) \| (\d+) \|$", README.read_text(encoding="utf-8"), re.M)
    return {name: (float(rms), int(level)) for name, rms, level in rows}


def test_the_table_has_all_rows():
    assert stated().keys() == ROWS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_table_holds(name, counted):
    """Within a factor of two, and of pixels two levels: machines round bfloat16 in their own order."""
    rms, level = errors(name, IMAGES, LEVELS)
    counted(f"relative RMS {rms:.1e}, worst pixel {level} levels")
    expected, levels = stated()[name]
    assert expected / 2 <= rms <= 2 * expected and levels / 2 - 2 <= level <= 2 * levels + 2


def test_a_state_in_float32_is_worth_it():
    """Of few steps and one image: the state's rounding outweighs the network's, and ours is no worse than eager's."""
    ours, eager, state = (
        errors(name, 1, 8)[0]
        for name in ("the network in bfloat16, by `cmfast.optimize`", "the network in bfloat16, as `model.bfloat16()`",
                     "the state alone in bfloat16")
    )  # fmt: skip
    assert ours <= 2 * eager and ours < FLOOR[HALF] and state > ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_states_of_half_precision(name, dtype):
    """From sigma = 80 down, states of 250 included: some roundings, nothing lost on the way."""
    torch.manual_seed(0)
    model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()
    noise, labels = torch.randn(2, 3, 8, 8).to(dtype), torch.tensor([1, 2])
    draws = torch.randn(20, 2, 3, 8, 8)
    levels = samplers.sampler_sigmas(name, steps={"onestep": 1, "multistep": 3}.get(name, 6))
    seen = []

    def sample(model, wide):
        given = iter(draws)
        options = {} if name in ("euler", "progdist") else {"noise_fn": lambda x: next(given).to(x.dtype)}
        options |= {"s_churn": 2.0} if name in ("heun", "dpm") else {}
        options["callback"] = lambda now: seen.append(now["x"].abs().max().item())
        return samplers.sample(model, noise.to(wide), sampler=name, sigmas=levels, labels=labels, **options)

    with torch.no_grad():
        exact, value = sample(copy.deepcopy(model).double(), torch.float64), sample(model, dtype)
    assert value.dtype == dtype and max(seen) > 250
    assert (value.double() - exact).abs().max() <= 2 * FLOOR[dtype] * exact.abs().max()
