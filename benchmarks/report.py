"""README's tables and the plots, from the files in `benchmarks/results/` alone: a table cannot say what no file says.

    python -m cmfast.benchmarks.report            write the tables of README.md, RESULTS.md and docs/, and the plots
    python -m cmfast.benchmarks.report --check    exit status 1 where a table is not what the files say
    python -m cmfast.benchmarks.report --agree A B     how far the ratios of two runs, folders of results, lie apart

A table stands between `<!-- benchmarks: NAME -->` and `<!-- /benchmarks -->`; NAME is one of `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cmfast.benchmarks import choices as chosen
from cmfast.benchmarks.comparisons import TIE, Comparison, agreed, case_of, comparisons, counts, milliseconds, missing
from cmfast.benchmarks.home import HOME

Results = list[dict[str, Any]]
#: The same tables for every device: devices by folder, in the order of their names.
Devices = dict[str, Results]
#: Comparisons that README shows of each device; benchmarks/RESULTS.md has all.
WORST = 12
#: What providers are, in words.
NAMES = {
    "cmfast": "**cmfast**",
    "cmfast_compile": "cmfast, `compile=True`",
    "cmfast_again": "cmfast, its second process on a machine",
    "reference": "plain PyTorch",
    "reference_channels_last": "plain PyTorch, channels_last",
    "inductor": "plain PyTorch under `torch.compile`",
    "inductor_max": "plain PyTorch under `torch.compile`, max-autotune, CUDA graphs",
    "openai": "openai/consistency_models",
    "openai_compile": "openai/consistency_models under `torch.compile`",
    "diffusers": "diffusers",
    "diffusers_compile": "diffusers under `torch.compile`, max-autotune",
    "convolutions": "the network's convolutions alone, weights packed",
    "convolutions_unpacked": "the network's convolutions alone, weights not packed",
}
RESULTS = HOME / "benchmarks" / "RESULTS.md"
#: The files that hold tables.
FILES = (HOME / "README.md", RESULTS, HOME / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- benchmarks: ([a-z]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)


def load(folder: Path) -> Devices:
    """Every result below a folder, by device; a report of `make gpu`, which lies beside them, is none.

    Raises: ValueError: a file is no result of these programs, or of an older version of them.
    """
    found: Devices = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        if "steps" in result:
            continue
        if result.get("schema") != 2:
            raise ValueError(f"{path}: schema {result.get('schema')}, not 2: measure it again")
        found.setdefault(path.parent.name, []).append(result)
    return found


def _about(results: Results) -> str:
    """What the tables below were measured on, in a line."""
    found = results[0]["environment"]
    versions = sorted({f"torch {r['environment']['torch']}" for r in results})
    threads = " or ".join(sorted({str(r["environment"]["cpu"]["threads"]) for r in results}))
    driver = f", driver {found['gpu']['driver']}" if found["gpu"] else f", {threads} threads"
    dates = sorted({r["environment"]["date"][:10] for r in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{found['device']}{driver}; {', '.join(versions)}, Python {found['python']}; {when}."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> list[str]:
    """Markdown; the first columns flush left, numbers flush right."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * left + ["---:"] * (len(head) - left)) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _number(value: float) -> str:
    """Three significant digits.

    >>> [_number(x) for x in (0.012345, 1.2345, 12.345, 1234.5)]
    ['0.0123', '1.23', '12.3', '1234']
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _times(row: dict[str, Any]) -> str:
    ratio = row.get("times_cmfast")
    if ratio is None or row["provider"] == "cmfast":
        return ""
    return f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def sampling(results: Results) -> list[str]:
    """Images and forward passes: who takes how long."""
    cells = [
        (
            row["case"], NAMES.get(row["provider"], row["provider"]), _number(row["p50_ms"]),
            "" if row["images_per_s"] is None else _number(row["images_per_s"]), _times(row),
            "" if row.get("percent_of_matrix") is None else f"{row['percent_of_matrix']:.0f}%",
        )
        for row in _rows(results, "sampling")
    ]  # fmt: skip
    head = ("what", "by", "ms, p50", "images/s", "times as long as cmfast, p50 (p20 to p80)", "of the matrix rate")
    return _table(head, cells, 2)


def _rows(results: Results, suite: str) -> list[dict[str, Any]]:
    """Rows of a suite, those of a case by trial and then by time. `case` says which where it has several, in one run
    or in more: only times of one trial were taken in turn."""
    trials: dict[str, list[tuple[int, Any]]] = {}
    found = []
    for run, result in enumerate(r for r in results if r["suite"] == suite):
        for row in result["rows"]:
            case, trial = case_of(row), (run, row.get("trial"))
            of_case = trials.setdefault(case, [])
            if trial not in of_case:
                of_case.append(trial)
            found.append((row.get("network", ""), case, of_case.index(trial), milliseconds(row), row))
    found.sort(key=lambda each: each[:-1])
    return [
        row | {"case": f"{case}, trial {number + 1}" if len(trials[case]) > 1 else case}
        for _, case, number, _, row in found
    ]


def training(results: Results) -> list[str]:
    """Training steps."""
    cells = [
        (
            row["case"], NAMES.get(row["provider"], row["provider"]), _number(row["p50_ms"]),
            _number(row["images_per_s"]), _times(row), _number(row["tflop_per_s"]),
            "" if not row.get("peak_bytes") else f"{row['peak_bytes'] / 1e9:.2f}",
        )
        for row in _rows(results, "training")
    ]  # fmt: skip
    head = ("a step of", "by", "ms, p50", "images/s", "times as long as cmfast, p50 (p20 to p80)", "TFLOP/s", "peak GB")
    return _table(head, cells, 2)


def parameters(results: Results) -> list[str]:
    """Averages and optimizers."""
    cells = [
        (row["case"], row["provider"], _number(milliseconds(row)), f"{row['percent_of_copy']:.0f}%", _times(row))
        for row in _rows(results, "parameters")
    ]
    return _table(("what, parameters, averages", "by", "ms, p50", "of a copy", "times as long as cmfast"), cells, 2)


def startup(results: Results) -> list[str]:
    """From nothing to the first images."""
    cells = [
        (
            row["case"], NAMES.get(row["provider"], row["provider"]),
            _number(row["p50_ms"] / 1e3), _number(row["make_s"]), _number(row["call_s"]),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        )
        for row in _rows(results, "startup")
    ]  # fmt: skip
    head = ("case", "by", "s to the first images", "of which after imports", "s for the next", "peak GB")
    return _table(head, cells, 2)


def _compared(found: Iterable[Comparison]) -> list[str]:
    cells = [
        (c.suite, c.case, NAMES.get(c.rival, c.rival), f"{c.p50:.3f}", f"{c.p20:.3f} to {c.p80:.3f}",
         _number(c.ours_ms), _number(c.rival_ms), c.verdict)
        for c in found
    ]  # fmt: skip
    head = ("suite", "case", "rival", "rival / cmfast", "p20 to p80", "cmfast ms", "rival ms", "")
    return _table(head, cells, 3)


def worst(results: Results) -> list[str]:
    """The worst comparisons of all suites, and how many there are of each kind."""
    found = comparisons(results)
    by_suite = {suite: [c for c in found if c.suite == suite] for suite in dict.fromkeys(c.suite for c in found)}
    parts = "; ".join(f"{suite}: {counts(some)}" for suite, some in sorted(by_suite.items()))
    lines = [f"{counts(found)} (a tie is within {TIE:.0%}). {parts}. The {WORST} worst:", ""]
    return lines + _compared(found[:WORST])


def everything(results: Results) -> list[str]:
    """Every comparison, and what is missing."""
    gone = sorted(set(missing(results)))
    return [*_compared(comparisons(results)), "", *(f"- {line}" for line in gone)]


def peaks(results: Results) -> list[str]:
    """Copy and matrix rates, as each run found them first and last."""
    cells = []
    for result in results:
        for when, rates in zip(("first", "last"), result["rates"]):
            matrices = ", ".join(f"{dtype} {_number(rate['tflop_per_s'])}" for dtype, rate in rates["matrix"].items())
            cells.append((result["suite"], when, _number(rates["copy"]["gb_per_s"]), matrices))
    return _table(("run", "", "copy, GB/s", "matrix rate, TFLOP/s"), cells, 2)


def choices(results: Results) -> list[str]:
    """What a setting is worth: two rows of one run, medians of each."""
    cells = []
    for choice, first, second in chosen.pairs(results):
        before, after = chosen.per_image(first, second)
        cells.append((choice.setting, case_of(first), _number(before), _number(after), f"{after / before:.2f}"))
    return _table(("setting", "instead of", "ms per image before", "with it", "times as long"), cells, 2)


def losses(results: Results) -> list[str]:
    """Who beats cmfast where: by suite and rival, with the worst case of each."""
    cells = [
        (one.suite, NAMES.get(one.rival, one.rival), f"{one.lost} of {one.of}", f"{one.median:.2f}",
         f"{one.worst.p50:.2f}", one.worst.case, _number(one.worst.ours_ms), _number(one.worst.rival_ms))
        for one in chosen.losses(comparisons(results))
    ]  # fmt: skip
    head = ("suite", "rival", "lost", "rival / cmfast, median of all", "the worst", "which is", "cmfast ms", "rival ms")
    return _table(head, cells, 3)


def perceptual(results: Results) -> list[str]:
    """The LPIPS loss with its gradient."""
    cells = [
        (row["case"], NAMES.get(row["provider"], row["provider"]), _number(milliseconds(row)), _times(row))
        for row in _rows(results, "perceptual")
    ]
    return _table(("LPIPS, VGG-16, and its gradient", "by", "ms, p50", "times as long as cmfast"), cells, 2)


#: What may stand in a file, by name.
BLOCKS: dict[str, Callable[[Results], list[str]]] = {
    "sampling": sampling,
    "training": training,
    "parameters": parameters,
    "perceptual": perceptual,
    "startup": startup,
    "choices": choices,
    "losses": losses,
    "worst": worst,
    "everything": everything,
    "peaks": peaks,
}


def block(name: str, devices: Devices) -> str:
    """What stands between the marks: a line about each device, and its table.

    Raises: KeyError: there is no such block.
    """
    parts = []
    for results in devices.values():
        made = BLOCKS[name](results)
        parts.append("\n".join([_about(results), "", *made]))
    return "\n\n".join(parts) + "\n"


def written(text: str, devices: Devices) -> str:
    """A file with its tables as the results have them.

    Raises: ValueError: a mark names no block.
    """
    for name in re.findall(r"<!-- benchmarks: (\S+) -->", text):
        if name not in BLOCKS:
            raise ValueError(f"there is no block {name!r}; known: {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda match: match[1] + block(match[2], devices) + match[3], text)


def _of_run(folder: Path) -> Results:
    """The results in a folder; a whole run has a report of its steps as well."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [one for one in found if "rows" in one]


def main(argv: list[str] | None = None) -> int:
    """0; with --check 1 where a table is not what the files say."""
    parser = argparse.ArgumentParser(prog="cmfast.benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HOME / "benchmarks" / "results")
    parser.add_argument("--files", type=Path, nargs="+", default=list(FILES))
    parser.add_argument("--plots", type=Path, default=HOME / "docs" / "benchmarks", help="folder for the plots")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table is wrong")
    parser.add_argument("--agree", type=Path, nargs=2, metavar="FOLDER", help="print how far two runs lie apart")
    options = parser.parse_args(argv)
    if options.agree:
        print(agreed(*map(_of_run, options.agree)))
        return 0
    devices = load(options.results)
    wrong = []
    for path in options.files:
        text = path.read_text()
        made = written(text, devices)
        if made != text:
            wrong.append(path.name)
            if not options.check:
                path.write_text(made)
    if options.check:
        print(f"not what the results say: {', '.join(wrong)}" if wrong else "every table is what the results say")
        return int(bool(wrong))
    from cmfast.benchmarks import plots

    for path in plots.draw(devices, options.plots):
        print(f"written: {path}")
    print(f"written: {', '.join(wrong)}" if wrong else "tables: unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
