"""The loop: interrupted anywhere, it ends in the bits of a run that was not; and nothing is ever lost."""

import copy
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cmfast
from cmfast.data import ImageData
from cmfast.objectives import EDM
from cmfast.training import NaNLoss, Trainer, checkpoints, config, loop, pictures, state
from tests.training.toys import (
    DATA,
    OBJECTIVES,
    OPTIONS,
    denoiser,
    exploding,
    teacher,
    trainer,
    unet,
    weights,
)


class Interrupted(Exception):
    pass


def interrupt(run: Trainer, at: int) -> None:
    """Run to a step, and fail there."""
    step = run.step.__class__.__call__

    def failing(self, batch, number):
        if number == at:
            raise Interrupted
        step(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.step), "__call__", failing)
        with pytest.raises(Interrupted):
            run.run(progress=False)


def everything(run: Trainer) -> list[torch.Tensor]:
    averages = [t for k in range(len(run.step.averages)) for t in run.step.averages.tensors(k)]
    moments = [s[name] for s in run.step.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*run.step.model.state_dict().values(), *averages, *moments]


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in OBJECTIVES), ("cd", "float16")])
def test_resumed_is_uninterrupted(tmp_path, name, dtype):
    """Bit for bit: 20 steps, and 10 + 10 from a checkpoint in the middle of an epoch, though step 17 was reached."""
    options = replace(OPTIONS, dtype=dtype)
    whole = trainer(name, tmp_path / "whole", options)
    whole.run(progress=False)
    interrupt(trainer(name, tmp_path / "part", options), 17)
    torch.manual_seed(12345)
    resumed = trainer(name, tmp_path / "part", options, unet(seed=5), resume=True)
    assert resumed.done == 10
    resumed.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))
    assert resumed.losses() == whole.losses()
    if dtype == "float16":
        assert resumed.step.scaler.state_dict() == whole.step.scaler.state_dict()
    result = cmfast.load(tmp_path / "part" / "model.safetensors")
    assert torch.equal(weights(result), weights(whole.average()))


def test_a_foreign_networks_dropout_resumes(tmp_path):
    """Its masks come from torch's generator, whose state is kept."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t, y):
            return nn.functional.dropout(self.conv(x), 0.5, self.training)

    def run(folder, **more):
        model = cmfast.Denoiser(Dropping(), num_classes=7, image_shape=(3, 8, 8))
        return Trainer(model, OBJECTIVES["ct"], DATA, OPTIONS, tmp_path / folder, **more)

    whole = run("whole")
    whole.run(progress=False)
    interrupt(run("part"), 13)
    torch.manual_seed(5)
    resumed = run("part", resume=True)
    resumed.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))


class Foreign(nn.Module):
    """Part of it is not trained, or is one weight by two names."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        if kind == "tied":
            self.two.weight = self.one.weight
        if kind == "frozen":
            self.two.requires_grad_(False)

    def forward(self, x, t):
        return self.two(torch.relu(self.one(x)))


def foreign(out, kind, steps=4, **more):
    network = Foreign(kind)
    if kind == "compiled":
        network = torch.compile(network, backend="eager")
    model = cmfast.Denoiser(network, cmfast.Preconditioner.edm(), image_shape=(3, 8, 8))
    return Trainer(model, EDM(), ImageData(DATA.images), replace(OPTIONS, steps=steps), out, **more)


@pytest.mark.parametrize("kind", ["frozen", "tied", "compiled"])
def test_foreign_networks_resume(tmp_path, kind):
    whole = foreign(tmp_path / "whole", kind)
    result = whole.run(progress=False)
    foreign(tmp_path / "part", kind, 2).run(progress=False)
    resumed = foreign(tmp_path / "part", kind, resume=True)
    resumed.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))
    # And what a run gives can be trained as its model could.
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in whole.step.model.parameters()]


def test_a_compiled_network_is_saved_by_its_own_names(tmp_path):
    """So that it may be gone on with as it is; those of older checkpoints have what torch.compile puts into them."""
    foreign(tmp_path, "compiled", 2).run(progress=False)
    found = sorted(checkpoints.newest(tmp_path).glob("*.safetensors"))
    for path in found:
        tensors = load_file(path)
        assert set(tensors) == set(Foreign("").state_dict())
        save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, path)
    assert len(found) == 3 and foreign(tmp_path, "", resume=True).done == 2


def test_a_compiled_unet_is_one_in_its_file(tmp_path):
    model = denoiser(OBJECTIVES["edm"])
    model.network = torch.compile(model.network, backend="eager")
    state.save_weights(model, tmp_path / "x.safetensors")
    assert torch.equal(weights(cmfast.load(tmp_path / "x.safetensors")), weights(unet()))


