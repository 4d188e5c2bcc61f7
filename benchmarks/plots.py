"""The plots of results: speed beside rivals, latency against batch size, the share of what the device can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmfast.benchmarks.comparisons import case_of, comparisons, milliseconds
from cmfast.benchmarks.providers import Trial

Results = list[dict[str, Any]]
#: One colour for each provider in every plot.
COLOURS = {
    "cmfast": "#c0392b", "reference": "#7f8c8d", "openai": "#2e86c1", "diffusers": "#28b463", "inductor": "#9b59b6"
}  # fmt: skip
OTHER = "#bbbbbb"
#: Bars of a plot of speed at most: the best and the worst of each suite would not fit a page.
BARS = 40


def draw(devices: dict[str, Results], folder: Path) -> list[Path]:
    """Every plot of every device, as PNG; their paths. Raises: ImportError: matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    kinds: dict[str, Callable[[Any, Results], bool]] = {"speed": speed, "latency": latency, "roofline": roofline}
    for device, results in devices.items():
        for name, drawn in kinds.items():
            figure = pyplot.figure(figsize=(8, 5))
            if drawn(figure, results):
                path = folder / f"{name}-{device}.png"
                figure.tight_layout()
                figure.savefig(path, dpi=70, metadata={"Software": None}, bbox_inches="tight")
                paths.append(path)
            pyplot.close(figure)
    return paths


def speed(figure: Any, results: Results) -> bool:
    """Bars: how many times as long as cmfast a rival takes, p20 to p80 as a line; the worst below."""
    found = [c for c in comparisons(results) if c.suite != "kernels"][:BARS]
    if not found:
        return False
    figure.set_size_inches(9, 1 + 0.24 * len(found))
    axes = figure.add_subplot()
    for i, c in enumerate(found):
        axes.barh(i, c.p50, color=COLOURS.get(c.rival, OTHER))
        axes.plot([c.p20, c.p80], [i, i], color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{c.suite} {c.case}: {c.rival}" for c in found], fontsize=6)
    rivals = {c.rival for c in found}
    for provider, colour in [*COLOURS.items(), ("others", OTHER)]:
        if provider in rivals or (provider == "others" and rivals - COLOURS.keys()):
            axes.plot([], [], "s", color=colour, label=provider)
    axes.legend(fontsize=7, loc="lower right")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time, as a multiple of cmfast's (right of the line: cmfast is faster)")
    return True


def latency(figure: Any, results: Results) -> bool:
    """Lines: milliseconds of one step against batch size, both logarithmic."""
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        for row in result["rows"] if result["suite"] == "sampling" and result["network"] == "imagenet64" else ():
            one_step = (row["name"], row["mode"]) == (Trial(row["batch"], ()).name, "latency")
            if one_step and row["provider"] in COLOURS:
                line = lines.setdefault(row["provider"], {})
                line[row["batch"]] = min(milliseconds(row), line.get(row["batch"], float("inf")))
    if not any(len(line) > 1 for line in lines.values()):
        return False
    axes = figure.add_subplot()
    for provider, line in lines.items():
        batches = sorted(line)
        axes.loglog(batches, [line[b] for b in batches], "o-", label=provider, color=COLOURS[provider], base=2)
    axes.set_xlabel("batch size")
    axes.set_ylabel("ms from noise to pixels, ImageNet-64, one step")
    axes.legend()
    return True


def roofline(figure: Any, results: Results) -> bool:
    """Points: bytes that must move against the share of the copy bandwidth; and networks' share of the matrix rate."""
    left, right = figure.subplots(1, 2)
    points, bars = 0, []
    for result in results:
        for row in result["rows"]:
            colour = COLOURS.get(row["provider"])
            if colour and row.get("percent_of_copy") is not None:
                left.semilogx(row["floor_bytes"], row["percent_of_copy"], ".", color=colour, markersize=4)
                points += 1
            if colour and row.get("percent_of_matrix") is not None:
                bars.append((f"{result['suite']} {case_of(row)}: {row['provider']}", row))
    if not points and not bars:
        return False
    left.axhline(100, color="black", linewidth=0.8)
    left.set_xlabel("bytes that must move")
    left.set_ylabel("% of the copy bandwidth")
    for provider, colour in COLOURS.items():
        left.plot([], [], "o", color=colour, label=provider)
    left.legend(fontsize=7)
    bars = sorted(bars, key=lambda bar: -bar[1]["percent_of_matrix"])[:BARS]
    for i, (_, row) in enumerate(bars):
        right.barh(i, row["percent_of_matrix"], color=COLOURS[row["provider"]])
    right.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=5)
    right.axvline(100, color="black", linewidth=0.8)
    right.set_xlabel("% of the matrix rate (above 100: fewer multiplications)")
    figure.set_size_inches(11, 6)
    return True
