"""What a billion images, or a training on a thousand GPUs, would take: the cost model of docs/scaling.md.

    python examples/scaling.py [--set NAME=VALUE ...]

Prints Markdown tables: sampling by seed or by index, communication of DDP and FSDP beside computing, where adding GPUs
stops helping, and how often to write a checkpoint. No GPU has run this code: every number below is counted, derived or
assumed, as its row says. Replace them by what you measure, such as `--set sample_ms=140 --set between_gb_s=320`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import product


def _given(value: float, kind: str, what: str) -> float:
    return field(default=value, metadata={"kind": kind, "what": what})


@dataclass(frozen=True)
class Inputs:
    """Of sampling and training ImageNet-64 on H100s. Times of a training step are those of `train_batch` images."""

    sample_ms: float = _given(152, "derived", "one network call on a batch")
    sample_batch: int = _given(256, "chosen", "images in it")
    image_bytes: int = _given(64 * 64 * 3, "counted", "pixels of an image in a file")
    shard_images: int = _given(50_000, "chosen", "images in a file of a sharded run")
    parameters: float = _given(295.9e6, "counted", "of the network")
    train_batch: int = _given(64, "chosen", "images per GPU and step, in one forward pass")
    matrices_ms: float = _given(179, "derived", "matrices of a distillation step")
    rest_ms: float = _given(41, "derived", "the rest of its networks, optimised: DDP")
    plain_rest_ms: float = _given(216, "derived", "the same as the original computes it: FSDP, which fuses nothing")
    lpips_ms: float = _given(18, "derived", "LPIPS")
    update_ms: float = _given(6.4, "derived", "optimizer and four averages, at any batch")
    global_batch: int = _given(2048, "published", "images per step of all GPUs, where that is fixed")
    total_steps: int = _given(600_000, "published", "steps of such a training")
    node_gpus: int = _given(8, "assumed", "GPUs that share a fast link")
    within_gb_s: float = _given(450, "assumed", "GB/s of a ring within a node: NVLink of an H100, nominal")
    between_gb_s: float = _given(400, "assumed", "GB/s of a ring between nodes: eight 400 Gb/s ports each, nominal")
    slow_gb_s: float = _given(50, "assumed", "the same with one port for each node")
    gathered_gb_s: float = _given(5, "assumed", "GB/s that one process receives on its host")
    written_gb_s: float = _given(1, "assumed", "GB/s at which one process writes a checkpoint, flushed")
    failure_hours: float = _given(50_000, "published", "GPU hours between failures: 419 in 54 days of 16,384 GPUs")
    restart_s: float = _given(300, "assumed", "seconds from a failure to the first new step")

    @property
    def images_per_s(self) -> float:
        """Of one GPU, in one step."""
        return 1000 * self.sample_batch / self.sample_ms

    def gpu_hours(self, images: float, steps: int) -> float:
        """To sample so many."""
        return images * steps / self.images_per_s / 3600

    @property
    def weight_bytes(self) -> float:
        """Of the float32 weights, or of their gradients."""
        return 4 * self.parameters

    def link(self, gpus: int, between: float) -> float:
        """GB/s of a ring of so many GPUs: its slowest link is what counts."""
        return self.within_gb_s if gpus <= self.node_gpus else between

    def ddp_ms(self, gpus: int, between: float) -> float:
        """Ring all-reduce of the gradients: 2 (n - 1) / n of their bytes leave each GPU."""
        return self._ring_ms(2, gpus, between)

    def fsdp_ms(self, gpus: int, between: float, images: float) -> float:
        """Weights gathered for each forward and each backward pass, gradients scattered once: (n - 1) / n of the bytes
        each. Networks without gradient are sharded too: the teacher is gathered for both its calls, the target for one.
        """
        passes = math.ceil(images / self.train_batch)
        return self._ring_ms((2 + 2 + 1) * passes + 1, gpus, between)

    def _ring_ms(self, times: int, gpus: int, between: float) -> float:
        return times * (gpus - 1) / gpus * self.weight_bytes / self.link(gpus, between) / 1e6

    def compute_ms(self, images: float, gpus: int = 1, *, fsdp: bool = False) -> float:
        """A step of so many images on each GPU. Small batches are slower than this, which is proportional."""
        rest = self.plain_rest_ms if fsdp else self.rest_ms
        work = (self.matrices_ms + rest + self.lpips_ms) * images / self.train_batch
        return work + self.update_ms / (gpus if fsdp else 1)

    def step_ms(self, images: float, gpus: int, between: float, *, overlap: bool, fsdp: bool = False) -> float:
        """Computing and communication: one after the other, or at once where that can be. FSDP gathers while anything
        is computed; DDP reduces during the last backward pass, a third of the time of six forward passes' worth."""
        compute = self.compute_ms(images, gpus, fsdp=fsdp)
        if fsdp:
            traffic, hidden = self.fsdp_ms(gpus, between, images), compute
        else:
            backward = (self.matrices_ms + self.rest_ms) / 3 * min(images / self.train_batch, 1)
            traffic, hidden = self.ddp_ms(gpus, between), backward
        return compute + max(0.0, traffic - hidden * overlap)

    def useful(self, gpus: int, between: float, *, overlap: bool, fsdp: bool = False) -> float:
        """The share of the GPUs' time that one GPU would need too, at a fixed batch of all."""
        alone = self.compute_ms(self.global_batch)
        return alone / gpus / self.step_ms(self.global_batch / gpus, gpus, between, overlap=overlap, fsdp=fsdp)

    @property
    def checkpoint_bytes(self) -> float:
        """Weights, four averages (the target is one) and the optimizer's two moments, in float32."""
        return (1 + 4 + 2) * self.weight_bytes

    @property
    def checkpoint_s(self) -> float:
        """To write it, by one process; the others wait."""
        return self.checkpoint_bytes / self.written_gb_s / 1e9

    def failure_s(self, gpus: int) -> float:
        """Seconds between two failures of so many GPUs."""
        return 3600 * self.failure_hours / gpus

    def best_interval_s(self, gpus: int) -> float:
        """Between checkpoints, sqrt(2 checkpoint failure): Young 1974."""
        return math.sqrt(2 * self.checkpoint_s * self.failure_s(gpus))

    def added(self, gpus: int, interval_s: float) -> float:
        """To each second of work: for writing, for steps done again (half an interval a failure), for restarts."""
        return self.checkpoint_s / interval_s + (interval_s / 2 + self.restart_s) / self.failure_s(gpus)


