"""Times of the LPIPS loss, distance and gradient of one image, beside piq and torch.compile. Trunk weights are random.

    python -m cmfast.benchmarks.perceptual --out DIR [--batch N] [--providers NAMES] [--seconds N] [--device cuda|cpu]
    python -m cmfast.benchmarks.perceptual --report DIR/perceptual-....json      the closing table again
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import ops
from cmfast.benchmarks import runs, timing
from cmfast.benchmarks.kernels import inductor_refusal
from cmfast.benchmarks.original import Missing
from cmfast.perceptual import LPIPS
from cmfast.tolerances import FLOOR

#: Images of 64x64 in a batch, by device, and seconds of samples of each.
BATCHES = {"cuda": [64, 8], "cpu": [4]}
BUDGET_S = {"cuda": 3.0, "cpu": 30.0}

#: (x, target) -> distances [B].
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """Who is timed on a batch of images."""

    batch: int
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"batch {self.batch}"

    def __str__(self) -> str:
        return self.name


def _in(backend: str, distance: Distance) -> Distance:
    def call(x: Tensor, y: Tensor) -> Tensor:
        with ops.backend(backend):
            return distance(x, y)

    return call


def _piq(model: LPIPS) -> Distance:
    """The original's: resized to 224, then piq's LPIPS, here with the weights of `model`."""
    if not find_spec("piq"):
        raise Missing("piq is not installed for this Python")
    import piq
    import torchvision

    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    features.to_empty(device="cpu")
    for layer, ours in zip(features, model.trunk):
        layer.load_state_dict({name: buffer.float().cpu() for name, buffer in ours.named_buffers()})
    heads = [head.view(1, -1, 1, 1).cpu() for head in model.heads.split([64, 128, 256, 512, 512])]
    trunk = SimpleNamespace(features=features)
    with (
        mock.patch.object(torch.hub, "load_state_dict_from_url", lambda *arguments, **options: heads),
        mock.patch.object(piq.perceptual, "vgg16", lambda *arguments, **options: trunk),
    ):
        peer = piq.LPIPS(replace_pooling=True, reduction="none").to(model.heads.device)

    def call(x: Tensor, y: Tensor) -> Tensor:
        x, y = (F.interpolate(image, size=224, mode="bilinear") for image in (x, y))
        return peer((x + 1) / 2.0, (y + 1) / 2.0)

    return call


#: What makes each provider of a module in float32, and whether it runs in the dtype of the default instead.
PROVIDERS: dict[str, tuple[Callable[[LPIPS], Distance], bool]] = {
    "piq": (_piq, False),
    "reference": (lambda model: _in("reference", model), True),
    "inductor": (lambda model: _in("reference", torch.compile(model, dynamic=False)), True),
    "cmfast": (lambda model: _in("auto", model), True),
    "cmfast_float32": (lambda model: _in("auto", model), False),
}


#: Those that take minutes to start.
COMPILED = ("inductor",)


def make(device: torch.device, dtype: torch.dtype | None) -> LPIPS:
    """VGG-16 with average pooling; the same weights each time, rounded to the dtype."""
    torch.manual_seed(0)
    return LPIPS("vgg", pretrained=False, dtype=dtype).to(device)


def step(distance: Distance, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distances, and the gradient of their sum."""
    x = x.detach().requires_grad_()
    made = distance(x, y)
    return made.detach(), torch.autograd.grad(made.sum(), x)[0]


