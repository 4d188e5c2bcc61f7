"""Times of what a training step does to parameters: averages, an optimizer. README.md says how times are taken.

    python -m cmfast.benchmarks.parameters --out DIR [--only TEXT] [--providers NAMES] [--seconds N] [--device cuda|cpu]
    python -m cmfast.benchmarks.parameters --report DIR/parameters-....json      the closing table again
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmfast import ops, optim, reference
from cmfast.benchmarks import runs, timing
from cmfast.benchmarks.kernels import inductor_refusal
from cmfast.benchmarks.networks import NETWORKS
from cmfast.checkpoint import meta_network
from cmfast.ema import Averages
from cmfast.tolerances import FLOOR

#: U-Nets for 32x32 by their millions of parameters; 296 is ImageNet-64's.
SIZES: dict[str, dict[str, Any]] = {
    "6M": {**NETWORKS["tiny"], "image_size": 32, "channel_mult": [1, 2, 2], "num_classes": None},
    "32M": {
        **NETWORKS["tiny"], "image_size": 32, "channel_mult": [1, 2, 2], "num_classes": None, "model_channels": 128,
        "num_res_blocks": 2,
    },
    "296M": NETWORKS["imagenet64"],
}  # fmt: skip
#: Those that compile nothing.
PLAIN = ("loop", "foreach", "cmfast")
#: What is run, by device: an operation, a size, how many averages, and who is timed. On a GPU with 296 million
#: parameters inductor compiles for minutes, of RAdam for longer than anyone waits.
TRIALS: dict[str, list[tuple[Any, ...]]] = {
    "cpu": [("averages", "32M", 4), ("radam", "6M", 2), ("averages", "6M", 2)],
    "cuda": [
        *((operation, size, 4, PLAIN) for size in ("296M", "6M") for operation in ("averages", "radam")),
        *((operation, "6M", 4, ("inductor", "cmfast")) for operation in ("averages", "radam")),
        ("averages", "296M", 4, ("inductor", "cmfast")),
    ],
}
#: Compiling RAdam takes longer than all that.
QUICK = [(operation, "6M", 2, PLAIN) for operation in ("averages", "radam")]
RATES = [0.95, 0.999, 0.9999, 0.99994]
LR, MAX_NORM = 1e-5, 1.0
BUDGET_S = {"cuda": 3.0, "cpu": 20.0}
QUICK_S = 5.0
#: Elements of the parameters that the correctness gate looks at, and steps that it takes: RAdam adapts from its sixth.
GATE_ELEMENTS, GATE_STEPS = 2**20, 8
#: Of the averages on a GPU: a part of the copy bandwidth, and how many times as fast as `foreach`.
BARS = {"percent_of_copy": 90.0, "foreach": 1.25}


@dataclass(frozen=True)
class Trial:
    """An operation on a network's parameters, with so many averages, and who is timed on it."""

    operation: str
    size: str
    averages: int
    providers: tuple[str, ...] = ("loop", "foreach", "inductor", "cmfast")

    @property
    def name(self) -> str:
        return f"{self.operation} {self.size} {self.averages}"

    def __str__(self) -> str:
        return self.name


@dataclass
class State:
    """A model's parameters and gradients, and averages of them."""

    parameters: list[nn.Parameter]
    averages: list[list[Tensor]]

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def data(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]


def make(size: str, averages: int, device: torch.device, elements: int | None = None) -> State:
    """Random values in the shapes of a network; the first parameters alone, up to so many elements."""
    generator = torch.Generator(device).manual_seed(0)
    parameters: list[nn.Parameter] = []
    for like in meta_network(SIZES[size]).parameters():
        if elements is not None and sum(p.numel() for p in parameters) + like.numel() > elements:
            break
        parameters.append(nn.Parameter(torch.randn(like.shape, generator=generator, device=device) * 0.1))
        parameters[-1].grad = torch.randn(like.shape, generator=generator, device=device)
    others = [[torch.randn(p.shape, generator=generator, device=device) for p in parameters] for _ in range(averages)]
    return State(parameters, others)


