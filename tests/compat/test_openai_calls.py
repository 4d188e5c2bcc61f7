"""openai's karras_diffusion as it is called and calls: draws, callbacks, churn, arguments in the original's order."""

import itertools

import pytest
import torch
from torch import nn

from cmfast import samplers
from cmfast.compat.openai import karras_diffusion as kd
from cmfast.compat.openai import random_util
from tests.compat.openai_utils import CHURN, TENSORS, Y, diffusion_of, toy


class CountingGenerator(random_util.DummyGenerator):
    def __init__(self):
        self.draws = 0

    def randn_like(self, x, **options):
        self.draws += 1
        return super().randn_like(x, **options)


def test_losses_draw_noise_then_indices():
    x, model, target, diffusion = TENSORS["x_start"], toy(), toy("target"), diffusion_of(loss_norm="l2")
    losses = []
    for drawn in (True, False):
        torch.manual_seed(1)
        noise = None if drawn else torch.randn_like(x)
        terms = diffusion.consistency_losses(model, x, 18, {"y": Y}, target_model=target, noise=noise)
        losses.append(terms["loss"])
    assert torch.equal(*losses)


def test_student_and_target_see_the_same_dropout():
    class Dropped(nn.Module):
        """D is all mask: loss 0 only where both masks agree."""

        def forward(self, x, t):
            return nn.functional.dropout(torch.ones_like(x), 0.5, training=True)

    diffusion = kd.KarrasDenoiser(loss_norm="l2", weight_schedule="uniform")
    diffusion.get_scalings = lambda sigma: (0 * sigma, 0 * sigma + 1, 0 * sigma)
    model = Dropped()
    terms = diffusion.consistency_losses(model, torch.zeros(2, 3, 8, 8), 18, target_model=model)
    assert terms["loss"].max() == 0


KEYS = {
    "heun": {"x", "i", "sigma", "sigma_hat", "denoised"},
    "dpm": {"x", "i", "sigma", "sigma_hat", "denoised"},
    "ancestral": {"x", "i", "sigma", "sigma_hat", "denoised"},
    "euler": {"x", "i", "sigma", "denoised"},
    "progdist": {"x", "i", "sigma", "denoised"},
    "onestep": None,
    "multistep": None,
}


@pytest.mark.parametrize("sampler, keys", KEYS.items())
def test_callbacks_and_progress(sampler, keys, capfd):
    seen = []
    out = kd.karras_sample(
        kd.KarrasDenoiser(),
        lambda x, t: 0.1 * x,
        (2, 1, 4, 4),
        4,
        sampler=sampler,
        ts=(0, 1, 3),
        callback=seen.append,
        progress=True,
    )
    assert out.shape == (2, 1, 4, 4) and out.abs().max() <= 1
    assert len(seen) == (4 if keys else 0)
    for i, info in enumerate(seen):
        assert set(info) == keys
        assert info["i"] == i
        assert info["x"].shape == info["denoised"].shape == (2, 1, 4, 4)
        assert isinstance(info["sigma"], torch.Tensor)
        assert info["denoised"].abs().max() <= 1
    assert bool(keys) == ("4/4" in capfd.readouterr().err)


@pytest.mark.parametrize("distillation", [False, True])
def test_a_callback_changes_what_the_ancestral_sampler_goes_on_from(distillation):
    """D in place, as in the original, which computes the slope behind the callback."""

    def sample(callback=None, model=lambda x, t: x.tanh()):
        torch.manual_seed(0)
        diffusion = kd.KarrasDenoiser(distillation=distillation)
        return kd.karras_sample(diffusion, model, (2, 1, 4, 4), 6, sampler="ancestral", callback=callback)

    torch.testing.assert_close(sample(lambda info: None), sample(), rtol=1e-5, atol=1e-5)
    changed = sample(lambda info: info["denoised"].fill_(0.25))
    torch.testing.assert_close(changed, torch.full_like(changed, 0.25), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [kd.sample_heun, kd.sample_dpm, kd.sample_euler, kd.sample_progdist])
