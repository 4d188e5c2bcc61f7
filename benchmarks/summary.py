"""What a run says: cmfast against each baseline, worst first, and the bars."""

from __future__ import annotations

from typing import Any

from cmfast.benchmarks import runs
from cmfast.benchmarks.cases import CASES
from cmfast.benchmarks.comparisons import TIE

Row = dict[str, Any]

#: What a user gets: the operation, alone or inside a compiled region; and there the kernel, were it forced.
OURS = ("cmfast", "auto", "kernel")
BASELINES = ("inductor", "inductor_randn", "reference")
#: Tensors from here on must come near the bandwidth of a copy.
LARGE_BYTES = 100e6
#: Least share of the copy bandwidth for large tensors.
BANDWIDTH_BARS = {
    "denoise": 0.92,
    "euler_step": 0.92,
    "heun_predictor": 0.92,
    "heun_corrector": 0.92,
    "weighted_loss l2": 0.92,
    "weighted_loss huber": 0.92,
    "renoise drawn": 0.85,
    "group_norm_silu": 0.80,
    "group_norm_silu on chip": 0.80,
    "lpips_layer": 0.80,
    "lpips_layer + backward": 0.80,
}
#: Where that is asked of smaller tensors too.
LARGE_BYTES_OF = dict.fromkeys(
    ("group_norm_silu", "group_norm_silu on chip", "lpips_layer", "lpips_layer + backward"), 32e6
)
#: There, so many times as fast as plain PyTorch at least.
EAGER_BARS = {"lpips_layer + backward": 5.0}
#: On a CPU, at most so many times the reference's time.
CPU_BAR = 1.05
#: Sizes at which nothing may be slower than inductor by more than TIE.
SPEED_SIZES = [((3, 64, 64), batch) for batch in (1, 64, 256)]


def line(trial: Any, found: runs.Found) -> str:
    """One configuration while a run goes on."""
    return runs.found_line(
        trial, found, [f"{row['provider']} {row['mode']} {row['p50_us']:.1f} us" for row in found["rows"]]
    )


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(
        tuple(row[k]) if k == "shape" else row[k]
        for k in ("case", "shape", "batch", "state_dtype", "model_dtype", "channels_last", "mode")
    )


def _name(row: Row) -> str:
    size = "x".join(str(n) for n in (row["batch"], *row["shape"]))
    layout = " channels_last" if row["channels_last"] else ""
    return f"{row['case']} {size} {row['state_dtype']}/{row['model_dtype']}{layout}"


def verdict(ratio: float) -> str:
    """
    >>> verdict(0.9), verdict(1.02), verdict(1.05)
    ('win', 'tie', 'LOSS')
    """
    return "win" if ratio < 1 - TIE else "tie" if ratio <= 1 + TIE else "LOSS"


def comparisons(rows: list[Row]) -> list[Row]:
    """Every row of `OURS` beside each baseline, the worst ratio of p50 first."""
    by_key: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault(_key(row), {})[row["provider"]] = row
    found = []
    for providers in by_key.values():
        for name in OURS:
            for baseline in BASELINES:
                if name in providers and baseline in providers:
                    ours, other = providers[name], providers[baseline]
                    # The median of the rounds' ratios; of its own rows where another name is cmfast's there.
                    known = other["times_cmfast"] if name != "kernel" else None
                    ratio = 1 / known["p50"] if known else ours["p50_us"] / other["p50_us"]
                    found.append({"row": ours, "provider": name, "baseline": baseline, "ratio": ratio,
                                  "baseline_us": other["p50_us"], "verdict": verdict(ratio)})
    return sorted(found, key=lambda c: -c["ratio"])


