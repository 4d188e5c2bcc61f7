"""Times of whole batches of images, cmfast's Sampler beside its rivals: README.md says how they are taken.

    python -m cmfast.benchmarks.sampling --out DIR [--network imagenet64|lsun256|tiny] [--seconds N] [--openai CHECKOUT]
    python -m cmfast.benchmarks.sampling --report DIR/sampling-....json      the closing table again
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cmfast.benchmarks import memory, runs, sampling_summary, timing
from cmfast.benchmarks.gate import Gate
from cmfast.benchmarks.kernels import inductor_refusal
from cmfast.benchmarks.liveness import forward_flops, forward_peak, weight_bytes
from cmfast.benchmarks.networks import NETWORKS
from cmfast.benchmarks.original import Missing
from cmfast.benchmarks.providers import (
    COMPILED,
    FORWARD,
    PROVIDERS,
    ConvolutionsAlone,
    Engine,
    Models,
    Provider,
    Trial,
    trials,
)

#: Batches by type of device; those of networks that take much more are fewer.
BATCHES = {"cuda": [1, 4, 16, 64, 256], "cpu": [1, 4]}
LARGE_BATCHES = {"cuda": [1, 16, 64], "cpu": [1]}
#: Seconds of samples of each trial, and rounds at least, whatever they take.
BUDGET_S = {"cuda": 6.0, "cpu": 20.0}
QUICK_S = 4.5
ROUNDS = 7
#: Images in a row, one batch after the other, that one sample of the throughput lasts, in seconds.
THROUGHPUT_S = 0.25


class Contender:
    """A provider that has made its first batch, with what that took."""

    def __init__(self, name: str, models: Models, trial: Trial) -> None:
        """Raises: Missing, or what the provider raises."""
        self.name, self.trial, self.device = name, trial, models.device
        if trial.sampler == FORWARD:
            self._noise, self._labels = models.noise(trial.batch), models.labels(trial.batch)
        before = memory.settled(self.device)
        start = time.perf_counter()
        self.provider: Provider = PROVIDERS[name](models, trial)
        self.batches(1)
        self.about: dict[str, Any] = {
            "dtype": str(self.provider.dtype).removeprefix("torch."),
            "first_call_s": round(time.perf_counter() - start, 3),
            "note": self.provider.note,
        }
        if isinstance(self.provider, Engine):
            self.about["startup_s"] = round(self.provider.sampler.startup, 3)
            self.about["path"] = {part: path for part, (path, _) in self.provider.sampler.explain().items()}
        self._measure_memory(models, before)

    def batches(self, count: int) -> None:
        """Make so many batches of images, on the CPU at the end; or, of a forward pass, so many D on the device."""
        if self.trial.sampler != FORWARD:
            self.provider.sample(count * self.trial.batch)
            return
        assert not isinstance(self.provider, ConvolutionsAlone)
        for _ in range(count):
            self.provider.denoised(self._noise, self._labels)
        timing.synchronize(self.device)

    def _measure_memory(self, models: Models, before: memory.Memory | None) -> None:
        """Device memory of a batch when all is compiled and captured, weights included; and at most until then."""
        if self.device.type != "cuda" or before is None:
            return
        weights = weight_bytes(models.name, models.dtype) if self.provider.shares_weights else 0
        self.about["startup_peak_bytes"] = _reserved(memory.peak(self.device)) - before.reserved + weights
        memory.settled(self.device)
        self.batches(1)
        self.about["peak_bytes"] = _reserved(memory.peak(self.device)) - before.reserved + weights


def _reserved(taken: memory.Memory | None) -> int:
    return 0 if taken is None else taken.reserved


def slices(contender: Contender) -> dict[str, Callable[[], float]]:
    """By `provider mode`, a sample: seconds for a batch. On a CPU, where nothing overlaps, there is one mode.

    latency: one batch alone, from the call to pixels on the host. throughput: batches in a row.
    """
    stopwatch = timing.Stopwatch(torch.device("cpu"))  # The wall clock: what is timed ends on the host.

    def seconds(count: int) -> float:
        return stopwatch(lambda: contender.batches(count)) / count

    once = seconds(1)
    found: dict[str, Callable[[], float]] = {f"{contender.name} latency": functools.partial(seconds, 1)}
    if contender.device.type == "cuda":
        count = max(2, min(100, math.ceil(THROUGHPUT_S / once)))
        found[f"{contender.name} throughput"] = functools.partial(seconds, count)
    return found


def measure(models: Models, trial: Trial, *, budget_s: float, rounds: int) -> dict[str, Any]:
    """Rows, failures and missing providers of one trial."""
    # Each trial is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    found: dict[str, Any] = {"rows": [], "failures": [], "missing": {}, "later": []}
    gate = Gate(models, trial)
    contenders: dict[str, Contender] = {}
    samplers: dict[str, Callable[[], float]] = {}
    for name in trial.providers:
        refusal = runs.left_out(contenders) or (inductor_refusal(models.device) if name in COMPILED else None)
        try:
            if refusal:
                raise Missing(refusal)
            contender = Contender(name, models, trial)
            wrong = gate.wrong(contender.provider)
            if wrong is None:
                samplers |= slices(contender)
                contenders[name] = contender
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        except Exception as error:
            wrong = timing.reason_of(error)
        if wrong:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": wrong})
    del gate
    samples, broken = timing.interleave(samplers, budget_s, rounds=(rounds, 1000))
    found["failures"] += [{"trial": str(trial), "provider": key, "reason": broken[key]} for key in broken]
    flops = forward_flops(models.name, trial.batch) * network_calls(trial)
    for key, times in samples.items():
        name, mode = key.split()
        statistics = timing.statistics_ms(times)
        alone = name.startswith("convolutions")
        found["rows"].append({
            "network": models.name,
            "batch": trial.batch,
            "sampler": trial.sampler,
            "steps": trial.steps,
            "provider": name,
            "mode": mode,
            **statistics,
            "times_cmfast": timing.times_of(times, samples.get(f"cmfast {mode}")),
            "images_per_s": None if alone else round(1e3 * trial.batch / statistics["p50_ms"], 2),
            "gflop": None if alone else round(flops / 1e9, 1),
            "tflop_per_s": None if alone else round(flops / statistics["p50_ms"] / 1e9, 3),
            **contenders[name].about,
            "kernels": None,
        })
    for name in dict.fromkeys(row["provider"] for row in found["rows"]):
        one = functools.partial(contenders[name].batches, 1)
        found["later"].append((name, "kernels", functools.partial(timing.count_kernels, models.device, one)))
    return found


def network_calls(trial: Trial) -> int:
    """Forward passes of a batch: Heun's method takes two a step, but for the last.

    >>> network_calls(Trial(1, (), sampler="heun", steps=18))
    35
    """
    return 2 * trial.steps - 1 if trial.sampler == "heun" else trial.steps


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"expected batch sizes such as 1,16, got {text!r}")
    return numbers


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this suite alone."""
    parser.add_argument("--network", choices=sorted(NETWORKS), help="default: imagenet64; --quick on a CPU: unet32")
    parser.add_argument("--batches", type=_numbers, help="batch sizes, as in 1,16 (default: by device and network)")


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line; with --providers, those and no others, at one step."""
    options.network = options.network or ("unet32" if options.quick and device.type == "cpu" else "imagenet64")
    default = (LARGE_BATCHES if options.network == "lsun256" else BATCHES)[device.type]
    batches = options.batches or default
    if options.providers:
        return [Trial(batch, tuple(options.providers)) for batch in batches]
    return trials(device.type, batches, runs.compiles(options, device), options.quick)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """What the result says of itself; and what measures a trial."""
    name, dtype = options.network, torch.bfloat16 if device.type == "cuda" else torch.float32
    alive: dict[str, int] = {}
    budget_s = QUICK_S if options.quick else BUDGET_S[device.type]

    @functools.lru_cache(maxsize=1)
    def models(dtype: torch.dtype) -> Models:
        return Models(name, device, dtype, options.openai)

    def measured(trial: Trial, number: int) -> runs.Found:
        if str(trial.batch) not in alive:
            alive[str(trial.batch)] = forward_peak(name, trial.batch, dtype)
        of_trial = getattr(torch, trial.dtype) if trial.dtype else dtype
        return measure(models(of_trial), trial, budget_s=budget_s, rounds=options.rounds)

    return {"network": name, "weight_bytes": weight_bytes(name, dtype), "liveness_bytes": alive}, measured


SUITE = runs.Suite(
    "sampling", "whole batches of images and forward passes, the Sampler beside its rivals", tuple(PROVIDERS),
    chosen_trials, start, sampling_summary.line, sampling_summary.text, COMPILED, add_options, ("network", "batches"),
    ROUNDS,
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
