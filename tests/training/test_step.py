"""One training step: nothing reads a value on the host, and what must not matter does not."""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast import backend
from cmfast.data import Batch, ImageData
from cmfast.objectives import EDM, ConsistencyDistillation
from cmfast.tolerances import TRAINING
from cmfast.training import TrainStep
from tests.golden_utils import small_unet
from tests.host_reads import NoHostReads
from tests.training.toys import DATA, OBJECTIVES, OPTIONS, denoiser, teacher, trainer, unet, weights


def batches(count, size=6, start=0):
    stream = DATA.batches(size, seed=0, start_step=start)
    return [next(stream) for _ in range(count)]


def step_of(name, options=OPTIONS, network=None) -> TrainStep:
    objective = OBJECTIVES[name] if isinstance(name, str) else name
    return TrainStep(denoiser(objective, network), objective, options, teacher_model=teacher(objective))


def run(step, count, size=6):
    for number, batch in enumerate(batches(count, size)):
        step(batch, number)
    return step.post(count).read()


def apart(a, b):
    """The largest difference of two runs' weights, as a part of how far they came."""
    start = weights(unet())
    return ((weights(a.model) - weights(b.model)).abs().max() / (weights(b.model) - start).abs().max()).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_read_on_the_host(name, dtype):
    step = step_of(name, replace(OPTIONS, dtype=dtype, microbatch=4))
    before = weights(step.model)
    prepared = batches(3)
    # The forms for a CPU, which no GPU runs, may look at values there.
    with backend("reference"), NoHostReads():
        for number, batch in enumerate(prepared, start=2):  # a stage of progressive distillation ends
            step(batch, number)
    assert not torch.equal(weights(step.model), before)


def test_the_guard_sees_a_read():
    with pytest.raises(AssertionError, match="reads a value on the host"), NoHostReads():
        torch.ones(()).item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_microbatches_change_nothing(name):
    whole, parts = step_of(name), step_of(name, replace(OPTIONS, microbatch=4))
    readings = run(whole, 3), run(parts, 3)
    assert readings[0].loss == pytest.approx(readings[1].loss, rel=1e-5)
    assert apart(parts, whole) < TRAINING


class Convolutions(TorchDispatchMode):
    """Counts them, but for those of gradients."""

    forward = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.forward += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cd", "ict"])
def test_activations_made_again_change_nothing(name):
    """Dropout included."""
    kept, again = step_of(name), step_of(name, replace(OPTIONS, checkpointing=True))
    with Convolutions() as once:
        run(kept, 3)
    with Convolutions() as twice:
        run(again, 3)
    assert apart(again, kept) < TRAINING and twice.forward > once.forward


def test_checkpointing_needs_blocks():
    network = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="Conv2d has no blocks"):
        step_of(EDM(), replace(OPTIONS, checkpointing=True), network)
    # diffusers' networks and transformers' have a switch of their own.
    switched = []
    network.enable_gradient_checkpointing = lambda: switched.append(True)
    step_of(EDM(), replace(OPTIONS, checkpointing=True), network)
    assert switched
    network.unet = nn.Conv2d(3, 3, 1)  # which is not asked
    step_of(EDM(), replace(OPTIONS, checkpointing=True), network)


def test_checkpointing_of_diffusers():
    diffusers_utils = pytest.importorskip("tests.compat.diffusers_utils")
    model = cmfast.load(diffusers_utils.small_unet(), preconditioning="edm")
    step_of(EDM(), replace(OPTIONS, checkpointing=True), model.network)
    assert model.network.unet.is_gradient_checkpointing


