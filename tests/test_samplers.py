"""Samplers on distributions whose answer is known, and on bad arguments. Golden numbers: test_golden.py."""

import inspect

import numpy as np
import pytest
import torch

from cmfast import Denoiser, Sampler, backend, editing, samplers, schedules
from cmfast.native import steps
from cmfast.samplers import SAMPLERS
from tests.toy import ToyNetwork


def gaussian(x, sigma, mean=0.3, std=0.2):
    """The perfect denoiser of data ~ N(mean, std^2)."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (std**2 * x + variance * mean) / (std**2 + variance)


NOISE = torch.randn(512, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm", "ancestral"])
def test_solvers_reach_the_data(sampler):
    out = samplers.sample(gaussian, NOISE, sampler=sampler, sigmas=schedules.karras_sigmas(80), clip_denoised=False)
    assert out.mean().item() == pytest.approx(0.3, abs=0.02) and out.std().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_order_of_convergence(sampler, order):
    """Halving the steps' length divides the error by 2^order; the ODE's solution is known in closed form."""

    def error(steps):
        sigmas = schedules.karras_sigmas(steps, sigma_min=0.05, sigma_max=5.0, append_zero=False, dtype=torch.float64)
        x = SAMPLERS[sampler](gaussian, 5 * NOISE, sigmas, clip_denoised=False)
        exact = 0.3 + (5 * NOISE - 0.3) * ((0.2**2 + 0.05**2) / (0.2**2 + 5.0**2)) ** 0.5
        return (x - exact).abs().mean().item()

    ratio = error(33) / error(65)
    assert 0.75 * 2**order < ratio < 1.35 * 2**order


def test_churn_adds_noise_only_between_its_bounds():
    draws = []

    def noise_fn(x):
        draws.append(x)
        return torch.zeros_like(x)

    sigmas = schedules.karras_sigmas(10)
    inside = sum(0.05 <= s <= 50 for s in sigmas.tolist())
    options = {"noise_fn": noise_fn, "s_churn": 4.0}
    samplers.sample_heun(gaussian, NOISE[:2], sigmas, s_tmin=0.05, s_tmax=50.0, **options)
    assert len(draws) == inside
    samplers.sample_heun(gaussian, NOISE[:2], sigmas, s_tmin=0.05, s_tmax=50.0, draw_unused=True, **options)
    assert len(draws) == inside + 10


def test_multistep_levels_and_calls():
    seen = []

    def model(x, sigma):
        seen.append(sigma.tolist())
        return gaussian(x, sigma)

    samplers.sample_multistep(model, NOISE[:2], [80.0, 1.5, 0.3])
    assert seen == [pytest.approx([s, s]) for s in (80.0, 1.5, 0.3)]


def test_callback_sees_every_call():
    calls = []
    samplers.sample_euler(gaussian, NOISE[:2], [3.0, 1.0, 0.0], callback=calls.append)
    assert [call["i"] for call in calls] == [0, 1] and [float(call["sigma"]) for call in calls] == [3.0, 1.0]
    torch.testing.assert_close(calls[0]["denoised"], gaussian(NOISE[:2], torch.tensor([3.0, 3.0])).clamp(-1, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("given", [{}, {"steps": 1}, {"steps": 3}, {"ts": (0, 22, 39)}], ids=str)
def test_levels_of_a_single_call(sampler, given):
    """Those of `sampler_sigmas`, for the range that the model says."""
    model = Denoiser(lambda x, t: 0.3 * x, sigma_max=20.0)

    def made(**levels):
        torch.manual_seed(0)
        return samplers.sample(model, NOISE, sampler=sampler, bounded=False, **levels)

    if sampler == "onestep" and given not in ({}, {"steps": 1}):
        with pytest.raises(ValueError, match="the onestep sampler takes one step"):
            made(**given)
        return
    assert torch.equal(made(**given), made(sigmas=samplers.sampler_sigmas(sampler, sigma_max=20.0, **given)))


def test_one_of_three():
    for given in ({"steps": 2, "ts": (0, 39)}, {"steps": 2, "sigmas": [80.0]}, {"ts": (0, 39), "sigmas": [80.0]}):
        with pytest.raises(ValueError, match="give one of steps, sigmas and ts, not more"):
            samplers.sample(gaussian, NOISE, **given)


@pytest.mark.parametrize(("name", "calls"), [("onestep", 1), ("multistep", 2), ("euler", 2), ("heun", 2)])
@pytest.mark.parametrize("pixels", [None, "trunc"])
def test_a_bar_reaches_its_end(name, calls, pixels, capsys):
    sigmas = [80.0, 1.5] if name in ("onestep", "multistep") else [80.0, 1.5, 0.0]
    samplers.sample(gaussian, NOISE[:2], sampler=name, sigmas=sigmas, pixels=pixels, progress=True)
    assert f"100%|██████████| {calls}/{calls}" in capsys.readouterr().err


def test_midpoint_ancestral():
    """dx/dt = x over t in [0, 1]: e within the method's second order."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = samplers.sample_midpoint_ancestral(lambda x, t: x, x, [i / 50 for i in range(50)])
    assert out.item() == pytest.approx(2.718281828, rel=2e-4)


