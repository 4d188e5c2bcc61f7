"""Times of the fused operations beside plain PyTorch and torch.compile: README.md says how they are taken.

    python -m cmfast.benchmarks.kernels --out DIR [--quick] [--seconds N] [--only TEXT] [--device cuda|cpu]
    python -m cmfast.benchmarks.kernels --report DIR/kernels-....json      the closing table again
    pytest benchmarks --benchmark-only [-k TEXT]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmfast import ops, reference
from cmfast.benchmarks import kernels_summary, runs, timing
from cmfast.benchmarks.cases import CASES, Config, Inputs, configs, exact, make_inputs, operation, run
from cmfast.benchmarks.comparisons import OURS
from cmfast.benchmarks.environment import environment
from cmfast.tolerances import FLOOR

#: Elements of a batch that the float64 yardstick computes at a time.
EXACT_ELEMENTS = 2**22
#: Calls in a CUDA graph of the plain path, whose calls are hundreds of launches each.
EAGER_GRAPH_CALLS = 16
#: Seconds of samples for each configuration and mode, by device: a CPU has other things to do as well.
BUDGET_S = {"cuda": 0.4, "cpu": 2.0}
QUICK_S = 2.0


def _operation(config: Config) -> Callable[[Inputs], Any]:
    return operation(config)


def _compiled(config: Config, function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """Under torch.compile with static shapes, the strongest baseline; of positional tensors, whose guards are cheap."""
    case = CASES[config.case]
    names = (*case.tensors, *case.sigmas, *(("index",) if case.drawn else ()))
    compiled = torch.compile(lambda *tensors: function(dict(zip(names, tensors))), fullgraph=True, dynamic=False)
    return lambda t: compiled(*(t[name] for name in names))


def _inductor(config: Config) -> Callable[[Inputs], Any]:
    return _compiled(config, operation(config, reference))


def _inductor_randn(config: Config) -> Callable[[Inputs], Any]:
    """The same with noise of torch's generator: less work, and other noise for another batch size."""
    plain = operation(config, reference)

    def call(t: Inputs) -> Any:
        noise = torch.randn((len(t["index"]), *config.shape), dtype=config.dtypes.state, device=t["index"].device)
        return plain({**t, "noise": noise})

    return _compiled(config, call)


def _operation_compiled(config: Config) -> Callable[[Inputs], Any]:
    return _compiled(config, operation(config))


class Provider(NamedTuple):
    """What makes the function of the inputs, and what `cmfast.backend` is while it runs (on a CPU: auto for triton)."""

    make: Callable[[Config], Callable[[Inputs], Any]]
    backend: str
    #: Its noise is not the counter's: results are checked by their size only.
    other_noise: bool = False


PROVIDERS = {
    "reference": Provider(_operation, "reference"),
    "inductor": Provider(_inductor, "reference"),
    "inductor_randn": Provider(_inductor_randn, "reference", other_noise=True),
    "cmfast": Provider(_operation, "triton"),
    # Inside a compiled region: the operation, which leaves itself to inductor unless it draws noise; and its kernel.
    "auto": Provider(_operation_compiled, "auto"),
    "kernel": Provider(_operation_compiled, "triton"),
}


#: Elements of a result whose size tells little.
FEW = 2000
#: Those that compile nothing.
PLAIN = ("reference", "cmfast")


def providers_for(config: Config) -> list[str]:
    case = CASES[config.case]
    names = ["reference", "inductor"]
    if case.drawn:
        names.append("inductor_randn")
    return [*names, *(("auto", "kernel") if case.compiled else ("cmfast",))]


def inductor_refusal(device: torch.device) -> str | None:
    """Why inductor cannot compile for a device; None if it should."""
    if device.type == "cuda":
        return None if find_spec("triton") else "inductor needs Triton on a GPU"
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    return None if any(shutil.which(name) for name in compilers if name) else "inductor needs a C++ compiler on a CPU"


def contender(name: str, config: Config, device: torch.device, sets: list[Inputs]) -> timing.Contender:
    provider = PROVIDERS[name]
    backend = "auto" if provider.backend == "triton" and device.type == "cpu" else provider.backend
    return timing.Contender(CASES[config.case], provider.make(config), lambda: ops.backend(backend), sets)