def test_steps_before_an_image_that_cannot_be_read_are_kept(tmp_path):
    class Broken(ImageData):
        def batches(self, *args, **options):
            yield from islice(super().batches(*args, **options), 2)
            raise ValueError("x.png cannot be read")

    whole = trainer("edm", tmp_path / "whole", replace(OPTIONS, steps=3)).run(progress=False)
    broken = Broken(DATA.images, DATA.labels)
    with pytest.raises(ValueError, match="x.png"):
        trainer("edm", tmp_path / "run", replace(OPTIONS, steps=3), data=broken).run(progress=False)
    assert checkpoints.newest(tmp_path / "run").name == "step-00000002"
    resumed = trainer("edm", tmp_path / "run", replace(OPTIONS, steps=3), resume=True)
    assert torch.equal(weights(resumed.run(progress=False)), weights(whole))


def test_checkpoints_are_not_written_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoints is a link out of the run"):
        trainer("edm", tmp_path / "run").run(progress=False)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_another_teacher_is_another_run(tmp_path):
    """Wherever the file of either is."""
    one, other = teacher(OBJECTIVES["cd"]), teacher(OBJECTIVES["cd"], seed=2)
    trainer("cd", tmp_path, replace(OPTIONS, steps=1), teacher_model=one).run(progress=False)
    longer = replace(OPTIONS, steps=2)
    with pytest.raises(ValueError, match="teacher_fingerprint: [0-9a-f]{16}, now [0-9a-f]{16}"):
        trainer("cd", tmp_path, longer, teacher_model=other, resume=True)
    trainer("cd", tmp_path, longer, teacher_model=copy.deepcopy(one), resume=True).run(progress=False)


@pytest.mark.parametrize("part", ["model.safetensors", "state.pt", "average-0.9.safetensors"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, part):
    run = trainer("cd", tmp_path, replace(OPTIONS, steps=10))
    run.run(progress=False)
    before = {path.name: path.read_bytes() for path in checkpoints.newest(tmp_path).iterdir()}
    kept = trainer("cd", tmp_path, OPTIONS, resume=True)

    def full(save):
        def write(*arguments, **options):
            path = next(x for x in (*arguments, *options.values()) if isinstance(x, type(tmp_path)))
            if path.name == part or part in str(path):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return save(*arguments, **options)

        return write

    monkeypatch.setattr(state, "save_weights", full(state.save_weights))
    monkeypatch.setattr(torch, "save", full(torch.save))
    with pytest.raises(OSError, match="No space"):
        kept.run(progress=False)
    monkeypatch.undo()
    (step, path), *others = checkpoints.saved(tmp_path)
    assert step == 10 and not others and {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in checkpoints.folder(tmp_path).iterdir()] == [path.name]
    resumed = trainer("cd", tmp_path, OPTIONS, resume=True)
    resumed.run(progress=False)


def test_the_last_checkpoints_stay(tmp_path):
    run = trainer("edm", tmp_path, replace(OPTIONS, steps=7, save_interval=2, keep=2))
    run.run(progress=False)
    assert [step for step, _ in checkpoints.saved(tmp_path)] == [6, 7]
    run = trainer("edm", tmp_path / "all", replace(OPTIONS, steps=7, save_interval=2, keep=None))
    run.run(progress=False)
    assert [step for step, _ in checkpoints.saved(tmp_path / "all")] == [2, 4, 6, 7]


def test_left_by_a_killed_process(tmp_path):
    """Half a checkpoint is not taken for one, and is cleared away."""
    half = checkpoints.folder(tmp_path) / f"{checkpoints._UNFINISHED}00000099"
    half.mkdir(parents=True)
    (half / "state.pt").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) is None
    trainer("edm", tmp_path, replace(OPTIONS, steps=1)).run(progress=False)
    assert not half.exists() and [step for step, _ in checkpoints.saved(tmp_path)] == [1]


def test_another_configuration_is_refused(tmp_path):
    trainer("cd", tmp_path, replace(OPTIONS, steps=2)).run(progress=False)
    with pytest.raises(ValueError, match=r"options\.seed: 0, now 1") as error:
        trainer("cd", tmp_path, replace(OPTIONS, steps=2, seed=1, eps=1.0, keep=9, max_norm=1.0, microbatch=2),
                resume=True)
    assert "options.eps: 1e-08, now 1.0" in str(error.value)
    assert not any(name in str(error.value) for name in ("keep", "max_norm", "microbatch"))
    with pytest.raises(ValueError, match=r"objective\.start_scales: 6, now 7"):
        trainer(replace(OBJECTIVES["cd"], start_scales=7), tmp_path, replace(OPTIONS, steps=2), resume=True)
    other = ImageData(DATA.images.flip(0), DATA.labels)
    with pytest.raises(ValueError, match="data_fingerprint"):
        trainer("cd", tmp_path, replace(OPTIONS, steps=2), data=other, resume=True)
    with pytest.raises(ValueError, match="resume it, or choose another folder"):
        trainer("cd", tmp_path, replace(OPTIONS, steps=2))
    with pytest.raises(FileNotFoundError, match="nothing to resume from"):
        trainer("cd", tmp_path / "new", resume=True)


