"""Times of the fused operations beside plain PyTorch and torch.compile: README.md says how they are taken.

    python benchmarks/kernels.py --out DIR [--quick] [--seconds N] [--only TEXT] [--device cuda|cpu]
    python benchmarks/kernels.py --report DIR/kernels-....json      the closing table again
    pytest benchmarks/kernels.py --benchmark-only [-k TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    # Run as a file. This folder must not be searched first: its `kernels` is another project's import name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import cmfast
from benchmarks import summary, timing
from benchmarks.cases import CASES, Config, Inputs, configs, exact, make_inputs, operation, run
from benchmarks.record import Record
from cmfast import reference
from tests.tolerances import FLOOR

#: Elements of a batch that the float64 yardstick computes at a time.
EXACT_ELEMENTS = 2**22
#: Calls in a CUDA graph of the plain path, whose calls are hundreds of launches each.
EAGER_GRAPH_CALLS = 16
#: Seconds of samples for each configuration and mode, by device: a CPU has other things to do as well.
BUDGET_S = {"cuda": 0.4, "cpu": 2.0}


class Wrong(AssertionError):
    """A provider's results are off."""


def _eager(config: Config) -> Callable[[Inputs], Any]:
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
    "eager": Provider(_eager, "reference"),
    "inductor": Provider(_inductor, "reference"),
    "inductor_randn": Provider(_inductor_randn, "reference", other_noise=True),
    "cmfast": Provider(_eager, "triton"),
    # Inside a compiled region: the operation, which leaves itself to inductor unless it draws noise; and its kernel.
    "auto": Provider(_operation_compiled, "auto"),
    "kernel": Provider(_operation_compiled, "triton"),
}


def providers_for(config: Config, device: torch.device, wanted: list[str] | None = None) -> list[str]:
    case = CASES[config.case]
    names = ["eager", "inductor"]
    if case.drawn:
        names.append("inductor_randn")
    names += ["auto", "kernel"] if case.compiled else ["cmfast"]
    if inductor_refusal(device):
        names = [name for name in names if name in ("eager", "cmfast")]
    return [name for name in names if wanted is None or name in wanted]


def inductor_refusal(device: torch.device) -> str | None:
    """Why inductor cannot compile for a device; None if it should."""
    if device.type == "cuda":
        return None if find_spec("triton") else "inductor needs Triton on a GPU"
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    return None if any(shutil.which(name) for name in compilers if name) else "inductor needs a C++ compiler on a CPU"


def contender(name: str, config: Config, device: torch.device, sets: list[Inputs]) -> timing.Contender:
    provider = PROVIDERS[name]
    backend = "auto" if provider.backend == "triton" and device.type == "cpu" else provider.backend
    return timing.Contender(CASES[config.case], provider.make(config), lambda: cmfast.backend(backend), sets)


def reason_of(error: Exception) -> str:
    """One that a run survives, in words.

    Raises: torch.AcceleratorError: the device is lost to this process.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    return f"{type(error).__name__}: {error}"


def _poison(like: list[Tensor]) -> None:
    """Leave NaN (255 in pixels) in the memory that the allocator hands out next."""
    junk = [torch.full_like(x, float("nan") if x.is_floating_point() else 255) for x in like]
    del junk


def _errors(config: Config, t: Inputs, results: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """For every result of every provider: max |value - exact| / max |exact|; of pixels, the share that is off by a
    level, and infinity where one is off by more."""
    count = len(results["eager"])
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
    `tests/tolerances.py`. Of pixels, one in a thousand may be off by one level.
    """
    with cmfast.backend("reference"):
        results = {"eager": run(CASES[config.case], operation(config), t)}
    wrong: dict[str, str] = {}
    for name, candidate in contenders.items():
        _poison(results["eager"])
        try:
            results[name] = candidate.once(t)
            timing.synchronize(device)
        except Exception as error:
            wrong[name] = reason_of(error)
    shapes = [(tuple(x.shape), x.dtype) for x in results["eager"]]
    for name in list(results):
        made = [(tuple(x.shape), x.dtype) for x in results[name]]
        if made != shapes:
            wrong[name] = f"gives {made}, not {shapes}"
            del results[name]
    for name in list(results):
        if PROVIDERS[name].other_noise:
            for i, (value, like) in enumerate(zip(results.pop(name), results["eager"])):
                ratio = (value.double().square().mean() / like.double().square().mean()).sqrt().item()
                if not 0.9 < ratio < 1.1:
                    wrong[name] = f"result {i}: root mean square is {ratio:.3g} times what it should be"
    errors = _errors(config, t, results)
    for name, found in errors.items():
        for i, (error, eager_error) in enumerate(zip(found, errors["eager"])):
            dtype = results[name][i].dtype
            if dtype == torch.uint8:
                allowed = 1e-3
            else:
                allowed = 2 * (FLOOR[dtype] if name == "eager" else eager_error) + (name != "eager") * FLOOR[dtype]
            if not error <= allowed:
                wrong[name] = f"result {i}: relative error {error:.3g}, allowed {allowed:.3g}"
    return wrong


