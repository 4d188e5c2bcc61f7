"""Numbers at the edges: the boundary, the largest noise in half precision, long runs."""

from __future__ import annotations

import copy

import pytest
import torch

import cmfast
from cmfast import ema, ops
from cmfast.tolerances import FLOOR
from tests.golden_utils import small_unet
from tests.ops.cases import CASES, flat, inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HALF = pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)


@pytest.fixture(params=["reference", "auto"])
def path(request):
    """The reference, and what serves on a CPU."""
    with cmfast.backend(request.param):
        yield


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("model", DTYPES, ids=str)
@pytest.mark.parametrize("sigma_min, sigma_data", [(0.002, 0.5), (0.01, 0.0723), (0.3, 3.3333)])
def test_the_boundary_bit_for_bit(state, model, sigma_min, sigma_data, path):
    """D(x, sigma_min) = x, and nothing is added there, whatever x and F: bit for bit, at a scalar level and at [B].

    Levels are those of the accumulation dtype: a float32 sigma_min is not that of a float64 D.
    """
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(3, 3, 7, 5, generator=generator)).to(state)
    x[0, 0, 0] = torch.tensor([0.0, 1.0, -1.0, 6e4, 2.0**-14]).to(state)
    output = (1000 * torch.randn(x.shape, generator=generator)).to(model)
    levels = max(state, model, key=lambda dtype: torch.finfo(dtype).bits)
    wide = torch.float64 if levels == torch.float64 else torch.float32
    options = {"sigma_data": sigma_data, "boundary": sigma_min}
    for sigma in (torch.tensor(sigma_min, dtype=wide), torch.full((3,), sigma_min, dtype=wide)):
        assert torch.equal(ops.denoise(output, x, sigma, **options), x)
        later, *_ = ops.renoise(output, x, sigma, sigma, 1e9 * x.float(), sigma_min=sigma_min, **options)
        assert torch.equal(later, x)
    c_skip, c_out, _ = ops.scalings(torch.tensor(sigma_min, dtype=wide), **options)
    assert c_skip == 1 and c_out == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalings_at_any_boundary(dtype):
    """c_skip = 1 and c_out = 0 exactly, for any deviation of the data."""
    for i in range(1, 400):
        sigma = torch.tensor(i / 1000, dtype=dtype)
        c_skip, c_out, _ = ops.scalings(sigma, sigma_data=i / 100, boundary=i / 1000)
        assert c_skip == 1 and c_out == 0, i / 100


@each_dtype
def test_a_model_is_the_identity_at_sigma_min(dtype):
    model = cmfast.Denoiser(lambda x, noise: 1e3 * torch.sin(x) + noise.mean())
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(model(x, 0.002), x)
    assert not torch.equal(model(x, 0.003), x)


@HALF
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sigmas])
def test_the_largest_noise(name, dtype, path):
    """States of sigma_max = 80 in half precision: rounded, never lost. The levels fall from there."""
    case = CASES[name]
    states, _ = inputs(case, (2, 3, 4, 4))
    states = {k: (80 * v if k in ("x", "x2") else v).to(dtype) for k, v in states.items()}
    sigmas = {k: torch.full((2,), 80.0 * 0.8**i) for i, k in enumerate(case.sigmas)}
    exact = flat(case.call({k: v.double() for k, v in states.items()}, {k: v.double() for k, v in sigmas.items()}))
    for value, high in zip(flat(case.call(states, sigmas)), exact, strict=True):
        assert value.isfinite().all()
        assert (value - high).abs().max() <= FLOOR[dtype] * high.abs().max()


@HALF
def test_levels_in_half_precision(dtype):
    """Scalings of levels in half precision are computed in float32 and rounded once: 300^2 is more than float16 has."""
    sigma = torch.tensor([0.002, 0.5, 80.0, 300.0]).to(dtype)
    functions = [lambda s: ops.scalings(s), lambda s: ops.c_noise(s), lambda s: ops.loss_weight(s[1:], "karras")]
    for function in functions:
        for value, high in zip(flat(function(sigma)), flat(function(sigma.double())), strict=True):
            assert torch.equal(value, high.float().to(dtype))


