"""The Sampler: images follow from (seed, index), whatever the batch."""

import pytest
import torch

from cmfast import Denoiser, Sampler, ops, samplers
from tests.golden_utils import relative_error
from tests.tolerances import GOLDEN_LOOP
from tests.toy import ToyNetwork


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


@pytest.mark.parametrize("options", [{"steps": 2}, {"sampler": "heun", "steps": 4, "s_churn": 2.0}], ids=str)
def test_batch_size_changes_nothing(model, options):
    images = {b: Sampler(model, b, **options).sample(7, seed=3) for b in (1, 3, 64)}
    assert images[1].shape == (7, 8, 8, 3) and images[1].dtype == torch.uint8
    for other in (3, 64):
        # One level: matrix kernels of another batch size round differently.
        assert (images[other].int() - images[1].int()).abs().max() <= 1


def test_noise_and_labels_are_bit_equal_across_batches(model):
    seen = {}
    for batch in (1, 3, 64):
        sampler = Sampler(model, batch, steps=2)
        rows = []

        def record(noise, labels, *, noise_fn, pixels, rows=rows):
            first = ops.normal(noise.seed, noise.index, (3, 8, 8), draw=noise.draw)
            rows.append((first, noise_fn(first), labels))
            return ops.to_uint8(first, rounding=pixels)

        sampler.generate = record
        list(sampler.stream(5, seed=1))
        seen[batch] = [torch.cat(parts)[:5] for parts in zip(*rows, strict=True)]
    for batch in (3, 64):
        assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[batch], strict=True))


def test_tail_is_bit_equal_at_one_batch_size(model):
    sampler = Sampler(model, 4, steps=2)
    assert torch.equal(sampler.sample(8, seed=0)[:5], sampler.sample(5, seed=0))


def test_seed_matters(model):
    sampler = Sampler(model, 4)
    assert not torch.equal(sampler.sample(4, seed=0), sampler.sample(4, seed=1))


@pytest.mark.parametrize("classes", [3, [3] * 5, torch.full((5,), 3)], ids=["one", "list", "tensor"])
def test_classes(model, classes):
    sampler = Sampler(model, 4)
    assert sampler.labels(5, classes=classes).tolist() == [3] * 5
    assert torch.equal(sampler.sample(5, classes=classes), sampler.sample(5, classes=3))


@pytest.mark.parametrize(
    "classes, message", [(7, "from 0 to 6"), (-1, "from 0 to 6"), ([1, 2], "one class or 5"), ([0, 0, 0, 0, 9], "9")]
)
def test_bad_classes(model, classes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, 4).sample(5, classes=classes)


def test_unconditional():
    sampler = Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4))
    assert sampler.labels(3) is None and sampler.sample(3).shape == (3, 4, 4, 1)
    with pytest.raises(ValueError, match="unconditional"):
        sampler.sample(3, classes=1)


def test_every_form_of_two_steps_is_the_same(model):
    forms = [{"steps": 2}, {"ts": (0, 22, 39)}, {"sigmas": Sampler(model, steps=2).sigmas}]
    images = [Sampler(model, 4, **form).sample(4) for form in forms]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_generate_is_the_algorithm(model):
    """Through the Sampler as without it, from given noise."""
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for name in samplers.SAMPLERS:
        sampler = Sampler(model, 2, sampler=name)
        torch.manual_seed(0)
        by_sampler = sampler.generate(noise, labels)
        torch.manual_seed(0)
        by_hand = samplers.sample(model, noise, sampler=name, sigmas=sampler.sigmas, labels=labels)
        assert relative_error(by_sampler, by_hand) <= GOLDEN_LOOP


def test_pixels_are_those_of_the_images(model):
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for name in samplers.SAMPLERS:
        sampler = Sampler(model, 2, sampler=name)
        torch.manual_seed(0)
        images = sampler.generate(noise, labels)
        torch.manual_seed(0)
        assert torch.equal(sampler.generate(noise, labels, pixels="trunc"), ops.to_uint8(images))


def test_training_mode_is_left_as_it_was(model):
    model.train()
    seen = []
    handle = model.network.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    Sampler(model, 2).sample(2)
    handle.remove()
    assert seen == [False] and model.training
    model.eval()


def test_none_at_all(model):
    assert Sampler(model, 4).sample(0).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    "options, message",
    [({"batch_size": 0}, "batch_size"), ({"sampler": "nope"}, "known:"), ({"steps": 1, "ts": (0, 39)}, "not more")],
    ids=str,
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, **options)
    with pytest.raises(ValueError, match="image_shape"):
        Sampler(lambda x, sigma: x)
    with pytest.raises(ValueError, match="n must"):
        Sampler(model).sample(-1)