def test_midpoint_ancestral_of_no_steps():
    with pytest.raises(ValueError, match="ts must hold one time or more, got none"):
        samplers.sample_midpoint_ancestral(lambda x, t: x, torch.ones(1, 1, 1, 1), [])


def test_midpoint_ancestral_takes_the_time_of_the_midpoint():
    """dx/dt = 2 t: exact by the midpoint rule."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    out = samplers.sample_midpoint_ancestral(lambda x, t: 2 * t.view(-1, 1, 1, 1), x, [i / 5 for i in range(5)])
    assert out.item() == pytest.approx(1.0)


def test_no_gradient_and_no_host_read():
    """A step reads no tensor on the host: on the meta device it could not."""
    network = ToyNetwork().to("meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    for name in SAMPLERS:
        sigmas = schedules.karras_sigmas(4)
        out = samplers.sample(Denoiser(network), torch.empty(2, 3, 8, 8, device="meta"), sampler=name,
                              sigmas=sigmas[:2] if name == "multistep" else sigmas, labels=labels)  # fmt: skip
        assert out.is_meta and not out.requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_empty_batch(name):
    sigmas = [3.0, 1.0, 0.0][: 2 if name == "multistep" else 3]
    assert samplers.sample(gaussian, NOISE[:0], sampler=name, sigmas=sigmas).shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "nope"}, "known: onestep, multistep, heun"),
        ({"sampler": "multistep", "steps": 2, "ts": (0, 39)}, "one of steps, sigmas and ts"),
        ({"sampler": "onestep", "steps": 2}, "takes one step"),
        ({"sampler": "onestep", "ts": (0, 22, 39)}, r"takes one step, got ts=\(0, 22, 39\)"),
        ({"sampler": "heun", "sigmas": [1.0]}, "2 or more"),
        ({"sampler": "heun", "sigmas": [1.0, 2.0]}, "decrease"),
        ({"sampler": "heun", "sigmas": [1.0, float("nan")]}, "none NaN"),
        ({"sampler": "multistep", "sigmas": [float("inf")]}, "none NaN or infinite"),
        ({"sampler": "heun", "steps": 0}, "steps must be 1 or more"),
        ({"sampler": "multistep", "ts": (0, 99)}, "from 0 to 39"),
        ({"sampler": "multistep", "ts": (0, 22)}, "end at 39"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        samplers.sampler_sigmas(**options)


@pytest.mark.parametrize(
    "sampler, option, value, message",
    [
        ("heun", "s_churn", "10", "option s_churn of the heun sampler must be a number, got '10'"),
        ("heun", "s_churn", True, "must be a number"),
        ("dpm", "s_tmin", float("nan"), "must be a number"),
        ("multistep", "clip_denoised", "false", "must be True or False, got 'false'"),
        ("euler", "clip_denoised", 0, "must be True or False"),
        ("progdist", "progress", None, "must be True or False"),
        ("onestep", "end_sigma", "0", "must be a number or None"),
        ("ancestral", "noise_fn", None, "must be a function of x"),
        ("heun", "callback", 1, "must be a function or None"),
    ],
)
def test_bad_options(sampler, option, value, message):
    with pytest.raises(TypeError, match=message):
        samplers.check_options(sampler, {option: value})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_as_they_may_be(sampler):
    """What an option is by default fits it, and so do NumPy's numbers."""
    parameters = inspect.signature(samplers._AS.get(sampler, SAMPLERS[sampler])).parameters
    options = {name: each.default for name, each in parameters.items() if name not in samplers._OWN}
    assert "clip_denoised" in options
    samplers.check_options(sampler, options)
    samplers.check_options(sampler, {"clip_denoised": np.bool_(True), "callback": print})
    if "s_churn" in options:
        samplers.check_options(sampler, {"s_churn": np.float32(1), "s_tmax": 50})


def test_defaults():
    assert samplers.sampler_sigmas("onestep", ts=(0, 39)) == samplers.sampler_sigmas("onestep", sigmas=[80]) == [80.0]
    assert samplers.sampler_sigmas("onestep", sigmas=[80, 2.0, 0.002]) == [80.0]  # the original's is given a whole grid
    assert samplers.sampler_sigmas("multistep") == [80.0] and len(samplers.sampler_sigmas("heun")) == 19
    assert (
        samplers.sampler_sigmas("progdist", steps=4)[-1] == 0 and len(samplers.sampler_sigmas("progdist", steps=4)) == 6
    )