@HALF
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sigmas])
def test_levels_given_in_half_precision(name, state, dtype):
    """From 80 down: what they are is computed with, bit for bit, in the precision of the state and never in theirs."""
    case = CASES[name]
    states, _ = inputs(case, (2, 3, 4, 4))
    states = {k: (80 * v if k in ("x", "x2") else v).to(state) for k, v in states.items()}
    sigmas = {k: torch.full((2,), 80.0 * 0.8**i).to(dtype) for i, k in enumerate(case.sigmas)}
    wide = torch.float64 if state == torch.float64 else torch.float32
    with cmfast.backend("reference"):
        given, same = case.call(states, sigmas), case.call(states, {k: v.to(wide) for k, v in sigmas.items()})
    for a, b in zip(flat(given), flat(same), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) and a.isfinite().all()


@HALF
@pytest.mark.parametrize("scale", [1.0, 150.0])
def test_a_network_in_half_precision_at_the_largest_noise(dtype, scale):
    """D(x, 80), optimised or not: 150 deviations of noise are 12,000, in the range of float16."""
    model = cmfast.Denoiser(small_unet(num_classes=5), image_shape=(3, 8, 8)).eval().requires_grad_(False)
    x = 80 * scale * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    labels, exact = torch.tensor([1, 2]), None
    wide = copy.deepcopy(model).double()
    cast, fast = copy.deepcopy(model).to(dtype), cmfast.optimize(model, dtype)
    for state in (torch.float32, dtype):
        sigma = torch.full((2,), 80.0, dtype=state)
        exact = wide(x.to(state).double(), sigma.double(), labels)
        eager, ours = (m(x.to(state), sigma, labels).double() for m in (cast, fast))
        assert ours.isfinite().all()
        allowed = 2 * (eager - exact).abs().max() + FLOOR[dtype] * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


#: Elements of a parameter, updates.
WIDTH, UPDATES = 5, 100_000
RATES = [0.9, 0.9999]


#: Dtypes of parameters and of their averages: the form that a CPU takes, and the reference.
PAIRS = {
    "float32": [(torch.float32, torch.float32)],
    "others": [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
               (torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float64)],
}  # fmt: skip


@pytest.mark.parametrize("name", ["float32", pytest.param("others", marks=pytest.mark.slow)])
def test_a_hundred_thousand_averages(name, counted):
    """Of parameters that move, against their sum in float64.

    An average a stands still within half a unit in the last place of a / (1 - rate) of its parameter: that bounds it.
    """
    pairs = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    path = [(1 + 0.1 * torch.randn(UPDATES, WIDTH, generator=generator)).to(dtype) for dtype, _ in pairs]
    groups = [[torch.zeros(WIDTH, dtype=dtype) for _, dtype in pairs] for _ in RATES]
    rates = torch.tensor(RATES, dtype=torch.float64)
    for parameters in zip(*path):
        ops.ema_update_(parameters, groups, rates)
    age = torch.arange(UPDATES - 1, -1, -1, dtype=torch.float64)
    for rate, group in zip(RATES, groups):
        for (_, dtype), average, steps in zip(pairs, group, path):
            exact = ((1 - rate) * rate**age) @ steps.double()
            error = ((average - exact).abs() / exact.abs()).max().item()
            bound = torch.finfo(dtype).eps / 2 / (1 - rate)
            counted(f"{steps.dtype} parameters, {dtype} averages, rate {rate}: error {error:.1e} of {bound:.1e}")
            assert error <= min(1.1 * bound, 1.0), f"{dtype}, rate {rate}: {error:.2e} of {bound:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_thousand_updates_of_a_model_in_half_precision(dtype, counted):
    """`ema.Averages` keeps them in float32, and its target is the average, rounded once."""
    model = torch.nn.Linear(WIDTH, 1, bias=False).to(dtype).requires_grad_(False)
    target = copy.deepcopy(model)
    averages = ema.Averages(model, [str(rate) for rate in RATES], targets={1: target})
    start = model.weight.double()
    generator = torch.Generator().manual_seed(0)
    path = (1 + 0.1 * torch.randn(UPDATES, 1, WIDTH, generator=generator)).to(dtype)
    for value in path:
        model.weight.copy_(value)
        averages.update_()
    age = torch.arange(UPDATES - 1, -1, -1, dtype=torch.float64)
    for k, rate in enumerate(RATES):
        exact = rate**UPDATES * start + ((1 - rate) * rate**age) @ path[:, 0].double()
        (average,) = averages.tensors(k)
        error = ((average - exact).abs() / exact.abs()).max().item()
        bound = torch.finfo(torch.float32).eps / 2 / (1 - rate)
        counted(f"rate {rate}: error {error:.1e} of {bound:.1e}")
        assert average.dtype == torch.float32 and error <= 1.1 * bound
    assert int(averages.step) == UPDATES and torch.equal(target.weight, averages.tensors(1)[0].to(dtype))
