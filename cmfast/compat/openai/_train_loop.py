"""`TrainLoop`, with what it shares with `CMTrainLoop`: see train_util.py."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmfast.compat.openai import _checkpoints, dist_util, logger
from cmfast.compat.openai.karras_diffusion import KarrasDenoiser
from cmfast.compat.openai.resample import LossAwareSampler

#: (images [B, C, H, W], {"y": labels [B]} or {}) without end.
Batches = Iterator[tuple[Tensor, Mapping[str, Tensor]]]
# As it is here: a subclass, an instance or a patch of the class may hold another, which may take timesteps.
_TRAINING_LOSSES = KarrasDenoiser.training_losses


class TrainLoop:
    """Trains an EDM model: diffusion.training_losses, RAdam, averages of the parameters.

    Args:
        batch_size: of this process; microbatch: samples in one pass, -1 for all of a batch.
        ema_rate: of an average, or several as "0.999,0.9999".
        log_interval, save_interval: steps between tables of the log and between checkpoints, the latter in files
            ema_RATE_NNNNNN.pt, optNNNNNN.pt and modelNNNNNN.pt of the logger's folder; -1: one at the end.
        resume_checkpoint: a modelNNNNNN.pt, whose other files lie beside it; "": a new run.
        schedule_sampler: default: uniform timesteps, which EDM cannot use: give `resample.LogNormalSampler()`.
        lr_anneal_steps: steps in which the learning rate falls to 0, where the run ends; 0: neither.

    Which files there are, rank 0 says, and gives what is in them to the others, whose machines may lack them.
    What a script puts in the place of a name of `cm.train_util`, such as RAdam or log_loss_dict, is used.

    With DIFFUSION_TRAINING_TEST in the environment, a run ends after its first checkpoint.
    Raises: ValueError: an argument out of range, or a checkpoint of another network.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: Batches,
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: Any = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        if log_interval < 1:
            raise ValueError(f"log_interval must be 1 or more, got {log_interval}")
        dist_util.setup_dist()
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = [float(rate) for rate in str(ema_rate).split(",")]
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or _checkpoints.hooks().UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.step = self.resume_step = 0
        self.global_batch = self.batch_size * dist.get_world_size()
        self.sync_cuda = torch.cuda.is_available()
        self._checkpoint: str | None = None

        self._load_and_sync_parameters()
        self.mp_trainer = _checkpoints.hooks().MixedPrecisionTrainer(
            model=self.model, use_fp16=self.use_fp16, fp16_scale_growth=fp16_scale_growth
        )
        self._load_master_parameters()
        self.opt = self._make_optimizer()
        if self.resume_step:
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        else:
            self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]
        self.use_ddp = dist.get_world_size() > 1
        self.ddp_model = self._distributed() if self.use_ddp else self.model
        self.step = self.resume_step

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = _checkpoints.hooks().RAdam(
            self.mp_trainer.master_params, lr=self.lr, weight_decay=self.weight_decay
        )
        return optimizer

    def _distributed(self) -> nn.Module:
        device = [dist_util.dev()] if torch.cuda.is_available() else None
        wrapped: nn.Module = _checkpoints.hooks().DDP(
            self.model, device_ids=device, broadcast_buffers=False, bucket_cap_mb=128
        )
        return wrapped

    def _main_checkpoint(self) -> str:
        """The file to go on from, "" for none: that of rank 0, also where the folders of other machines hold others."""
        if self._checkpoint is None:
            own = _checkpoints.hooks().find_resume_checkpoint() or self.resume_checkpoint
            self._checkpoint = str(_of_rank_0(own) or "")
        return self._checkpoint

    def _load_and_sync_parameters(self) -> None:
        checkpoint = self._main_checkpoint()
        if checkpoint:
            self.resume_step = _checkpoints.hooks().parse_resume_step_from_filename(checkpoint)
        self._load_and_sync(self.model, checkpoint)

    def _load_and_sync(self, model: nn.Module, path: str | None) -> None:
        """Load a file, if there is one, on rank 0, and copy parameters and buffers from there to the other ranks."""
        if path and dist.get_rank() == 0:
            logger.log(f"loading model from checkpoint: {path}...")
            _checkpoints.load_into(model, path)
        dist_util.sync_params(model.parameters())
        dist_util.sync_params(model.buffers())

    def _load_master_parameters(self) -> None:
        """Take float32 parameters from the file: the model may have rounded them to float16 already."""
        checkpoint = self._main_checkpoint()
        if not (checkpoint and self.use_fp16):
            return
        if dist.get_rank() == 0:
            saved = self.mp_trainer.state_dict_to_master_params(_checkpoints.read(checkpoint))
            with torch.no_grad():
                torch._foreach_copy_(self.mp_trainer.master_params, saved)
        dist_util.sync_params(self.mp_trainer.master_params)

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        averages = copy.deepcopy(self.mp_trainer.master_params)
        path = _checkpoints.hooks().find_ema_checkpoint(self._main_checkpoint(), self.resume_step, rate)
        if path and dist.get_rank() == 0:
            logger.log(f"loading EMA from checkpoint: {path}...")
            averages = self.mp_trainer.state_dict_to_master_params(_checkpoints.read(path))
        dist_util.sync_params(averages)
        return averages

    def _load_optimizer_state(self) -> None:
        path = _checkpoints.beside(self._main_checkpoint(), f"opt{self.resume_step:06}.pt")
        found: list[Any] = [path is not None] * dist.get_world_size()
        if len(found) > 1:
            dist.all_gather_object(found, path is not None)
        # Of machines that lack it: one that started its moments anew would move its weights away from the others'.
        if not found[0]:
            return
        state: Any = None
        if path and (all(found) or dist.get_rank() == 0):
            logger.log(f"loading optimizer state from checkpoint: {path}")
            state = _checkpoints.read(path, "cpu")
        if not all(found):
            state = _of_rank_0(state)
        try:
            self.opt.load_state_dict(state)
        except ValueError as error:
            path = path or f"the optimizer of {self._main_checkpoint()}"
            raise ValueError(f"{path} belongs to another network, or to a run with another use_fp16: {error}") from None

    def run_loop(self) -> None:
        """Train to the end, with logs and checkpoints on the way and a checkpoint at the end."""
        saved = None
        while not self.lr_anneal_steps or self.step < self.lr_anneal_steps:
            before = self.step
            self.run_step(*next(self.data))
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            # After a step that was skipped, its checkpoint is there already.
            if self.save_interval > 0 and self.step % self.save_interval == 0 and self.step != before:
                self.save()
                saved = self.step
                if os.environ.get("DIFFUSION_TRAINING_TEST", ""):
                    return
        if saved != self.step:
            self.save()

    def run_step(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """One step; skipped where float16 gradients overflow."""
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self.step += 1
            self._update_ema()
        self._anneal_lr()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """The gradient of a batch [B, C, H, W] with its keyword arguments for the model, [B, ...] each."""
        for key, value in cond.items():
            if len(value) != len(batch):
                raise ValueError(f"{key!r} has {len(value)} entries, the batch {len(batch)} images")
        self.mp_trainer.zero_grad()
        device = dist_util.dev()
        for start in range(0, batch.shape[0], self.microbatch):
            part = slice(start, start + self.microbatch)
            micro = batch[part].to(device)
            micro_cond = {key: value[part].to(device) for key, value in cond.items()}
            t, weights = self.schedule_sampler.sample(micro.shape[0], device)
            last = start + self.microbatch >= batch.shape[0]
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():  # type: ignore[operator]  # DDP's
                losses = self._losses(micro, micro_cond, t)
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
            loss = (losses["loss"] * weights).mean()
            weighted = {key: value * weights for key, value in losses.items()}
            _checkpoints.hooks().log_loss_dict(self.diffusion, t, weighted)
            self.mp_trainer.backward(loss)

    def _losses(self, images: Tensor, model_kwargs: dict[str, Tensor], t: Tensor) -> dict[str, Tensor]:
        """Losses [B] by name, of which `loss` is trained on."""
        own = getattr(getattr(self.diffusion, "training_losses", None), "__func__", None) is _TRAINING_LOSSES
        if own and not t.is_floating_point():
            raise ValueError(
                f"{type(self.schedule_sampler).__name__} draws numbers of timesteps, and EDM needs noise levels: "
                "--schedule_sampler lognormal"
            )
        losses: dict[str, Tensor] = self.diffusion.training_losses(
            self.ddp_model, images, t, model_kwargs=model_kwargs
        )
        return losses

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            _checkpoints.hooks().update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        if not self.lr_anneal_steps:
            return
        for group in self.opt.param_groups:
            group["lr"] = self.lr * max(1 - self.step / self.lr_anneal_steps, 0)

    def log_step(self) -> None:
        """Note the step, and the number of samples so far."""
        self._log_step(self.step)

    def _log_step(self, step: int) -> None:
        logger.logkv("step", step)
        logger.logkv("samples", (step + 1) * self.global_batch)

    def save(self) -> None:
        """Write a checkpoint. Its model comes last: where it is, the others are too."""
        self._save(self.step, {})

    def _save(self, step: int, others: Mapping[str, nn.Module]) -> None:
        if dist.get_rank() == 0:
            to_state_dict = self.mp_trainer.master_params_to_state_dict
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                logger.log(f"saving model {rate}...")
                _checkpoints.save(to_state_dict(params), f"ema_{rate}_{step:06d}.pt")
            logger.log("saving optimizer state...")
            _checkpoints.save(self.opt.state_dict(), f"opt{step:06d}.pt")
            for name, model in others.items():
                logger.log(f"saving {name} state")
                _checkpoints.save(model.state_dict(), f"{name}{step:06d}.pt")
            logger.log("saving model 0...")
            _checkpoints.save(to_state_dict(self.mp_trainer.master_params), f"model{step:06d}.pt")
        dist.barrier()


def _of_rank_0(value: Any) -> Any:
    """What it is on rank 0, on all ranks; tensors in it are on the CPU."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=dist_util.dev())
    return values[0]


def log_loss_dict(diffusion: Any, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Note the mean of each of `losses` [B, ...], and those of four ranges of ts [B], by name_q0 to name_q3."""
    table = [x.detach().float()[..., None].flatten(1).mean(1).to(ts.device) for x in (ts, *losses.values())]
    read = torch.cat(table).cpu()  # the only read from the device
    times, *rows = (row.tolist() for row in read.split([len(row) for row in table]))
    for key, values in zip(losses, rows, strict=True):
        logger.logkv_mean(key, sum(values) / len(values) if values else math.nan)
        for t, value in zip(times, values):  # as many as there are of both
            logger.logkv_mean(f"{key}_q{int(4 * t / diffusion.num_timesteps)}", value)
