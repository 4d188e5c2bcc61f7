"""The exact denoiser of a mixture, where its value is known."""

import pytest
import torch

from cmfast.exact import MixtureDenoiser, gaussian_map, solved_map

MEANS = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.tensor([0, 0, 1, 1, 1, 2])


def test_a_class_is_the_mixture_of_its_means():
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 2])
    sigma = torch.tensor([0.1, 0.5, 3.0, 0.2], dtype=torch.float64)
    value = MixtureDenoiser(MEANS, 0.3, labels=CLASSES)(x, sigma, labels)
    for i, label in enumerate(labels):
        alone = MixtureDenoiser(MEANS[label == CLASSES], 0.3)
        torch.testing.assert_close(value[i : i + 1], alone(x[i : i + 1], sigma[i : i + 1]))
    assert not torch.allclose(value, MixtureDenoiser(MEANS, 0.3)(x, sigma))


def test_a_class_without_means():
    """There is no D of it, and no NaN in its place."""
    denoiser, x = MixtureDenoiser(MEANS, labels=2 * CLASSES), torch.zeros(2, 1, 2, 2)
    assert denoiser(x, 1.0, torch.tensor([0, 4])).isfinite().all()
    with pytest.raises(ValueError, match="labels must be of classes that have means, and 3 has none"):
        denoiser(x, 1.0, torch.tensor([0, 3]))


@pytest.mark.parametrize("weights", [[3.0, -1.0], [0.0, 0.0], [1.0, torch.nan]], ids=str)
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights must be 0 or more, and not all 0, got"):
        MixtureDenoiser(MEANS[:2], weights=torch.tensor(weights))
    assert torch.equal(MixtureDenoiser(MEANS[:2], weights=torch.tensor([0, 3]))(MEANS[:1], 9.0), MEANS[1:2])


def test_far_out_and_close_by():
    """At high noise D is the mean of all, at low noise the mean that is nearest."""
    denoiser, x = MixtureDenoiser(MEANS), MEANS[:1] + 0.01
    torch.testing.assert_close(denoiser(x, torch.tensor(1e6)), MEANS.mean(0, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(denoiser(x, torch.tensor(0.01)), MEANS[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_half_precision_is_rounded_once(dtype, sigma):
    means, x = MEANS.to(dtype), (MEANS[:3] + 0.1).to(dtype)
    wanted = MixtureDenoiser(means.double())(x.double(), sigma)
    torch.testing.assert_close(MixtureDenoiser(means)(x, sigma), wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sigma", [0.002, 80.0, 300.0])
def test_the_map_of_a_gaussian_is_rounded_once(dtype, sigma):
    x = (sigma * MEANS).to(dtype)
    for level in (sigma, torch.full((6,), sigma, dtype=torch.float64)):
        found, wanted = (gaussian_map(each, level, 0.002, mean=0.3, std=0.5) for each in (x, x.double()))
        torch.testing.assert_close(found, wanted.to(dtype))


def test_as_exact_under_autocast():
    denoiser, x = MixtureDenoiser(MEANS.float(), 0.3), torch.randn(4, 1, 2, 2)
    wanted = denoiser(x, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoiser(x, 1.0), wanted)


def test_the_solved_map_ends_at_the_boundary():
    denoiser, x = MixtureDenoiser(MEANS, 0.3), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    assert solved_map(denoiser, x, 0.002, 0.002) is x
    assert not torch.equal(solved_map(denoiser, x, 2.0, 0.002, steps=8), x)
