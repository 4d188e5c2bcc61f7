"""cm.train_util and cm.fp16_util: the original's numbers, stages of distillation, resuming, ends of runs, errors."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmfast.compat.openai import fp16_util, logger, resample, script_util, train_util
from cmfast.compat.openai.karras_diffusion import KarrasDenoiser
from cmfast.tolerances import GOLDEN_TRAINED
from cmfast.unet import UNetModel
from tests.compat.openai_train_utils import (  # noqa: F401  # fixtures
    Small,
    batches,
    cm_loop,
    edm_loop,
    folder_of_logs,
    names,
    process_group,
    schedule,
)
from tests.golden_utils import golden_tensor, load, relative_error

GOLDEN, HEADER = load("train_2303")


# Against the original


def golden_network(offset, dropout, use_fp16):
    model = UNetModel(**HEADER["network"], dropout=dropout, use_fp16=use_fp16)
    with torch.no_grad():
        for k, (name, tensor) in enumerate(model.state_dict().items()):
            tensor.copy_(golden_tensor(k + offset, name, tensor.shape))
    return model.convert_to_fp16() if use_fp16 else model


def golden_batches(size):
    numel = size * 3 * 8 * 8
    for i in itertools.count():
        values = torch.sin(0.7390851 * torch.arange(i * numel, (i + 1) * numel, dtype=torch.float64))
        yield values.float().view(size, 3, 8, 8), {"y": (torch.arange(size) + i) % 5}


def changes(state, start):
    """Of each entry up to 24 evenly spaced elements, less what they were at the start."""
    parts = [(state[name].float() - start[name].float()).flatten() for name in state]
    return torch.cat([part[:: max(1, part.numel() // 24)][:24] for part in parts]).detach()


@pytest.mark.parametrize("mode", ["edm", "consistency_training", "consistency_distillation"])
def test_ends_where_the_original_does(mode):
    run = HEADER[mode]
    use_fp16, diffusion = (
        run["use_fp16"],
        KarrasDenoiser(
            distillation=mode != "edm",
            loss_norm=run.get("loss_norm", "l2"),
            weight_schedule=run.get("weight_schedule", "karras"),
        ),
    )
    model, target, teacher = (golden_network(1000 * i, run["dropout"], use_fp16) for i in range(3))
    start, target_start = (copy.deepcopy(network.state_dict()) for network in (model, target))
    keys = ("batch_size", "microbatch", "lr", "ema_rate", "weight_decay", "lr_anneal_steps", "use_fp16")
    options = {key: run[key] for key in keys} | {
        "model": model.train(),
        "diffusion": diffusion,
        "data": golden_batches(run["batch_size"]),
        "log_interval": 100,
        "save_interval": 100,
        "resume_checkpoint": "",
        "fp16_scale_growth": 0.01,
    }
    if mode == "edm":
        loop = train_util.TrainLoop(schedule_sampler=resample.LogNormalSampler(), **options)
    else:
        loop = train_util.CMTrainLoop(
            target_model=target,
            teacher_model=teacher if mode == "consistency_distillation" else None,
            teacher_diffusion=KarrasDenoiser(loss_norm="l2"),
            training_mode=mode,
            ema_scale_fn=script_util.create_ema_and_scales_fn(**run["curriculum"]),
            total_training_steps=10,
            **options,
        )
    torch.manual_seed(run["seed"])
    np.random.seed(run["seed"])
    for _ in range(run["calls"]):
        loop.run_step(*next(loop.data))

    tolerance = GOLDEN_TRAINED[torch.float16 if use_fp16 else torch.float32]
    trainer = loop.mp_trainer
    assert loop.step == run["steps"]
    assert trainer.lg_loss_scale == pytest.approx(run["lg_loss_scale"], rel=1e-12)
    assert loop.opt.param_groups[0]["lr"] == pytest.approx(run["lr_now"], rel=1e-12)
    assert [torch.rand(()).item(), np.random.rand()] == run["next_draw"]
    states = {"model": trainer.master_params_to_state_dict(trainer.master_params)}
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        states[f"ema_{rate}"] = trainer.master_params_to_state_dict(params)
    for name, state in states.items():
        assert relative_error(changes(state, start), GOLDEN[f"{mode}.{name}"]) <= tolerance
    if mode != "edm":
        assert relative_error(changes(target.state_dict(), target_start), GOLDEN[f"{mode}.target"]) <= tolerance
    kvs = logger.getkvs()
    assert kvs.keys() == run["kvs"].keys()
    for key, value in run["kvs"].items():
        assert kvs[key] == pytest.approx(value, rel=tolerance)


def same(state, other):
    assert state.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


# Consistency training in float32, progressive distillation


def test_float32_moves_the_target():
    loop = cm_loop()
    before = copy.deepcopy(loop.target_model.state_dict())
    loop.run_step(*next(loop.data))
    for name, parameter in loop.target_model.named_parameters():
        torch.testing.assert_close(parameter, (before[name] + loop.model.state_dict()[name]) / 2)
    # What subclasses of the original do by hand: it leaves the target as it is.
    moved = copy.deepcopy(loop.target_model.state_dict())
    fp16_util.master_params_to_model_params(loop.target_model_param_groups_and_shapes, loop.target_model_master_params)
    assert same(moved, loop.target_model.state_dict())


class Stages(train_util.CMTrainLoop):
    """Notes of each step: (step, scales, teacher's sigma_data, lr_anneal_steps, its weights, those of the student)."""

    def __init__(self, **options):
        self.seen = []
        super().__init__(**options)

    def forward_backward(self, batch, cond):
        inner = self.diffusion.progdist_losses

        def losses(model, images, num_scales, *, teacher_model, teacher_diffusion, **rest):
            assert teacher_model is self.teacher_model and not teacher_model.training
            self.now = (num_scales, teacher_diffusion.sigma_data, self.lr_anneal_steps)
            return inner(
                model, images, num_scales, teacher_model=teacher_model, teacher_diffusion=teacher_diffusion, **rest
            )

        self.diffusion.progdist_losses = losses
        teacher = copy.deepcopy(self.teacher_model.state_dict())
        step = self.step
        super().forward_backward(batch, cond)
        self.diffusion.progdist_losses = inner
        self.seen.append((step, *self.now, teacher, copy.deepcopy(self.model.state_dict())))


@pytest.mark.parametrize("anneal", [0, 2])
def test_progressive_distillation_makes_each_student_the_next_teacher(anneal):
    loop = cm_loop(
        "progdist", Stages, total_training_steps=10, lr_anneal_steps=anneal, ema_scale_fn=schedule("progdist", 8)
    )
    target = copy.deepcopy(loop.target_model.state_dict())
    loop.run_loop()
    steps, scales, sigma_data, lengths, teachers, students = zip(*loop.seen, strict=True)
    # The last stage goes on to the end of its learning rate.
    total = 12 if anneal else 10
    assert loop.global_step == len(scales) == total
    assert scales == (8, 8, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1)[:total]
    assert steps == (0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3)[:total]
    assert sigma_data == (0.4, 0.4, *[0.5] * (total - 2))
    assert lengths == (*[anneal] * 4, *[2 * anneal] * (total - 4))
    for i in range(1, total):
        begins = scales[i] != scales[i - 1]
        assert same(teachers[i], students[i] if begins else teachers[i - 1])
        assert not begins or not same(teachers[i], teachers[i - 1])
    assert same(target, loop.target_model.state_dict())


def test_a_new_stage_starts_anew():
    loop = cm_loop("progdist", total_training_steps=2)
    loop.run_loop()
    assert all(state["step"] == 2 for state in loop.opt.state.values())
    loop.reset_training_for_progdist()
    assert not loop.opt.state and loop.step == 0
    for params in loop.ema_params:
        assert all(torch.equal(a, b) and a is not b for a, b in zip(params, loop.mp_trainer.master_params, strict=True))


def test_hooks_that_users_replace(tmp_path, monkeypatch, log_dir):
    edm_loop().save()
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: str(log_dir / "model000000.pt"))
    monkeypatch.setattr(train_util, "get_blob_logdir", lambda: str(tmp_path / "bucket"))
    loop = edm_loop(model=Small(seed=5))
    assert same(loop.model.state_dict(), Small().state_dict())
    loop.save()
    assert "model000000.pt" in names(tmp_path / "bucket")


