"""RAdam and Adam as optimizers: against torch.optim, their states, GradScaler, averages, parts without gradients."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cmfast
from cmfast import optim
from cmfast.ema import Averages
from tests.host_reads import NoHostReads
from tests.ops.matrix import close
from tests.toy import ToyNetwork

CLASSES = {"RAdam": torch.optim.RAdam, "Adam": torch.optim.Adam}
each = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def groups(model, **options):
    """Weights and biases with options of their own."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [{"params": weights, "weight_decay": 0.1, **options}, {"params": biases, "lr": 0.003}]


def give(gradients, *models):
    for model in models:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)


def drawn(model, scale=1.0):
    return [torch.randn(p.shape, dtype=torch.float64) * scale for p in model.parameters()]


@each
@pytest.mark.parametrize("decoupled", [False, True], ids=["L2", "decoupled"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_trains_as_torch_optim_does(name, decoupled, backend):
    """25 steps of two groups, clipped together, with two averages, against float64 and within torch's own error."""
    model = ToyNetwork().to(memory_format=torch.channels_last)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    averages = Averages(model, [0.9, "power:0.1"])
    options = {"lr": 0.01, "decoupled_weight_decay": decoupled}
    optimizer = getattr(optim, name)(groups(model), max_norm=2.0, averages=averages, **options)
    others = [CLASSES[name](groups(other), **options) for other in (exact, eager)]
    by_hand = [[[p.detach().clone() for p in other.parameters()] for _ in range(2)] for other in (exact, eager)]
    for t in range(1, 26):
        give(drawn(model), model, exact, eager)
        norms = [torch.nn.utils.clip_grad_norm_(other.parameters(), 2.0) for other in (exact, eager)]
        for other in others:
            other.step()
        with cmfast.backend(backend), NoHostReads():
            optimizer.step()
        close(optimizer.grad_norm, norms[1], norms[0], "norm")
        for other, lists in zip((exact, eager), by_hand):
            for rate, group in zip((0.9, (1 - 1 / t) ** (averages.schedules[1].gamma + 1)), lists):
                torch._foreach_lerp_(group, [p.detach() for p in other.parameters()], 1 - rate)
    for value, low, high in zip(model.parameters(), eager.parameters(), exact.parameters(), strict=True):
        close(value.detach(), low.detach(), high.detach(), "parameter")
    for k in range(2):
        for value, low, high in zip(averages.tensors(k), by_hand[1][k], by_hand[0][k], strict=True):
            close(value, low, high, f"average {k}")
    assert optimizer.skipped.item() == 0 and averages.step.item() == 25


@each
def test_states_load_both_ways(name):
    """5 steps of one, 5 of the other: as 10 of torch's."""
    for ours_first in (True, False):
        model, whole = nn.Linear(5, 3).double(), None
        whole = copy.deepcopy(model)
        kinds = [getattr(optim, name), CLASSES[name]]
        first, second = kinds if ours_first else kinds[::-1]
        optimizer, expected = first(model.parameters(), lr=0.1), CLASSES[name](whole.parameters(), lr=0.1)
        for t in range(10):
            if t == 5:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = second(model.parameters(), lr=0.3)
                optimizer.load_state_dict(state)
                assert optimizer.param_groups[0]["lr"] == 0.1
                # One launch for all parameters, where torch's optimizers count for each.
                counts = {id(entry["step"]) for entry in optimizer.state.values()}
                assert len(counts) == (2 if ours_first else 1)
            give(drawn(model), model, whole)
            optimizer.step(), expected.step()
        torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))
        assert set(optimizer.state_dict()) == set(expected.state_dict())
        for entry, other in zip(*(o.state_dict()["state"].values() for o in (optimizer, expected)), strict=True):
            assert set(entry) == set(other) and entry["step"].item() == other["step"].item() == 10
        for group, other in zip(optimizer.state_dict()["param_groups"], expected.state_dict()["param_groups"]):
            assert set(group) == set(other)


@each
def test_a_state_resumes_exactly(name, tmp_path):
    model = ToyNetwork()
    optimizer = getattr(optim, name)(groups(model), lr=0.01)
    for _ in range(7):
        give(drawn(model), model)
        optimizer.step()
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    again = ToyNetwork()
    resumed = getattr(optim, name)(groups(again), lr=0.5)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(3):
        give(drawn(model), model, again)
        optimizer.step(), resumed.step()
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@each
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_grad_scaler(name, max_norm, backend):
    """Scaled gradients train as unscaled ones do; a step that overflows is skipped, counted, and lowers the scale."""
    model, plain = ToyNetwork(), None
    plain = copy.deepcopy(model)
    averages, others = Averages(model, [0.9]), Averages(plain, [0.9])
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01, max_norm=max_norm, averages=averages)
    expected = getattr(optim, name)(plain.parameters(), lr=0.01, max_norm=max_norm, averages=others)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    for t in range(8):
        gradients = drawn(model)
        give([g * scaler.get_scale() for g in gradients], model)
        give(gradients, plain)
        if t in (2, 3):
            model.conv1.weight.grad[0, 0, 0, 0] = math.inf if t == 2 else math.nan
        else:
            expected.step()
        scaler.scale(torch.ones(()))
        with cmfast.backend(backend), NoHostReads():
            scaler.step(optimizer)
            scaler.update()
    assert optimizer.skipped.item() == 2 and scaler.get_scale() == 2.0 ** (12 - 2 + 1)
    assert averages.step.item() == 6 and optimizer.state[model.conv1.weight]["step"].item() == 6
    tensors = [[*m.parameters(), *a.tensors(0)] for m, a in ((model, averages), (plain, others))]
    torch.testing.assert_close(*([x.detach() for x in each] for each in tensors), rtol=1e-6, atol=1e-7)


