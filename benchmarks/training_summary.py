"""What a run of training.py says: a table of its trials, what a step consists of, and the bars."""

from __future__ import annotations

from typing import Any

from cmfast.benchmarks import runs
from cmfast.benchmarks.comparisons import TIE

Row = dict[str, Any]

#: On a CPU: unet32, batch 16, distillation with l2, float32: so many times as fast as the original.
CPU_SPEEDUP = 1.3
#: On a GPU: imagenet64, batch 64, distillation with LPIPS: the same (bar, aim).
GPU_SPEEDUP = (1.6, 2.0)
CPU_BAR = {"network": "unet32", "batch": 16, "recipe": "cd", "loss_norm": "l2", "dtype": "float32"}
GPU_BAR = {"network": "imagenet64", "batch": 64, "recipe": "cd", "loss_norm": "lpips", "dtype": "bfloat16"}


def line(trial: Any, found: dict[str, Any]) -> str:
    """One trial while a run goes on."""
    return runs.found_line(
        trial,
        found,
        [f"{row['provider']} {row['p50_ms']:.1f} ms, {row['images_per_s']:.1f} images/s" for row in found["rows"]],
    )


def _where(row: Row) -> str:
    return f"{row['network']}, batch {row['batch']}, {row['recipe']} {row['loss_norm']}, {row['dtype']}"


def _pair(rows: list[Row], bar: Row, other: str) -> tuple[Row, Row] | None:
    """cmfast's row and another's of the same trial of a bar; the first such trial."""
    at = [row for row in rows if all(row[name] == value for name, value in bar.items())]
    ours = {row["trial"]: row for row in at if row["provider"] == "cmfast"}
    return next(((ours[r["trial"]], r) for r in at if r["provider"] == other and r["trial"] in ours), None)


def _speed(rows: list[Row], bar: Row, other: str, least: float, what: str) -> str:
    pair = _pair(rows, bar, other)
    where = _where(bar)
    if pair is None:
        return f"not measured: {what} ({where})"
    ratio = pair[1]["times_cmfast"]
    spread = f"{ratio['p50']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f} in single rounds)"
    return f"{'met' if ratio['p50'] >= least else 'MISSED'}: {what}: {spread} ({where})"


def _memory(rows: list[Row], bar: Row, other: str) -> str:
    """Both by what tensors take and by what the allocator has taken: a graph's memory shows in the second alone."""
    pair, what = _pair(rows, bar, other), f"peak memory no more than {other}'s"
    names = ("peak_allocated_bytes", "peak_bytes")
    if pair is None or not all(row.get(name) for row in pair for name in names):
        return f"not measured: {what} ({_where(bar)})"
    parts = [pair[0][name] / pair[1][name] for name in names]
    outcome = "met" if max(parts) <= 1 else "MISSED"
    return f"{outcome}: {what}: {parts[0]:.3f} allocated, {parts[1]:.3f} reserved ({_where(bar)})"


def bars(result: dict[str, Any]) -> list[str]:
    """Each bar with what was measured: `met`, `MISSED`, or `not measured`. What is missing never counts as met."""
    rows = result["rows"]
    if result["environment"]["device_type"] != "cuda":
        return [_speed(rows, CPU_BAR, "openai", CPU_SPEEDUP, f"at least {CPU_SPEEDUP} times as fast as openai")]
    least, aim = GPU_SPEEDUP
    return [
        _speed(rows, GPU_BAR, "openai", least, f"at least {least} times as fast as openai (aim {aim})"),
        _speed(rows, GPU_BAR, "inductor", 1 / (1 + TIE), f"at most {TIE:.0%} slower than inductor, as times as fast"),
        _memory(rows, GPU_BAR, "openai"),
    ]


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def table(rows: list[Row]) -> list[str]:
    """Markdown: a table of all rows, those of a trial by their times, and one of the parts of cmfast's steps."""
    lines = [
        "| trial | provider | computes in | p20 ms | p50 ms | p80 ms | images/s | x cmfast | TFLOP/s | first step s | "
        "peak GB | kernels |",
        "| --- | --- | --- " + "| ---: " * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["trial"], row["p50_ms"])):
        ratio = "" if row["times_cmfast"] is None else f"{row['times_cmfast']['p50']:.2f}"
        cells = [
            _where(row), row["provider"], row["computes_in"], *(f"{row[f'p{p}_ms']:.1f}" for p in (20, 50, 80)),
            f"{row['images_per_s']:.1f}", ratio, f"{row['tflop_per_s']:.2f}", f"{row['first_step_s']:.1f}",
            _gigabytes(row.get("peak_bytes")), str(row["kernels"] or ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    timed = [row for row in rows if row.get("phases_ms")]
    names = list(dict.fromkeys(name for row in timed for name in row["phases_ms"]))
    if timed:
        lines += ["", f"| cmfast, ms of a step | GFLOP | {' | '.join(names)} |"]
        lines += ["| --- " + "| ---: " * (len(names) + 1) + "|"]
    for row in timed:
        parts = [f"{row['phases_ms'][name]:.1f}" if name in row["phases_ms"] else "" for name in names]
        lines.append(f"| {_where(row)} | {row['gflop']:.0f} | {' | '.join(parts)} |")
    return lines


def text(result: dict[str, Any]) -> str:
    """The closing table."""
    out = ["", *runs.about(result), "", *table(result["rows"]), ""]
    return "\n".join([*out, *bars(result), *runs.leftovers(result)])
