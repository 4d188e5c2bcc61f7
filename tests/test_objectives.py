"""Objectives: the formulas against slow transcriptions of the papers, and what holds for every one of them."""

import copy
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast import Denoiser, Preconditioner, curricula, losses, objectives, ops, schedules
from cmfast.objectives import OBJECTIVES, EasyConsistencyTuning, ImprovedConsistencyTraining, ProgressiveDistillation
from tests.golden_utils import small_unet
from tests.tolerances import FLOOR, STEP_VALUE
from tests.toy import ToyNetwork

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
Y = torch.tensor([0, 1, 2, 3, 4, 5])
DRAW = ops.Draw(2**40 + 7, torch.tensor([3, 1, 2**33, 8, 11, 100]), 5)
each = pytest.mark.parametrize("name", OBJECTIVES)


def make(name, **options):
    """An objective that needs no LPIPS."""
    cls = OBJECTIVES[name]
    return cls(**({"loss_norm": "huber"} if hasattr(cls, "loss_norm") else {}) | options)


def toy(seed, preconditioning="consistency"):
    torch.manual_seed(seed)
    return Denoiser(ToyNetwork(), Preconditioner.by_name(preconditioning))


def models(objective):
    """Model, target and teacher."""
    return toy(0, objective.preconditioning), toy(1, objective.preconditioning), toy(2, "edm")


def loss(objective, model, x, draw=DRAW, *, step=0, labels=Y, target=None, teacher=None, **options):
    arguments = {"labels": labels, "target_model": target, "teacher_model": teacher, **options}
    return objective.loss(model, x, stage=objective.stage(step), draw=draw, **arguments)


# The formulas.


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
    objective, model = make("ect", steps_per_stage=1, q=256.0), toy(0, "edm").to(dtype)
    value = loss(objective, model, X.to(dtype), step=20)["loss"]
    value.sum().backward()
    assert not value.any() and not any(p.grad.any() for p in model.parameters())


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


# Progressive distillation.


@pytest.mark.parametrize("start, steps", [(16, 100), (4096, 7), (40, 100), (2, 50), (3, 10)], ids=str)
def test_halving_stages(start, steps):
    """The original's schedule; a stage is as long as it says, and the last ones are twice as long."""
    objective = ProgressiveDistillation(start_scales=start, steps_per_stage=steps)
    schedule = schedules.ema_and_scales("fixed", 0.0, "progdist", start, start, 10**6, steps)
    before = None
    for step in range(20 * steps):
        stage = objective.stage(step)
        assert stage.num_scales == schedule(step)[1] and stage.target_rate is None
        if before is None or stage.num_scales != before.num_scales:
            assert stage.first_step == step and stage.number == (0 if before is None else before.number + 1)
            assert before is None or step == before.first_step + before.steps
        else:
            assert stage == before
        before = stage
    assert before.steps is None and before.num_scales == 1
    if start == 16:
        lengths = [objective.stage(step).steps for step in (0, 100, 200, 300, 500)]
        assert lengths == [100, 100, 100, 200, None]


class Euler(nn.Module):
    """D of the levels of a grid: a table of its own for each, so that a student can learn exactly what it is shown."""

    def __init__(self, intervals):
        super().__init__()
        self.ends = schedules.karras_sigmas(intervals + 1, append_zero=False, dtype=torch.float64)
        self.scale = nn.Parameter(torch.full((intervals + 1,), 0.3, dtype=torch.float64))

    def forward(self, x, sigma):
        level = (sigma.double()[:, None] - self.ends).abs().argmin(1)
        return self.scale[level].view(-1, 1, 1, 1) * x


def euler(model, x, sigmas):
    """Steps along levels."""
    for sigma, following in zip(sigmas, sigmas[1:]):
        denoised = model(x, torch.full((x.shape[0],), float(sigma)))
        x = x + (x - denoised) / float(sigma) * float(following - sigma)
    return x


