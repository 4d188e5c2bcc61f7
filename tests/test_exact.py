"""The exact denoiser of a mixture, where its value is known."""

import torch

from cmfast.exact import MixtureDenoiser, solved_map

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


def test_far_out_and_close_by():
    """At high noise D is the mean of all, at low noise the mean that is nearest."""
    denoiser, x = MixtureDenoiser(MEANS), MEANS[:1] + 0.01
    torch.testing.assert_close(denoiser(x, torch.tensor(1e6)), MEANS.mean(0, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(denoiser(x, torch.tensor(0.01)), MEANS[:1])


def test_as_exact_under_autocast():
    denoiser, x = MixtureDenoiser(MEANS.float(), 0.3), torch.randn(4, 1, 2, 2)
    wanted = denoiser(x, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoiser(x, 1.0), wanted)


def test_the_solved_map_ends_at_the_boundary():
    denoiser, x = MixtureDenoiser(MEANS, 0.3), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    assert solved_map(denoiser, x, 0.002, 0.002) is x
    assert not torch.equal(solved_map(denoiser, x, 2.0, 0.002, steps=8), x)
