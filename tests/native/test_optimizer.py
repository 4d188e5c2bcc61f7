"""Steps of optimizers and averages in C against float64, for every CPU that this one can be."""

import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.native import optimizer
from tests.native.common import CPUS, Looking
from tests.ops.lists import check, make
from tests.ops.test_optimizer import OPTIONS

pytestmark = pytest.mark.skipif(optimizer.refusal() is not None, reason=f"Optimizers in C: {optimizer.refusal()}")
NAMES = ["radam_ema_", "adam_ema_"]
each = pytest.mark.parametrize("name", NAMES)
#: Of tensors, in their order: none, one, some, a block and one, several blocks.
COUNTS = (0, 1, 37, 1025, 70000, 3, 5000)


@each
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("cpu", CPUS)
def test_values(name, options, step, cpu, monkeypatch):
    made = optimizer.functions(cpu)
    monkeypatch.setattr(optimizer, "functions", lambda cpu=None: made)
    check(make(step=step, lr=0.01, max_norm=2.0, grad_norm=torch.tensor(3.0), **options), "auto", name)


def lists(count=4):
    """Parameters, gradients, moments and averages of many sizes."""
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randn(n, generator=generator) for n in COUNTS] for _ in range(count + 2)]
    for v in made[3]:
        v.square_()
    return made


def taken(name, made):
    p, g, m, v, *averages = ([x.clone() for x in tensors] for tensors in made)
    getattr(ops, name)(p, g, m, v, torch.tensor(7.0), averages, [0.9, 0.3], lr=0.1, weight_decay=0.1)
    return [x for tensors in (p, m, v, *averages) for x in tensors]


@each
def test_same_bits_for_any_number_of_threads(name, monkeypatch):
    monkeypatch.setattr(optimizer, "LEAST", 0)
    made, before = lists(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = taken(name, made)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, taken(name, made), alone))
    finally:
        torch.set_num_threads(before)
    with cmfast.backend("reference"):
        for value, expected in zip(alone, taken(name, made), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_beside_is_written(cpu, threads, monkeypatch):
    monkeypatch.setattr(optimizer.native, "threads", lambda work, least: threads)
    memory = [torch.full((sum(COUNTS) + 64 * len(COUNTS) + 64,), 0.5) for _ in range(6)]
    inside = torch.zeros(memory[0].shape, dtype=torch.bool)
    at, views = 64, [[] for _ in memory]
    for n in COUNTS:
        inside[at : at + n] = True
        for flat, tensors in zip(memory, views):
            tensors.append(flat[at : at + n])
        at += n + 64
    p, g, m, v, *averages = views
    step = optimizer.Step(divisor=2, sign=1, beta1=0.9, beta2=0.99, size=0.1, slope=1, eps=1e-8, adaptive=True)
    optimizer.go_through(p, averages, [0.5, 0.1], step, g, m, v, cpu)
    for i, flat in enumerate(memory):
        assert (flat[~inside] == 0.5).all()
        assert (flat[inside] == 0.5).all() == (i == 1)


def test_a_rate_of_zero_copies():
    parameter, average = torch.full((1000,), 0.1), torch.full((1000,), 3e7)
    ops.ema_update_([parameter], [[average]], [0.0])
    assert torch.equal(average, parameter)


def calls_of(monkeypatch):
    calls, function = [], optimizer.functions(None)
    monkeypatch.setattr(optimizer, "functions", lambda cpu=None: lambda *args: calls.append(1) or function(*args))
    return calls


def test_threads_by_the_sum(monkeypatch):
    """And not by one of the tensors."""
    asked = []
    monkeypatch.setattr(optimizer.native, "threads", lambda work, least: asked.append(work) or 1)
    taken("adam_ema_", lists())
    assert asked == [sum(COUNTS)]


def test_who_looks_on_sees_pytorchs(monkeypatch):
    calls = calls_of(monkeypatch)
    taken("radam_ema_", lists())
    assert calls
    calls.clear()
    with Looking():
        taken("radam_ema_", lists())
    assert not calls


def test_without_a_compiler(monkeypatch):
    expected, calls = taken("radam_ema_", lists()), calls_of(monkeypatch)
    monkeypatch.setattr(optimizer, "refusal", lambda: "there is no C compiler")
    for value, other in zip(taken("radam_ema_", lists()), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
    assert not calls
