"""What holds for every objective."""

import copy
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast import Denoiser, Preconditioner, objectives, ops
from cmfast.objectives import OBJECTIVES
from tests.golden_utils import small_unet
from tests.objective_utils import DRAW, X, Y, loss, make, toy
from tests.toy import ToyNetwork

each = pytest.mark.parametrize("name", OBJECTIVES)


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


def test_how_each_is_sampled():
    """Consistency models in a step; a diffusion model as such; students of progressive distillation in their own."""
    found = {name: kind().sampling(kind().stage(60_000)) for name, kind in OBJECTIVES.items()}
    assert found.pop("edm") == {"sampler": "heun"} and found.pop("pd") == {"sampler": "progdist", "steps": 32}
    assert set(found) == {"cd", "ct", "ict", "ect"} and all(how == {"steps": 1} for how in found.values())


def test_lpips_is_the_originals_default():
    with pytest.raises(ValueError, match="LPIPS"):
        loss(objectives.ConsistencyTraining(), toy(0), X.float(), target=toy(1))