#: What is otherwise when sampling something else: input, value, kind.
OTHERS = {
    "LSUN-256": [("sample_ms", 392, "derived"), ("sample_batch", 64, "chosen"), ("image_bytes", 196_608, "counted")],
    "ImageNet-64 on two CPU cores": [("sample_ms", 390, "measured"), ("sample_batch", 1, "chosen")],
}
SIZES = (8, 64, 256, 1024)


def number(x: float) -> str:
    """Three digits, or whole numbers."""
    if 0 < x < 0.001:
        return "< 0.001"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table(heads: str, rows: Iterable[Iterable[object]]) -> str:
    """Markdown; numbers as `number` has them."""
    cells = [[number(x) if isinstance(x, int | float) else str(x) for x in row] for row in rows]
    lines = [heads, " | ".join(["---"] * (heads.count("|") + 1)), *(" | ".join(row) for row in cells)]
    return "\n".join(f"| {line} |" for line in lines)


def inputs(given: Inputs) -> str:
    known = {f.name: f.metadata for f in fields(given)}
    rows = [(f"`{name}`", getattr(given, name), kept["kind"], kept["what"]) for name, kept in known.items()]
    for other, values in OTHERS.items():
        rows += [(f"`{name}`, {other}", value, kind, known[name]["what"]) for name, value, kind in values]
    return table("input | value | kind | what", rows)


def sampling(given: Inputs) -> str:
    others = {other: {name: value for name, value, _ in values} for other, values in OTHERS.items()}
    cases = {"ImageNet-64": given, **{other: replace(given, **values) for other, values in others.items()}}
    rows = []
    for name, each in cases.items():
        for images in (50_000, 1_000_000_000):
            hours = [each.gpu_hours(images, steps) for steps in (1, 2)]
            files = math.ceil(images / each.shard_images)
            minutes = math.ceil(files / SIZES[-1]) * each.gpu_hours(each.shard_images, 1) * 60
            rows.append((name, images, *hours, images * each.image_bytes / 1e9, files, minutes))
    heads = "network | images | hours of one: 1 step | 2 steps | GB of pixels | files"
    return table(f"{heads} | minutes on {SIZES[-1]:,}, by whole files", rows)


