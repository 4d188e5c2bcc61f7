"""Normal numbers and levels from counters in C against those of the reference, for every CPU that this one can be."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import cmfast
from cmfast import ops, reference
from cmfast.native import noise
from cmfast.tolerances import FLOOR
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
    # A pair's levels are float32 beside its bfloat16.
    assert len(calls) == (0 if rounded or dtype == torch.float64 else 2 if name == "draw_pair" else 1)
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)


TABLE = torch.tensor([80.0, 20.0, 7.0, 2.0, 0.5, 0.1, 0.002])
#: Of samples 0 to 4,095 some have the words of these thresholds, and of those before and after.
WORDS = reference.philox.draw_words(5, torch.arange(4096), reference.draw.level_draw(ops.Draw(5, INDEX, 3)), 1)[0][:, 0]
THRESHOLDS = torch.tensor([*sorted([WORDS[1], WORDS[1], WORDS[9] + 1, WORDS[2], 2**32 - 1]), 0])
LEVELS = {
    "alike": ops.Grid(TABLE),
    "halved": ops.Grid(TABLE, 2),
    "thresholds": ops.Grid(TABLE, 1, THRESHOLDS[:-1]),
    "all the last": ops.Grid(TABLE, 2, torch.tensor([0, 0])),
    "one": ops.Grid(TABLE[:2], 1, torch.empty(0, dtype=torch.int64)),
    "lies apart": ops.Grid(torch.stack([TABLE, -TABLE], 1)[:, 0], 1, torch.tensor([2**31, 7] * 5)[::2]),
    "lognormal": ops.LogNormal(-1.2, 1.2),
    "wide": ops.LogNormal(-1.1, 6.0),
    "below": ops.LogNormal(-1.1, 2.0, ops.Below(0.25)),
    "close below": ops.LogNormal(-1.1, 2.0, ops.Below(2.0**-9, 8.0, 1.5)),
    "none below": ops.LogNormal(-1.1, 2.0, ops.Below(1.0, 8.0, 1.0)),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("cpu", CPUS)
def test_levels(name, cpu, monkeypatch):
    """Of a table the same; else within what eager PyTorch is of float64, in all."""
    made, of = noise.functions(cpu), LEVELS[name]
    monkeypatch.setattr(noise, "functions", lambda cpu=None: made)
    draw, calls = ops.Draw(5, torch.arange(4096), 3), called(monkeypatch)
    found, eager, exact = (
        ops.draw_levels(draw, of), reference.draw_levels(draw, of), reference.draw_levels(draw, of, torch.float64)
    )  # fmt: skip
    assert calls == [1] and len(found) == len(eager)
    for one, other, true in zip(found, eager, exact, strict=True):
        if isinstance(of, ops.Grid):
            assert torch.equal(one, other)
        else:
            errors = [((x - true).abs() / true.clamp(min=1e-30)).max() for x in (one, other)]
            assert errors[0] <= 2 * errors[1] + FLOOR[torch.float32] and (one >= 0).all()
    some = ops.draw_levels(draw._replace(index=draw.index[7:12]), of)
    assert all(torch.equal(one, every[7:12]) for one, every in zip(some, found, strict=True))


def test_explain_says_who_draws_levels():
    assert ops.explain("draw_levels")[0] == "C" and ops.explain("scalings")[0] == "reference"
    assert {ops.explain("draw_levels", dtype=torch.float64)[0], ops.explain("draw_levels", "cuda")[0]} == {"reference"}
    with cmfast.backend("reference"):
        assert ops.explain("draw_levels")[0] == "reference"


def test_levels_by_any_number_of_threads():
    before, draw = torch.get_num_threads(), ops.Draw(5, torch.arange(5000))
    expected = ops.draw_levels(draw, LEVELS["below"])
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, ops.draw_levels(draw, LEVELS["below"]), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("batch", [0, 1, 37])
def test_no_level_beyond_is_written(name, batch, monkeypatch):
    memory, index = [], torch.arange(batch)

    def apart(size, **_):
        memory.append(torch.full((size + 128,), 77.0))
        return memory[-1][64 : 64 + size]

    monkeypatch.setattr(noise.torch, "empty", apart)
    made = noise.levels(ops.Draw(5, index), LEVELS[name])
    monkeypatch.undo()
    assert len(made) == len(memory)
    assert all((flat[:64] == 77).all() and (flat[64 + batch :] == 77).all() for flat in memory)


def test_levels_that_are_written_over():
    """Each is memory of its own, with a version of its own."""
    x = torch.ones(5, requires_grad=True)
    sigma, next_sigma = ops.draw_levels(ops.Draw(5, INDEX), LEVELS["below"])
    y = (x * sigma).sum()
    next_sigma.clamp_(min=1).mul_(x)
    y.backward()
    assert torch.equal(x.grad, sigma)


@pytest.mark.parametrize("levels", [
    ops.LogNormal(torch.tensor(1.0)), ops.LogNormal(0.0, torch.tensor(1.0)), ops.LogNormal(below=(0.5, 8.0, 1.0)),
    ops.LogNormal(below=ops.Below(torch.tensor(0.5))),
], ids=["mean", "std", "a tuple", "a tensor below"])  # fmt: skip
def test_levels_of_no_numbers(levels):
    with pytest.raises(TypeError, match="levels[.].* must be a "):
        ops.draw_levels(ops.Draw(5, INDEX), levels)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_draws_for_any_sample(pre_dispatch):
    """No numbers are part of it."""
    calls = [
        lambda index: ops.normal(3, index, (4,)), lambda index: ops.uniform_int(3, index, 1000),
        lambda index: ops.draw_levels(ops.Draw(5, index), LEVELS["alike"])[0],
        lambda index: ops.draw_levels(ops.Draw(5, index), LEVELS["below"])[1],
    ]  # fmt: skip
    for call in calls:
        graph = make_fx(call, pre_dispatch=pre_dispatch)(torch.arange(5))
        torch.testing.assert_close(graph(INDEX), call(INDEX))

def test_levels_that_c_does_not_draw(monkeypatch):
    """Those with gradients, in another dtype, or before who looks on."""
    calls, draw = called(monkeypatch), ops.Draw(5, INDEX)
    table = TABLE.clone().requires_grad_()
    ops.draw_levels(draw, ops.Grid(table))[0].sum().backward()
    assert table.grad.sum() == len(INDEX)
    assert ops.draw_levels(draw, ops.Grid(TABLE), dtype=torch.float64)[0].dtype == torch.float64
    assert torch.equal(*(ops.draw_levels(draw, ops.Grid(x))[0] for x in (TABLE.bfloat16(), TABLE.bfloat16().float())))
    calls.clear()
    with Looking() as looking:
        ops.draw_levels(draw, ops.Grid(TABLE.double()))
        ops.draw_levels(draw, ops.LogNormal())
    assert not calls and "exp" in looking.seen


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
