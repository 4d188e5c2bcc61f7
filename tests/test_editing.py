"""Zero-shot editing: what is known is kept. Golden numbers: test_golden.py."""

import pytest
import torch

from cmfast import editing

SIGMAS = [80.0, 3.0, 0.5]
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
X = 80 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model(x, sigma):
    return torch.tanh(x).roll(1, -1)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (16, 16), (1, 1, 16, 16), (2, 1, 1, 16)], ids=str)
def test_inpaint_keeps_the_known_pixels(shape):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    out, reference = editing.inpaint(model, IMAGES, X, SIGMAS, mask)
    known = mask.expand(2, 3, 16, 16) == 1
    torch.testing.assert_close(out[known], IMAGES[known])
    assert (reference[~known] == -1).all() and not torch.allclose(out[~known], IMAGES[~known])
    # Reversed masks keep the other half.
    other, _ = editing.inpaint(model, IMAGES, X, SIGMAS, 1 - mask)
    torch.testing.assert_close(other[~known], IMAGES[~known])


def test_inpaint_mixes_where_the_mask_is_between():
    """The model's with the image itself, and not with what is black in part already."""
    mask = torch.linspace(0, 1, 16)
    out, reference = editing.inpaint(model, IMAGES, X, [80.0], mask)
    torch.testing.assert_close(out, torch.lerp(model(X, None).clamp(-1, 1), IMAGES, mask.expand_as(X)))
    torch.testing.assert_close(reference, torch.lerp(torch.tensor(-1.0), IMAGES, mask.expand_as(X)))


def test_colorize_keeps_the_luminance():
    out, reference = editing.colorize(model, IMAGES, X, SIGMAS)
    weights = torch.tensor([0.2989, 0.5870, 0.1140])
    luminance = [torch.einsum("bchw,c->bhw", image, weights) for image in (out, IMAGES, reference)]
    torch.testing.assert_close(luminance[0], luminance[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(luminance[2], luminance[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size", [4, 8])
def test_super_resolution_keeps_the_means(patch_size):
    out, reference = editing.super_resolve(model, IMAGES, X, SIGMAS, patch_size=patch_size)
    pool = torch.nn.AvgPool2d(patch_size)
    torch.testing.assert_close(pool(out), pool(IMAGES), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        reference, pool(IMAGES).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    )


def test_oblong_images():
    out, _ = editing.super_resolve(model, IMAGES[..., :8], X[..., :8], SIGMAS)
    assert out.shape == (2, 3, 16, 8)


def test_bad_arguments():
    with pytest.raises(ValueError, match="mask does not broadcast"):
        editing.inpaint(model, IMAGES, X, SIGMAS, torch.ones(5, 5))
    with pytest.raises(ValueError, match="shape of x"):
        editing.edit(model, IMAGES[:1], X, SIGMAS, mask=torch.ones(()))
    with pytest.raises(ValueError, match="multiples of 8"):
        editing.super_resolve(model, IMAGES[..., :7], X[..., :7], SIGMAS)
    with pytest.raises(ValueError, match="3, H, W"):
        editing.colorize(model, IMAGES[:, :1], X[:, :1], SIGMAS)
    with pytest.raises(ValueError, match=r"mask must be from 0 \(filled in\) to 1 \(kept\), got 0 to 255"):
        editing.inpaint(model, IMAGES, X, SIGMAS, torch.tensor([0, 255], dtype=torch.uint8).repeat(8))
    with pytest.raises(TypeError, match="mask must be a torch.Tensor, got ndarray"):
        editing.inpaint(model, IMAGES, X, SIGMAS, torch.ones(16).numpy())
    with pytest.raises(TypeError, match="images must .*floating"):
        editing.inpaint(model, (IMAGES * 127).to(torch.uint8), X, SIGMAS, torch.ones(16))
    for patch_size, error in ((0, ValueError), (-4, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="patch_size must be"):
            editing.super_resolve(model, IMAGES, X, SIGMAS, patch_size=patch_size)


def test_nothing_of_what_is_not_known_is_looked_at():
    mask = (torch.arange(16) % 2).float()
    wanted, reference = editing.inpaint(model, IMAGES, X, [80.0], mask)
    broken = torch.where(mask == 0, torch.nan, IMAGES)
    out, known = editing.inpaint(model, broken, X, [80.0], mask)
    assert torch.equal(out, wanted) and torch.equal(known, reference)
    assert torch.equal(editing.edit(model, broken, X, [80.0], mask=mask), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("of", ["state", "images"])
def test_dtypes(dtype, of):
    """The result is in the dtype of the state, whatever that of the images."""
    x, images = (X.to(dtype), IMAGES) if of == "state" else (X, IMAGES.to(dtype))
    for run in (
        lambda: editing.colorize(model, images, x, [80.0]),
        lambda: editing.super_resolve(model, images, x, [80.0]),
        lambda: editing.inpaint(model, images, x, [80.0], torch.ones(16)),
    ):
        out, reference = run()
        assert out.dtype == reference.dtype == x.dtype and out.isfinite().all()


@pytest.mark.parametrize("run", [editing.colorize, editing.super_resolve])
def test_what_is_known_is_kept_under_autocast(run):
    wanted = run(model, IMAGES, X, SIGMAS, noise_fn=torch.zeros_like)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, IMAGES, X, SIGMAS, noise_fn=torch.zeros_like)
    assert all(map(torch.equal, out, wanted))


def test_the_state_keeps_its_layout():
    """Where noise is drawn like the state, that does not lie as the maps to and from a transform leave an image."""
    seen = []

    def noise_fn(x):
        seen.append(x.is_contiguous())
        return torch.zeros_like(x)

    editing.colorize(model, IMAGES, X, SIGMAS, noise_fn=noise_fn)
    assert seen == [True] * 2