def test_a_callback_changes_x_and_not_the_slope(function):
    """As inpainting by a callback does: the original computes the slope before it, and D counts no more after it."""

    def denoise(x, sigma):
        return x.tanh() / (1 + kd.append_dims(sigma, x.ndim))

    def callback(info):
        info["x"][..., 0] = info["sigma"]
        info["denoised"].zero_()

    levels = kd.get_sigmas_karras(5, 0.1, 10.0)
    start = 10 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = function(denoise, start.clone(), levels, random_util.get_generator("dummy"), callback=callback)

    x, ones = start.clone(), torch.ones(2)
    end = -1 if function is kd.sample_progdist else None
    for level, to in itertools.pairwise(levels[:end]):
        d = (x - denoise(x, level * ones)) / level
        x[..., 0] = level
        if function is kd.sample_heun and to > 0:
            x_2 = x + d * (to - level)
            d = (d + (x_2 - denoise(x_2, to * ones)) / to) / 2
        if function is kd.sample_dpm:
            middle = ((level ** (1 / 3) + to ** (1 / 3)) / 2) ** 3
            x_2 = x + d * (middle - level)
            d = (x_2 - denoise(x_2, middle * ones)) / middle
        x = x + d * (to - level)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bounds, levels",
    [
        ({"s_tmin": 0.002}, 17),  # the last level is 0.0019999996
        ({"s_tmax": 80.0}, 18),
        ({"s_tmax": 48.4, "sigma_max": 48.4}, 18),  # 48.4 is more in float32, and the first level
    ],
)
def test_churn_at_the_ends_of_the_grid(bounds, levels):
    """Levels and bounds are compared in float32, as in the original."""
    raised = []

    def callback(info):
        raised.append(bool(info["sigma_hat"] > info["sigma"]))

    options = {"sampler": "heun", "s_churn": 10.0, "callback": callback} | bounds
    kd.karras_sample(kd.KarrasDenoiser(), lambda x, t: x.tanh(), (1, 1, 4, 4), 18, **options)
    assert sum(raised) == levels and raised[0]


@pytest.mark.parametrize(
    "run, draws",
    [
        (kd.sample_heun, 5),
        (kd.sample_dpm, 5),
        (kd.sample_euler_ancestral, 5),
        (kd.sample_euler, 0),
        (kd.sample_progdist, 0),
        (kd.sample_onestep, 0),
    ],
)
def test_any_denoiser_positionally(run, draws):
    """(denoiser, x, sigmas, generator, progress, callback), and D is called with sigma [B]."""
    sigmas, generator, seen, levels = kd.get_sigmas_karras(5, 0.002, 80.0), CountingGenerator(), [], []

    def denoiser(x, sigma):
        levels.append(sigma.clone())
        return 0.3 * x.clamp(-1, 1)

    x = 80 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = run(denoiser, x, sigmas, generator, False, seen.append)
    assert out.shape == x.shape and generator.draws == draws
    assert all(level.shape == (3,) for level in levels)
    assert torch.equal(levels[0], sigmas[0].expand(3))


@pytest.mark.parametrize("name", ["sample_heun", "sample_dpm"])
def test_churn_reaches_the_core(name):
    x, sigmas, outs = 80 * torch.randn(1, 1, 4, 4), kd.get_sigmas_karras(5, 0.002, 80.0), []

    def denoiser(x, sigma):
        return x.tanh() / 2

    for options in ({}, CHURN, CHURN | {"s_noise": 2.0}, CHURN | {"s_tmin": 1.0}, CHURN | {"s_tmax": 1.0}):
        torch.manual_seed(0)
        outs.append(getattr(kd, name)(denoiser, x, sigmas, CountingGenerator(), False, None, *options.values()))
        torch.manual_seed(0)
        expected = getattr(samplers, name)(denoiser, x, sigmas, draw_unused=True, **options)
        assert torch.equal(outs[-1], expected)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