def test_progressive_distillation_distils():
    """Over three stages, each student learns two steps of the student before: its teacher, as at each new stage the
    student becomes that. After all of them, one step goes where eight of the first teacher did."""
    torch.manual_seed(0)
    objective = ProgressiveDistillation(loss_norm="l2", start_scales=8, steps_per_stage=60)
    finest = schedules.karras_sigmas(17, append_zero=False, dtype=torch.float64)
    first = Euler(16)
    with torch.no_grad():
        first.scale.copy_(0.9 * torch.rand(17, dtype=torch.float64))
    teacher, student = copy.deepcopy(first), copy.deepcopy(first)
    x = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    learned, before = [], objective.stage(0)
    for step in range(180):
        stage = objective.stage(step)
        if stage.number != before.number:
            learned.append((student, before.num_scales))
            teacher = copy.deepcopy(student)
        before = stage
        optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
        draw = ops.Draw(0, torch.arange(64) + 64 * step)
        # Newton's step, for the loss is quadratic in each level's scale and D is linear in it.
        terms = objective.loss(student, x, stage=stage, draw=draw, teacher_model=teacher)["loss"]
        (slope,) = torch.autograd.grad(terms.sum(), student.scale, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), student.scale)
        student.scale.grad = torch.where(curvature > 0, slope.detach() / curvature.clamp(min=1e-30), 0.0)
        optimizer.step()
        if step in (59, 119, 179):
            stride = 16 // stage.num_scales
            for i in range(stage.num_scales):
                ends = finest[i * stride], finest[i * stride + stride // 2], finest[(i + 1) * stride]
                torch.testing.assert_close(euler(student, x, ends[::2]), euler(teacher, x, ends), rtol=1e-6, atol=1e-6)
    assert [n for _, n in learned] == [8, 4] and before.num_scales == 2
    torch.testing.assert_close(euler(student, x, finest[::8]), euler(first, x, finest), rtol=1e-5, atol=1e-5)


# What holds for all.


@each
def test_a_stage_follows_from_the_step(name):
    """From nothing else, so that every rank has it; numbers grow by one; and it goes on past the last step."""
    objective = make(name)
    steps = [*range(0, 1_200_000, 9973), 10**7]
    stages = [objective.stage(step) for step in steps]
    assert stages == [make(name).stage(step) for step in steps]
    assert stages == [objective.stage(step) for step in reversed(steps)][::-1]
    numbers = [stage.number for stage in stages]
    assert numbers == sorted(numbers) and numbers[0] == 0
    assert all(stage.first_step <= step for step, stage in zip(steps, stages))


@each
def test_settings_are_plain(name):
    objective = make(name)
    assert all(isinstance(value, int | float | str | tuple | None) for value in asdict(objective).values())
    assert type(objective)(**asdict(objective)) == objective
    with pytest.raises(FrozenInstanceError):
        objective.sigma_data = 1.0


@each
def test_a_batch_may_be_shared_between_ranks(name):
    """Levels, noise and dropout of a sample are the same in any batch: two halves have the losses of the whole."""
    objective = make(name)
    network = {"num_classes": 7, "dropout": 0.3}
    preconditioner = Preconditioner.by_name(objective.preconditioning)
    model = Denoiser(small_unet(**network).double(), preconditioner)
    others = {"target": copy.deepcopy(model), "teacher": Denoiser(small_unet(**network).double().eval())}
    whole = loss(objective, model, X, **others)["loss"]
    halves = []
    for part in (slice(0, 2), slice(2, 6)):
        torch.manual_seed(hash(part.start))
        draw = ops.Draw(DRAW.seed, DRAW.index[part], DRAW.draw)
        halves.append(loss(objective, model, X[part], draw, labels=Y[part], **others)["loss"])
    torch.testing.assert_close(torch.cat(halves), whole)
    assert not torch.allclose(loss(objective, model, X, DRAW._replace(seed=3), **others)["loss"], whole)


class NoReads(TorchDispatchMode):
    """Fails where a value of a tensor comes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        forbidden = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
        assert func.overloadpacket not in forbidden, f"{func} reads a tensor on the host"
        return func(*args, **(kwargs or {}))


@each
@pytest.mark.parametrize("kind", ["toy", "unet", "function"])
def test_nothing_is_read_on_the_host(name, kind):
    objective = make(name)
    x = X.float()
    network = small_unet(num_classes=7, dropout=0.1) if kind == "unet" else ToyNetwork()
    model = Denoiser(network, Preconditioner.by_name(objective.preconditioning))
    given = (lambda x, sigma, labels: model(x, sigma, labels)) if kind == "function" else model
    with NoReads():
        value = loss(objective, given, x, target=given, teacher=given)["loss"]
        value.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    # And outside, bad labels are found as ever.
    with NoReads(), pytest.raises(AssertionError, match="on the host"):
        model(x, torch.ones(6), Y)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPED = {
    "ddp": lambda model: DistributedDataParallel(model),
    "ddp inside": lambda model: _around(model, DistributedDataParallel(model.network)),
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled inside": lambda model: _around(model, torch.compile(model.network, backend="aot_eager")),
    "compiled in place": lambda model: (model.compile(backend="aot_eager"), model)[1],
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="aot_eager")),
}


def _around(model, network):
    return Denoiser(network, model.preconditioner)


@each
@pytest.mark.parametrize("how", ["ddp", "ddp inside"])
def test_distributed_models_are_accepted(name, how, process_group):
    check_wrapped(name, how)


@pytest.mark.parametrize("name", ["edm", "cd", "ect"])
@pytest.mark.parametrize("how", [how for how in WRAPPED if "compiled" in how])
def test_compiled_models_are_accepted(name, how, process_group):
    torch._dynamo.reset()
    check_wrapped(name, how)


def check_wrapped(name, how):
    """The same losses and gradients as of the model itself, which is called through its wrapper."""
    objective = make(name)
    x = X.float()
    model, target, teacher = models(objective)
    expected = loss(objective, model, x, target=target, teacher=teacher)["loss"]
    expected.mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    wrapped = WRAPPED[how](model)
    synced = []
    ddp = wrapped if how.startswith("ddp") and how != "ddp inside" else getattr(wrapped, "network", None)
    if isinstance(ddp, DistributedDataParallel):
        ddp.register_comm_hook(None, lambda _, bucket: (synced.append(1), _done(bucket.buffer()))[1])
    value = loss(objective, wrapped, x, target=target, teacher=teacher)["loss"]
    torch.testing.assert_close(value, expected, rtol=STEP_VALUE, atol=STEP_VALUE)
    value.mean().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=STEP_VALUE, atol=STEP_VALUE)
    assert bool(synced) == ("ddp" in how)
    if how == "compiled in place":
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def _done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


@pytest.mark.parametrize("name", ["cd", "ct", "pd"])
def test_a_missing_model_is_named(name):
    objective = make(name)
    if objective.needs_teacher:
        with pytest.raises(ValueError, match="needs a teacher_model"):
            loss(objective, toy(0), X.float(), target=toy(1))
    if objective.needs_target:
        with pytest.raises(ValueError, match="needs a target_model"):
            loss(objective, toy(0), X.float(), teacher=toy(1))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("edm", {"weighting": "nope"}, "truncated-snr"),
        ("edm", {"std": 0.0}, "std must be positive"),
        ("cd", {"loss_norm": "nope"}, "l2-32"),
        ("cd", {"solver": "nope"}, "heun, euler"),
        ("cd", {"start_scales": 1}, "start_scales must be 2 or more, got 1"),
        ("cd", {"sigma_min": 80.0}, "need 0 < sigma_min"),
        ("cd", {"scale_mode": "progdist"}, "ProgressiveDistillation"),
        ("ct", {"target_ema_mode": "nope"}, "fixed/progressive"),
        ("ct", {"start_ema": 1.5}, "start_ema must be from 0 to 1"),
        ("ct", {"total_steps": 0}, "total_steps must be 1 or more"),
        ("pd", {"steps_per_stage": 0}, "steps_per_stage must be 1 or more"),
        ("ict", {"end_scales": 5}, "end_scales must be 10 or more, got 5"),
        ("ect", {"q": -1.0}, "q must be positive"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_bad_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_lpips_is_the_originals_default():
    with pytest.raises(ValueError, match="LPIPS"):
        loss(objectives.ConsistencyTraining(), toy(0), X.float(), target=toy(1))
