"""Kernels of a step of RAdam and Adam: precision, skipping, the norm, same bits, layouts."""

from __future__ import annotations

import math

import pytest
import torch

import cmfast
from cmfast import ops, optim
from cmfast.ema import Averages
from cmfast.kernels import optimizer
from tests.host_reads import NoHostReads
from tests.ops.lists import LAYOUTS, check, make
from tests.ops.test_optimizer import OPTIONS

each = pytest.mark.parametrize("name", ["radam_ema_", "adam_ema_"])


@each
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("step", [0, 4, 5])
def test_agrees_with_float64(name, options, step, device):
    """RAdam starts to adapt with its sixth step; its rho, of differences of large numbers, needs float64."""
    check(make(step=step, lr=0.01, device=device, **options), "triton", name)


@each
@pytest.mark.parametrize("step", [2**24 - 1, 2**24])
def test_where_a_float32_count_stops(name, step, device):
    lists = make(step=step, lr=0.01, device=device)
    exact = lists.map(torch.Tensor.double)
    lists.take(name, "triton"), exact.take(name, "reference")
    assert lists.step.item() == 2**24
    torch.testing.assert_close(lists.parameters, [p.float() for p in exact.parameters])


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "float32 gradients"])
def test_low_dtypes(name, dtype, mixed, device):
    lists = make(dtype, copies=torch.float16, step=7, lr=0.01, device=device)
    if mixed:
        lists.gradients = [g.float() for g in lists.gradients]
    check(lists, "triton", name)


@each
@pytest.mark.parametrize("given", ["scale", "clip", "loose clip", "lr", "found_inf", "all", "no averages"])
def test_what_may_be_given(name, given, device):
    def scalar(value):
        return torch.tensor(value, device=device)

    norm = {"grad_norm": scalar(50.0), "max_norm": 0.5}
    options = {
        "scale": {"grad_scale": scalar(1024.0)}, "clip": norm, "loose clip": {**norm, "max_norm": 100.0},
        "lr": {"lr": scalar(0.02)}, "found_inf": {"found_inf": scalar(0.0)},
        "all": {**norm, "grad_scale": scalar(8.0), "lr": scalar(0.02), "found_inf": scalar([0.0])}, "no averages": {},
    }[given]  # fmt: skip
    plain = {"rates": [], "copies": None} if given == "no averages" else {}
    check(make(step=7, device=device, **{"lr": 0.01, **options}, **plain), "triton", name)


@each
def test_clips_by_its_own_norm(name, device):
    lists = make(step=7, lr=0.01, max_norm=0.5, grad_scale=torch.tensor(4.0, device=device), device=device)
    given = lists.map(torch.clone)
    with cmfast.backend("triton"):
        norm = ops.grad_norm(lists.gradients, grad_scale=lists.options["grad_scale"])
    given.options = {**lists.options, "grad_norm": norm}
    lists.take(name, "triton"), given.take(name, "triton")
    assert all(map(torch.equal, lists.parameters, given.parameters))