def test_midpoint_ancestral():
    seen = []
    out = kd.sample_midpoint_ancestral(
        lambda x, t: t[:, None], torch.zeros(2, 3), [0.0, 0.5], None, callback=seen.append
    )
    # x' = t by midpoints with h = 1/2: 1/2 (1/4) + 1/2 (3/4).
    torch.testing.assert_close(out, torch.full((2, 3), 0.5))
    assert [set(info) for info in seen] == [{"x", "tn", "dn", "dn_2"}] * 2


def test_multistep_adds_noise_of_the_last_index():
    generator = CountingGenerator()
    torch.manual_seed(0)
    out = kd.stochastic_iterative_sampler(
        lambda x, sigma: torch.zeros_like(x), torch.zeros(2, 1, 4, 4), None, generator, (0, 5, 5, 20), steps=40
    )
    torch.manual_seed(0)
    *_, noise = (torch.randn(2, 1, 4, 4) for _ in range(3))
    sigma = kd.get_sigmas_karras(40, 0.002, 80.0)[20]
    torch.testing.assert_close(out, noise * (sigma**2 - 0.002**2).sqrt())
    assert generator.draws == 3


def test_multistep_takes_rho_from_the_diffusion():
    levels = []

    class Recording(kd.KarrasDenoiser):
        def denoise(self, model, x_t, sigmas, **model_kwargs):
            levels.append(sigmas[0].item())
            return super().denoise(model, x_t, sigmas, **model_kwargs)

    kd.karras_sample(
        Recording(rho=3.0), lambda x, t: x, (1, 1, 2, 2), 10, sampler="multistep", ts=(0, 4, 9), rho=7.0, sigma_max=70
    )
    assert levels == pytest.approx(kd.get_sigmas_karras(10, 0.002, 70.0, rho=3.0)[[0, 4]].tolist())


def test_sampling_starts_at_its_own_sigma_max():
    diffusion = kd.KarrasDenoiser(sigma_max=3.0)
    diffusion.denoise = lambda model, x_t, sigmas: (None, x_t)
    generator = random_util.get_generator("determ", 2, 5)
    out = kd.karras_sample(diffusion, None, (2, 1, 4, 4), 2, sampler="onestep", sigma_max=0.25, generator=generator)
    noise = random_util.get_generator("determ", 2, 5).randn(2, 1, 4, 4)
    torch.testing.assert_close(out, (0.25 * noise).clamp(-1, 1))


@pytest.mark.parametrize("kwargs", [None, {}, {"y": 2.0}, {"low_res": 1.0, "scale": 3.0}])
def test_model_kwargs_reach_the_model(kwargs):
    seen = []

    def model(x, t, **given):
        seen.append(given)
        assert t.shape == (2,)
        return x

    diffusion = kd.KarrasDenoiser(loss_norm="l2")
    x = torch.randn(2, 1, 4, 4)
    kd.karras_sample(diffusion, model, x.shape, 2, model_kwargs=kwargs, sampler="euler")
    diffusion.training_losses(model, x, torch.ones(2), kwargs)
    diffusion.consistency_losses(model, x, 4, kwargs, model, model, diffusion)
    diffusion.progdist_losses(model, x, 4, kwargs, model, diffusion)
    assert seen == [kwargs or {}] * (2 + 1 + 4 + 3)


def test_network_input_keeps_the_state_dtype():
    """Under autocast a network answers in bfloat16; the next input is not rounded to that."""
    dtypes = []

    def model(x, t):
        dtypes.append(x.dtype)
        return x.bfloat16()

    kd.karras_sample(kd.KarrasDenoiser(), model, (1, 1, 4, 4), 3)
    kd.sample_heun(model, torch.ones(1, 1, 4, 4), kd.get_sigmas_karras(3, 0.002, 80.0), CountingGenerator())
    assert set(dtypes) == {torch.float32}


def test_ancestral_step_and_slope():
    down, up = kd.get_ancestral_step(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(down, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(up, torch.tensor([0.75**0.5, 0.0]))
    assert kd.get_ancestral_step(2.0, 1.0) == pytest.approx((0.5, 0.75**0.5))
    assert kd.to_d(torch.ones(2, 1, 1), torch.tensor([1.0, 2.0]), torch.zeros(2, 1, 1)).flatten().tolist() == [1, 0.5]