@pytest.mark.parametrize("name", ["RAdam", "MixedPrecisionTrainer", "UniformSampler", "log_loss_dict", "update_ema"])
def test_names_of_train_util_that_users_replace(name, monkeypatch):
    """As where `TrainLoop` stood in that module."""
    used, own = [], getattr(train_util, name)
    monkeypatch.setattr(train_util, name, lambda *args, **options: used.append(name) or own(*args, **options))
    cm_loop(schedule_sampler=None).run_step(*next(batches()))
    assert used


def test_losses_of_any_shape_are_noted(monkeypatch):
    """As there: a value for each time, as far as there are both."""
    noted = []
    monkeypatch.setattr(logger, "logkv_mean", lambda key, value: noted.append((key, value)))
    loss = torch.tensor([1.0, 2.0, 6.0])
    losses = {"loss": loss, "column": loss[:, None], "one": torch.ones(1)}
    train_util.log_loss_dict(SimpleNamespace(num_timesteps=40), torch.tensor([0, 10, 39]), losses)
    assert noted == [
        *((f"{name}{part}", value) for name in ("loss", "column") for part, value in
          (("", 3.0), ("_q0", 1.0), ("_q1", 2.0), ("_q3", 6.0))),
        ("one", 1.0), ("one_q0", 1.0),
    ]  # fmt: skip
    noted.clear()
    train_util.log_loss_dict(SimpleNamespace(num_timesteps=40), torch.empty(0), {"loss": torch.empty(0)})
    assert len(noted) == 1 and math.isnan(noted[0][1])  # of an empty batch


# Subclasses of users


