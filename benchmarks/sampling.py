"""Times of whole batches of images, cmfast's Sampler beside its rivals: README.md says how they are taken.

    python benchmarks/sampling.py --out DIR [--network imagenet64|lsun256|tiny] [--seconds N] [--openai CHECKOUT]
    python benchmarks/sampling.py --report DIR/sampling-....json      the closing table again
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a file. This folder must not be searched first: its `kernels` is another project's import name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import sampling_summary, timing
from benchmarks.gate import Gate
from benchmarks.kernels import inductor_refusal, reason_of
from benchmarks.liveness import forward_peak, weight_bytes
from benchmarks.networks import NETWORKS
from benchmarks.original import Missing
from benchmarks.providers import COMPILED, PROVIDERS, Engine, Models, Provider, Trial, trials
from benchmarks.record import Record

#: Batches by type of device; those of networks that take much more are fewer.
BATCHES = {"cuda": [1, 16, 64, 256], "cpu": [1, 4]}
LARGE_BATCHES = {"cuda": [1, 16, 64], "cpu": [1]}
#: Seconds of samples of each trial, and rounds at least, whatever they take.
BUDGET_S = {"cuda": 6.0, "cpu": 20.0}
ROUNDS = 7
#: Images in a row, one batch after the other, that one sample of the throughput lasts, in seconds.
THROUGHPUT_S = 0.25
#: With a time limit, a trial with compiled providers is not started when less is left: it would be cut off.
COMPILE_S = {"cuda": 240.0, "cpu": 240.0}


class Contender:
    """A provider that has made its first batch, with what that took."""

    def __init__(self, name: str, models: Models, trial: Trial) -> None:
        """Raises: Missing, or what the provider raises."""
        self.name, self.trial, self.device = name, trial, models.device
        before = self._reserved()
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
        """Make so many batches of images, on the CPU at the end."""
        self.provider.sample(count * self.trial.batch)

    def _reserved(self) -> int:
        """Bytes that the allocator has for what lives, graphs' memory included."""
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_reserved(self.device)

    def _measure_memory(self, models: Models, before: int) -> None:
        """Device memory of a batch when all is compiled and captured, weights included; and at most until then."""
        if self.device.type != "cuda":
            return
        weights = weight_bytes(models.name, models.dtype) if self.provider.shares_weights else 0
        self.about["startup_peak_bytes"] = torch.cuda.max_memory_reserved(self.device) - before + weights
        self._reserved()
        self.batches(1)
        self.about["peak_bytes"] = torch.cuda.max_memory_reserved(self.device) - before + weights

    def count_kernels(self) -> int | None:
        """Kernels on the device for one batch, noise and pixels included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self.batches(1)
            torch.cuda.synchronize(self.device)
        ran = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        marks = ("Memcpy", "Memset")
        count = sum(not (event.name.startswith(marks) or event.is_user_annotation) for event in ran)
        # Where the profiler may not look at the device, it reports nothing at all.
        return count or None


def slices(contenders: list[Contender], device: torch.device) -> dict[str, Callable[[], float]]:
    """By `provider mode`, a sample: seconds for a batch. On a CPU, where nothing overlaps, there is one mode.

    latency: one batch alone, from the call to pixels on the host. throughput: batches in a row.
    """
    stopwatch = timing.Stopwatch(torch.device("cpu"))  # The wall clock: what is timed ends on the host.
    found: dict[str, Callable[[], float]] = {}
    for contender in contenders:
        def seconds(count: int, contender: Contender = contender) -> float:
            return stopwatch(lambda: contender.batches(count)) / count

        once = seconds(1)
        found[f"{contender.name} latency"] = lambda seconds=seconds: seconds(1)
        if device.type == "cuda":
            count = max(2, min(100, math.ceil(THROUGHPUT_S / once)))
            found[f"{contender.name} throughput"] = lambda seconds=seconds, count=count: seconds(count)
    return found


def measure(models: Models, trial: Trial, number: int, *, budget_s: float, rounds: int) -> dict[str, Any]:
    """Rows, failures and missing providers of one trial."""
    # Each trial is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    found: dict[str, Any] = {"rows": [], "failures": [], "missing": {}}
    gate = Gate(models, trial)
    contenders = []
    for name in trial.providers:
        refusal = inductor_refusal(models.device) if name in COMPILED else None
        try:
            if refusal:
                raise Missing(refusal)
            contender = Contender(name, models, trial)
            wrong = gate.wrong(contender.provider)
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        except Exception as error:
            wrong = reason_of(error)
        if wrong:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": wrong})
            continue
        contender.about["kernels"] = contender.count_kernels()
        contenders.append(contender)
    del gate
    samples = timing.interleave(slices(contenders, models.device), budget_s, rounds=(rounds, 1000))
    abouts = {contender.name: contender.about for contender in contenders}
    for key, times in samples.items():
        name, mode = key.split()
        statistics = {
            what.replace("_us", "_ms"): [round(v / 1e3, 4) for v in value] if isinstance(value, list) else value / 1e3
            for what, value in timing.statistics_us(times).items() if what.endswith("_us")
        }
        found["rows"].append({
            "trial": number,
            "network": models.name,
            "batch": trial.batch,
            "sampler": trial.sampler,
            "steps": trial.steps,
            "provider": name,
            "mode": mode,
            **statistics,
            "samples": len(times),
            "images_per_s": None if name.startswith("convolutions")
            else round(1e3 * trial.batch / statistics["p50_ms"], 2),
            **abouts[name],
        })
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/sampling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the JSON file")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="imagenet64")
    parser.add_argument("--batches", type=_numbers, help="batch sizes, as in 1,16 (default: by device and network)")
    parser.add_argument("--providers", type=lambda text: text.split(","),
                        help=f"these alone, at one step, of {','.join(PROVIDERS)}")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="also what takes minutes to compile (default: on a GPU)")
    parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="a checkout of openai/consistency_models")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each at least (default {ROUNDS})")
    parser.add_argument("--seconds", type=float, help="start no new trial after so many seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--list", action="store_true", help="print the trials and stop")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the closing table of an earlier run")
    options = parser.parse_args(argv)
    unknown = set(options.providers or ()) - set(PROVIDERS)
    if unknown:
        parser.error(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(PROVIDERS)}")
    return options


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"expected batch sizes such as 1,16, got {text!r}")
    return numbers


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line; with --providers, those and no others, at one step."""
    default = (LARGE_BATCHES if options.network == "lsun256" else BATCHES)[device.type]
    batches = options.batches or default
    if options.providers:
        return [Trial(batch, tuple(options.providers)) for batch in batches]
    return trials(device.type, batches, device.type == "cuda" if options.compile is None else options.compile)