def bars(result: dict[str, Any]) -> list[str]:
    """Each bar with what was measured: `met`, `MISSED`, or why it cannot be checked."""
    if result["environment"]["device_type"] != "cuda":
        return _cpu_bar(comparisons(result["rows"]))
    rows = [row for row in result["rows"] if row["provider"] == "cmfast"]
    lines = []
    for case, least in BANDWIDTH_BARS.items():
        least_bytes = LARGE_BYTES_OF.get(case, LARGE_BYTES)
        large = [r for r in rows if r["case"] == case and r["mode"] == "graph"
                 and r["largest_tensor_bytes"] > least_bytes]
        if not large:
            lines.append(f"not measured: {case}, tensors > {least_bytes / 1e6:.0f} MB")
        for row in large:
            share = row["percent_of_copy"] / 100
            outcome = "met" if share >= least else "MISSED"
            lines.append(f"{outcome}: {_name(row)} at {share:.1%} of the copy bandwidth, bar {least:.0%}")
    compared = [c for c in comparisons(result["rows"]) if c["provider"] != "kernel"]
    for case, least in EAGER_BARS.items():
        for c in compared:
            large = c["row"]["largest_tensor_bytes"] > LARGE_BYTES_OF.get(case, LARGE_BYTES)
            if c["row"]["case"] == case and c["baseline"] == "reference" and c["row"]["mode"] == "graph" and large:
                outcome = "met" if c["ratio"] * least <= 1 else "MISSED"
                name, times = _name(c["row"]), 1 / c["ratio"]
                lines.append(f"{outcome}: {name} {times:.1f} times as fast as the reference, bar {least:g}")
    images = [c for c in compared if (tuple(c["row"]["shape"]), c["row"]["batch"]) in SPEED_SIZES]
    maps = [c for c in compared if CASES[c["row"]["case"]].sizes]
    for what, baseline, found in (
        ("at 3x64x64", "inductor", images), ("at 3x64x64", "inductor_randn", images), ("on maps", "inductor", maps),
    ):
        for mode in ("call", "graph"):
            some = [c for c in found if c["baseline"] == baseline and c["row"]["mode"] == mode]
            slow = [c for c in some if c["verdict"] == "LOSS"]
            names = "".join(f"\n    {_name(c['row'])}: {c['ratio']:.3f}" for c in slow)
            outcome = "not measured" if not some else "MISSED" if slow else "met"
            lines.append(f"{outcome}: at most {TIE:.0%} slower than {baseline} {what}, {mode} mode: "
                         f"{len(some) - len(slow)} of {len(some)}{names}")
    return lines


def _cpu_bar(found: list[Row]) -> list[str]:
    some = [c for c in found if c["provider"] == "cmfast" and c["baseline"] == "reference"]
    slow = [c for c in some if c["ratio"] > CPU_BAR]
    names = "".join(f"\n    {_name(c['row'])}: {c['ratio']:.3f}" for c in slow)
    outcome = "not measured" if not some else "MISSED" if slow else "met"
    return [f"{outcome}: at most {CPU_BAR} of the reference's time: {len(some) - len(slow)} of {len(some)}{names}"]


def text(result: dict[str, Any]) -> str:
    """The closing table."""
    found = comparisons(result["rows"])
    out = ["", *runs.about(result), *filter(None, [result["about"]])]
    widest = max([len(_name(c["row"])) for c in found], default=4)
    out += ["", f"{'cmfast / baseline, worst first':{widest}}  mode   provider baseline        ratio  verdict"
                "       us  baseline us  % of copy"]
    for c in [*(c for c in found if c["provider"] != "kernel"), *(c for c in found if c["provider"] == "kernel")]:
        row = c["row"]
        out.append(
            f"{_name(row):{widest}}  {row['mode']:5}  {c['provider']:8} {c['baseline']:14} {c['ratio']:6.3f}  "
            f"{c['verdict']:7} {row['p50_us']:8.2f} {c['baseline_us']:12.2f} {row['percent_of_copy']:10.1f}"
        )
    verdicts = [c["verdict"] for c in found if c["provider"] != "kernel"]
    wins, ties, losses = (verdicts.count(kind) for kind in ("win", "tie", "LOSS"))
    out += ["", f"{wins} wins, {ties} ties (within {TIE:.0%}), {losses} losses; rows of `kernel`, which nobody gets "
            "without asking, are not counted", ""]
    return "\n".join([*out, *bars(result), *runs.leftovers(result)])