def test_more_steps(tmp_path):
    """Where no schedule depends on their number, more steps are the same steps and more."""
    whole = trainer("edm", tmp_path / "whole", replace(OPTIONS, steps=6))
    whole.run(progress=False)
    trainer("edm", tmp_path / "part", replace(OPTIONS, steps=3)).run(progress=False)
    more = trainer("edm", tmp_path / "part", replace(OPTIONS, steps=6), resume=True)
    more.run(progress=False)
    assert all(map(torch.equal, everything(more), everything(whole)))
    trainer("edm", tmp_path / "linear", replace(OPTIONS, steps=3, decay="linear")).run(progress=False)
    with pytest.raises(ValueError, match=r"options\.steps: 3, now 6"):
        trainer("edm", tmp_path / "linear", replace(OPTIONS, steps=6, decay="linear"), resume=True)


def test_a_nan_loss_stops_with_a_checkpoint_of_the_step_before(tmp_path):
    with pytest.raises(NaNLoss, match=r"the loss of step 7 \(of 20\).*step-00000007"):
        exploding(tmp_path / "part", 7).run(progress=False)
    whole = exploding(tmp_path / "whole", None)
    whole.run(progress=False)
    resumed = exploding(tmp_path / "part", None, resume=True)
    assert resumed.done == 7
    resumed.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))


def test_a_nan_loss_is_gone_on_from_as_the_message_says(tmp_path):
    """The step is left out; or an earlier checkpoint goes on with other options, which are those that act."""
    options = replace(OPTIONS, save_interval=5)
    with pytest.raises(NaNLoss, match=r"step-00000007: resumed from there, on_nan='skip' .* lower learning_rate"):
        exploding(tmp_path, 7, options).run(progress=False)
    shutil.copytree(tmp_path, tmp_path / "other")
    # Its network counts calls from the start of the process.
    skipping = exploding(tmp_path, 0, replace(options, on_nan="skip"), resume=True)
    skipping.run(progress=False)
    assert [line["skipped"] for line in pictures.read_log(tmp_path / loop.LOG)] == [0, 1, 1, 1]
    assert config.read(tmp_path / loop.SETTINGS)["options"]["on_nan"] == "skip"

    (place,) = (path for step, path in checkpoints.saved(tmp_path / "other") if step == 7)
    shutil.rmtree(place)
    lower = replace(options, learning_rate=1e-4, max_norm=1e-3)
    resumed = exploding(tmp_path / "other", None, lower, resume=True)
    assert resumed.done == 5 and resumed.step.optimizer.max_norm == 1e-3
    resumed.run(progress=False)
    assert [line["learning_rate"] for line in pictures.read_log(tmp_path / "other" / loop.LOG)] == [3e-3, *[1e-4] * 3]


@pytest.mark.parametrize("first, scale, since", [(2.0**16, 2.0**16, 2), (2.0**40, 2.0**38, 0)])
def test_a_nan_loss_leaves_the_scale_of_float16(tmp_path, first, scale, since):
    """Steps after it, up to the reading, find no finite gradients either, and it was not the scale's fault; that of
    steps before it was, and stays."""
    run = exploding(tmp_path, 2, replace(OPTIONS, dtype="float16", log_interval=20))
    run.step.scaler = torch.amp.GradScaler("cpu", init_scale=first)
    with pytest.raises(NaNLoss, match="the loss of step 2 "):
        run.run(progress=False)
    resumed = exploding(tmp_path, None, replace(OPTIONS, dtype="float16", on_nan="skip"), resume=True)
    state = resumed.step.scaler.state_dict()
    assert resumed.done == 2 and (state["scale"], state["_growth_tracker"]) == (scale, since)


@pytest.mark.parametrize("at, save_interval", [(6, 8), (18, 20)], ids=["a checkpoint", "the last step"])
def test_a_nan_between_two_readings_shows_before_a_checkpoint(tmp_path, at, save_interval):
    options = replace(OPTIONS, log_interval=11, save_interval=save_interval)
    with pytest.raises(NaNLoss, match=f"the loss of step {at} "):
        exploding(tmp_path, at, options).run(progress=False)
    assert [step for step, _ in checkpoints.saved(tmp_path)] == [at]
    assert not (tmp_path / loop.RESULT).exists()


