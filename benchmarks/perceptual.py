"""Times of the LPIPS loss, distance and gradient of one image, beside piq and torch.compile. Trunk weights are random.

    python benchmarks/perceptual.py --out DIR [--batch N] [--providers NAMES] [--seconds N] [--device cuda|cpu]
    python benchmarks/perceptual.py --report DIR/perceptual-....json      the closing table again
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if not __package__:
    # Run as a file. This folder must not be searched first: its `kernels` is another project's import name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor

import cmfast
from benchmarks import timing
from benchmarks.kernels import inductor_refusal, reason_of
from benchmarks.original import Missing
from benchmarks.record import Record
from cmfast.perceptual import LPIPS
from tests.tolerances import FLOOR

#: Images of 64x64 in a batch, by device, and seconds of samples of each.
BATCHES = {"cuda": [64, 8], "cpu": [4]}
BUDGET_S = {"cuda": 3.0, "cpu": 30.0}

#: (x, target) -> distances [B].
Distance = Callable[[Tensor, Tensor], Tensor]


def _in(backend: str, distance: Distance) -> Distance:
    def call(x: Tensor, y: Tensor) -> Tensor:
        with cmfast.backend(backend):
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
    "eager": (lambda model: _in("reference", model), True),
    "inductor": (lambda model: _in("reference", torch.compile(model, dynamic=False)), True),
    "cmfast": (lambda model: _in("auto", model), True),
    "cmfast_float32": (lambda model: _in("auto", model), False),
}


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


def measure(
    batch: int, wanted: list[str] | None, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows and failures of one batch size."""
    x, y = images(batch, device)
    stopwatch, slices, about, failures = timing.Stopwatch(device), {}, {}, []
    for name, (maker, by_default) in PROVIDERS.items():
        if wanted is not None and name not in wanted:
            continue
        if (name == "inductor" and inductor_refusal(device)) or (name == "cmfast_float32" and device.type == "cpu"):
            continue
        torch._dynamo.reset()
        model = make(device, None if by_default else torch.float32)
        try:
            distance = maker(model)
            reason = wrong(distance, model, batch)
        except Exception as error:
            reason = reason_of(error)
        if reason is not None:
            failures.append({"batch": str(batch), "provider": name, "reason": reason})
            continue
        dtype = str(next(model.trunk.buffers()).dtype).removeprefix("torch.")
        about[name] = {"dtype": dtype, "peak_bytes": _peak(distance, x, y)}
        slices[name] = timing.sliced(
            stopwatch, lambda count, distance=distance: [step(distance, x, y) for _ in range(count)]
        )
    rows = [
        {"batch": batch, "provider": name, **about[name], **timing.statistics_us(samples)}
        for name, samples in timing.interleave(slices, BUDGET_S[device.type], (5, 1000)).items()
    ]
    return rows, failures


def _peak(distance: Distance, x: Tensor, y: Tensor) -> int | None:
    """Device memory that a call takes at most."""
    if not x.is_cuda:
        return None
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    step(distance, x, y)
    return torch.cuda.max_memory_allocated(x.device) - before


def table(result: dict[str, Any]) -> str:
    """Each provider, as times of cmfast's."""
    ours = {row["batch"]: row["p50_us"] for row in result["rows"] if row["provider"] == "cmfast"}
    lines = []
    for row in result["rows"]:
        times = f"  {row['p50_us'] / ours[row['batch']]:.2f} x cmfast" if row["batch"] in ours else ""
        memory = f"  {row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else ""
        rate = row["batch"] / row["p50_us"] * 1e6
        lines.append(
            f"batch {row['batch']:3}  {row['provider']:14} {row['dtype']:8} {row['p50_us'] / 1e3:10.2f} ms "
            f"{rate:9.1f} images/s{times}{memory}"
        )
    lines += [f"FAILED batch {f['batch']} {f['provider']}: {f['reason']}" for f in result["failures"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a provider was off or failed; one whose package is missing has not."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="benchmarks/perceptual.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the JSON file")
    parser.add_argument("--batch", type=int, help="this batch size alone")
    parser.add_argument("--providers", type=lambda text: text.split(","), help=f"of {','.join(PROVIDERS)}")
    parser.add_argument("--seconds", type=float, help="start no new batch size after so many seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the closing table of an earlier run")
    options = parser.parse_args(argv)
    if options.report:
        print(table(json.loads(options.report.read_text())))
        return 0
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    words = ["python", "benchmarks/perceptual.py", "--device", device.type]
    words += ["--batch", str(options.batch)] if options.batch else []
    words += ["--providers", ",".join(options.providers)] if options.providers else []
    record = Record("perceptual", options.out, device, shlex.join(words))
    result = record.result
    for batch in [options.batch] if options.batch else BATCHES[device.type]:
        if options.seconds is not None and time.perf_counter() - start > options.seconds:
            result["truncated"] = True
            result["not_started"].append(f"batch {batch}")
            continue
        rows, failures = measure(batch, options.providers, device)
        result["rows"] += rows
        result["failures"] += failures
        record.write()
    print(table(result))
    print(f"written: {record.path}")
    return int(any(not failure["reason"].startswith("Missing: ") for failure in result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