def _loop(state: State) -> Callable[[], None]:
    """The original's update_ema: parameter by parameter."""

    def call() -> None:
        for rate, averages in zip(RATES, state.averages):
            for average, parameter in zip(averages, state.parameters):
                average.detach().mul_(rate).add_(parameter, alpha=1 - rate)

    return torch.no_grad()(call)


def _foreach(state: State) -> Callable[[], None]:
    def call() -> None:
        for rate, averages in zip(RATES, state.averages):
            torch._foreach_lerp_(averages, state.data, 1 - rate)

    return call


def _fused(state: State) -> Callable[[], None]:
    rates = torch.tensor(RATES[: len(state.averages)], dtype=torch.float64, device=state.data[0].device)
    return lambda: ops.ema_update_(state.data, state.averages, rates)


def _inductor(state: State) -> Callable[[], None]:
    return torch.compile(_foreach(state), dynamic=False)


def _then(state: State, average: Callable[[State], Callable[[], None]], **options: Any) -> Callable[[], None]:
    """Clipping, torch's RAdam and averages, one after the other."""
    optimizer = torch.optim.RAdam(state.parameters, lr=LR, **options)
    averages = average(state)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(state.parameters, MAX_NORM)
        optimizer.step()
        averages()

    return call


def _optimizer(state: State) -> Callable[[], None]:
    averages = Averages([(str(i), p) for i, p in enumerate(state.parameters)], RATES[: len(state.averages)])
    for values, starts in zip(averages._averages, state.averages):
        torch._foreach_copy_(values, starts)
    state.averages[:] = averages._averages
    return optim.RAdam(state.parameters, lr=LR, max_norm=MAX_NORM, averages=averages).step


PROVIDERS: dict[str, dict[str, Callable[[State], Callable[[], Any]]]] = {
    "averages": {"loop": _loop, "foreach": _foreach, "inductor": _inductor, "cmfast": _fused},
    "radam": {
        "loop": lambda state: _then(state, _loop, foreach=False),
        "foreach": lambda state: _then(state, _foreach, foreach=True, capturable=state.data[0].is_cuda),
        "inductor": lambda state: torch.compile(_then(state, _foreach, foreach=True, capturable=state.data[0].is_cuda)),
        "cmfast": _optimizer,
    },
}


def floor_bytes(operation: str, averages: int) -> int:
    """Per parameter, in float32: each tensor once; gradients once more for their norm."""
    return (4 if operation == "averages" else 7 * 4 + 4) + 8 * averages


def wrong(operation: str, size: str, averages: int, provider: str, device: torch.device) -> str | None:
    """The correctness gate: what is off after a few steps, in float64's eyes."""
    state = make(size, averages, device, GATE_ELEMENTS)
    exact = [p.double() for p in state.data]
    others = [[a.double() for a in group] for group in state.averages]
    gradients = [p.grad.double() for p in state.parameters if p.grad is not None]
    means, squares = ([torch.zeros_like(p) for p in exact] for _ in range(2))
    step, rates = torch.zeros((), device=device), torch.tensor(RATES[:averages], dtype=torch.float64, device=device)
    call = PROVIDERS[operation][provider](state)
    for _ in range(GATE_STEPS):
        if operation == "averages":
            reference.ema_update_(exact, others, rates)
        else:
            norm = reference.grad_norm(gradients)
            reference.radam_ema_(
                exact, gradients, means, squares, step, others, rates, lr=LR, grad_norm=norm, max_norm=MAX_NORM
            )
        call()
    pairs = zip([*state.data, *sum(state.averages, [])], [*exact, *sum(others, [])])
    error = max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    return None if error <= GATE_STEPS * FLOOR[torch.float32] else f"relative error {error:.3g}"