def _poison(like: list[Tensor]) -> None:
    """Leave NaN (255 in pixels) in the memory that the allocator hands out next."""
    junk = [torch.full_like(x, float("nan") if x.is_floating_point() else 255) for x in like]
    del junk


def _errors(config: Config, t: Inputs, results: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """For every result of every provider: max |value - exact| / max |exact|; of pixels, the share that is off by a
    level, and infinity where one is off by more."""
    count = len(results["reference"])
    worst = {name: [0.0] * count for name in results}
    peaks = [0.0] * count
    rows = max(1, EXACT_ELEMENTS * config.batch // config.elements)
    for start in range(0, config.batch, rows):
        stop = min(start + rows, config.batch)
        for i, value in enumerate(exact(config, t, start, stop)):
            pixels = value.dtype == torch.uint8
            peaks[i] = config.elements if pixels else max(peaks[i], value.abs().max().item())
            for name, result in results.items():
                off = (result[i][start:stop].double() - value.double()).abs()
                if pixels:
                    worst[name][i] += off.sum().item() if off.max() <= 1 else float("inf")
                else:
                    # NaN is worse than anything, and max() would lose it.
                    worst[name][i] = max(worst[name][i], off.nan_to_num(nan=float("inf")).max().item())
    return {name: [error / peak for error, peak in zip(errors, peaks)] for name, errors in worst.items()}


def check(config: Config, device: torch.device, contenders: dict[str, timing.Contender], t: Inputs) -> dict[str, str]:
    """The correctness gate: what is wrong, by provider; nothing for one that may be timed.

    Plain PyTorch is within twice the floor of the dtype of float64, others within twice its error and the floor:
    `cmfast/tolerances.py`. Of pixels, one in a thousand may be off by one level.
    """
    with ops.backend("reference"):
        results = {"reference": run(CASES[config.case], operation(config), t)}
    wrong: dict[str, str] = {}
    for name, candidate in contenders.items():
        _poison(results["reference"])
        try:
            results[name] = candidate.once(t)
            timing.synchronize(device)
        except Exception as error:
            wrong[name] = timing.reason_of(error)
    shapes = [(tuple(x.shape), x.dtype) for x in results["reference"]]
    for name in list(results):
        made = [(tuple(x.shape), x.dtype) for x in results[name]]
        if made != shapes:
            wrong[name] = f"gives {made}, not {shapes}"
            del results[name]
    for name in list(results):
        if PROVIDERS[name].other_noise:
            for i, (value, like) in enumerate(zip(results.pop(name), results["reference"])):
                if "table" in CASES[config.case].tensors:  # Its noise levels are others too, and with them the size.
                    if not value.isfinite().all():
                        wrong[name] = f"result {i}: not all are finite"
                    continue
                ratio = (value.double().square().mean() / like.double().square().mean()).sqrt().item()
                if value.numel() > FEW and not 0.9 < ratio < 1.1:
                    wrong[name] = f"result {i}: root mean square is {ratio:.3g} times what it should be"
    errors = _errors(config, t, results)
    for name, found in errors.items():
        for i, (off, plain_error) in enumerate(zip(found, errors["reference"])):
            dtype = results[name][i].dtype
            if dtype == torch.uint8:
                allowed = 1e-3
            else:
                floor = FLOOR[dtype]
                own = 2 * max(floor, CASES[config.case].plain_error * (dtype == torch.float32))
                allowed = own if name == "reference" else 2 * plain_error + floor
            if not off <= allowed:
                wrong[name] = f"result {i}: relative error {off:.3g}, allowed {allowed:.3g}"
    return wrong


def measure(
    trial: Trial, device: torch.device, *, l2_bytes: int | None, budget_s: float, seed: int
) -> runs.Found:
    """Rows, failures and missing providers of one configuration."""
    config = trial.config
    # Each configuration is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    case = CASES[config.case]
    sets = make_inputs(config, timing.sets_for(config.floor_bytes, l2_bytes), device, seed)
    contenders: dict[str, timing.Contender] = {}
    first_call_s, peaks, failures, missing = {}, {}, [], {}
    refusal = inductor_refusal(device)
    for name in trial.providers:
        reason = refusal if refusal and name not in PLAIN else runs.left_out(contenders)
        if reason:
            missing[name] = reason
            continue
        candidate = contender(name, config, device, sets)
        start = time.perf_counter()
        try:
            candidate.once(sets[0])
            timing.synchronize(device)
            first_call_s[name] = round(time.perf_counter() - start, 3)
            peaks[name] = timing.peak_bytes(candidate, device)
        except Exception as error:
            failures.append({"trial": str(config), "provider": name, "reason": timing.reason_of(error)})
            continue
        contenders[name] = candidate
    wrong = check(config, device, contenders, sets[-1])
    failures += [{"trial": str(config), "provider": name, "reason": reason} for name, reason in wrong.items()]
    contenders = {name: candidate for name, candidate in contenders.items() if name not in wrong}
    rows = []
    for mode in ("call", "graph") if device.type == "cuda" else ("call",):
        samples, calls, broken = _samples(mode, contenders, device, budget_s)
        failures += [{"trial": str(config), "provider": f"{name} ({mode})", "reason": broken[name]} for name in broken]
        for name, times in samples.items():
            statistics = timing.statistics_us(times)
            rotated = config.floor_bytes * (calls[name] if mode == "graph" else len(sets))
            rows.append({
                "case": config.case,
                "shape": list(config.shape),
                "batch": config.batch,
                "state_dtype": str(config.dtypes.state).removeprefix("torch."),
                "model_dtype": str(config.dtypes.model).removeprefix("torch."),
                "channels_last": config.channels_last,
                "provider": name,
                "mode": mode,
                **statistics,
                "times_cmfast": timing.times_of(times, next((samples[own] for own in OURS if own in samples), None)),
                "floor": str(case.floor),
                "floor_bytes": config.floor_bytes,
                "largest_tensor_bytes": config.elements * max(dtype.itemsize for dtype in config.dtypes),
                "gb_per_s": round(config.floor_bytes / statistics["p50_us"] / 1e3, 2),
                "input_sets": calls[name] if mode == "graph" else len(sets),
                "cold": None if l2_bytes is None else rotated >= 2 * l2_bytes,
                "peak_bytes": peaks[name],
                "first_call_s": first_call_s[name],
            })
    for candidate in contenders.values():
        candidate.release()
    return {"rows": rows, "failures": failures, "missing": missing}


def _samples(
    mode: str, contenders: dict[str, timing.Contender], device: torch.device, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """Seconds per call of every contender, how many calls are in its graph, and why one could not be timed."""
    stopwatch = timing.Stopwatch(device)
    slices, calls, broken = {}, {}, {}
    for name, candidate in contenders.items():
        try:
            if mode == "call":
                candidate.calls(len(candidate.sets))
                slices[name] = timing.sliced(stopwatch, candidate.calls)
            else:
                candidate.capture(EAGER_GRAPH_CALLS if name == "reference" else timing.MAX_SETS)
                calls[name] = candidate.graph_calls
                slices[name] = timing.sliced(stopwatch, candidate.replays, candidate.graph_calls)
        except Exception as error:
            broken[name] = timing.reason_of(error)
    samples, failed = timing.interleave(slices, budget_s)
    return samples, calls, broken | failed


@dataclass(frozen=True)
class Trial:
    """A configuration, and who is timed on it."""

    config: Config
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.config)

    def __str__(self) -> str:
        return self.name


def trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The configurations of a command line."""
    found = [Trial(config, tuple(providers_for(config))) for config in configs(device.type, options.quick)]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """What the result says of itself; and what measures a configuration."""
    if device.type == "cpu":
        # Two threads wait for each other at every one of these short loops: on a shared machine that is what is timed.
        torch.set_num_threads(1)
        timing.keep_memory()
    gpu = environment(device)["gpu"]
    budget_s = QUICK_S if options.quick else BUDGET_S[device.type]

    def measured(trial: Trial, number: int) -> runs.Found:
        return measure(trial, device, l2_bytes=gpu and gpu["l2_bytes"], budget_s=budget_s, seed=number)

    note = "measured on a CPU, where cmfast takes plain PyTorch, some of it in place: tells nothing of a GPU"
    return {"about": None if device.type == "cuda" else note}, measured


SUITE = runs.Suite(
    "kernels", "the fused operations, beside plain PyTorch and torch.compile", tuple(PROVIDERS), trials, start,
    kernels_summary.line, kernels_summary.text,
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