@pytest.mark.parametrize("name", OBJECTIVES)
def test_optimised_networks_learn_the_same(name):
    fast, plain = step_of(name), step_of(name, replace(OPTIONS, optimize=False))
    assert "Fast" in type(fast.student.network).__name__ and "Fast" not in type(plain.student.network).__name__
    readings = run(fast, 3), run(plain, 3)
    assert readings[0].loss == pytest.approx(readings[1].loss, rel=1e-4)
    assert apart(fast, plain) < TRAINING


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN to pack weights for")
def test_weights_that_change_are_not_packed():
    """A teacher's are, which stay as they are."""
    step = step_of("cd")
    run(step, 2)
    kinds = {name: getattr(step, name).network._fast._weights.kinds() for name in ("student", "_target", "_teacher")}
    assert "packed" in kinds["_teacher"] and "packed" not in kinds["_target"] | kinds["student"]


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.3), ("float16", 0.05)])
def test_half_precision_learns_nearly_the_same(dtype, tolerance):
    options = replace(OPTIONS, optimizer="adam")
    half, full = step_of("edm", replace(options, dtype=dtype)), step_of("edm", options)
    readings = run(half, 4), run(full, 4)
    assert readings[0].loss == pytest.approx(readings[1].loss, rel=0.02) and readings[0].skipped == 0
    difference = (weights(half.model) - weights(full.model)).norm() / (weights(full.model) - weights(unet())).norm()
    assert 0 < difference < tolerance
    assert weights(half.model).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_not_trained(dtype):
    """Whole networks and torsos; a teacher's may be, unless students are to become it."""
    whole, torso = denoiser(EDM()), denoiser(EDM())
    whole.network.to(dtype)
    torso.network.convert_torso(dtype)
    for model in whole, torso:
        with pytest.raises(ValueError, match=rf"weights of model are {dtype}, .*call model\.float\(\)"):
            TrainStep(model, EDM(), OPTIONS)
    with pytest.raises(ValueError, match="weights of teacher_model"):
        TrainStep(denoiser(EDM()), OBJECTIVES["pd"], OPTIONS, teacher_model=torso)
    step = TrainStep(denoiser(OBJECTIVES["cd"]), OBJECTIVES["cd"], OPTIONS, teacher_model=torso)
    assert torch.isfinite(torch.tensor(run(step, 1).loss))


class Adapted(nn.Module):
    """A layer in bfloat16 that stays as it is, and a small one beside it that is trained."""

    input_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, 3, 1).to(torch.bfloat16).requires_grad_(False)
        self.adapter = nn.Conv2d(3, 3, 1)

    def forward(self, x, t, y=None):
        return self.base(x.to(torch.bfloat16)).to(x.dtype) + self.adapter(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["edm", "pd"])
def test_what_is_not_trained_may_be_in_half_precision(name, dtype, tmp_path):
    """As of a large network that is tuned by small parts; an average of it is itself, and a resumed run ends alike."""
    def train(folder, steps):
        torch.manual_seed(0)
        network, others = Adapted(), {"teacher_model": None}
        if name == "pd":
            others["teacher_model"] = denoiser(EDM(), Adapted())
        options = replace(OPTIONS, steps=steps, dtype=dtype, save_interval=2)
        run = trainer(name, tmp_path / folder, options, network, ImageData(DATA.images), resume="auto", **others)
        before = copy.deepcopy(network)
        run.run(progress=False)
        assert torch.equal(network.base.weight, before.base.weight) and network.base.weight.dtype == torch.bfloat16
        average = run.step.averages.module(0, run.step.model).network
        assert torch.equal(average.base.weight, before.base.weight)
        return before.adapter, network.adapter, average.adapter

    (start, whole, average), _, (_, again, same) = train("one", 4), train("two", 2), train("two", 4)
    assert not torch.equal(start.weight, whole.weight) and not torch.equal(average.weight, whole.weight)
    assert torch.equal(whole.weight, again.weight) and torch.equal(average.weight, same.weight)


class Bad(nn.Module):
    """A network whose output is NaN for the images numbered so."""

    def __init__(self, value=float("nan")) -> None:
        super().__init__()
        self.conv, self.value, self.now = nn.Conv2d(3, 3, 1), value, False

    def forward(self, x, t, y=None):
        return self.conv(x) * (self.value if self.now else 1.0)