@pytest.mark.parametrize("log_interval", [3, 4], ids=["a reading on its way", "none sent"])
def test_a_nan_just_before_a_new_stage_stops_in_the_old_one(tmp_path, log_interval):
    """A stage of 3 steps: the teacher, averages and moments that are kept are those of the step before the NaN."""
    options = replace(OPTIONS, log_interval=log_interval, steps=8)
    good = trainer("pd", tmp_path / "good", options)
    interrupt(good, 2)
    first = teacher(OBJECTIVES["pd"])
    run = trainer("pd", tmp_path / "bad", options)
    loss = run.step._loss
    run.step._loss = lambda *batch: loss(*batch) * (float("nan") if run.done == 2 else 1.0)
    with pytest.raises(NaNLoss, match="the loss of step 2 "):
        run.run(progress=False)
    assert all(map(torch.equal, everything(run), everything(good)))
    resumed = trainer("pd", tmp_path / "bad", options, unet(seed=5), resume=True)
    assert resumed.done == 2 and resumed.step.stage.number == 0
    assert torch.equal(weights(resumed.step.teacher_model), weights(first))
    assert all(map(torch.equal, everything(resumed), everything(good)))


def test_a_nan_loss_can_be_left_out(tmp_path):
    run = exploding(tmp_path, 7, replace(OPTIONS, on_nan="skip"))
    run.run(progress=False)
    lines = pictures.read_log(tmp_path / loop.LOG)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1] and all(line["loss"] > 0 for line in lines)


def test_skipped_steps_are_counted_on(tmp_path):
    exploding(tmp_path, 2, replace(OPTIONS, steps=5, on_nan="skip")).run(progress=False)
    exploding(tmp_path, None, replace(OPTIONS, steps=10, on_nan="skip"), resume=True).run(progress=False)
    assert [line["skipped"] for line in pictures.read_log(tmp_path / loop.LOG)] == [1, 1]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_numpy(tmp_path, kind):
    exploding(tmp_path, None, replace(OPTIONS, steps=1, log_interval=1, learning_rate=kind(0.5))).run(progress=False)
    assert config.read(tmp_path / loop.SETTINGS)["options"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    "model, data, message",
    [
        ({}, ImageData(torch.zeros(4, 3, 8, 8)), "for 7 classes and the data has no labels"),
        ({}, ImageData(torch.zeros(4, 1, 8, 8), torch.arange(4)), r"makes images \[3, 8, 8\]"),
        ({}, ImageData(torch.zeros(9, 3, 8, 8), torch.arange(9)), "labels of 9 classes, the model knows 7"),
        ({"num_classes": None}, DATA, "the data has labels and the model takes none"),
    ],
    ids=["no labels", "gray", "more classes", "labels"],
)
def test_data_that_does_not_fit(tmp_path, model, data, message):
    denoise = denoiser(OBJECTIVES["edm"])
    for name, value in model.items():
        setattr(denoise, name, value)
    with pytest.raises(ValueError, match=message):
        Trainer(denoise, OBJECTIVES["edm"], data, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    "model, data, message",
    [
        (unet(), DATA, r"a UNetModel, a network F\(x, timesteps\): wrap it in cmfast\.Denoiser"),
        (nn.Conv2d(3, 3, 1), DATA, r"model must be a cmfast\.Denoiser, got a Conv2d"),
        (denoiser(OBJECTIVES["edm"]), DATA.images, r"data must be a cmfast\.data\.Dataset, .*got a Tensor: cmfast"),
    ],
    ids=["a U-Net", "a network", "a tensor"],
)
def test_what_is_not_trained_from(tmp_path, model, data, message):
    with pytest.raises(TypeError, match=message):
        Trainer(model, OBJECTIVES["edm"], data, OPTIONS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0.999, "0.999", "power:0.1"])
def test_one_rate_is_a_tuple_of_one(rate):
    with pytest.raises(ValueError, match=rf"averages must be several rates.*: averages=\({rate!r},\)"):
        replace(OPTIONS, averages=rate)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"batch_size": 0}, {"save_interval": 0}, {"microbatch": 0}, {"learning_rate": 0.0},
        {"optimizer": "sgd"}, {"dtype": "int8"}, {"on_nan": "pray"}, {"decay": "exp"}, {"keep": 0}, {"max_norm": -1.0},
        {"warmup": -1}, {"averages": ("2",)},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_bad_options(tmp_path, options):
    name = {"averages": "rate"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(ValueError, match=name):
        trainer("edm", tmp_path, replace(OPTIONS, **options))
