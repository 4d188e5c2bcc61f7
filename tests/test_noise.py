import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmfast import Denoiser, Sampler, losses, noise, ops
from cmfast.reference.philox import draw_words

X = torch.empty(4, 3, 5, 5)


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
def test_numbers_of_a_sample_do_not_depend_on_the_batch(name):
    whole = noise.get_generator(name, 8, seed=5).randn(8, 3, 4)
    parts = noise.get_generator(name, 8, seed=5)
    first = parts.randn(4, 3, 4)
    parts.set_done_samples(4)
    assert torch.equal(torch.cat([first, parts.randn(4, 3, 4)]), whole)
    integers = noise.get_generator(name, 8, seed=5).randint(0, 9, (8, 2))
    assert integers.dtype == torch.int64 and 0 <= integers.min() and integers.max() < 9


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
def test_ranks_take_turns(name, monkeypatch):
    whole = noise.get_generator(name, 8, seed=5).randn(8, 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert torch.equal(noise.get_generator(name, 8, seed=5).randn(4, 2), whole[rank::2])


def test_past_the_end_the_last_sample_again():
    drawn = noise.get_generator("determ", 3, seed=0).randn(5, 2)
    assert torch.equal(drawn[3], drawn[2]) and torch.equal(drawn[4], drawn[2])


def test_set_seed_starts_over():
    generator = noise.get_generator("determ-indiv", 4, seed=1)
    first = generator.randn_like(X)
    assert not torch.equal(generator.randn_like(X), first)
    generator.set_seed(1)
    assert torch.equal(generator.randn_like(X), first) and generator.get_seed() == 1


def test_torchs_generator_draws_integers():
    torch.manual_seed(3)
    drawn = noise.TorchGenerator().randint(0, 10, (5,))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randint(0, 10, (5,)))


def test_dummy_is_torch():
    torch.manual_seed(0)
    drawn = noise.get_generator("dummy").randn_like(X)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn_like(X))


@pytest.mark.parametrize("name, word", [("dummy", "input"), ("determ", "tensor"), ("determ-indiv", "tensor")])
def test_randn_like_by_keyword(name, word):
    assert noise.get_generator(name, 4).randn_like(**{word: X}).shape == X.shape


def test_counter_noise():
    source = noise.CounterNoise(1, torch.arange(4))
    first, second = source(X), source(X)
    assert not torch.equal(first, second) and first.dtype == X.dtype
    assert noise.CounterNoise(1, torch.arange(4))(X.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="batch of 2"):
        source(X[:2])


def test_counter_labels_are_independent_of_the_noise():
    labels = noise.counter_labels(0, torch.arange(1000), 10)
    assert labels.unique().numel() == 10
    assert torch.equal(noise.counter_labels(0, torch.tensor([7]), 10), labels[7:8])


def test_bad_arguments():
    with pytest.raises(ValueError, match="dummy, determ, determ-indiv"):
        noise.get_generator("nope")
    with pytest.raises(ValueError, match="num_samples"):
        noise.get_generator("determ")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_seeds_and_draws_of_numpy(kind):
    """As Python's: a sum of small ones must not wrap."""
    index, x = torch.arange(2), torch.randn(2, 32, 4, 4)
    given, plain = ops.Draw(kind(200), index, kind(100)), ops.Draw(200, index, 100)
    grid = ops.Grid(torch.tensor([80.0, 2.0, 0.002]))
    sigma = torch.ones(2)
    for made in (
        lambda draw: ops.normal(draw.seed, index, (3, 4), draw=draw.draw),
        lambda draw: ops.uniform_int(draw.seed, index, 9, draw=draw.draw),
        lambda draw: ops.init_noise(draw, sigma, shape=(3, 4))[0],
        lambda draw: ops.add_noise(x, draw, sigma)[0],
        lambda draw: ops.add_noise_pair(x, draw, sigma, sigma)[1][0],
        lambda draw: ops.renoise(x, x, sigma, sigma, draw)[0],
        lambda draw: ops.draw_levels(draw, grid)[0],
        lambda draw: ops.draw_pair(x, draw, grid).second[0],
        lambda draw: ops.dropout(x, 0.5, draw),
        lambda draw: losses.denoising_loss(lambda x, sigma: 0.5 * x, x, ops.LogNormal(), draw=draw)["loss"],
        lambda draw: ops.group_norm_silu(x, 4, torch.ones(32), torch.zeros(32), dropout=0.5, draw=draw),
    ):
        assert torch.equal(made(given), made(plain))
    sampler = Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4))
    assert torch.equal(sampler.sample(3, seed=kind(200)), sampler.sample(3, seed=200))
    network = Denoiser(lambda x, t, y: 0.1 * y.view(-1, 1, 1, 1) * x, num_classes=np.int64(5), image_shape=(1, 4, 4))
    assert torch.equal(Sampler(network, 2).sample(3, seed=kind(200)), Sampler(network, 2).sample(3, seed=200))


@pytest.mark.parametrize("seed", [True, 2.0, "3", None], ids=repr)
def test_seeds_that_are_none(seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        ops.normal(seed, torch.arange(2), (3,))
    with pytest.raises(TypeError, match="seed must be an integer"):
        ops.uniform_int(seed, torch.arange(2), 9)
    with pytest.raises(TypeError, match="seed must be an integer"):
        Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4)).sample(3, seed=seed)


class NoFloat64(TorchDispatchMode):
    """Fails where float64 would be on an mps device, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch has it
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, Tensor) or x.device.type != "mps" or x.dtype != torch.float64, func
        return result


def test_a_device_without_float64_gets_the_noise_of_the_cpu() -> None:
    with FakeTensorMode(), NoFloat64():
        index, sigma = torch.empty(2, dtype=torch.int64, device="mps"), torch.empty((), device="mps")
        draw = ops.Draw(index.sum(), index, 1)
        x, *_ = ops.init_noise(draw, sigma, shape=(3, 5, 5))
        made = x, ops.renoise(x, x, sigma, sigma, draw)[0], ops.normal(3, index, (3, 5, 5))
        words = draw_words(7, index, 0, 3)
    assert {(each.shape, each.dtype, each.device.type) for each in made} == {((2, 3, 5, 5), torch.float32, "mps")}
    assert [(word.shape, word.device.type) for word in words] == 4 * [((2, 3), "mps")]
