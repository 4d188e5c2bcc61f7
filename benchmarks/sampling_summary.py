"""What a run of sampling.py says: a table of its trials, and the bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cmfast.benchmarks import runs
from cmfast.benchmarks.comparisons import TIE

Row = dict[str, Any]

#: On a GPU, of one step with ImageNet-64's network: milliseconds for one image, images per second at batch 256; each
#: as (bar, aim).
LATENCY_MS = (2.0, 1.0)
IMAGES_PER_S = (1600.0, 2000.0)
#: Memory at batch 256, at most so many times that of the weights and of what lives in a forward pass.
MEMORY_FACTOR = 1.2
#: Kernels of one forward pass, counted: the least there can be, fused (`tests/kernels/test_optimize.py`), the original.
KERNELS = {"floor": 260, "fused": 370, "original": 1182}
#: On a CPU: at most so many times the convolutions alone, at least so many times as fast as the original.
CONVOLUTIONS_FACTOR = 1.06
ORIGINAL_FACTOR = 1.2


def line(trial: Any, found: dict[str, Any]) -> str:
    """One trial while a run goes on."""
    return runs.found_line(
        trial, found, [f"{row['provider']} {row['mode']} {row['p50_ms']:.2f} ms" for row in found["rows"]]
    )


def _one_step(rows: list[Row]) -> list[Row]:
    return [row for row in rows if (row["sampler"], row["steps"]) == ("multistep", 1)]


def _pick(rows: list[Row], provider: str, batch: int, mode: str) -> Row | None:
    """The fastest of the rows of a provider, which is in several trials."""
    some = [r for r in _one_step(rows) if (r["provider"], r["batch"], r["mode"]) == (provider, batch, mode)]
    return min(some, key=lambda row: row["p50_ms"], default=None)


def ratios(rows: list[Row], ours: str, other: str) -> list[tuple[Row, float]]:
    """Rows of `ours` with their p50 as a part of the other's, timed in turn with it."""
    found = []
    by_key = {(r["trial"], r["mode"]): r for r in rows if r["provider"] == other}
    for row in _one_step(rows):
        if row["provider"] == ours and (row["trial"], row["mode"]) in by_key:
            rival = by_key[row["trial"], row["mode"]]
            if ours == "cmfast" and rival["times_cmfast"]:
                found.append((row, 1 / rival["times_cmfast"]["p50"]))
            else:
                found.append((row, row["p50_ms"] / rival["p50_ms"]))
    return found


def _against(
    rows: list[Row], ours: str, other: str, what: str, most: float, show: Callable[[float], str] = "{:.3f}".format
) -> list[str]:
    """A bar on a ratio of times, for each batch and mode where both were timed."""
    found = ratios(rows, ours, other)
    if not found:
        return [f"not measured: {ours} {what}"]
    return [
        f"{'met' if ratio <= most else 'MISSED'}: {ours} {what}: {show(ratio)} ({row['name']}, {row['mode']})"
        for row, ratio in found
    ]


def bars(result: dict[str, Any]) -> list[str]:
    """Each bar with what was measured: `met`, `MISSED`, or `not measured`."""
    if result["network"] != "imagenet64":
        return [f"no bars: they are about the network imagenet64, and this is {result['network']}"]
    return _gpu_bars(result) if result["environment"]["device_type"] == "cuda" else _cpu_bars(result["rows"])


def _gpu_bars(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    lines = []
    single = _pick(rows, "cmfast", 1, "latency")
    bar, aim = LATENCY_MS
    name = f"batch 1, one step, at most {bar} ms (aim {aim})"
    if single is None:
        lines.append(f"not measured: {name}")
    else:
        lines.append(f"{'met' if single['p50_ms'] <= bar else 'MISSED'}: {name}: {single['p50_ms']:.3f} ms")
    large = _pick(rows, "cmfast", 256, "throughput")
    least, aim = IMAGES_PER_S
    name = f"batch 256, one step, at least {least:.0f} images/s (aim {aim:.0f})"
    if large is None:
        lines.append(f"not measured: {name}")
    else:
        lines.append(f"{'met' if large['images_per_s'] >= least else 'MISSED'}: {name}: {large['images_per_s']:.0f}")
    what = f"at most {TIE:.0%} slower than diffusers_compile"
    lines += _against(rows, "cmfast", "diffusers_compile", what, 1 + TIE)
    name = f"memory at batch 256 at most {MEMORY_FACTOR} times weights + what lives in a forward pass"
    if large is None or not large.get("peak_bytes"):
        lines.append(f"not measured: {name}")
    else:
        needed = result["weight_bytes"] + result["liveness_bytes"]["256"]
        factor = large["peak_bytes"] / needed
        outcome = "met" if factor <= MEMORY_FACTOR else "MISSED"
        lines.append(f"{outcome}: {name}: {factor:.3f} ({large['peak_bytes'] / 1e9:.2f} of {needed / 1e9:.2f} GB)")
    known = ", ".join(f"{kind} {count}" for kind, count in KERNELS.items())
    counted = [r for r in (single, _pick(rows, "reference", 1, "latency")) if r is not None and r.get("kernels")]
    found = ", ".join(f"{r['provider']} {r['kernels']}" for r in counted) or "not measured"
    return [*lines, f"kernels for one image, one step: {found} (counted for the network: {known})"]


def _cpu_bars(rows: list[Row]) -> list[str]:
    speedup: Callable[[float], str] = lambda ratio: f"{1 / ratio:.3f}"  # noqa: E731
    tie = f"at most {TIE:.0%} slower than"
    return [
        *_against(rows, "cmfast", "convolutions", f"at most {CONVOLUTIONS_FACTOR} times its packed convolutions alone",
                  CONVOLUTIONS_FACTOR),
        *_against(rows, "cmfast", "openai", f"at least {ORIGINAL_FACTOR} times as fast as openai", 1 / ORIGINAL_FACTOR,
                  speedup),
        *_against(rows, "cmfast_compile", "cmfast", f"{tie} cmfast", 1 + TIE),
        *_against(rows, "cmfast_compile", "openai_compile", f"{tie} openai_compile", 1 + TIE),
    ]


def _table(rows: list[Row]) -> list[str]:
    lines = []
    for number in dict.fromkeys(row["trial"] for row in rows):
        trial = [row for row in rows if row["trial"] == number]
        lines += ["", f"{trial[0]['name']:42} mode         p20 ms    p50 ms    p80 ms  images/s  first call s  "
                      "peak GB  kernels"]
        for row in sorted(trial, key=lambda row: (row["mode"], row["p50_ms"])):
            rate = "" if row["images_per_s"] is None else f"{row['images_per_s']:.2f}"
            peak = f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else ""
            kernels = row.get("kernels") or ""
            lines.append(
                f"    {row['provider']:28} {row['mode']:10} {row['p20_ms']:8.2f}  {row['p50_ms']:8.2f}  "
                f"{row['p80_ms']:8.2f}  {rate:>8}  {row['first_call_s']:12.1f}  {peak:>7}  {kernels:>7}"
            )
    return lines


def text(result: dict[str, Any]) -> str:
    """The closing table."""
    live = ", ".join(f"{int(size) / 1e9:.3f} GB at batch {batch}" for batch, size in result["liveness_bytes"].items())
    out = [
        "",
        *runs.about(result),
        f"{result['network']}: weights {result['weight_bytes'] / 1e9:.3f} GB; alive in a forward pass: {live}",
        *_table(result["rows"]),
        "",
    ]
    return "\n".join([*out, *bars(result), *runs.leftovers(result)])