def images(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(batch, 3, 64, 64, generator=generator), torch.randn(batch, 3, 64, 64, generator=generator)
    x = x * 2 - 1
    return x.to(device), (x + 0.3 * noise).clamp(-1, 1).to(device)


def wrong(distance: Distance, model: LPIPS, batch: int) -> str | None:
    """The correctness gate, one image of the batch against float64: what is off beyond twice what plain PyTorch in the
    same dtype is, and the floor."""
    x, y = images(batch, model.heads.device)
    double = copy.deepcopy(model).double()
    exact = step(_in("reference", double), x[:1].double(), y[:1].double())
    plain = step(_in("reference", model), x[:1], y[:1])
    made = step(distance, x, y)
    dtype = next(model.trunk.buffers()).dtype
    for name, value, other, right in zip(("distance", "gradient"), made, plain, exact):
        error, plain_error = (((v[:1].double() - right).norm() / right.norm()).item() for v in (value, other))
        if not error <= 2 * plain_error + FLOOR[dtype]:
            return f"{name}: relative error {error:.3g}, allowed {2 * plain_error + FLOOR[dtype]:.3g}"
    return None


def measure(trial: Trial, device: torch.device, budget_s: float) -> runs.Found:
    """Rows, failures and missing providers of one batch size."""
    x, y = images(trial.batch, device)
    stopwatch, about = timing.Stopwatch(device), {}
    slices: dict[str, Callable[[], float]] = {}
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    for name in trial.providers:
        maker, by_default = PROVIDERS[name]
        refusal = runs.left_out(slices) or (inductor_refusal(device) if name == "inductor" else None)
        torch._dynamo.reset()
        try:
            if refusal:
                raise Missing(refusal)
            model = make(device, None if by_default else torch.float32)
            distance = maker(model)
            reason = wrong(distance, model, trial.batch)
            if reason is None:
                dtype = str(next(model.trunk.buffers()).dtype).removeprefix("torch.")
                about[name] = {"dtype": dtype, "peak_bytes": _peak(distance, x, y)}

                def steps(count: int, distance: Distance = distance) -> list[Any]:
                    return [step(distance, x, y) for _ in range(count)]

                slices[name] = timing.sliced(stopwatch, steps)
        except Missing as missing:
            found["missing"][name] = str(missing)
            continue
        except Exception as error:
            reason = timing.reason_of(error)
        if reason is not None:
            found["failures"].append({"trial": str(trial), "provider": name, "reason": reason})
    samples, broken = timing.interleave(slices, budget_s, (5, 1000))
    found["failures"] += [{"trial": str(trial), "provider": name, "reason": broken[name]} for name in broken]
    found["rows"] = [
        {"batch": trial.batch, "provider": name, **about[name], **timing.statistics_us(times),
         "times_cmfast": timing.times_of(times, samples.get("cmfast"))}
        for name, times in samples.items()
    ]  # fmt: skip
    return found


def _peak(distance: Distance, x: Tensor, y: Tensor) -> int | None:
    """Device memory that a call takes at most."""
    if not x.is_cuda:
        return None
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    step(distance, x, y)
    return torch.cuda.max_memory_allocated(x.device) - before


def text(result: dict[str, Any]) -> str:
    """Each provider, as times of cmfast's."""
    lines = ["", *runs.about(result), ""]
    for row in result["rows"]:
        times = f"  {row['times_cmfast']['p50']:.2f} x cmfast" if row["times_cmfast"] else ""
        memory = f"  {row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else ""
        rate = row["batch"] / row["p50_us"] * 1e6
        lines.append(
            f"batch {row['batch']:3}  {row['provider']:14} {row['dtype']:8} {row['p50_us'] / 1e3:10.2f} ms "
            f"{rate:9.1f} images/s{times}{memory}"
        )
    return "\n".join([*lines, *runs.leftovers(result)])


def add_options(parser: argparse.ArgumentParser) -> None:
    """That of this suite alone."""
    parser.add_argument("--batch", type=int, help="this batch size alone")


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line."""
    if options.quick and device.type == "cpu":
        return []  # One image takes a second.
    # Of the default's dtype there is only one on a CPU.
    names = tuple(name for name in PROVIDERS if not (name == "cmfast_float32" and device.type == "cpu"))
    batches = [options.batch] if options.batch else BATCHES[device.type]
    if device.type == "cpu":
        found = [Trial(batch, names) for batch in batches]
    else:
        # Apart from the rest, which would be lost with what compiles for too long.
        found = [Trial(batch, tuple(name for name in names if name not in COMPILED)) for batch in batches]
        found += [Trial(batch, (*COMPILED, "cmfast")) for batch in batches if runs.compiles(options, device)]
    return runs.of_providers(found, options.providers, dataclasses.replace)


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """Nothing but rows in the result; and what measures a trial."""
    return {}, lambda trial, number: measure(trial, device, BUDGET_S[device.type])


SUITE = runs.Suite(
    "perceptual", "the LPIPS loss with its gradient", tuple(PROVIDERS), chosen_trials, start,
    runs.milliseconds_line, text, COMPILED, add_options, ("batch",),
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