@each
@pytest.mark.parametrize("cause", ["found_inf", "inf", "nan"])
def test_skipping(name, cause, device):
    """Nothing changes; the next step is as if there had been none."""
    lists = make(step=3, lr=0.01, device=device)
    kept = lists.map(torch.clone)
    if cause == "found_inf":
        lists.options = {"lr": 0.01, "found_inf": torch.tensor(2.0, device=device)}
    else:
        lists.gradients[5][1, 7] = float(cause)
        lists.options = {"lr": 0.01, "max_norm": math.inf}
    for copy, other in zip(lists.copies, kept.copies):
        copy.fill_(7), other.fill_(7)
    assert lists.take(name, "triton").item() == 1
    assert lists.step.item() == 3
    for what, values in lists.written().items():
        assert all(map(torch.equal, values, kept.written()[what])), what
    lists.gradients, lists.options = kept.gradients, {"lr": 0.01, "max_norm": math.inf}
    assert lists.take(name, "triton").item() == 0
    kept.take(name, "triton")
    assert all(map(torch.equal, lists.parameters, kept.parameters))


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", ["all", "gradients", "moments"])
def test_layouts(name, layout, kinds, device):
    lists = make(step=9, lr=0.01, device=device)
    changed = lists.map(LAYOUTS[layout])
    if kinds == "gradients":
        lists.gradients = changed.gradients
    elif kinds == "moments":
        lists.exp_avgs, lists.averages = changed.exp_avgs, changed.averages
    check(changed if kinds == "all" else lists, "triton", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm(dtype, device):
    gradients = make(dtype, device=device).gradients
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    scale = torch.tensor(8.0, device=device)
    with cmfast.backend("triton"):
        torch.testing.assert_close(ops.grad_norm(gradients).double(), exact, rtol=1e-6, atol=0)
        for each in (scale, -scale):
            scaled = ops.grad_norm(gradients, grad_scale=each)
            torch.testing.assert_close(scaled.double(), exact / 8, rtol=1e-6, atol=0)
        assert ops.grad_norm([torch.zeros(0, device=device)]) == 0
        assert ops.grad_norm([*gradients, torch.tensor(math.inf, device=device, dtype=dtype)]).isinf()
        assert ops.grad_norm([*gradients, torch.tensor(math.nan, device=device, dtype=dtype)]).isnan()
        assert ops.grad_norm([x.mT for x in gradients if x.ndim > 1]).isfinite()


@each
def test_a_norm_only_reads(name, device):
    """An expanded gradient, as that of a sum is, and one with gaps."""
    expanded, gaps = torch.ones(1, device=device).expand(4), torch.ones(4, 6, device=device)[:, ::2]
    version = gaps._version
    with cmfast.backend("triton"):
        assert ops.grad_norm([expanded, gaps]).item() == 4 and gaps._version == version
        parameter, mean, square = (torch.zeros(4, device=device) for _ in range(3))
        step = torch.zeros((), device=device)
        assert getattr(ops, name)([parameter], [expanded], [mean], [square], step, lr=0.1, max_norm=1.0).item() == 0
    torch.testing.assert_close(mean, torch.full_like(mean, 0.05))


@pytest.mark.parametrize("parts, enough", [(4, 1024), (8192, 1)])
def test_norm_of_many_elements(parts, enough, device, monkeypatch):
    """A program sums several blocks."""
    monkeypatch.setattr(optimizer, "PARTS", parts)
    monkeypatch.setattr(optimizer, "ENOUGH", enough)
    gradients = [torch.randn(30_000, device=device), torch.randn(77, device=device)]
    exact = torch.cat(gradients).double().norm()
    with cmfast.backend("triton"):
        norm = ops.grad_norm(gradients)
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        assert norm.equal(ops.grad_norm([g.clone() for g in gradients]))


@each
def test_writes_are_counted(name, device):
    lists = make(step=3, lr=0.01, device=device)
    tensors = [x for group in lists.written().values() for x in group] + [lists.step]
    versions = [x._version for x in tensors]
    lists.take(name, "triton")
    assert all(x._version > version for x, version in zip(tensors, versions))


def test_a_step_reads_what_the_device_holds(device):
    """Rates, learning rate and step count may change between calls, as between replays of a graph."""
    lists = make(step=3, lr=torch.tensor(0.01, device=device), device=device)
    for change in (lambda: lists.rates.fill_(0.5), lambda: lists.options["lr"].mul_(2), lambda: lists.step.fill_(50)):
        change()
        check(lists.map(torch.clone), "triton", "radam_ema_")


def test_a_whole_step_reads_nothing_on_the_host(device):
    """Two groups, averages, clipping, GradScaler's scalars: with tables that are new and with those of before."""
    weights = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((33, 5), (64,), (3, 3))]
    averages = Averages(weights, [0.9, "power:0.1"])
    groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.1}]
    fused = optim.RAdam(groups, lr=0.01, max_norm=1.0, averages=averages)
    fused.grad_scale, fused.found_inf = (torch.ones((), device=device) for _ in range(2))
    for found in (0.0, 1.0, 0.0):
        fused.found_inf.fill_(found)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        with cmfast.backend("triton"), NoHostReads():
            fused.step()
    assert fused.skipped.item() == 1 and averages.step.item() == 2
    assert [fused.state[weight]["step"].item() for weight in weights] == [2, 2, 2]
