"""Times of whole training steps, cmfast's TrainStep beside its rivals: README.md says how they are taken.

    python -m cmfast.benchmarks.training --out DIR [--network unet32|imagenet64|tiny] [--seconds N] [--openai CHECKOUT]
    python -m cmfast.benchmarks.training --report DIR/training-....json      the closing table again
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cmfast.benchmarks import memory, runs, timing, training_summary
from cmfast.benchmarks.kernels import inductor_refusal
from cmfast.benchmarks.networks import NETWORKS
from cmfast.benchmarks.original import Missing
from cmfast.benchmarks.phases import phases
from cmfast.benchmarks.training_gate import STEPS, Gate
from cmfast.benchmarks.training_providers import COMPILED, OURS, PROVIDERS, Ours, dtypes_of, trials
from cmfast.benchmarks.training_start import LEARNING_RATE, Provider, Start, Trial
from cmfast.training.step import TrainStep

#: Seconds of samples of each trial, and rounds at least, whatever they take.
BUDGET_S = {"cuda": 8.0, "cpu": 60.0}
QUICK_S = 6.0
ROUNDS = 7
#: Seconds that one sample lasts at least, in whole steps: on a GPU, where launches overlap with the step before.
SAMPLE_S = {"cuda": 0.5, "cpu": 0.0}
#: Steps whose parts are timed.
PHASE_STEPS = 5


class Contender:
    """A provider that has taken its first step, with what that took."""

    def __init__(self, name: str, start: Start) -> None:
        """Raises: Missing, or what the provider raises."""
        self.name, self.device, self.number = name, start.device, STEPS
        self._before = memory.settled(self.device)
        begun = time.perf_counter()
        self.provider: Provider = PROVIDERS[name](start)
        self.provider.step(0, start.drawn(0))
        self.first_loss = self.provider.loss()
        self.about: dict[str, Any] = {
            "computes_in": str(self.provider.dtype).removeprefix("torch."),
            "first_step_s": round(time.perf_counter() - begun, 3),
            "note": self.provider.note,
        }

    def ready(self) -> None:
        """After the gate's steps: measure what a step takes other than time, and learn slowly from now on."""
        self.provider.learn(LEARNING_RATE)
        self._memory("startup_")
        memory.settled(self.device)
        self.steps(2)
        self._memory("")

    def steps(self, count: int) -> None:
        """So many steps, with noise of the provider's own."""
        for _ in range(count):
            self.provider.step(self.number)
            self.number += 1

    def _memory(self, prefix: str) -> None:
        taken = memory.peak(self.device)
        if self._before is not None and taken is not None:
            self.about[f"{prefix}peak_bytes"] = taken.reserved - self._before.reserved
            self.about[f"{prefix}peak_allocated_bytes"] = taken.allocated - self._before.allocated


def sample_of(contender: Contender) -> Callable[[], float]:
    """A sample: seconds for a step."""
    stopwatch = timing.Stopwatch(contender.device)

    def seconds(count: int) -> float:
        return stopwatch(lambda: contender.steps(count)) / count

    return functools.partial(seconds, max(1, math.ceil(SAMPLE_S[contender.device.type] / seconds(1))))


def measure(gate: Gate, trial: Trial, *, budget_s: float, rounds: int) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    # Each trial is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    start = gate.start
    found: runs.Found = {"rows": [], "failures": [], "missing": {}, "later": []}
    contenders: list[Contender] = []
    slices: dict[str, Callable[[], float]] = {}
    gate.prepare(dtypes_of(trial.providers, start))
    for name in trial.providers:
        refusal = runs.left_out(contenders) or (inductor_refusal(start.device) if name in COMPILED else None)
        try:
            if refusal:
                raise Missing(refusal)
            contender = Contender(name, start)
            wrong = gate.wrong(contender.provider, contender.first_loss)
            if wrong is None:
                contender.ready()
                slices[name] = sample_of(contender)
                contenders.append(contender)
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        except torch.OutOfMemoryError as error:
            wrong = timing.reason_of(error)
            if name != OURS:
                found["missing"][name] = f"{trial.setting} does not fit into memory: {wrong}"
                continue
        except Exception as error:
            wrong = timing.reason_of(error)
        if wrong:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": wrong})
    samples, broken = timing.interleave(slices, budget_s, rounds=(rounds, 1000))
    found["failures"] += [{"trial": str(trial), "provider": name, "reason": broken[name]} for name in broken]
    timed = []
    for contender in contenders:
        if contender.name in broken:
            continue
        times = samples[contender.name]
        if not math.isfinite(contender.provider.loss()):
            reason = "the loss is not finite after the steps that were timed"
            found["failures"].append({"trial": str(trial), "provider": contender.name, "reason": reason})
            continue
        statistics = timing.statistics_ms(times)
        found["rows"].append({
            **{field: getattr(trial, field) for field in ("network", "batch", "recipe", "loss_norm", "dtype")},
            "provider": contender.name,
            **statistics,
            "images_per_s": round(1e3 * trial.batch / statistics["p50_ms"], 2),
            "times_cmfast": timing.times_of(times, samples.get(OURS)),
            "gflop": round(gate.flops / 1e9, 1),
            "tflop_per_s": round(gate.flops / statistics["p50_ms"] / 1e9, 3),
            **contender.about,
            "kernels": None,
        })
        timed.append(contender)
    steps = {contender.name: functools.partial(contender.steps, 1) for contender in timed}
    for contender in timed:
        if isinstance(contender.provider, Ours):
            parts = functools.partial(_phases_ms, contender.provider.training, steps[contender.name])
            found["later"].append((contender.name, "phases_ms", parts))
    for name, step in steps.items():
        found["later"].append((name, "kernels", functools.partial(timing.count_kernels, start.device, step)))
    return found


def _phases_ms(training: TrainStep, step: Callable[[], None]) -> dict[str, float]:
    return {name: round(1e3 * seconds, 3) for name, seconds in phases(training, step, PHASE_STEPS).items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this suite alone."""
    parser.add_argument("--network", choices=sorted(NETWORKS), help="trials of this one alone")
    parser.add_argument("--batch", help="another batch size for all trials", type=int)


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line."""
    found = trials(device.type, options.network, runs.compiles(options, device), options.quick)
    if options.batch:
        found = [dataclasses.replace(trial, batch=options.batch) for trial in found]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """Nothing but rows in the result; and what measures a trial."""
    kept: dict[str, Gate] = {}
    budget_s = QUICK_S if options.quick else BUDGET_S[device.type]

    def measured(trial: Trial, number: int) -> runs.Found:
        if trial.setting not in kept:
            # One at a time: that of a large network holds gigabytes.
            kept.clear()
            try:
                kept[trial.setting] = Gate(Start(trial, device, options.openai))
            except Missing as missing:
                return {"rows": [], "failures": [], "missing": {trial.setting: str(missing)}}
        gate = kept[trial.setting]
        gate.start.trial = trial
        return measure(gate, trial, budget_s=budget_s, rounds=options.rounds)

    return {}, measured


SUITE = runs.Suite(
    "training", "whole training steps, cmfast's TrainStep beside its rivals", tuple(PROVIDERS), chosen_trials, start,
    training_summary.line, training_summary.text, COMPILED, add_options, ("network", "batch"), ROUNDS,
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