def test_a_model_brings_its_own_noise_range():
    """Levels, and the noise added between them, follow the model's sigma_min and sigma_max."""
    model = Denoiser(lambda x, t: torch.zeros_like(x), sigma_min=0.1, sigma_max=10.0)
    seen = []
    samplers.sample(model, NOISE[:2].float(), sampler="heun", callback=lambda info: seen.append(float(info["sigma"])))
    assert seen[0] == pytest.approx(10.0) and seen[-1] == pytest.approx(0.1)
    out = []
    options = {"noise_fn": torch.ones_like, "callback": lambda info: out.append(info)}
    samplers.sample(model, NOISE[:2].float(), sigmas=[10.0, 1.0], **options)
    added = out[1]["x"] - out[0]["denoised"]
    torch.testing.assert_close(added, torch.full_like(added, (1.0 - 0.1**2) ** 0.5))


def test_a_range_that_makes_no_levels_is_none():
    """As that of NVlabs/edm's networks."""

    def model(x, sigma):
        return softened(x, sigma)

    plain = {each: samplers.sample(model, NOISE[:2], sampler=each) for each in ("heun", "multistep")}
    model.sigma_min, model.sigma_max, model.rho = 0, float("inf"), None
    for each, wanted in plain.items():
        assert torch.equal(samplers.sample(model, NOISE[:2], sampler=each), wanted)
    sampler = Sampler(model, 2, steps=2, image_shape=NOISE.shape[1:])
    assert sampler.sigmas == samplers.sampler_sigmas("multistep", steps=2) and sampler.ts == (0, 22, 39)


@pytest.mark.parametrize("given", [{}, {"sigma_min": None}, {"sigma_min": 0.5}], ids=str)
@pytest.mark.parametrize("run", ["sample", "sample_multistep", "inpaint"])
def test_noise_ends_at_the_models_sigma_min(run, given):
    """A model of images that are all 0 is left with the noise."""
    seen = []

    def model(x, sigma):
        seen.append(x)
        return torch.zeros_like(x)

    model.sigma_min = 0.1
    x, options = NOISE[:2].float(), {"noise_fn": torch.ones_like, **given}
    if run == "sample":
        samplers.sample(model, x, sigmas=[10.0, 1.0], **options)
    elif run == "sample_multistep":
        samplers.sample_multistep(model, x, [10.0, 1.0], **options)
    else:
        editing.inpaint(model, x, x, [10.0, 1.0], torch.zeros(1), **options)
    added = (1 - (given.get("sigma_min") or 0.1) ** 2) ** 0.5
    torch.testing.assert_close(seen[1], torch.full_like(x, added))


def softened(x, sigma):
    """A denoiser whose neighbouring pixels and channels matter, and that makes differences no larger."""
    return 0.3 * torch.tanh(x.roll(1, 1) / (1 + sigma.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("options", [{}, {"s_churn": 2.0}], ids=str)
@pytest.mark.parametrize("sampler", ["heun", "dpm"])
def test_a_model_with_one_memory_for_all_outputs(sampler, options):
    """As that of a CUDA graph, into which the second call writes while the first output is still needed."""
    memory, calls = torch.empty_like(NOISE[:2]), []

    def model(x, sigma):
        calls.append(1)
        return memory.copy_(softened(x, sigma))

    options = {"noise_fn": torch.ones_like, **options}
    plain, out = (
        SAMPLERS[sampler](each, NOISE[:2], [80.0, 5.0, 1.0, 0.1], **options) for each in (softened, model)
    )
    assert torch.equal(plain, out)
    assert len(calls) == 2 * 3 + 1  # once more, when it is found out


def in_channels_last(x, sigma):
    return softened(x, sigma).contiguous(memory_format=torch.channels_last)


MIXED = {
    "multistep": lambda model, x: samplers.sample_multistep(model, x, [80.0, 5.0, 1.0]),
    "heun": lambda model, x: samplers.sample_heun(model, x, [80.0, 5.0, 1.0, 0.0], s_churn=1.0),
    "dpm": lambda model, x: samplers.sample_dpm(model, x, [80.0, 5.0, 1.0, 0.0], s_churn=1.0),
    "ancestral": lambda model, x: samplers.sample_euler_ancestral(model, x, [80.0, 5.0, 1.0, 0.0]),
    "inpaint": lambda model, x: editing.inpaint(
        model, torch.zeros_like(x), x, [80.0, 5.0, 1.0], (torch.arange(16) > 7).float()
    )[0],
}


@pytest.mark.parametrize("batch", [2, 86], ids=["few", "many"])
@pytest.mark.parametrize("state", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MIXED)
def test_noise_of_a_seed_does_not_depend_on_the_layout_of_the_model(name, state, batch):
    """torch's generator fills a tensor in the order of its memory: the state's own, whatever the model returns."""
    x = 80 * torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=state)
    assert (x.numel() >= steps.LEAST) == (batch > 2)
    made = []
    for path in ("auto", "reference"):
        for model in (softened, in_channels_last):
            torch.manual_seed(3)
            with backend(path):
                made.append(MIXED[name](model, x))
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], atol=1e-5, rtol=0)
    assert all(each.is_contiguous(memory_format=state) for each in made)