class Normed(Bad):
    """With buffers that a forward pass writes: in place, whole numbers among them, and by another tensor."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x, t, y=None):
        x = super().forward(x, t)
        self.last = x.detach().mean()
        return self.norm(x)


def bad_at(step, numbers, count):
    for number, batch in enumerate(batches(count)):
        step.model.network.now = number in numbers
        step(Batch(batch.images, None, batch.index), number)
    return step.post(count).read()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_after_a_bad_step_nothing_changes(dtype):
    """on_nan="stop": the weights, averages and moments are those before the first bad step, whatever comes after."""
    options = replace(OPTIONS, dtype=dtype, optimize=False)
    stopped, short = (step_of(EDM(), options, Bad()) for _ in range(2))
    short.model.load_state_dict(stopped.model.state_dict())
    short.averages.load_state_dict(stopped.averages.state_dict())
    reading = bad_at(stopped, {3}, 6)
    assert reading.bad_step == 3 and bad_at(short, (), 3).bad_step is None
    assert torch.equal(weights(stopped.model), weights(short.model))
    for k in range(len(stopped.averages)):
        assert all(map(torch.equal, stopped.averages.tensors(k), short.averages.tensors(k)))


def test_a_bad_step_can_be_left_out():
    step = step_of(EDM(), replace(OPTIONS, on_nan="skip", optimize=False), Bad())
    reading = bad_at(step, {1, 3}, 6)
    assert reading.skipped == 2 and torch.isfinite(weights(step.model)).all() and reading.loss > 0


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("name, dtype", [("edm", "float32"), ("edm", "float16"), ("cd", "float32")])
def test_a_bad_step_leaves_buffers_as_they_were(name, dtype, on_nan):
    """The student's and, which follow them, the target's."""
    options = replace(OPTIONS, dtype=dtype, on_nan=on_nan, optimize=False)
    network, objective = Normed(), OBJECTIVES[name]
    others = {"teacher_model": denoiser(EDM(), Bad())} if name == "cd" else {}
    bad, short = (TrainStep(denoiser(objective, copy.deepcopy(network)), objective, options, **others) for _ in "12")
    with NoHostReads():
        for number, batch in enumerate(islice(DATA.batches(6, seed=0), 6)):
            bad.model.network.now = number == 3
            plain = Batch(batch.images, None, batch.index)
            bad(plain, number)
            if number != 3 and (number < 3 or on_nan == "skip"):
                short(plain, number)
    assert bad.post(6).read().skipped == (1 if on_nan == "skip" else 3)
    assert bad.model.network.norm.num_batches_tracked == (5 if on_nan == "skip" else 3)
    for model in ("model", *(["target_model"] if name == "cd" else [])):
        found, expected = (dict(getattr(step, model).named_buffers()) for step in (bad, short))
        assert len(found) == 4 and all(torch.equal(x, expected[name]) for name, x in found.items()), model


def test_an_overflow_leaves_buffers_as_they_were():
    step = step_of(EDM(), replace(OPTIONS, dtype="float16", optimize=False), Normed(1.0))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    reading = bad_at(step, (), 40)
    assert 20 < reading.skipped < 40 and step.model.network.norm.num_batches_tracked == 40 - reading.skipped


@dataclass(frozen=True)
class Known(EDM):
    """A loss of 1, or NaN."""

    def _loss(self, *arguments, **others):
        terms = super()._loss(*arguments, **others)
        return {"loss": 1 + 0 * terms["loss"]}


def test_the_loss_is_that_of_the_steps_that_are_taken():
    step = step_of(Known(), replace(OPTIONS, on_nan="skip", optimize=False), Bad())
    assert bad_at(step, {1, 3, 4}, 6).loss == 1.0
    assert math.isnan(bad_at(step, {0, 1}, 2).loss)
    assert bad_at(step, (), 2).loss == 1.0


@dataclass(frozen=True)
class Hidden(EDM):
    """A loss of NaN whose gradients are none."""

    def _loss(self, *arguments, **others):
        return {"loss": super()._loss(*arguments, **others)["loss"] + float("nan")}


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_bad_loss_is_enough(on_nan):
    step = step_of(Hidden(), replace(OPTIONS, on_nan=on_nan))
    reading = run(step, 2)
    assert torch.equal(weights(step.model), weights(unet())) and (reading.skipped, reading.bad_step) == (2, 0)


def test_overflow_in_float16_is_counted_and_goes_on():
    step = step_of(EDM(), replace(OPTIONS, dtype="float16", optimize=False), Bad(1.0))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    reading = bad_at(step, (), 40)
    assert 20 < reading.skipped < 40 and reading.bad_step is None
    assert torch.isfinite(weights(step.model)).all()


def test_a_loss_that_is_not_finite_leaves_the_scale_of_float16():
    """Else one broken image in some hundreds takes it, halved each time, to where all gradients are 0."""
    step = step_of(EDM(), replace(OPTIONS, dtype="float16", on_nan="skip", optimize=False), Bad())
    assert bad_at(step, {1, 3, 4}, 6).skipped == 3 and step.scaler.get_scale() == 2.0**16


def test_gradients_that_no_scale_makes_finite_are_no_overflow():
    """In float16: the scale falls from 2^16 to 2^-24 at most, and the step after is a bad one, as in float32."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    class Network(nn.Conv2d):
        def forward(self, x, t, y=None):
            return Steep.apply(super().forward(x))

    for dtype, expected in (("float32", 0), ("float16", 40)):
        step = step_of(EDM(), replace(OPTIONS, dtype=dtype, optimize=False), Network(3, 3, 1))
        stream = DATA.batches(6, seed=0)
        with NoHostReads():
            for number in range(45):
                batch = next(stream)
                step(Batch(batch.images, None, batch.index), number)
        reading = step.post(45).read()
        assert reading.bad_step == expected and reading.skipped == 45
    # And the scale is one to go on from, once gradients are finite.
    assert step.scaler.get_scale() > 2.0**10


