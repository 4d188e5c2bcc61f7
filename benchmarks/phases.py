"""What a training step spends its time on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cmfast.denoiser import Denoiser
from cmfast.training.parallel import with_network
from cmfast.training.step import TrainStep

REST = "rest"


class Clock:
    """Seconds by name, between CUDA events or by the wall clock; nothing waits for the device until `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted under a name."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return function(*arguments, **options)

        return call

    def seconds(self) -> dict[str, float]:
        """Sums by name since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + (start.elapsed_time(end) / 1e3 if self._cuda else end - start)
        self._spans.clear()
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Timed(nn.Module):
    """A network whose calls are timed. Not by hooks: a network with hooks is not an optimised one any more."""

    def __init__(self, network: nn.Module, clock: Clock, name: str) -> None:
        super().__init__()
        self.network, self._clock, self._name = network, clock, name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        with self._clock(self._name):
            return self.network(*arguments, **options)


def phases(training: TrainStep, step: Callable[[], None], count: int) -> dict[str, float]:
    """Seconds of the parts of a step, medians of `count` steps.

    The networks' forward passes; of LPIPS the forward pass; the whole backward pass; optimizer and averages; and the
    rest: draws, solver, loss. step: one step of `training`.
    """
    clock = Clock(training.device)

    def timed(model: Denoiser | None, name: str) -> Denoiser | None:
        network: Any = None if model is None else model.network
        return None if model is None else with_network(model, _Timed(network, clock, name))

    found: list[dict[str, float]] = []
    with ExitStack() as stack:
        for attribute, name in (("student", "student"), ("_teacher", "teacher"), ("_target", "target")):
            stack.enter_context(patch.object(training, attribute, timed(getattr(training, attribute), name)))
        if training.lpips is not None:
            stack.enter_context(patch.object(training, "lpips", clock.timed("lpips", training.lpips)))
        optimizer = training.optimizer
        stack.enter_context(
            patch.object(optimizer, "step", clock.timed("optimizer and averages", optimizer.step))
        )
        stack.enter_context(patch.object(Tensor, "backward", clock.timed("backward", Tensor.backward)))
        for _ in range(count + 1):
            with clock("whole"):
                step()
            found.append(clock.seconds())
    medians = {name: statistics.median(one[name] for one in found[1:]) for name in found[-1]}
    whole = medians.pop("whole")
    return {**medians, REST: max(0.0, whole - sum(medians.values()))}