def test_unscaled_before_the_step():
    """`scaler.unscale_` for whoever clips by hand: the step must not divide again."""
    model, plain = nn.Linear(3, 3), None
    plain = copy.deepcopy(model)
    optimizer, expected = optim.RAdam(model.parameters(), lr=0.1), optim.RAdam(plain.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    gradients = drawn(model)
    give([g * 256 for g in gradients], model)
    give(gradients, plain)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    expected.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@each
def test_parameters_without_a_gradient(name):
    """They are left alone and their step count stands still, whoever else steps; their averages go on."""
    model = ToyNetwork()
    exact = copy.deepcopy(model).double()
    averages = Averages(model, [0.5])
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01, averages=averages)
    expected = CLASSES[name](exact.parameters(), lr=0.01)
    average = [p.detach().clone() for p in exact.parameters()]
    for t in range(12):
        gradients = drawn(model)
        # One that starts late, one with a gap, one that stops.
        for i, missing in ((0, t < 3), (2, t in (5, 6)), (3, t > 8)):
            if missing:
                gradients[i] = None
        give(gradients, model, exact)
        if t == 4:
            with torch.no_grad():
                model.conv1.weight.add_(1), exact.conv1.weight.add_(1)
        optimizer.step(), expected.step()
        torch._foreach_lerp_(average, [p.detach() for p in exact.parameters()], 0.5)
    for p, q in zip(model.parameters(), exact.parameters()):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == expected.state[q]["step"].item()
    torch.testing.assert_close([a.double() for a in averages.tensors(0)], average, rtol=1e-5, atol=1e-6)


def test_no_averages_at_all():
    model = nn.Linear(2, 2)
    optim.Adam(model.parameters(), averages=Averages(model, []))


def test_no_gradients_at_all():
    optimizer = optim.Adam(nn.Linear(2, 2).parameters(), max_norm=1.0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.5) == 3.5


def test_learning_rates_on_the_device_and_schedules():
    model, plain = nn.Linear(3, 3), None
    plain = copy.deepcopy(model)
    optimizers = (
        optim.RAdam(model.parameters(), lr=torch.tensor(0.1)), optim.RAdam(plain.parameters(), lr=0.1)
    )  # fmt: skip
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in optimizers]
    for _ in range(8):
        give(drawn(model), model, plain)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step(), schedule.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@each
def test_some_parameters_are_averaged(name):
    """Each parameter counts a step once."""
    model, whole = nn.Linear(3, 3), None
    whole = copy.deepcopy(model)
    averages = Averages([("weight", model.weight)], [0.5])
    average = model.weight.detach().clone()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1, averages=averages)
    expected = CLASSES[name](whole.parameters(), lr=0.1)
    for t in range(1, 8):
        give(drawn(model), model, whole)
        optimizer.step(), expected.step()
        average.lerp_(model.weight.detach(), 0.5)
        assert [state["step"].item() for state in optimizer.state.values()] == [t, t]
    torch.testing.assert_close(averages.tensors(0)[0], average)
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))


@each
def test_parameters_may_move_to_another_group(name):
    """They take their step count along, and go on by themselves, with a gradient and without."""
    model, whole = ToyNetwork(), None
    whole = copy.deepcopy(model).double()
    optimizers = [kind(m.parameters(), lr=0.01) for kind, m in ((getattr(optim, name), model), (CLASSES[name], whole))]
    for t in range(12):
        if t == 3:
            for optimizer in optimizers:
                moving = optimizer.param_groups[0]["params"][2:]
                del optimizer.param_groups[0]["params"][2:]
                optimizer.add_param_group({"params": moving, "lr": 0.003})
        gradients = drawn(model)
        if t in (3, 5, 6):
            gradients[2:] = [None] * len(gradients[2:])
        give(gradients, model, whole)
        for optimizer in optimizers:
            optimizer.step()
    counts = [[optimizer.state[p]["step"].item() for group in optimizer.param_groups for p in group["params"]]
              for optimizer in optimizers]  # fmt: skip
    assert counts[0] == counts[1] == [12, 12, 9, 9, 9]
    for p, q in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["module", "list"])