def test_the_student_becomes_the_teacher():
    """Over three stages; each starts with an optimizer and averages of its own."""
    step = step_of("pd")
    stages = []
    for number, batch in enumerate(batches(11)):
        student = weights(step.model)
        step(batch, number)
        if step.stage.number != (stages[-1] if stages else 0):
            assert torch.equal(weights(step.teacher_model), student)
            assert {float(s["step"]) for s in step.optimizer.state.values()} == {1.0}
        stages.append(step.stage.number)
    assert sorted(set(stages)) == [0, 1, 2]


def test_buffers_come_along_to_the_teacher():
    step = step_of("pd", replace(OPTIONS, optimize=False))
    for model in step.model, step.teacher_model:
        model.network.register_buffer("seen", torch.zeros(()))
    step.model.network.seen.fill_(7)
    run(step, 4)
    assert step.stage.number == 1 and step.teacher_model.network.seen == 7


def test_what_is_frozen_stays():
    """In a network of its own and in a U-Net that is optimised; averages and target have it too."""
    step = step_of("cd")
    frozen, free = step_of("cd"), unet()
    free.out[2].weight.requires_grad_(False)
    frozen = step_of("cd", network=free)
    for each in step, frozen:
        run(each, 2)
    start = unet().out[2].weight
    assert not torch.equal(step.model.network.out[2].weight, start)
    assert not frozen.model.network.out[2].weight.requires_grad
    for model in frozen.model, frozen.target_model, *(frozen.averages.module(k) for k in range(3)):
        assert torch.equal(model.network.out[2].weight, start)
        assert not torch.equal(weights(model), weights(unet()))


def test_the_target_is_an_average_of_the_student():
    step = step_of("cd")
    run(step, 3)
    assert torch.equal(weights(step.target_model), torch.cat([t.flatten() for t in step.averages.tensors(0)]))
    assert not torch.equal(weights(step.target_model), weights(step.model))


