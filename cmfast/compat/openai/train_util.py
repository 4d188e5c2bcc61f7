"""`cm.train_util`: the training loops, for one process or for those of torchrun, on GPUs or on the CPU.

The same arguments, data and seeds give the same models as the original's, microbatches included: their gradients add
up, so that n of them have n times the gradient of one batch. Attributes and methods are the original's too, for
subclasses. What is otherwise:

- `step` counts the steps since the very first one, also after resuming: the original counts those before twice.
- CMTrainLoop ends at total_training_steps. TrainLoop knows lr_anneal_steps alone: with 0 it never ends.
- The learning rate stops at 0, and does not turn negative behind lr_anneal_steps.
- Consistency training works in float32; several processes synchronise gradients on the CPU as well.
- Progressive distillation: see CMTrainLoop.
"""

from __future__ import annotations

import copy
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import RAdam

from cmfast.compat.openai import _checkpoints, dist_util, logger
from cmfast.compat.openai._checkpoints import (
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    parse_resume_step_from_filename,
)
from cmfast.compat.openai._train_loop import TrainLoop, log_loss_dict
from cmfast.compat.openai.fp16_util import (
    INITIAL_LOG_LOSS_SCALE,
    MixedPrecisionTrainer,
    get_param_groups_and_shapes,
    make_master_params,
    master_params_to_model_params,
)
from cmfast.compat.openai.karras_diffusion import KarrasDenoiser
from cmfast.compat.openai.nn import update_ema
from cmfast.compat.openai.resample import LossAwareSampler, UniformSampler

__all__ = [
    "DDP",
    "INITIAL_LOG_LOSS_SCALE",
    "CMTrainLoop",
    "LossAwareSampler",
    "MixedPrecisionTrainer",
    "RAdam",
    "TrainLoop",
    "UniformSampler",
    "dist_util",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "get_param_groups_and_shapes",
    "log_loss_dict",
    "logger",
    "make_master_params",
    "master_params_to_model_params",
    "parse_resume_step_from_filename",
    "update_ema",
]

TRAINING_MODES = ("consistency_distillation", "consistency_training", "progdist")