def ways(given: Inputs) -> str:
    served = given.gathered_gb_s * 1e9 / (given.images_per_s * given.image_bytes)
    rows: list[tuple[object, ...]] = [
        (f"`cmfast sample`, {images:,} images", images * given.image_bytes / 1e9, served, "everything, of all GPUs")
        for images in (50_000, 1_000_000_000)
    ]
    shard_s = given.gpu_hours(given.shard_images, 1) * 3600
    held = given.shard_images * given.image_bytes / 1e9
    rows.append(("`examples/shards.py`", held, "any number", f"{number(shard_s)} s at most, of one GPU"))
    return table("way | GB of pixels in one process | GPUs it can serve | lost when a process dies", rows)


def training(given: Inputs) -> str:
    rows, images = [], given.train_batch
    for gpus in SIZES:
        links = (given.between_gb_s, given.slow_gb_s)
        compute = [given.compute_ms(images, gpus, fsdp=fsdp) for fsdp in (False, True)]
        ddp = given.parameters * 42 / 1e9, compute[0], *(given.ddp_ms(gpus, link) for link in links)
        fsdp = given.parameters * 36 / gpus / 1e9, compute[1], *(given.fsdp_ms(gpus, link, images) for link in links)
        rows.append((gpus, gpus * images, *ddp, *fsdp))
    fast, slow = number(given.between_gb_s), number(given.slow_gb_s)
    each = f"GB of state | ms computing | ms moving at {fast} GB/s | at {slow}"
    return table(f"GPUs | images a step | DDP: {each} | FSDP: {each}", rows)


def fixed(given: Inputs) -> str:
    rows = []
    for link in (given.between_gb_s, given.slow_gb_s):
        for gpus in (1, *SIZES):
            images = given.global_batch / gpus
            steps = [given.step_ms(images, gpus, link, overlap=overlap) for overlap in (False, True)]
            shares = [f"{given.useful(gpus, link, overlap=overlap):.0%}" for overlap in (False, True)]
            days = steps[1] * given.total_steps / 1000 / 86400
            moving = given.compute_ms(images), given.ddp_ms(gpus, link)
            rows.append((link, gpus, images, *moving, *steps, *shares, days))
    heads = "GB/s between nodes | GPUs | images each | ms computing | ms moving | ms a step: in turn | overlapped"
    return table(f"{heads} | useful: in turn | overlapped | days, overlapped", rows)


def limits(given: Inputs) -> str:
    def first(found: Iterable[int]) -> str:
        return next(map(number, found), f"none to {number(given.global_batch)}")

    rows, total = [], given.global_batch
    # Those that share a fixed batch evenly, as `train` asks for.
    sizes = [n for n in range(1, total + 1) if total % n == 0]
    for name, link, overlap in product(("DDP", "FSDP"), (given.between_gb_s, given.slow_gb_s), (False, True)):
        options = {"overlap": overlap, "fsdp": name == "FSDP"}
        waits = {
            n: given.step_ms(total / n, n, link, **options) / given.compute_ms(total / n, n, fsdp=options["fsdp"]) - 1
            for n in sizes
        }
        useful = {n: given.useful(n, link, **options) for n in sizes}
        more, less = first(n for n in sizes if waits[n] > 1), first(n for n in sizes if useful[n] < 0.5)
        rows.append((name, link, "overlapped" if overlap else "in turn", more, less))
    heads = "way | GB/s between nodes | moving is | GPUs from which waiting exceeds computing"
    return table(f"{heads} | GPUs from which less than half is useful", rows)


def checkpoints(given: Inputs) -> str:
    rows = []
    for gpus in SIZES:
        step_s = given.step_ms(given.global_batch / gpus, gpus, given.between_gb_s, overlap=True) / 1000
        best = given.best_interval_s(gpus)
        added = [f"{given.added(gpus, interval):.2%}" for interval in (best, 1000 * step_s)]
        rows.append((gpus, given.failure_s(gpus) / 3600, best / 60, round(best / step_s, -2), *added))
    size, seconds = number(given.checkpoint_bytes / 1e9), number(given.checkpoint_s)
    heads = f"GPUs | hours between failures | best interval for {size} GB in {seconds} s: minutes | steps"
    return table(f"{heads} | time added | time added with 1,000 steps", rows)


def report(given: Inputs) -> str:
    """All tables."""
    return "\n\n".join(make(given) for make in (inputs, sampling, ways, training, fixed, limits, checkpoints))


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    kinds = {f.name: type(f.default) for f in fields(Inputs)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"there is no input {name!r}; there are {', '.join(kinds)}")
    return name, int(value) if kinds[name] is int and value.isdecimal() else float(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE", help="another input")
    print(report(Inputs(**dict(parser.parse_args(arguments).set))))


if __name__ == "__main__":
    main()
