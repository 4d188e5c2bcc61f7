"""Times of nearest-neighbour doubling with the 3x3 convolution after it: two passes, or one: Winograd's algorithm for a
doubled image on a CPU in float32, else a transposed convolution.

    python -m cmfast.benchmarks.doubling --out DIR [--batch N] [--providers NAMES] [--seconds N] [--device cuda|cpu]

On a GPU the networks take two passes: these are the numbers by which that is to be decided.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.benchmarks import runs, timing
from cmfast.benchmarks.kernels import inductor_refusal
from cmfast.fast import doubling
from cmfast.native import winograd
from cmfast.tolerances import FLOOR

#: Channels and side of the map that is doubled: of the published ImageNet-64 network, and the largest of LSUN-256.
MAPS = ((384, 32), (576, 16), (768, 8), (256, 128))
#: And of `unet32`, the network of quick runs.
QUICK_MAPS = ((128, 16),)
BATCHES = {"cuda": [64, 1], "cpu": [1]}
BUDGET_S = {"cuda": 1.0, "cpu": 8.0}
QUICK_S = 2.0
FORWARD, TRAINING = "forward", "forward and backward"

#: Of a map [B, C, H, W], and of weight and bias in training.
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Trial:
    """Who is timed on a map, and whether gradients are taken as well."""

    channels: int
    side: int
    batch: int
    mode: str
    dtype: torch.dtype
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.batch, self.channels, self.side, self.side)))
        return f"{size} {str(self.dtype).removeprefix('torch.')}, {self.mode}"

    def __str__(self) -> str:
        return self.name

    def module(self) -> nn.Conv2d:
        """The convolution, its filter in channels_last."""
        torch.manual_seed(0)
        conv = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        return conv.to(self.dtype).to(memory_format=torch.channels_last)


def two_passes(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(h, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def at_once(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return doubling.transposed(h, doubling.fold(weight), bias)


def _kept(conv: nn.Conv2d, h: Tensor) -> Function:
    """For maps like h, as sampling has it: what is made of the weight is made once."""
    weight = conv.weight.detach()
    if winograd.fits(conv, h, kept=True, doubled=True):
        filters, memory = winograd.pack(weight), winograd.Workspace()
        options: dict[str, Any] = {"doubled": True, "workspace": memory}
        return lambda h, _, bias: winograd.convolve(h, filters, len(weight), bias, **options)
    if h.device.type == "cpu":
        packed = doubling.pack(weight, None, h.shape)
        return lambda h, _, bias: doubling.convolve(h, packed, bias)
    folded = doubling.fold(weight)
    return lambda h, _, bias: doubling.transposed(h, folded, bias)


def _in_training(conv: nn.Conv2d, h: Tensor) -> Function:
    """On a CPU as networks have it, for a map that is large enough."""
    if winograd.fits(conv, h, kept=False, doubled=True):
        return functools.partial(winograd.convolution, doubled=True, workspace=winograd.Workspace())
    return at_once if h.device.type == "cuda" or doubling.fits(conv, h, kept=False) else two_passes


#: What makes each provider of a convolution, the maps that it will be given, and whether gradients are taken.
PROVIDERS: dict[str, Callable[[nn.Conv2d, Tensor, bool], Function]] = {
    "reference": lambda conv, h, training: two_passes,
    "inductor": lambda conv, h, training: torch.compile(two_passes, dynamic=False),
    "cmfast": lambda conv, h, training: _in_training(conv, h) if training else _kept(conv, h),
}
COMPILED = ("inductor",)


def step(function: Function, training: bool, *given: Tensor) -> list[Tensor]:
    """The image, and where gradients are taken those of all that is given, of the sum of its squares."""
    if not training:
        with torch.no_grad():
            return [function(*given)]
    leaves = [x.detach().requires_grad_() for x in given]
    made = function(*leaves)
    return [made.detach(), *torch.autograd.grad(made, leaves, made.detach())]


def wrong(trial: Trial, function: Function, *given: Tensor) -> str | None:
    """The correctness gate, against float64: what is off beyond twice what two passes in the same dtype are, and the
    floor."""
    training = trial.mode == TRAINING
    exact = step(two_passes, training, *(x.double() for x in given))
    plain, made = step(two_passes, training, *given), step(function, training, *given)
    for name, value, other, right in zip(("image", "gradient", "of weight", "of bias"), made, plain, exact):
        error, allowed = (((v - right).norm() / right.norm()).item() for v in (value, other))
        if not error <= 2 * allowed + FLOOR[trial.dtype]:
            return f"{name}: relative error {error:.3g}, allowed {2 * allowed + FLOOR[trial.dtype]:.3g}"
    return None


def measure(trial: Trial, device: torch.device, budget_s: float) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    conv, training = trial.module().to(device), trial.mode == TRAINING
    h = torch.randn(trial.batch, trial.channels, trial.side, trial.side, device=device)
    parameters = [parameter.detach() for parameter in conv.parameters()]
    given = h.to(trial.dtype, memory_format=torch.channels_last), *parameters
    slices: dict[str, Callable[[], float]] = {}
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    for name in trial.providers:
        refusal = runs.left_out(slices) or (inductor_refusal(device) if name in COMPILED else None)
        if refusal:
            found["missing"][name] = refusal
            continue
        torch._dynamo.reset()
        try:
            function = PROVIDERS[name](conv, given[0], training)
            reason = wrong(trial, function, *given)
            if reason is None:
                call = functools.partial(step, function, training, *given)

                def steps(count: int, call: Callable[[], Any] = call) -> list[Any]:
                    return [call() for _ in range(count)]

                slices[name] = timing.sliced(timing.Stopwatch(device), steps)
        except Exception as error:
            reason = timing.reason_of(error)
        if reason is not None:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": reason})
    samples, broken = timing.interleave(slices, budget_s)
    found["failures"] += [{"trial": str(trial), "provider": name, "reason": broken[name]} for name in broken]
    # Of two passes, as everywhere: those of a network in plain PyTorch.
    flops = 2 * 9 * trial.channels**2 * 4 * trial.side**2 * trial.batch * (3 if training else 1)
    for name, times in samples.items():
        statistics = timing.statistics_us(times)
        found["rows"].append({
            "batch": trial.batch, "provider": name, "dtype": str(trial.dtype).removeprefix("torch."), **statistics,
            "times_cmfast": timing.times_of(times, samples.get("cmfast")),
            "tflop_per_s": round(flops / statistics["p50_us"] / 1e6, 3),
        })  # fmt: skip
    return found


def text(result: dict[str, Any]) -> str:
    """Each provider, as times of cmfast's."""
    lines = ["", *runs.about(result), ""]
    for row in result["rows"]:
        times = f"  {row['times_cmfast']['p50']:.2f} x cmfast" if row["times_cmfast"] else ""
        lines.append(f"{row['name']:45} {row['provider']:10} {row['p50_us'] / 1e3:10.3f} ms{times}")
    return "\n".join([*lines, *runs.leftovers(result)])


def add_options(parser: argparse.ArgumentParser) -> None:
    """That of this suite alone."""
    parser.add_argument("--batch", type=int, help="this batch size alone")


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    maps, batches = (QUICK_MAPS, [4]) if options.quick else (MAPS, BATCHES[device.type])
    names = tuple(name for name in PROVIDERS if name not in COMPILED or runs.compiles(options, device))
    found = [
        Trial(channels, side, batch, mode, dtype, names)
        for batch in ([options.batch] if options.batch else batches)
        for channels, side in maps
        for mode in (FORWARD, TRAINING)
    ]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """Nothing but rows in the result; and what measures a trial."""
    budget_s = QUICK_S if options.quick else BUDGET_S[device.type]
    return {}, lambda trial, number: measure(trial, device, budget_s)


SUITE = runs.Suite(
    "doubling", "doubling with the convolution after it", tuple(PROVIDERS), chosen_trials, start,
    runs.milliseconds_line, text, COMPILED, add_options, ("batch",),
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
