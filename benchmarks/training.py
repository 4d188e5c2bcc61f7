"""Times of whole training steps, cmfast's TrainStep beside its rivals: README.md says how they are taken.

    python benchmarks/training.py --out DIR [--network unet32|imagenet64|tiny] [--seconds N] [--openai CHECKOUT]
    python benchmarks/training.py --report DIR/training-....json      the closing table again
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file. This folder must not be searched first: its `kernels` is another project's import name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import memory, runs, timing, training_summary
from benchmarks.kernels import inductor_refusal, reason_of
from benchmarks.networks import NETWORKS
from benchmarks.original import Missing
from benchmarks.phases import phases
from benchmarks.record import Record
from benchmarks.training_gate import STEPS, Gate
from benchmarks.training_providers import COMPILED, OURS, PROVIDERS, Ours, trials
from benchmarks.training_start import LEARNING_RATE, Provider, Start, Trial

#: Seconds of samples of each trial, and rounds at least, whatever they take.
BUDGET_S = {"cuda": 8.0, "cpu": 60.0}
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
        self.about["kernels"] = timing.count_kernels(self.device, lambda: self.steps(1))

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


def slices(contenders: list[Contender], device: torch.device) -> dict[str, Callable[[], float]]:
    """By provider, a sample: seconds for a step."""
    stopwatch = timing.Stopwatch(device)
    found: dict[str, Callable[[], float]] = {}
    for contender in contenders:
        def seconds(count: int, contender: Contender = contender) -> float:
            return stopwatch(lambda: contender.steps(count)) / count

        count = max(1, math.ceil(SAMPLE_S[device.type] / seconds(1)))
        found[contender.name] = lambda seconds=seconds, count=count: seconds(count)
    return found


def measure(gate: Gate, trial: Trial, number: int, *, budget_s: float, rounds: int) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    # Each trial is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    start = gate.start
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    contenders = []
    for name in trial.providers:
        refusal = inductor_refusal(start.device) if name in COMPILED else None
        try:
            if refusal:
                raise Missing(refusal)
            contender = Contender(name, start)
            wrong = gate.wrong(contender.provider, contender.first_loss)
            if wrong is None:
                contender.ready()
                contenders.append(contender)
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        except torch.OutOfMemoryError as error:
            wrong = reason_of(error)
            if name != OURS:
                found["missing"][name] = f"{trial.setting} does not fit into memory: {wrong}"
                continue
        except Exception as error:
            wrong = reason_of(error)
        if wrong:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": wrong})
    samples = timing.interleave(slices(contenders, start.device), budget_s, rounds=(rounds, 1000))
    for contender in contenders:
        times = samples[contender.name]
        if not math.isfinite(contender.provider.loss()):
            reason = "the loss is not finite after the steps that were timed"
            found["failures"].append({"trial": str(trial), "provider": contender.name, "reason": reason})
            continue
        statistics = timing.statistics_ms(times)
        row = {
            "trial": number,
            **{field: getattr(trial, field) for field in ("network", "batch", "recipe", "loss_norm", "dtype")},
            "provider": contender.name,
            **statistics,
            "images_per_s": round(1e3 * trial.batch / statistics["p50_ms"], 2),
            "times_cmfast": _ratio(times, samples.get(OURS)),
            "gflop": round(gate.flops / 1e9, 1),
            "tflop_per_s": round(gate.flops / statistics["p50_ms"] / 1e9, 3),
            **contender.about,
        }
        if isinstance(contender.provider, Ours):
            parts = phases(contender.provider.training, lambda one=contender: one.steps(1), PHASE_STEPS)
            row["phases_ms"] = {name: round(1e3 * seconds, 3) for name, seconds in parts.items()}
        found["rows"].append(row)
    return found


def _ratio(times: list[float], ours: list[float] | None) -> dict[str, float] | None:
    """Percentiles of a provider's time as a multiple of cmfast's in the same round."""
    if ours is None:
        return None
    ratios = [other / one for other, one in zip(times, ours)]
    return {f"p{p}": round(timing.percentile(ratios, p), 4) for p in (20, 50, 80)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.parser("training", __doc__.splitlines()[0], PROVIDERS, ROUNDS)
    parser.add_argument("--network", choices=sorted(NETWORKS), help="trials of this one alone")
    parser.add_argument("--batch", help="another batch size for all trials", type=int)
    return runs.parse(parser, argv, PROVIDERS)


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line."""
    found = trials(device.type, options.network, runs.compiles(options, device))
    if options.batch:
        found = [dataclasses.replace(trial, batch=options.batch) for trial in found]
    if options.providers:
        wanted = tuple(options.providers)
        found = [dataclasses.replace(t, providers=tuple(p for p in wanted if p in t.providers)) for t in found]
    return [trial for trial in dict.fromkeys(found) if trial.providers]


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a provider was off or failed."""
    begun = time.perf_counter()
    options = arguments(argv)
    status = runs.only(options, lambda device: chosen_trials(options, device), training_summary.text)
    if status is not None:
        return status
    device = runs.device_of(options)
    command = runs.command("training", options, ROUNDS, ("network", "batch"))
    record = Record("training", options.out, device, command, missing={})
    kept: dict[str, Gate] = {}

    def measured(trial: Trial, number: int) -> runs.Found:
        if trial.setting not in kept:
            # One at a time: that of a large network holds gigabytes.
            kept.clear()
            kept[trial.setting] = Gate(Start(trial, device, options.openai))
        gate = kept[trial.setting]
        gate.start.trial = trial
        return measure(gate, trial, number, budget_s=BUDGET_S[device.type], rounds=options.rounds)

    runs.run(
        record, chosen_trials(options, device), measured, training_summary.line, compiled=COMPILED,
        seconds=options.seconds, begun=begun,
    )  # fmt: skip
    print(training_summary.text(record.result))
    print(f"written: {record.path}")
    return 1 if record.result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
