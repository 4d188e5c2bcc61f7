"""What users change in a KarrasDenoiser is honoured: methods, in every way Python has, and the perceptual loss."""

import pytest
import torch

from cmfast import perceptual
from cmfast.compat.openai import karras_diffusion as kd


def network(x, t):
    return 0.1 * x


def double(self, model, x_t, sigmas, **model_kwargs):
    return None, torch.full_like(x_t, 0.25)


@pytest.mark.parametrize("how", ["subclass", "instance", "class", "other object"])
def test_an_overridden_denoise_is_used(how, monkeypatch):
    diffusion = kd.KarrasDenoiser(loss_norm="l1", weight_schedule="uniform")
    if how == "subclass":
        diffusion = type("Sub", (kd.KarrasDenoiser,), {"denoise": double})(loss_norm="l1", weight_schedule="uniform")
    elif how == "instance":
        monkeypatch.setattr(diffusion, "denoise", double.__get__(diffusion), raising=False)
    elif how == "class":
        monkeypatch.setattr(kd.KarrasDenoiser, "denoise", double)
    else:
        diffusion = type("Other", (), {"denoise": double, "rho": 7.0})()
    for sampler in ("heun", "onestep", "multistep"):
        out = kd.karras_sample(diffusion, None, (1, 1, 4, 4), 4, sampler=sampler, ts=(0, 3))
        torch.testing.assert_close(out, torch.full_like(out, 0.25), rtol=0, atol=1e-5)
    if how != "other object":
        x = torch.zeros(3, 1, 4, 4)
        assert torch.equal(diffusion.training_losses(None, x, torch.ones(3))["loss"], torch.full((3,), 0.0625))
        terms = diffusion.consistency_losses(None, x, 4, target_model=network)
        assert torch.equal(terms["loss"], torch.zeros(3))


@pytest.mark.parametrize("distillation", [False, True])
def test_overridden_scalings_are_used(distillation):
    class Doubled(kd.KarrasDenoiser):
        def get_scalings(self, sigma):
            return 0 * sigma, 2 * torch.ones_like(sigma), torch.ones_like(sigma)

        def get_scalings_for_boundary_condition(self, sigma):
            return 0 * sigma, 3 * torch.ones_like(sigma), torch.ones_like(sigma)

    model, factor = (lambda x, t: torch.full_like(x, 0.1)), 3 if distillation else 2
    out = kd.karras_sample(Doubled(distillation=distillation), model, (2, 1, 4, 4), 1, sampler="onestep")
    torch.testing.assert_close(out, torch.full_like(out, 0.1 * factor))


def test_an_overridden_snr_weighs_the_loss():
    class Weighted(kd.KarrasDenoiser):
        def get_snr(self, sigmas):
            return torch.full_like(sigmas, 5.0)

    terms = Weighted(weight_schedule="snr").training_losses(lambda x, t: x, torch.ones(2, 1, 4, 4), torch.ones(2))
    torch.testing.assert_close(terms["loss"], 5 * terms["xs_mse"])


def test_lpips_is_made_when_a_loss_needs_it(monkeypatch):
    made = []
    monkeypatch.setattr(
        kd, "_UnitLPIPS", lambda **options: made.append(options) or (lambda x, y: (x - y).mean((1, 2, 3)))
    )
    diffusion = kd.KarrasDenoiser()
    assert diffusion.loss_norm == "lpips"
    kd.karras_sample(diffusion, lambda x, t: x, (1, 3, 8, 8), 2)
    assert not made
    for _ in range(2):
        diffusion.consistency_losses(network, torch.rand(1, 3, 8, 8), 4, target_model=network)
    assert made == [{"pooling": "avg", "dtype": torch.float32}]


def test_lpips_gets_what_the_original_gives_it():
    """Images in [0, 1], 224 x 224 where they are narrower than 256."""
    seen = []

    def lpips(x, y):
        seen.append((x, y))
        return (x - y).abs().mean((1, 2, 3))

    diffusion = kd.KarrasDenoiser(weight_schedule="uniform")
    diffusion.lpips_loss = lpips
    values = iter((1.0, 0.5, 1.0, 0.5))  # D of the student, then of the target
    diffusion.denoise = lambda model, x_t, sigmas: (None, torch.full_like(x_t, next(values)))
    for size, expected in (8, 224), (256, 256):
        terms = diffusion.consistency_losses(network, torch.zeros(1, 3, size, size), 4, target_model=network)
        x, y = seen[-1]
        assert x.shape == y.shape == (1, 3, expected, expected)
        torch.testing.assert_close((x.mean(), y.mean(), terms["loss"][0]), tuple(map(torch.tensor, (1.0, 0.75, 0.25))))


def test_own_lpips_is_that_of_the_core():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    core = perceptual.LPIPS("alex", pretrained=False)
    unit = kd._UnitLPIPS("alex", pretrained=False)
    unit.load_state_dict(core.state_dict())
    unit.trunk = core.trunk
    x, y = torch.rand(2, 2, 3, 48, 48)
    torch.testing.assert_close(unit(x, y), core(2 * x - 1, 2 * y - 1, resize=False), rtol=1e-4, atol=1e-7)
    resized = unit(perceptual.unit_images(2 * x - 1), perceptual.unit_images(2 * y - 1))
    torch.testing.assert_close(resized, core(2 * x - 1, 2 * y - 1), rtol=1e-4, atol=1e-7)