def measure(
    config: Config, device: torch.device, *, wanted: list[str] | None, l2_bytes: int | None, budget_s: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows and failures of one configuration."""
    # Each configuration is compiled anew, and Dynamo gives up after a few versions of one function.
    torch._dynamo.reset()
    case = CASES[config.case]
    sets = make_inputs(config, timing.sets_for(config.floor_bytes, l2_bytes), device, seed)
    contenders, first_call_s, failures = {}, {}, []
    for name in providers_for(config, device, wanted):
        candidate = contender(name, config, device, sets)
        start = time.perf_counter()
        try:
            candidate.once(sets[0])
            timing.synchronize(device)
        except Exception as error:
            failures.append({"config": str(config), "provider": name, "reason": reason_of(error)})
            continue
        first_call_s[name] = round(time.perf_counter() - start, 3)
        contenders[name] = candidate
    wrong = check(config, device, contenders, sets[-1])
    failures += [{"config": str(config), "provider": name, "reason": reason} for name, reason in wrong.items()]
    contenders = {name: candidate for name, candidate in contenders.items() if name not in wrong}
    rows = []
    peaks = {name: timing.peak_bytes(candidate, device) for name, candidate in contenders.items()}
    for mode in ("call", "graph") if device.type == "cuda" else ("call",):
        samples, calls, broken = _samples(mode, contenders, device, budget_s)
        failures += [{"config": str(config), "provider": f"{name} ({mode})", "reason": broken[name]} for name in broken]
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
    return rows, failures


def _samples(
    mode: str, contenders: dict[str, timing.Contender], device: torch.device, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """Seconds per call of every contender, how many calls are in its graph, and why one could not be captured."""
    stopwatch = timing.Stopwatch(device)
    slices, calls, broken = {}, {}, {}
    for name, candidate in contenders.items():
        if mode == "call":
            candidate.calls(len(candidate.sets))
            slices[name] = timing.sliced(stopwatch, candidate.calls)
            continue
        try:
            candidate.capture(EAGER_GRAPH_CALLS if name == "eager" else timing.MAX_SETS)
        except Exception as error:
            broken[name] = reason_of(error)
            continue
        calls[name] = candidate.graph_calls
        slices[name] = timing.sliced(stopwatch, candidate.replays, candidate.graph_calls)
    return timing.interleave(slices, budget_s), calls, broken


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/kernels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the JSON file")
    parser.add_argument("--quick", action="store_true", help="one size per case, few samples")
    parser.add_argument("--seconds", type=float, help="start no new configuration after so many seconds")
    parser.add_argument("--only", metavar="TEXT", help="configurations whose name holds TEXT, as --list prints them")
    parser.add_argument("--providers", type=lambda text: text.split(","), help=f"of {','.join(PROVIDERS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--list", action="store_true", help="print the configurations and stop")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the closing table of an earlier run")
    options = parser.parse_args(argv)
    unknown = set(options.providers or ()) - set(PROVIDERS)
    if unknown:
        parser.error(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(PROVIDERS)}")
    return options


def _command(options: argparse.Namespace) -> str:
    """The command line without the folder that results went to."""
    words = ["python", "benchmarks/kernels.py"]
    for name in ("seconds", "only", "device"):
        value = getattr(options, name)
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else value] if value is not None else []
    words += ["--providers", ",".join(options.providers)] if options.providers else []
    return shlex.join(words + (["--quick"] if options.quick else []))


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a provider was off or failed."""
    start = time.perf_counter()
    options = arguments(argv)
    if options.report:
        print(summary.text(json.loads(options.report.read_text())))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = [c for c in configs(device.type, options.quick) if options.only is None or options.only in str(c)]
    if options.list:
        print("\n".join(str(config) for config in chosen))
        return 0
    if not chosen:
        print(f"no configuration's name holds {options.only!r}: --list prints them", file=sys.stderr)
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    record = Record("kernels", options.out, device, _command(options), note=None, copy_bandwidth=[])
    if device.type != "cuda":
        record.result["note"] = (
            "measured on a CPU, where cmfast takes plain PyTorch, some of it in place: tells nothing of a GPU"
        )
    result = record.result
    gpu = result["environment"]["gpu"]
    refusal = inductor_refusal(device)
    if refusal:
        result["note"] = "; ".join(filter(None, [result["note"], refusal]))
    result["copy_bandwidth"].append(timing.copy_bandwidth(device, options.quick))
    for i, config in enumerate(chosen):
        if options.seconds is not None and time.perf_counter() - start > options.seconds:
            result["truncated"], result["not_started"] = True, [str(c) for c in chosen[i:]]
            break
        try:
            rows, failures = measure(
                config, device, wanted=options.providers, l2_bytes=gpu and gpu["l2_bytes"],
                budget_s=0.07 if options.quick else BUDGET_S[device.type], seed=i,
            )
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            rows, failures = [], [{"config": str(config), "provider": "all", "reason": reason}]
            if isinstance(error, torch.AcceleratorError):
                result["failures"] += failures
                result["truncated"], result["not_started"] = True, [str(c) for c in chosen[i + 1 :]]
                record.write()
                raise  # The device is lost to this process.
        bandwidth = result["copy_bandwidth"][0]["gb_per_s"]
        for row in rows:
            row["percent_of_copy"] = round(100 * row["gb_per_s"] / bandwidth, 2)
        result["rows"] += rows
        result["failures"] += failures
        record.write()
        print(f"[{time.perf_counter() - start:6.1f} s] {summary.line(config, rows, failures)}", flush=True)
    result["copy_bandwidth"].append(timing.copy_bandwidth(device, options.quick))
    record.write()
    print(summary.text(result))
    print(f"written: {record.path}")
    return 1 if result["failures"] else 0


def pytest_generate_tests(metafunc: Any) -> None:
    """Every configuration with each of its providers, as a test of its own."""
    if "config" in metafunc.fixturenames:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pairs = [(config, name) for config in configs(device.type) for name in providers_for(config, device)]
        metafunc.parametrize("config, provider", pairs, ids=[f"{config} {name}" for config, name in pairs])


def test_kernel(config: Config, provider: str, benchmark: Any) -> None:
    """The gate, then calls that rotate over cold inputs, each round ending when the device has finished."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.reset()
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None
    sets = make_inputs(config, timing.sets_for(config.floor_bytes, l2_bytes), device, seed=0)
    candidate = contender(provider, config, device, sets)
    wrong = check(config, device, {provider: candidate}, sets[-1])
    if wrong:
        raise Wrong(f"{config}: {wrong}")

    def call() -> None:
        candidate.calls(1)
        if candidate.position == 0:
            timing.synchronize(device)

    benchmark.group = str(config)
    benchmark.extra_info.update(
        device=device.type, floor=str(CASES[config.case].floor), floor_bytes=config.floor_bytes, input_sets=len(sets)
    )
    benchmark.pedantic(call, iterations=len(sets), rounds=30, warmup_rounds=3)


if __name__ == "__main__":
    sys.exit(main())
