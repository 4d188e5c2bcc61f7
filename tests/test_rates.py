"""Rates of averages against their formulas, step by step."""

import math

import pytest
import torch

from cmfast.rates import Constant, Given, HalfLife, PowerFunction, WarmUp, parse_rate
from tests.host_reads import NoHostReads

STEPS = [1, 2, 3, 10, 1000, 10**6]


def check(rate, formula):
    with NoHostReads():
        values = [rate(torch.tensor(t)) for t in STEPS]
    assert all(value.dtype == torch.float64 and value.shape == () for value in values)
    assert [value.item() for value in values] == pytest.approx([formula(t) for t in STEPS], rel=1e-12, abs=1e-15)
    assert rate.constant is None or rate.constant == formula(1) == formula(77)


def test_constant():
    check(Constant(0.9999), lambda t: 0.9999)


def test_half_life():
    check(HalfLife(500), lambda t: 0.5 ** (1 / 500))
    check(HalfLife(500_000, batch=64), lambda t: 0.5 ** (64 / 500_000))


def test_half_life_that_ramps_up():
    """EDM's training loop: min(halflife, images seen * 0.05), which are none at the first update."""
    check(
        HalfLife(10_000, batch=64, rampup=0.05),
        lambda t: 0.5 ** (64 / max(min(10_000, (t - 1) * 64 * 0.05), 1e-8)),
    )


def test_power_function():
    """The average is one over the whole past, weighted by t^gamma: Karras et al. 2023, eq. 121."""
    rate = PowerFunction(gamma=6.94)
    check(rate, lambda t: (1 - 1 / t) ** 7.94)
    weights = torch.zeros(2000, dtype=torch.float64)
    for t in range(1, 2001):
        beta = rate(torch.tensor(t))
        weights.mul_(beta)
        weights[t - 1] += 1 - beta
    times = torch.arange(1, 2001, dtype=torch.float64) / 2000
    mean = (weights * times).sum()
    std = (weights * (times - mean) ** 2).sum().sqrt()
    assert weights.sum().item() == pytest.approx(1)
    assert std.item() == pytest.approx(rate.std, rel=2e-3)


@pytest.mark.parametrize("std, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_widths_of_the_paper(std, gamma):
    assert PowerFunction(std=std).gamma == pytest.approx(gamma, abs=5e-3)
    assert PowerFunction(std=PowerFunction(gamma=gamma).std).gamma == pytest.approx(gamma, rel=1e-9)


def test_warm_up():
    """After n updates at most (n + 1) / (n + 10)."""
    check(WarmUp(Constant(0.999)), lambda t: min(0.999, (t - 1 + 1) / (t - 1 + 10)))


def test_given():
    rate = Given(0.9)
    with NoHostReads():
        rate.set_(0.95)
    assert rate(torch.tensor(3)).item() == 0.95
    rate.set_(torch.tensor(0.5))
    assert rate(torch.tensor(3)).item() == 0.5
    with pytest.raises(ValueError, match="a rate must be from 0 to 1, got 95"):
        rate.set_(95)
    assert rate(torch.tensor(3)).item() == 0.5


@pytest.mark.parametrize(
    "text", ["0.9999", "halflife:500,batch=4", "halflife:5000,rampup=0.05", "warmup:power:0.1", "given:0.95", "1"]
)
def test_text_and_back(text):
    assert str(parse_rate(text)) == text and parse_rate(str(parse_rate(text))) == parse_rate(text)
    assert parse_rate(parse_rate(text)) == parse_rate(text)


@pytest.mark.parametrize(
    "text",
    ["fast", "halflife:x", "power:0.5", "power:0.1,0.2", "1.5", "halflife:5,rate=1", "halflife:-1", "given:1.5", ""],
)
def test_texts_that_are_none(text):
    with pytest.raises(ValueError, match="known: 0.9999, halflife:IMAGES"):
        parse_rate(text)


@pytest.mark.parametrize("arguments", [{}, {"std": 0.1, "gamma": 6.94}, {"gamma": 0}], ids=str)
def test_errors(arguments):
    with pytest.raises(ValueError, match="gamma"):
        PowerFunction(**arguments)
    assert math.isfinite(PowerFunction(std=1e-4).gamma)