class Scaled(cmfast.Denoiser):
    """With a weight of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(()))


def wider(network):
    network.out[0].weight = nn.Parameter(torch.ones(64))
    return network


def with_buffer(network):
    network.register_buffer("seen", torch.zeros(()))
    return network


def test_data_is_looked_at_by_weightings_that_depend_on_it():
    step_of(EDM(sigma_data=0.25, weighting="uniform"))


@pytest.mark.parametrize(
    "objective, options, message",
    [
        (ConsistencyDistillation(loss_norm="l2"), {}, "needs a teacher_model"),
        (EDM(), {"teacher_model": denoiser(EDM())}, "takes no teacher_model"),
        (OBJECTIVES["ct"], {"model": denoiser(EDM())}, "trains a model with consistency preconditioning"),
        (ConsistencyDistillation(), {"teacher_model": denoiser(EDM())}, "needs lpips="),
        (replace(OBJECTIVES["ct"], sigma_max=10.0, rho=3.0), {}, r"a model with sigma_max=10, not 80; rho=3, not 7\."),
        (OBJECTIVES["ict"], {"model": cmfast.Denoiser(unet(), cmfast.Preconditioner.consistency(sigma_min=0.01))},
         r"a model with boundary=0\.002, not 0\.01\."),
        (EDM(sigma_data=0.25), {}, r"a model with sigma_data=0\.25, not 0\.5\."),
        (EDM(), {"model": denoiser(EDM()).requires_grad_(False)}, "no weight of the model is to be trained"),
        (OBJECTIVES["pd"], {"teacher_model": denoiser(EDM(), wider(unet()))},
         r"where model has network\.out\.0\.weight \[32\], teacher_model has network\.out\.0\.weight \[64\]"),
        (OBJECTIVES["pd"], {"teacher_model": denoiser(EDM(), with_buffer(unet()))},
         r"where model has nothing more, teacher_model has network\.seen \[\]"),
        (OBJECTIVES["pd"], {"teacher_model": cmfast.Denoiser(unet(), cmfast.Preconditioner.edm(sigma_data=0.25))},
         r"where model has .*sigma_data=0\.5.*, teacher_model has .*sigma_data=0\.25"),
        (OBJECTIVES["cd"], {"teacher_model": cmfast.Denoiser(small_unet(), cmfast.Preconditioner.edm())},
         "model has num_classes=7 and teacher_model num_classes=None: both are given the labels of the data"),
        (OBJECTIVES["cd"], {"teacher_model": cmfast.Denoiser(small_unet(num_classes=6), cmfast.Preconditioner.edm())},
         "model has num_classes=7 and teacher_model num_classes=6: "),
        (EDM(), {"model": Scaled(unet(), cmfast.Preconditioner.edm())}, "gain of the model is no part of its network"),
    ],
    ids=["no teacher", "a teacher too many", "other scalings", "no lpips", "another range", "another boundary",
         "other data", "nothing to train", "a wider teacher", "a teacher with a buffer", "a teacher of other data",
         "a teacher without classes", "a teacher of fewer classes", "a weight outside"],
)
def test_models_that_do_not_go_together(objective, options, message):
    model = options.pop("model", None) or denoiser(objective)
    with pytest.raises(ValueError, match=message):
        TrainStep(model, objective, OPTIONS, **options)


def test_an_average_by_the_name_of_the_target():
    """They would have one file; without a target, or of another rate, it has one of its own."""
    start = OBJECTIVES["ct"].stage(0).target_rate
    options = [replace(OPTIONS, averages=("0.9", f"given:{rate}")) for rate in (start, 0.5)]
    with pytest.raises(ValueError, match=rf"averages have given:{start}, which the target's file is called"):
        step_of(OBJECTIVES["ct"], options[0])
    step_of(OBJECTIVES["ct"], options[1])
    step_of(EDM(), options[0])


@pytest.mark.parametrize(
    "model, teacher_model, message",
    [
        (unet(), None, r"a UNetModel, a network F\(x, timesteps\): wrap it in cmfast\.Denoiser\(network\)"),
        (nn.Conv2d(3, 3, 1), None, r"model must be a cmfast\.Denoiser, got a Conv2d: wrap a network"),
        (torch.compile(denoiser(OBJECTIVES["cd"])), None, r"model must be a cmfast\.Denoiser, got a OptimizedModule"),
        (denoiser(OBJECTIVES["cd"]), nn.Conv2d(3, 3, 1), r"teacher_model must be a cmfast\.Denoiser, got a Conv2d"),
        (denoiser(OBJECTIVES["cd"]), unet(), r"a UNetModel, a network F\(x, timesteps\)"),
    ],
    ids=["a network", "another network", "compiled", "a network for a teacher", "a U-Net for a teacher"],
)
def test_what_is_no_denoiser(model, teacher_model, message):
    others = {"teacher_model": teacher_model or teacher(OBJECTIVES["cd"])}
    with pytest.raises(TypeError, match=message):
        TrainStep(model, OBJECTIVES["cd"], OPTIONS, **others)
