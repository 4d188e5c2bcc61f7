"""Normal numbers from counters in C against those of the reference, for every CPU that this one can be."""

import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.native import noise
from tests.native.common import CPUS, Looking

pytestmark = pytest.mark.skipif(noise.refusal() is not None, reason=f"Noise in C: {noise.refusal()}")
INDEX = torch.tensor([0, 1, 5, 2**33 + 3, -3])


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", [(3, 64, 61), (1,), (7,), (4097,), (0,), ()], ids=str)
@pytest.mark.parametrize("seed, draw", [(0, 0), (2**63 + 12345678901, 7), (-1, 2**32 + 2), (2303, -1)])
def test_bits(shape, cpu, seed, draw):
    """All of them: hardly a number is another than the reference's, and here none."""
    made = noise.normal(seed, INDEX, shape, draw, cpu)
    assert torch.equal(made, reference.normal(seed, INDEX, shape, draw=draw))


@pytest.mark.parametrize("cpu", CPUS)
def test_bits_of_many(cpu):
    """Of some million numbers, the tails among them."""
    index, shape = torch.arange(8), (2**19,)
    made, expected = noise.normal(11, index, shape, 0, cpu), reference.normal(11, index, shape)
    assert expected.abs().max() > 4.9
    steps = (made.view(torch.int32) - expected.view(torch.int32)).abs()
    assert steps.max() <= 1 and (steps > 0).sum() <= 1


def test_same_bits_for_any_batch_and_threads():
    before, together = torch.get_num_threads(), noise.normal(3, INDEX, (3, 50, 50), 1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for which in (slice(None), slice(3, 4), slice(1, 3)):
                assert torch.equal(noise.normal(3, INDEX[which], (3, 50, 50), 1), together[which])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("count", [1, 3, 30, 33, 4096, 4099])
def test_nothing_beyond_is_written(monkeypatch, count, cpu):
    margin, flat = 64, torch.full((2 * count + 128,), torch.nan)
    monkeypatch.setattr(noise.torch, "empty", lambda *size, **options: flat[margin:-margin].view(size))
    made = noise.normal(0, INDEX[:2], (count,), 0, cpu)
    monkeypatch.undo()
    assert made.isfinite().all() and flat[:margin].isnan().all() and flat[-margin:].isnan().all()


def called(monkeypatch) -> list:
    """Draws that C makes: alone, or on the way."""
    calls, words = [], noise.words
    monkeypatch.setattr(noise, "words", lambda draw: calls.append(1) or words(draw))
    return calls


def operations(draw, dtype=torch.float32):
    """Whatever draws, by name."""
    x, sigma, second = torch.ones(2, 3, 5, 4, dtype=dtype), torch.tensor([2.0, 1.0]), torch.tensor(0.5)
    options = {"state_dtype": dtype, "shape": (3, 5, 4)}
    return {
        "normal": lambda: (ops.normal(draw.seed, draw.index, (3, 5, 4), draw=draw.draw, dtype=dtype),),
        "init_noise": lambda: ops.init_noise(draw, sigma, **options),
        "add_noise": lambda: ops.add_noise(x, draw, sigma),
        "add_noise_pair": lambda: sum(ops.add_noise_pair(x, draw, sigma, second), ()),
        "renoise": lambda: ops.renoise(x, x, sigma, second, draw),
        "draw_pair": lambda: ops.draw_pair(x, draw, ops.Grid(torch.tensor([80.0, 2.0, 0.002]))).first,
    }


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", operations(ops.Draw(0, INDEX[:2])))
def test_operations(monkeypatch, name, dtype, tensors):
    """They take it where the numbers are float32, and what they make of them is the same."""
    draw = ops.Draw(5, INDEX[2:4], 3)
    if tensors:
        draw = ops.Draw(torch.tensor(5), INDEX[2:4].clone(), torch.tensor(3))
    with cmfast.backend("reference"):
        expected = operations(draw, dtype)[name]()
    calls = called(monkeypatch)
    with cmfast.backend("auto"):
        made = operations(draw, dtype)[name]()
    rounded = dtype == torch.bfloat16 and name in ("normal", "init_noise")  # drawn in that dtype
    assert calls == ([] if rounded or dtype == torch.float64 else [1])
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_who_looks_on_sees_pytorchs(monkeypatch):
    calls = called(monkeypatch)
    with Looking(), cmfast.backend("auto"):
        ops.normal(0, INDEX, (3,))
    assert not calls


def test_without_a_compiler(monkeypatch):
    expected = ops.normal(0, INDEX, (3,))
    monkeypatch.setattr(noise, "refusal", lambda: "there is no C compiler")
    monkeypatch.setattr(noise, "normal", lambda *args: pytest.fail("it was called"))
    assert torch.equal(ops.normal(0, INDEX, (3,)), expected)