class OwnLosses(train_util.CMTrainLoop):
    """The student teaches itself, in a mode that is not the original's."""

    def forward_backward(self, batch, cond):
        self.mp_trainer.zero_grad()
        _, num_scales = self.ema_scale_fn(self.global_step)
        losses = self.diffusion.consistency_losses(self.ddp_model, batch, num_scales, target_model=self.ddp_model)
        self.mp_trainer.backward(losses["loss"].mean())


class OwnDiffusion(KarrasDenoiser):
    def consistency_losses(self, model, x_start, num_scales, target_model=None, **options):
        return super().consistency_losses(model, x_start, num_scales, target_model=model, **options)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        return super().training_losses(model, x_start, torch.linspace(0.01, 2, 40)[t], model_kwargs, noise)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cm_loop("ict", OwnLosses, target_model=None),
        lambda: cm_loop("consistency_training", OwnLosses, target_model=None),
        lambda: cm_loop(target_model=None, diffusion=OwnDiffusion(distillation=True, loss_norm="l2")),
        lambda: edm_loop(schedule_sampler=None, diffusion=OwnDiffusion()),
        lambda: cm_loop("consistency_distillation", teacher_model=Small(5)),
    ],
    ids=["own mode", "no target", "no target for own losses", "losses of timesteps", "a wider teacher"],
)
def test_what_users_change_is_trained_as_there(make):
    loop = make()
    before = copy.deepcopy(loop.model.state_dict())
    loop.run_step(*next(batches()))
    assert loop.step == 1 and not same(before, loop.model.state_dict())


@pytest.mark.parametrize(
    "mode, options, message",
    [
        ("ict", {}, "unknown training_mode 'ict'"),
        ("consistency_training", {"target_model": None}, "target_model is missing"),
        ("progdist", {"teacher_model": None}, "teacher_model is missing"),
    ],
)
def test_a_subclass_that_needs_them_hears_what_is_missing_at_its_first_step(mode, options, message):
    class Logs(train_util.CMTrainLoop):
        def run_step(self, batch, cond):
            super().run_step(batch, cond)

    loop = cm_loop(mode, Logs, **options)
    with pytest.raises(ValueError, match=message):
        loop.run_step(*next(batches()))


# float16


def test_master_parameters_and_state_dicts():
    model = Small()
    loop = edm_loop(model=model, use_fp16=True)
    trainer = loop.mp_trainer
    vectors, matrices = trainer.master_params
    assert vectors.shape == (4 + 4 + 3,) and matrices.shape == (1, 4 * 27 + 4 + 3 * 36)
    assert vectors.dtype == matrices.dtype == torch.float32 and model.torso.weight.dtype == torch.float16
    state = trainer.master_params_to_state_dict(trainer.master_params)
    assert same(state, Small().state_dict())
    back = trainer.state_dict_to_master_params(state)
    assert all(torch.equal(a, b) for a, b in zip(back, trainer.master_params, strict=True))
    model.torso.bias.grad = torch.ones(4).half()
    fp16_util.model_grads_to_master_grads(trainer.param_groups_and_shapes, trainer.master_params)
    assert vectors.grad.tolist() == [1.0] * 4 + [0.0] * 7 and not matrices.grad.any()
    fp16_util.zero_grad(trainer.model_params)
    assert not model.torso.bias.grad.any() and model.out.bias.grad is None


def test_loss_that_stays_nan_ends_the_run():
    loop = edm_loop(use_fp16=True, data=itertools.repeat((torch.full((4, 3, 4, 4), float("nan")), {})))
    loop.mp_trainer.lg_loss_scale = -22.0
    with pytest.raises(FloatingPointError, match="down to a loss scale of 2\\^-25"):
        loop.run_loop()
    assert loop.step == 0 and all(p.isfinite().all() for p in loop.mp_trainer.master_params)


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cm_loop("consistency"), "'consistency'; known: consistency_distillation, consistency_training, prog"),
        (lambda: cm_loop("progdist", teacher_model=None), "teacher_model is missing"),
        (lambda: cm_loop(target_model=None), "target_model is missing"),
        (lambda: cm_loop(target_model=Small(5)), r"target_model is another network.*\[5, 3, 3, 3\] against \[4, 3"),
        (lambda: cm_loop("progdist", teacher_model=Small(5)), "teacher_model is another network"),
        (lambda: edm_loop(log_interval=0), "log_interval must be 1 or more, got 0"),
        (lambda: edm_loop(schedule_sampler=None).run_loop(), "UniformSampler draws.*--schedule_sampler lognormal"),
        (lambda: edm_loop(data=iter([(torch.zeros(2, 3, 4, 4), {"y": torch.zeros(3)})])).run_loop(), "'y' has 3.*2 im"),
        (lambda: cm_loop().reset_training_for_progdist(), "it is consistency_training"),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_distillation_without_a_teacher_is_said(log_dir):
    cm_loop("consistency_distillation", teacher_model=None).run_step(*next(batches()))
    assert "without a teacher_model is consistency training" in (log_dir / "log.txt").read_text()