class CMTrainLoop(TrainLoop):
    """Trains a consistency model, by distillation or alone, or distils progressively.

    Args:
        target_model: gives the target of consistency losses; moves towards the model at the rate of ema_scale_fn.
        teacher_model, teacher_diffusion: the EDM model that is distilled; None for consistency training.
        training_mode: `consistency_distillation`, `consistency_training` or `progdist`.
        ema_scale_fn: step -> (rate of the target, number of scales), see `create_ema_and_scales_fn`.
        total_training_steps: where the run ends; with lr_anneal_steps, not before the learning rate is 0.

    Checkpoints hold target_modelNNNNNN.pt too, and with progdist teacher_modelNNNNNN.pt.

    Progressive distillation: `step` counts within a stage, `global_step` over all. Where the number of scales falls,
    a stage ends: the student becomes the teacher, and optimizer and averages start anew. (In the original that happens
    a step late, and students learn from the target, which never moves.) lr_anneal_steps is for one stage; the stages
    of two scales and of one have twice as many.

    A subclass with `forward_backward` of its own may have a training_mode of its own, and no target.

    Raises: ValueError: an unknown training_mode, progdist without a teacher, a target of other shapes than the model,
        or with progdist a teacher of others.
    """

    def __init__(
        self,
        *,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion: Any,
        training_mode: str,
        ema_scale_fn: Callable[[int], tuple[float, int]],
        total_training_steps: int,
        **kwargs: Any,
    ) -> None:
        # A subclass may compute losses in a way of its own, from a mode of its own, without a target.
        if all(getattr(type(self), name) is function for name, function in _OWN.items()):
            _check_mode(training_mode)
            if training_mode == "progdist" and teacher_model is None:
                raise ValueError("progdist distils a teacher: teacher_model is missing (--teacher_model_path FILE)")
            losses = getattr(kwargs.get("diffusion"), "consistency_losses", None)
            if training_mode != "progdist" and target_model is None and _takes_a_target(losses):
                raise ValueError("target_model is missing: give an average of the model")
        super().__init__(**kwargs)
        self.training_mode = training_mode
        self.ema_scale_fn = ema_scale_fn
        self.target_model = target_model
        self.teacher_model = teacher_model
        self.teacher_diffusion = teacher_diffusion
        self.total_training_steps = total_training_steps
        if training_mode == "consistency_distillation" and teacher_model is None:
            logger.warn("consistency_distillation without a teacher_model is consistency training")

        if target_model is not None:
            if type(self)._update_target_ema is _UPDATE_TARGET:
                _checkpoints.check_same_shapes("target_model", target_model, self.mp_trainer.model_params)
            self._load_and_sync_target_parameters()
            target_model.requires_grad_(False).train(training_mode != "progdist")
            self._make_target_master_params(target_model)
        if teacher_model is not None:
            if training_mode == "progdist":  # alone in making the student the teacher
                _checkpoints.check_same_shapes("teacher_model", teacher_model, self.mp_trainer.model_params)
            self._load_and_sync_teacher_parameters()
            teacher_model.requires_grad_(False).eval()

        self.global_step = self.step
        self._stage_steps = self.lr_anneal_steps
        if training_mode == "progdist":
            # Of the last step taken: the next may begin a stage, see `run_step`.
            last = max(self.global_step - 1, 0)
            scales = ema_scale_fn(last)[1]
            first = bisect_left(range(last), -scales, key=lambda step: -ema_scale_fn(step)[1])
            self.step = self.global_step - first
            self._set_anneal_steps(scales)

    def _make_target_master_params(self, target_model: nn.Module) -> None:
        """The target's parameters in the layout of the model's master parameters."""
        named = list(target_model.named_parameters())
        if self.use_fp16:
            self.target_model_param_groups_and_shapes: Any = get_param_groups_and_shapes(named)
            self.target_model_master_params = list(make_master_params(self.target_model_param_groups_and_shapes))
        else:
            self.target_model_param_groups_and_shapes = [([(name, p)], p.shape) for name, p in named]
            self.target_model_master_params = list(target_model.parameters())

    def _load_and_sync_target_parameters(self) -> None:
        self._load_and_sync(self.target_model, self._beside_model("target_model"))  # type: ignore[arg-type]  # there where it is called

    def _load_and_sync_teacher_parameters(self) -> None:
        self._load_and_sync(self.teacher_model, self._beside_model("teacher_model"))  # type: ignore[arg-type]  # there where it is called

    def _beside_model(self, name: str) -> str | None:
        """The file of another model that belongs to the checkpoint that is resumed, if it exists."""
        checkpoint = self._main_checkpoint()
        if not checkpoint:
            return None
        return _checkpoints.beside(checkpoint, os.path.basename(checkpoint).replace("model", name))

    def run_loop(self) -> None:
        """Train to the last step, and save."""
        saved = None
        while self.step < self.lr_anneal_steps or self.global_step < self.total_training_steps:
            before = self.global_step
            self.run_step(*next(self.data))
            step = self.global_step
            if self.save_interval > 0 and step % self.save_interval == 0 and step != before:
                self.save()
                saved = step
                if os.environ.get("DIFFUSION_TRAINING_TEST", ""):
                    return
            if step % self.log_interval == 0:
                logger.dumpkvs()
        if saved != self.global_step:
            self.save()

    def run_step(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """One step: batch [B, C, H, W], cond {"y": labels [B]} or {}."""
        if self.training_mode == "progdist":
            self.reset_training_for_progdist()
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
            if self.target_model is not None:
                self._update_target_ema()
            self.step += 1
            self.global_step += 1
        self._anneal_lr()
        self.log_step()

    @torch.no_grad()
    def _update_target_ema(self) -> None:
        target_ema, _ = self.ema_scale_fn(self.global_step)
        update_ema(self.target_model_master_params, self.mp_trainer.master_params, rate=target_ema)
        if self.use_fp16:
            master_params_to_model_params(self.target_model_param_groups_and_shapes, self.target_model_master_params)

    def reset_training_for_progdist(self) -> None:
        """Where global_step begins a stage: the student becomes the teacher, optimizer and averages start anew."""
        if self.training_mode != "progdist":
            raise ValueError(f"training_mode must be progdist, it is {self.training_mode}")
        if self.global_step == 0:
            return
        scales, before = (self.ema_scale_fn(step)[1] for step in (self.global_step, self.global_step - 1))
        if scales == before:
            return
        assert self.teacher_model is not None
        update_ema(self.teacher_model.parameters(), self.model.parameters(), rate=0.0)
        self.teacher_model.eval()
        self.opt = self._make_optimizer()
        self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]
        self._set_anneal_steps(scales)
        self.step = 0

    def _set_anneal_steps(self, scales: int) -> None:
        self.lr_anneal_steps = self._stage_steps * (2 if scales <= 2 else 1)

    def _losses(self, images: Tensor, model_kwargs: dict[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor]
        _check_mode(self.training_mode)
        _, num_scales = self.ema_scale_fn(self.global_step)
        if self.training_mode == "progdist":
            # The first teacher comes with its own scalings, a former student has the model's.
            first_stage = num_scales == self.ema_scale_fn(0)[1]
            losses = self.diffusion.progdist_losses(
                self.ddp_model,
                images,
                num_scales,
                teacher_model=self.teacher_model,
                teacher_diffusion=self.teacher_diffusion if first_stage else self.diffusion,
                model_kwargs=model_kwargs,
            )
            return losses
        teacher: dict[str, Any] = {}
        if self.training_mode == "consistency_distillation":
            teacher = {"teacher_model": self.teacher_model, "teacher_diffusion": self.teacher_diffusion}
        losses = self.diffusion.consistency_losses(
            self.ddp_model, images, num_scales, target_model=self.target_model, model_kwargs=model_kwargs, **teacher
        )
        return losses

    def log_step(self) -> None:
        """Log the numbers of the step and of samples."""
        self._log_step(self.global_step)

    def save(self) -> None:
        """Write checkpoints of all models."""
        others = {"target_model": self.target_model}
        if self.training_mode == "progdist":
            others["teacher_model"] = self.teacher_model
        self._save(self.global_step, {name: model for name, model in others.items() if model is not None})


def _check_mode(training_mode: str) -> None:
    if training_mode not in TRAINING_MODES:
        raise ValueError(f"unknown training_mode {training_mode!r}; known: {', '.join(TRAINING_MODES)}")


def _takes_a_target(losses: Any) -> bool:
    """Whether they are KarrasDenoiser's own, and not those of a subclass, which may do without."""
    return getattr(losses, "__func__", None) is _CONSISTENCY_LOSSES


# As they are here: a subclass or a patch of the class may hold others.
_OWN = {name: getattr(CMTrainLoop, name) for name in ("run_loop", "run_step", "forward_backward", "_losses")}
_UPDATE_TARGET = CMTrainLoop._update_target_ema
_CONSISTENCY_LOSSES = KarrasDenoiser.consistency_losses