def measure(trial: Trial, device: torch.device, budget_s: float) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    operation, size, averages = trial.operation, trial.size, trial.averages
    state, stopwatch = make(size, averages, device), timing.Stopwatch(device)
    slices: dict[str, Callable[[], float]] = {}
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    for provider in trial.providers:
        maker = PROVIDERS[operation][provider]
        refusal = runs.left_out(slices) or (inductor_refusal(device) if provider == "inductor" else None)
        if refusal:
            found["missing"][provider] = refusal
            continue
        torch._dynamo.reset()
        try:
            reason = wrong(operation, size, averages, provider, device)
            if reason is None:
                # Lists of its own, of the same tensors: 296M parameters with averages are 9.5 GB.
                call = maker(State(state.parameters, [list(group) for group in state.averages]))

                def calls(count: int, call: Callable[[], Any] = call) -> list[Any]:
                    return [call() for _ in range(count)]

                slices[provider] = timing.sliced(stopwatch, calls)
        except Exception as error:
            reason = timing.reason_of(error)
        if reason is not None:
            found["failures"].append({"trial": str(trial), "provider": provider, "reason": reason})
    samples, broken = timing.interleave(slices, budget_s)
    found["failures"] += [{"trial": str(trial), "provider": name, "reason": broken[name]} for name in broken]
    for provider, times in samples.items():
        statistics = timing.statistics_us(times)
        moved = state.elements * floor_bytes(operation, averages)
        found["rows"].append({
            "operation": operation, "size": size, "parameters": state.elements, "tensors": len(state.parameters),
            "averages": averages, "provider": provider, **statistics,
            "times_cmfast": timing.times_of(times, samples.get("cmfast")), "floor_bytes": moved,
            "gb_per_s": round(moved / statistics["p50_us"] / 1e3, 2),
        })  # fmt: skip
    return found


def text(result: dict[str, Any]) -> str:
    """Each provider of each trial, as times of cmfast's; and the bars, on a GPU."""
    lines = ["", *runs.about(result), ""]
    for row in result["rows"]:
        times = f"  {row['times_cmfast']['p50']:.2f} x cmfast" if row["times_cmfast"] else ""
        lines.append(
            f"{row['operation']:9} {row['size']:>5} K={row['averages']}  {row['provider']:9} "
            f"{row['p50_us'] / 1e3:10.3f} ms "
            f"{row['gb_per_s']:8.1f} GB/s {row['percent_of_copy']:6.1f}% of copy{times}"
        )
    return "\n".join([*lines, *bars(result), *runs.leftovers(result)])


def bars(result: dict[str, Any]) -> list[str]:
    """Each bar with what was measured: `met`, `MISSED`, or `not measured`. There are none on a CPU."""
    if result["environment"]["device_type"] != "cuda":
        return []
    at = [row for row in result["rows"] if (row["operation"], row["size"], row["averages"]) == ("averages", "296M", 4)]
    # The first trial of them, in which both were timed in turn.
    ours, rival = (next((row for row in at if row["provider"] == name), None) for name in ("cmfast", "foreach"))
    share = ours and ours["percent_of_copy"]
    times = rival and rival["times_cmfast"] and rival["times_cmfast"]["p50"]
    return [
        _bar("averages 296M at least {:g}% of the copy bandwidth", BARS["percent_of_copy"], share),
        _bar("averages 296M at least {:g} times as fast as foreach", BARS["foreach"], times),
    ]


def _bar(what: str, least: float, value: float | None) -> str:
    if value is None:
        return f"not measured: {what.format(least)}"
    return f"{'met' if value >= least else 'MISSED'}: {what.format(least)}: {value:.2f}"


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line."""
    found = [Trial(*trial) for trial in (QUICK if options.quick else TRIALS[device.type])]
    if options.compile is False:
        plain = [dataclasses.replace(t, providers=tuple(p for p in t.providers if p in PLAIN)) for t in found]
        found = [trial for trial in plain if len(trial.providers) > 1]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """Nothing but rows in the result; and what measures a trial."""
    if options.quick and device.type == "cpu":
        torch.set_num_threads(1)  # As in kernels.py; few samples show nothing else.
    if device.type == "cpu":
        timing.keep_memory()
    budget_s = QUICK_S if options.quick else BUDGET_S[device.type]
    return {}, lambda trial, number: measure(trial, device, budget_s)


SUITE = runs.Suite(
    "parameters", "averages, and an optimizer's step with averages", ("loop", "foreach", "inductor", "cmfast"),
    chosen_trials, start, runs.milliseconds_line, text,
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
