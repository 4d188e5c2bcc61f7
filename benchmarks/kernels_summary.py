"""What a run of kernels.py says: cmfast beside each rival, worst first, and the bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmfast.benchmarks import runs
from cmfast.benchmarks.cases import CASES
from cmfast.benchmarks.comparisons import TIE, Comparison, comparisons, table

Row = dict[str, Any]

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
#: Sizes at which nothing may be slower than inductor by more than TIE; nor may it on images from LARGE_BYTES on.
SPEED_SIZES = [((3, 64, 64), batch) for batch in (1, 64, 256)]


def line(trial: Any, found: runs.Found) -> str:
    """One configuration while a run goes on."""
    return runs.found_line(
        trial, found, [f"{row['provider']} {row['mode']} {row['p50_us']:.1f} us" for row in found["rows"]]
    )


def _name(row: Row) -> str:
    size = "x".join(str(n) for n in (row["batch"], *row["shape"]))
    layout = " channels_last" if row["channels_last"] else ""
    return f"{row['case']} {size} {row['state_dtype']}/{row['model_dtype']}{layout}"


def bars(result: dict[str, Any]) -> list[str]:
    """Each bar with what was measured: `met`, `MISSED`, or why it cannot be checked."""
    found = comparisons([result])
    if result["environment"]["device_type"] != "cuda":
        some = [c for c in found if c.row["provider"] == "cmfast" and c.rival == "reference"]
        return [_at_least(1 / CPU_BAR, some, f"at most {CPU_BAR} of the reference's time")]
    lines = []
    for case, least in BANDWIDTH_BARS.items():
        ours = [r for r in result["rows"] if r["provider"] == "cmfast" and r["case"] == case and _large(r)]
        if not ours:
            lines.append(f"not measured: {case}, tensors > {_large_bytes(case) / 1e6:.0f} MB")
        for row in ours:
            share = row["percent_of_copy"] / 100
            outcome = "met" if share >= least else "MISSED"
            lines.append(f"{outcome}: {_name(row)} at {share:.1%} of the copy bandwidth, bar {least:.0%}")
    for case, least in EAGER_BARS.items():
        beside = [c for c in found if c.row["case"] == case and c.rival == "reference" and _large(c.row)]
        if not beside:
            lines.append(f"not measured: {case} beside the reference, tensors > {_large_bytes(case) / 1e6:.0f} MB")
        for c in beside:
            outcome = "met" if c.p50 >= least else "MISSED"
            lines.append(f"{outcome}: {_name(c.row)} {c.p50:.1f} times as fast as the reference, bar {least:g}")
    images, maps = ([c for c in found if bool(CASES[c.row["case"]].sizes) == of_maps] for of_maps in (False, True))
    large_images = [c for c in images if c.row["largest_tensor_bytes"] > LARGE_BYTES]
    small_images = [c for c in images if (tuple(c.row["shape"]), c.row["batch"]) in SPEED_SIZES]
    large = f"on tensors > {LARGE_BYTES / 1e6:.0f} MB"
    for where, rival, some in (
        (large, "inductor", large_images), (large, "inductor_randn", large_images),
        ("at 3x64x64", "inductor", small_images), ("at 3x64x64", "inductor_randn", small_images),
        ("on maps", "inductor", maps),
    ):
        for mode in ("call", "graph"):
            lines.append(_at_least(
                1 / (1 + TIE), [c for c in some if c.rival == rival and c.row["mode"] == mode],
                f"at most {TIE:.0%} slower than {rival} {where}, {mode} mode",
            ))  # fmt: skip
    return lines


def _large_bytes(case: str) -> float:
    return LARGE_BYTES_OF.get(case, LARGE_BYTES)


def _large(row: Row) -> bool:
    """Whether it is about memory: in a graph, where no call costs, and of large tensors."""
    return row["mode"] == "graph" and row["largest_tensor_bytes"] > _large_bytes(row["case"])


def _at_least(least: float, some: Sequence[Comparison], what: str) -> str:
    slow = [c for c in some if c.p50 < least]
    names = "".join(f"\n    {_name(c.row)}: {c.p50:.3f}" for c in slow)
    outcome = "not measured" if not some else "MISSED" if slow else "met"
    return f"{outcome}: {what}: {len(some) - len(slow)} of {len(some)}{names}"


def text(result: dict[str, Any]) -> str:
    """The closing table."""
    out = ["", *runs.about(result), *filter(None, [result["about"]]), *table(comparisons([result])), ""]
    for row in result["rows"]:
        # Nobody gets it without asking: no rival, and no win.
        if row["provider"] == "kernel" and row["times_cmfast"]:
            out.append(f"kernel forced in a compiled region, times auto: {_name(row)}, {row['mode']}: "
                       f"{row['times_cmfast']['p50']:.3f}")
    return "\n".join([*out, *bars(result), *runs.leftovers(result)])