def test_copies_in_a_low_dtype(kind):
    model, low = nn.Linear(3, 3), nn.Linear(3, 3).bfloat16()
    optimizer = optim.RAdam(model.parameters(), lr=0.1, copies=low if kind == "module" else list(low.parameters()))
    give(drawn(model), model)
    optimizer.step()
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(model.parameters(), low.parameters()))


def test_a_norm_is_measured_without_clipping():
    model = nn.Linear(3, 3)
    optimizer = optim.Adam(model.parameters(), max_norm=math.inf)
    gradients = drawn(model)
    give(gradients, model)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.double(), torch.cat([g.flatten() for g in gradients]).norm())
    give([g * math.inf for g in gradients], model)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.skipped.item() == 1 and all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: optim.Adam(p, amsgrad=True), ValueError, "Adam has no amsgrad; torch.optim.Adam does"),
        (lambda p: optim.RAdam(p, differentiable=True), ValueError, "RAdam has no differentiable"),
        (lambda p: optim.Adam([{"params": p, "amsgrad": True}]), ValueError, "Adam has no amsgrad"),
        (lambda p: optim.RAdam(p, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda p: optim.RAdam(p, max_norm=0.0), ValueError, "max_norm must be positive, got 0.0"),
        (lambda p: optim.RAdam(p, copies=nn.Linear(2, 2)), ValueError, "copies must have the shapes"),
        (lambda p: optim.RAdam(p, averages=Averages(nn.Linear(3, 3), [0.5])), ValueError, "none of these parameters"),
        (lambda p: optim.RAdam(p, momentum=0.9), TypeError, "momentum"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Linear(3, 3).parameters())


def test_options_that_come_with_a_state_or_a_group():
    """They are refused, and change nothing."""
    model, optimizer = nn.Linear(3, 3), optim.Adam(nn.Linear(3, 3).parameters(), lr=0.1)
    state = torch.optim.Adam(model.parameters(), lr=0.2, amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="Adam has no amsgrad"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="Adam has no differentiable"):
        optimizer.add_param_group({"params": model.parameters(), "differentiable": True})
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.1
    # RAdam has none of its own, here and in torch.
    optim.RAdam(model.parameters()).load_state_dict({**state, "state": {}})


def test_a_state_of_adamw():
    """Its decay stays decoupled, in states of older versions too, which don't say so."""
    model, whole = nn.Linear(5, 3).double(), None
    whole = copy.deepcopy(model)
    options = {"lr": 0.1, "weight_decay": 0.5}
    expected = torch.optim.AdamW(whole.parameters(), **options)
    optimizer = optim.Adam(model.parameters(), **options, decoupled_weight_decay=True)
    give(drawn(model), model, whole)
    expected.step(), optimizer.step()
    state = copy.deepcopy(expected.state_dict())
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(state)
    assert "decoupled_weight_decay" not in state["param_groups"][0]
    for _ in range(5):
        give(drawn(model), model, whole)
        expected.step(), optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))


def test_ranks():
    """Sharded by FSDP, and by tensor parallelism too, four ranks step as one does with the whole: norm, skipping,
    averages, target."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 4 -m tests.optim_ranks"
    done = subprocess.run(
        [sys.executable, *torchrun.split()], cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@each
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_by_themselves(name, way):
    """What a process is sent, or a trial begins with: the copy steps as the first would, and leaves it alone."""
    model, target = ToyNetwork(), ToyNetwork()
    low = copy.deepcopy(model).bfloat16()
    averages = Averages(model, [0.5, "power:0.1"], targets={0: target})
    options = {"lr": 0.01, "max_norm": 1.0, "averages": averages, "copies": low}
    whole = model, low, target, averages, getattr(optim, name)(model.parameters(), **options)

    def step(model, low, target, averages, optimizer):
        give(gradients, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        return [*model.parameters(), *low.parameters(), *target.parameters(), *averages.tensors(0),
                *averages.tensors(1), averages.step, optimizer.grad_norm, optimizer.skipped]  # fmt: skip

    gradients = drawn(model)
    step(*whole)
    if way == "deepcopy":
        again = copy.deepcopy(whole)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(whole))
    else:
        torch.save(whole, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    gradients = drawn(model)
    before = [x.clone() for x in again[0].parameters()]
    expected = step(*whole)
    assert all(map(torch.equal, again[0].parameters(), before))
    assert all(map(torch.equal, step(*again), expected))


def test_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam"):
        optim.RAdam(embedding.parameters()).step()


@each
def test_every_write_is_seen(name):
    """What is made of weights is made anew where their versions grow, which torch's fused functions do not see to."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    averages = Averages(model, [0.5])
    optimizer = getattr(optim, name)(model.parameters(), lr=1e-2, averages=averages)
    for _ in range(8):  # RAdam takes another path from its sixth step on
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        tensors = [*model.parameters(), *averages.tensors(0)]
        before = [x._version for x in tensors]
        optimizer.step()
        assert all(x._version > version for x, version in zip(tensors, before))