def _command(options: argparse.Namespace) -> str:
    """The command line without the folders that results went to and the original came from."""
    words = ["python", "benchmarks/sampling.py", "--network", options.network]
    for name in ("batches", "providers"):
        value = getattr(options, name)
        words += [f"--{name}", ",".join(map(str, value))] if value else []
    words += ["--openai", "CHECKOUT"] if options.openai else []
    words += [] if options.compile is None else ["--compile" if options.compile else "--no-compile"]
    words += ["--rounds", str(options.rounds)] if options.rounds != ROUNDS else []
    words += ["--seconds", f"{options.seconds:g}"] if options.seconds is not None else []
    return shlex.join(words + (["--device", options.device] if options.device else []))


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a provider was off or failed."""
    start = time.perf_counter()
    options = arguments(argv)
    if options.report:
        print(sampling_summary.text(json.loads(options.report.read_text())))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = chosen_trials(options, device)
    if options.list:
        print("\n".join(str(trial) for trial in chosen))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    memory = {str(b): forward_peak(options.network, b, dtype) for b in sorted({t.batch for t in chosen})}
    record = Record(
        "sampling", options.out, device, _command(options),
        network=options.network, weight_bytes=weight_bytes(options.network, dtype), liveness_bytes=memory, missing={},
    )
    result = record.result
    models = Models(options.network, device, dtype, options.openai)
    for i, trial in enumerate(chosen):
        left = math.inf if options.seconds is None else options.seconds - (time.perf_counter() - start)
        if left < (COMPILE_S[device.type] if set(trial.providers) & set(COMPILED) else 0):
            result["truncated"] = True
            result["not_started"].append(str(trial))
            continue
        try:
            found = measure(models, trial, i, budget_s=BUDGET_S[device.type], rounds=options.rounds)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            failures = [{"trial": str(trial), "provider": "all", "reason": reason}]
            found = {"rows": [], "missing": {}, "failures": failures}
            if isinstance(error, torch.AcceleratorError):
                result["failures"] += failures
                result["truncated"], result["not_started"] = True, [str(t) for t in chosen[i + 1 :]]
                record.write()
                raise  # The device is lost to this process.
        result["rows"] += found["rows"]
        result["failures"] += found["failures"]
        result["missing"] |= found["missing"]
        record.write()
        print(f"[{time.perf_counter() - start:6.1f} s] {sampling_summary.line(trial, found)}", flush=True)
    record.write()
    print(sampling_summary.text(result))
    print(f"written: {record.path}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
