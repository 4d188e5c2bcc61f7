"""Who takes training steps: cmfast's TrainStep and its rivals, from the same weights, and all through the same gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cmfast import Denoiser, backend, losses, objectives
from cmfast.benchmarks.original_training import OpenAI
from cmfast.benchmarks.training_start import (
    GATE_RATE,
    LOG2_LOSS_SCALE,
    NUM_SCALES,
    SEED,
    TARGET_RATE,
    Drawn,
    Provider,
    Start,
    State,
    Trial,
    state_of,
)
from cmfast.data import Batch
from cmfast.training import TrainOptions
from cmfast.training.parallel import with_network
from cmfast.training.step import TrainStep


class Ours:
    """A `TrainStep`, as a training run has it."""

    note: str | None = None

    def __init__(self, start: Start) -> None:
        trial = start.trial
        self.dtype = getattr(torch, trial.dtype)
        kinds = {"cd": objectives.ConsistencyDistillation, "ct": objectives.ConsistencyTraining}
        objective = kinds[trial.recipe](
            loss_norm=trial.loss_norm, target_ema_mode="fixed", start_ema=TARGET_RATE, scale_mode="fixed",
            start_scales=NUM_SCALES, end_scales=NUM_SCALES,
        )  # fmt: skip
        options = TrainOptions(
            steps=2**31, batch_size=trial.batch, learning_rate=GATE_RATE, averages=tuple(map(str, start.rates)),
            dtype=trial.dtype, seed=SEED,
        )  # fmt: skip
        student: Any = start.denoiser("student")
        student.requires_grad_(True)
        self.training = TrainStep(
            student, objective, options, teacher_model=start.denoiser("teacher"), lpips=start.perceptual()
        )
        if self.training.scaler is not None:
            self.training.scaler = torch.amp.GradScaler(start.device.type, init_scale=2.0**LOG2_LOSS_SCALE)
        # As in the middle of a run, where the target is not the student.
        target: Any = self.training.target_model
        with torch.no_grad():
            for weight, given in zip(target.parameters(), start.weights["target"].parameters(), strict=True):
                weight.copy_(given)
        self._start, self._done = start, 0
        batch = Batch(start.pixels, start.labels, start.index(0))
        self._batch = batch.pin_memory() if start.device.type == "cuda" else batch

    def step(self, number: int, drawn: Drawn | None = None) -> None:
        """As `Provider.step`; what it draws is what `Start.drawn` gives."""
        self.training(self._batch._replace(index=self._start.index(number)), number)
        self._done = number + 1

    def learn(self, rate: float) -> None:
        """As `Provider.learn`."""
        self.training.options = dataclasses.replace(self.training.options, learning_rate=rate)

    def loss(self) -> float:
        """As `Provider.loss`."""
        reading = self.training.post(self._done).read()
        return reading.loss if reading.bad_step is None else float("nan")

    def state(self) -> State:
        """As `Provider.state`."""
        averages, target = self.training.averages, self.training.target_model
        assert target is not None
        others = {f"average {k}": averages.tensors(k + 1) for k in range(len(averages) - 1)}
        return state_of(self.training.model.parameters(), target.parameters(), others)


class Plain:
    """Our networks and losses in plain PyTorch, autocast, torch.optim's RAdam and foreach averages.

    dtype: of everything; float64 is the gate's. compiled: networks and LPIPS under torch.compile. microbatch: images of
    one forward and backward pass.
    """

    note: str | None = None

    def __init__(
        self, start: Start, *, compiled: bool = False, dtype: torch.dtype | None = None, microbatch: int | None = None
    ) -> None:
        trial = start.trial
        self.dtype = dtype or getattr(torch, trial.dtype)
        weights = torch.float64 if self.dtype == torch.float64 else torch.float32
        student, target = start.denoiser("student", weights), start.denoiser("target", weights)
        assert student is not None and target is not None
        self.student, self.target = student, target
        self._models: list[Any] = [self.student.requires_grad_(True), self.target, start.denoiser("teacher", weights)]
        # In half precision autocast says what the trunk computes in.
        self._lpips: Any = start.perceptual(weights)
        if compiled:
            self._models = [None if model is None else _compiled(model) for model in self._models]
            self._lpips = None if self._lpips is None else torch.compile(self._lpips, dynamic=False)
        self._parameters = list(self.student.parameters())
        self._averages = [[p.detach().clone() for p in self._parameters] for _ in start.rates]
        self._optimizer = torch.optim.RAdam(self._parameters, lr=GATE_RATE, foreach=True)
        self._scaler = None
        if self.dtype == torch.float16:
            self._scaler = torch.amp.GradScaler(start.device.type, init_scale=2.0**LOG2_LOSS_SCALE)
        self._start, self._micro = start, microbatch or trial.batch
        images, self._labels = start.batch()
        self._images = images.to(weights)
        self._loss = torch.zeros(())

    def step(self, number: int, drawn: Drawn | None = None) -> None:
        """As `Provider.step`."""
        noise, indices = drawn or (torch.randn_like(self._images), self._indices())
        self._optimizer.zero_grad(set_to_none=True)
        parts = []
        for first in range(0, len(self._images), self._micro):
            rows = slice(first, first + self._micro)
            loss = self._losses(rows, noise.to(self._images), indices).sum() / len(self._images)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            parts.append(loss.detach())
        self._loss = torch.stack(parts).sum()
        self._update()

    def _indices(self) -> Tensor:
        return torch.randint(0, NUM_SCALES - 1, (len(self._images),), device=self._images.device)

    def _losses(self, rows: slice, noise: Tensor, indices: Tensor) -> Tensor:
        trial, half = self._start.trial, self.dtype in (torch.float16, torch.bfloat16)
        student, target, teacher = self._models
        with backend("reference"), torch.autocast(self._images.device.type, self.dtype) if half else nullcontext():
            return losses.consistency_loss(
                student,
                target,
                self._images[rows],
                NUM_SCALES,
                teacher_model=teacher,
                noise=noise[rows],
                indices=indices[rows],
                labels=None if self._labels is None else self._labels[rows],
                loss_norm=trial.loss_norm,
                lpips=self._lpips,
            )["loss"]

    def _update(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        new = [p.detach() for p in self._parameters]
        for rate, average in zip(self._start.rates, self._averages):
            torch._foreach_lerp_(average, new, 1 - rate)
        torch._foreach_lerp_(list(self.target.parameters()), new, 1 - TARGET_RATE)

    def learn(self, rate: float) -> None:
        """As `Provider.learn`."""
        self._optimizer.param_groups[0]["lr"] = rate

    def loss(self) -> float:
        """As `Provider.loss`."""
        return self._loss.item()

    def state(self) -> State:
        """As `Provider.state`."""
        others = {f"average {k}": average for k, average in enumerate(self._averages)}
        return state_of(self._parameters, self.target.parameters(), others)


def _compiled(model: Denoiser) -> Denoiser:
    """With its network under torch.compile; scalings and solver around it are a few small operations."""
    network: Any = model.network
    return with_network(model, torch.compile(network, dynamic=False))  # type: ignore[arg-type]  # compiled


OURS = "cmfast"
#: By name, what makes it. Raises: Missing.
PROVIDERS: dict[str, Callable[[Start], Provider]] = {
    "reference": Plain,
    "inductor": functools.partial(Plain, compiled=True),
    "openai": OpenAI,
    OURS: Ours,
}


def dtypes_of(names: Iterable[str], start: Start) -> set[torch.dtype]:
    """What those of the providers that are here compute in."""
    original = torch.float16 if start.device.type == "cuda" else torch.float32
    of_trial = getattr(torch, start.trial.dtype)
    absent = start.openai is None and not find_spec("cm")
    return {original if name == "openai" else of_trial for name in names if not (name == "openai" and absent)}


#: Those that take minutes to start.
COMPILED = ("inductor",)


def trials(device_type: str, network: str | None, compile: bool, quick: bool = False) -> list[Trial]:
    """What is run, the important first. network: that alone."""
    if quick:
        return [Trial(network or "unet32", 2, ("reference", "openai", "cmfast"))]
    if device_type == "cuda":
        # Few at a time: each holds 8 to 10 GB of weights and moments. The first trial may be the only one.
        large = functools.partial(Trial, "imagenet64", 64)
        found = [
            large(("cmfast", "reference", "openai"), loss_norm="lpips", dtype="bfloat16"),
            *(large(("openai", "cmfast"), recipe=recipe, dtype="bfloat16") for recipe in ("cd", "ct")),
            large(("openai", "cmfast"), loss_norm="lpips", dtype="float16"),
            Trial("unet32", 128, ("openai", "reference", "cmfast"), dtype="bfloat16"),
            *([large(("inductor", "cmfast"), loss_norm="lpips", dtype="bfloat16")] if compile else []),
            *([Trial("unet32", 128, ("inductor", "cmfast"), dtype="bfloat16")] if compile else []),
        ]
    else:
        small = functools.partial(Trial, "unet32", 16)
        found = [
            small(("reference", "openai", "cmfast")),
            small(("reference", "openai", "cmfast"), recipe="ct"),
            Trial("unet32", 4, ("reference", "openai", "cmfast"), loss_norm="lpips"),
            small(("reference", "cmfast"), dtype="bfloat16"),
            *([small(("inductor", "cmfast"))] if compile else []),
        ]
    if network is None:
        return found
    named = [trial for trial in found if trial.network == network]
    return named or [Trial(network, 4, (*PROVIDERS,), recipe, norm) for recipe, norm in (("cd", "l2"), ("ct", "l2"))]
