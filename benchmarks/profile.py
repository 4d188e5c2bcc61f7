"""Where the time of a call goes, kernel by kernel, and where the device waits: a table of the profiler, as JSON.

    python -m cmfast.benchmarks.profile --out DIR [--network NAME] [--batches 1,256] [--providers cmfast] [--seconds N]

On a CPU it is the operations that are counted, and nothing waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cmfast.benchmarks import providers, runs, sampling, training_providers
from cmfast.benchmarks.gate import Gate
from cmfast.benchmarks.liveness import weight_bytes
from cmfast.benchmarks.original import Missing
from cmfast.benchmarks.training_start import Start

#: Kernels and gaps that a table holds.
LONGEST = 25
#: What is profiled: calls in a row, after as many to warm up.
CALLS = 3


@dataclass(frozen=True)
class Trial:
    """A batch of images, or a training step (batch 0: as the training benchmark has it), by each provider alone."""

    network: str
    batch: int
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.network}, training step" if not self.batch else f"{self.network}, batch {self.batch}, 1 step"

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.providers)}"


def kernels(spans: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """From (name, start, end) in microseconds: the longest kernels by name, and the longest gaps between any two.

    >>> found = kernels([("a", 0, 2), ("b", 5, 9), ("a", 9, 10)])
    >>> found["busy_us"], found["idle_us"], found["kernels"][0]["name"], found["gaps"][0]["after"]
    (7, 3.0, 'b', 'a')
    """
    ordered = sorted(spans, key=lambda span: span[1])
    sums: dict[str, list[float]] = {}
    gaps: list[dict[str, Any]] = []
    end, last, idle = None, "", 0.0
    for name, begun, ended in ordered:
        sums.setdefault(name, []).append(ended - begun)
        if end is not None and begun > end:
            idle += begun - end
            gaps.append({"us": round(begun - end, 2), "after": last, "before": name})
        if end is None or ended > end:
            end, last = ended, name
    busy = sum(sum(times) for times in sums.values())
    table = [
        {"name": name, "calls": len(times), "us": round(sum(times), 2), "share": round(sum(times) / busy, 4)}
        for name, times in sorted(sums.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "busy_us": round(busy, 2), "idle_us": round(idle, 2), "count": len(ordered), "kernels": table[:LONGEST],
        "gaps": sorted(gaps, key=lambda gap: -gap["us"])[:LONGEST],
    }  # fmt: skip


def profiled(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """`kernels` of CALLS calls; on a CPU operations by their own time, without gaps."""
    for _ in range(CALLS):
        call()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as traced:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    if cuda:
        cuda_type = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]  # exported at run time alone
        events = [e for e in traced.events() if e.device_type == cuda_type and not e.is_user_annotation]
        return kernels((event.name, event.time_range.start, event.time_range.end) for event in events)
    rows = sorted(traced.key_averages(), key=lambda row: -row.self_cpu_time_total)
    busy = sum(row.self_cpu_time_total for row in rows) or 1.0
    table = [
        {"name": row.key, "calls": row.count, "us": round(row.self_cpu_time_total, 2),
         "share": round(row.self_cpu_time_total / busy, 4)}
        for row in rows
    ]  # fmt: skip
    return {"busy_us": round(busy, 2), "idle_us": None, "count": sum(row.count for row in rows),
            "kernels": table[:LONGEST], "gaps": []}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this suite alone."""
    sampling.add_options(parser)


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """cmfast's largest and smallest batch, then the original's, which shows what is left to gain; a training step."""
    network = options.network or ("unet32" if options.quick or device.type == "cpu" else "imagenet64")
    names = ("cmfast", "openai")
    batches = options.batches or ([1, 256] if device.type == "cuda" else [1])
    found = [Trial(network, batch, names[:1]) for batch in batches] + [Trial(network, 0, names[:1])]
    found += [Trial(network, batch, names[1:]) for batch in batches]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def measure(trial: Trial, options: argparse.Namespace, device: torch.device) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    for name in trial.providers:
        try:
            call, wrong = (_step if not trial.batch else _batch)(trial, name, options, device)
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        if wrong:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": wrong})
            continue
        row = {"network": trial.network, "batch": trial.batch, "provider": name, "calls": CALLS, "note": None}
        found["rows"].append(row | profiled(call, device))
    return found


def _batch(
    trial: Trial, name: str, options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], Any], str | None]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = providers.Models(trial.network, device, dtype, options.openai)
    about = providers.Trial(trial.batch, (name,))
    provider = providers.PROVIDERS[name](models, about)
    return lambda: provider.sample(trial.batch), Gate(models, about).wrong(provider)


def _step(
    trial: Trial, name: str, options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], Any], str | None]:
    """What the training benchmark times and has checked; here it is looked at alone."""
    known = training_providers.trials(device.type, trial.network, False, options.quick)
    about = next(t for t in known if name in t.providers)
    provider = training_providers.PROVIDERS[name](Start(about, device, options.openai))
    numbers = iter(range(10**6))
    return lambda: provider.step(next(numbers)), None


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """What the weights take, beside the rows; and what measures a trial."""
    weights = {trial.network: weight_bytes(trial.network, torch.float32) for trial in chosen}
    return {"weight_bytes_float32": weights}, lambda trial, number: measure(trial, options, device)


def line(trial: Trial, found: runs.Found) -> str:
    """One trial while a run goes on."""
    busy = [f"{row['provider']} busy {row['busy_us'] / 1e3:.2f} ms" for row in found["rows"]]
    return runs.found_line(trial, found, busy)


def text(result: dict[str, Any]) -> str:
    """The closing tables."""
    lines = ["", *runs.about(result)]
    for row in result["rows"]:
        waits = "" if row["idle_us"] is None else f", waiting {row['idle_us'] / 1e3:.3f} ms"
        lines += ["", f"{row['name']}, {row['provider']}: {row['calls']} calls, {row['count']} kernels or operations, "
                      f"busy {row['busy_us'] / 1e3:.3f} ms{waits}"]
        lines += [f"    {k['share']:6.1%} {k['us'] / 1e3:10.3f} ms {k['calls']:6}  {k['name'][:90]}"
                  for k in row["kernels"][:10]]
        lines += [f"    waits {gap['us']:.1f} us after {gap['after'][:50]}" for gap in row["gaps"][:3]]
    return "\n".join([*lines, *runs.leftovers(result)])


SUITE = runs.Suite(
    "profile", "kernels of a call, by the profiler", ("cmfast", "openai"), chosen_trials, start, line, text,
    options=add_options, own=("network", "batches"),
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
