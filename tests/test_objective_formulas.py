"""iCT and ECT against slow transcriptions of their papers; levels as often as they should be; the other losses."""

import contextlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cmfast import curricula, losses, ops, schedules
from cmfast.objectives import EasyConsistencyTuning, ImprovedConsistencyTraining
from cmfast.tolerances import FLOOR
from tests.objective_utils import DRAW, X, Y, loss, make, toy


@pytest.mark.parametrize("total, s_0, s_1", [(400_000, 10, 1280), (1000, 10, 160), (77, 3, 50), (5, 10, 1280)], ids=str)
def test_ict_number_of_levels(total, s_0, s_1):
    """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1))."""
    objective = ImprovedConsistencyTraining(start_scales=s_0, end_scales=s_1, total_steps=total)
    k_prime = max(math.floor(total / (math.log2(math.floor(s_1 / s_0)) + 1)), 1)
    before = objective.stage(0)
    for k in range(0, total + 1, max(total // 997, 1)):
        stage = objective.stage(k)
        assert stage.num_scales == min(s_0 * 2 ** math.floor(k / k_prime), s_1) + 1
        assert stage.number - before.number == (stage.num_scales != before.num_scales)
        assert stage.first_step <= k and (stage.steps is None or k < stage.first_step + stage.steps)
        before = stage
    assert objective.stage(10 * total)[3:] == (s_1 + 1, None)


def karras_rising(n, i, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """sigma_i of 1 <= i <= n, rising."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + (i - 1) / (n - 1) * (high - low)) ** rho


@pytest.mark.parametrize("n", [2, 3, 11, 1281])
def test_ict_levels_are_drawn_as_often_as_they_should(n):
    """p(sigma_i) ~ erf((ln sigma_{i+1} - P_m) / (sqrt2 P_s)) - erf((ln sigma_i - P_m) / (sqrt2 P_s)), as integers."""
    p_mean, p_std = -1.1, 2.0
    edges = [math.erf((math.log(karras_rising(n, i)) - p_mean) / (math.sqrt(2) * p_std)) for i in range(1, n + 1)]
    rising = [b - a for a, b in zip(edges, edges[1:])]
    grid = curricula.lognormal_grid(n)
    bounds = torch.tensor([0, *grid.thresholds, 2**32], dtype=torch.float64)
    # An index counts the levels down.
    p = (bounds.diff() / 2**32).flip(0)
    expected = torch.tensor(rising, dtype=torch.float64) / sum(rising)
    assert (p - expected).abs().max() < 2**-31  # two roundings
    levels = torch.tensor([karras_rising(n, i) for i in range(n, 0, -1)], dtype=torch.float64)
    torch.testing.assert_close(grid.table.double(), levels, rtol=FLOOR[torch.float32], atol=0)


def test_levels_are_drawn_by_their_thresholds():
    """Of many samples, as many of each index as its share; sigma and the next are neighbours."""
    grid = ops.Grid(torch.tensor([8.0, 4.0, 2.0, 1.0]), thresholds=torch.tensor([2**29, 2**31]))
    sigma, next_sigma = ops.draw_levels(ops.Draw(1, torch.arange(20_000)), grid)
    share = [(sigma == level).double().mean().item() for level in (8, 4, 2)]
    assert share == pytest.approx([1 / 8, 3 / 8, 1 / 2], abs=0.015)
    assert torch.equal(next_sigma, sigma / 2)


def test_grids_of_fake_tensors_are_not_kept():
    """Nor do those that are kept get among them."""
    for first in (FakeTensorMode(), contextlib.nullcontext(), FakeTensorMode()):
        with first:
            table = curricula.karras_grid(23).table
            assert table.clone().shape == (23,) and isinstance(table, FakeTensor) == isinstance(first, FakeTensorMode)


def test_uniform_and_halved_levels():
    draw = ops.Draw(1, torch.arange(4000))
    sigma, next_sigma, mid = ops.draw_levels(draw, curricula.halved_grid(4))
    whole, halves = schedules.karras_sigmas(5, append_zero=False), schedules.karras_sigmas(9, append_zero=False)
    index = (sigma[:, None] - whole).abs().argmin(1)
    assert torch.bincount(index).tolist() == pytest.approx([1000] * 4, abs=120)
    torch.testing.assert_close(next_sigma, whole[index + 1])
    torch.testing.assert_close(mid, halves[2 * index + 1])


def test_what_is_drawn_is_drawn_apart():
    """Levels follow neither from noise nor from another draw's, and a counter starts in each of them."""
    index = torch.arange(4000)
    levels = ops.LogNormal(0.0, 1.0)
    z = [ops.draw_levels(ops.Draw(1, index, k), levels)[0].log() for k in range(2)]
    z += [ops.normal(1, index, (), draw=k) for k in range(2)]
    assert torch.stack(z).corrcoef().fill_diagonal_(0).abs().max() < 0.06
    assert all(abs(each.mean()) < 0.06 and abs(each.std() - 1) < 0.05 for each in z)


def noised(sigma):
    """x + sigma noise of DRAW, in float64."""
    return X + sigma.view(-1, 1, 1, 1) * ops.normal(DRAW.seed, DRAW.index, (3, 8, 8), draw=5, dtype=torch.float64)


@pytest.mark.parametrize("huber_c", [None, 0.3])
def test_ict_loss(huber_c):
    """(sqrt(||D(x_{i+1}, sigma_{i+1}) - D(x_i, sigma_i)||^2 + c^2) - c) / (sigma_{i+1} - sigma_i), per sample."""
    objective, model = make("ict", huber_c=huber_c, total_steps=800), toy(0).double()
    step = 250
    grid = curricula.lognormal_grid(41)
    sigma, next_sigma = (level.double() for level in ops.draw_levels(DRAW, grid))
    c = 0.00054 * math.sqrt(3 * 8 * 8) if huber_c is None else huber_c
    student, target = model(noised(sigma), sigma, Y), model(noised(next_sigma), next_sigma, Y).detach()
    expected = []
    for b in range(6):
        squared = sum(d**2 for d in (student[b] - target[b]).flatten().tolist())
        expected.append((math.sqrt(squared + c**2) - c) / float(sigma[b] - next_sigma[b]))
    value = loss(objective, model, X, step=step)["loss"]
    assert value.tolist() == pytest.approx(expected, rel=1e-10)
    # The gradient is that of the student alone.
    (grad,) = torch.autograd.grad(value.sum(), model.network.conv2.bias)
    norm = ((student - target).square().sum((1, 2, 3)) + c**2).sqrt() - c
    (by_hand,) = torch.autograd.grad((norm / (sigma - next_sigma)).sum(), model.network.conv2.bias)
    torch.testing.assert_close(grad, by_hand)


@pytest.mark.parametrize("stage", [0, 1, 4, 9])
@pytest.mark.parametrize("q, k, b", [(2.0, 8.0, 1.0), (4.0, 8.0, 1.0), (256.0, 5.0, 2.0)], ids=str)
def test_ect_second_level(stage, q, k, b):
    """r(t) = max(0, t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))))."""
    levels = ops.LogNormal(-1.1, 2.0, curricula.stage_below(stage, q=q, k=k, b=b))
    sigma, below = ops.draw_levels(ops.Draw(0, torch.arange(500)), levels, dtype=torch.float64)
    for t, r in zip(sigma.tolist(), below.tolist()):
        assert r == pytest.approx(max(0, t * (1 - q ** -(stage + 1) * (1 + k / (1 + math.exp(b * t))))), abs=1e-12)
    if stage == 0 and q < 5:
        assert 0 < (below == 0).sum() < 500
    assert sigma.log().mean().item() == pytest.approx(-1.1, abs=0.25)
    assert sigma.log().std().item() == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("kind", ["edm", "function", "consistency"])
@pytest.mark.parametrize("huber_c", [0.0, 0.3])
def test_ect_loss(huber_c, kind):
    """(sqrt(||D(x_t, t) - D(x_r, r)||^2 + c^2) - c) / (t - r); x_start is the target where r = 0, which it is here for
    some samples. Of a consistency model, D(x, 0) is not quite x."""
    objective = EasyConsistencyTuning(steps_per_stage=100, huber_c=huber_c)
    model = toy(0, "consistency" if kind == "consistency" else "edm").double()
    t, r = ops.draw_levels(DRAW, ops.LogNormal(-1.1, 2.0, curricula.stage_below(1)), dtype=torch.float64)
    assert 0 < (r == 0).sum() < 6
    expected = []
    for b in range(6):
        denoised = model(noised(t)[b : b + 1], t[b : b + 1], Y[b : b + 1])
        target = model(noised(r)[b : b + 1], r[b : b + 1], Y[b : b + 1]) if r[b] > 0 else X[b : b + 1]
        squared = sum(d**2 for d in (denoised - target).flatten().tolist())
        expected.append((math.sqrt(squared + huber_c**2) - huber_c) / float(t[b] - r[b]))
    given = (lambda x, sigma, labels: model(x, sigma, labels)) if kind == "function" else model
    assert loss(objective, given, X, step=150)["loss"].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ect_levels_may_come_closer_than_numbers_do(dtype):
    """t - r is that of the formula, where both are the same number: no loss, and no NaN."""
    tiny = -100.0 if dtype == torch.float32 else -800.0
    objective, model = make("ect", steps_per_stage=1, mean=tiny), toy(0, "edm").to(dtype)
    value = loss(objective, model, X.to(dtype), step=20)["loss"]
    value.sum().backward()
    assert not value.any() and not any(p.grad.any() for p in model.parameters())


def test_ect_stages_end():
    """A run that is longer than its curriculum, as one resumed for more steps, stays at the last of eight stages."""
    objective = EasyConsistencyTuning(steps_per_stage=7)
    assert [objective.stage(step)[:3] for step in (0, 6, 7, 48)] == [(0, 0, 7), (0, 0, 7), (1, 7, 7), (6, 42, 7)]
    assert {objective.stage(step)[:3] for step in (49, 55, 56, 7000)} == {(7, 49, None)}


@pytest.mark.parametrize("q, last", [(2.0, 16), (4.0, 7), (256.0, 1)], ids=str)
def test_ect_pairs_closer_than_their_numbers_are_refused(q, last):
    """In float32; float64 has further stages."""
    model, x = toy(0, "edm"), X.float()
    losses.easy_consistency_loss(model, x, last, q=q, draw=DRAW, labels=Y)
    with pytest.raises(ValueError, match=rf"stage {last + 1} with q={q:g} has levels that differ by .* torch.float32"):
        losses.easy_consistency_loss(model, x, last + 1, q=q, draw=DRAW, labels=Y)
    losses.easy_consistency_loss(model.double(), X, last + 1, q=q, draw=DRAW, labels=Y)


def test_ect_has_no_slope_where_there_is_no_difference():
    """D that is x_start already: with c = 0 the gradient is 0, not NaN."""
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = loss(make("ect"), lambda x, sigma, labels: X + shift, X)["loss"]
    (grad,) = torch.autograd.grad(value.sum(), shift)
    assert value.abs().max() == 0 and grad == 0


def test_the_others_are_the_losses_at_drawn_levels():
    """Distillation, training, halving and denoising: what `losses` makes of the same noise and levels, given."""
    noise = ops.normal(DRAW.seed, DRAW.index, (3, 8, 8), draw=5, dtype=torch.float64)
    model, target, teacher = toy(0).double(), toy(1).double(), toy(2, "edm").double()
    given = {"noise": noise, "labels": Y, "loss_norm": "huber"}

    def indices(grid):
        sigma = ops.draw_levels(DRAW, grid)[0]
        return (grid.table[:: grid.stride][None] == sigma[:, None]).nonzero()[:, 1]

    for name, teach in (("cd", teacher), ("ct", None)):
        objective = make(name, start_scales=20, weighting="snr+1", sigma_max=50.0)
        n = objective.stage(0).num_scales
        value = loss(objective, model, X, target=target, teacher=teacher)["loss"]
        options = {"teacher_model": teach, "weighting": "snr+1", "sigma_max": 50.0}
        at = indices(curricula.karras_grid(n, sigma_max=50.0))
        expected = losses.consistency_loss(model, target, X, n, indices=at, **given, **options)["loss"]
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=0)  # levels of the table are float32
    value = loss(make("pd"), teacher, X, teacher=target)["loss"]
    at = indices(curricula.halved_grid(64))
    expected = losses.progressive_distillation_loss(teacher, target, X, 64, indices=at, **given)["loss"]
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=0)
    (sigma,) = ops.draw_levels(DRAW, ops.LogNormal(-1.2, 1.2), dtype=torch.float64)
    expected = losses.denoising_loss(teacher, X, sigma, noise=noise, labels=Y)["loss"]
    torch.testing.assert_close(loss(make("edm"), teacher, X)["loss"], expected)
