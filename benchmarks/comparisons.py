"""cmfast beside every other provider, from the results of all suites: one table, the worst ratio first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmfast.benchmarks.cores import APART

#: A difference of the median ratio up to this is a tie.
TIE = 0.03
#: Two runs on a machine that others use as well should agree within this.
AGREE = 0.15
#: What cmfast is called where it is not called so: an operation inside a region that is compiled.
OURS = ("cmfast", "auto")
#: Not rivals: other ways of ours, and what measures a limit.
OTHERS = ("kernel", "cmfast_compile", "cmfast_again", "cmfast_float32", "convolutions", "convolutions_unpacked")


@dataclass(frozen=True)
class Comparison:
    """A rival's time as a multiple of cmfast's in the same rounds: percentiles of the ratio; both medians; cmfast's
    row."""

    suite: str
    case: str
    rival: str
    p20: float
    p50: float
    p80: float
    ours_ms: float
    rival_ms: float
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def verdict(self) -> str:
        """
        >>> [Comparison("s", "c", "r", p, p, p, 1.0, p).verdict for p in (1.2, 1.02, 0.98, 0.9)]
        ['win', 'tie', 'tie', 'LOSS']
        """
        return "win" if self.p50 > 1 + TIE else "tie" if self.p50 >= 1 / (1 + TIE) else "LOSS"


def milliseconds(row: dict[str, Any]) -> float:
    """A row's median."""
    return row["p50_us"] / 1e3 if "p50_us" in row else row["p50_ms"]


def _where(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row.get("trial"), row.get("mode")


def case_of(row: dict[str, Any]) -> str:
    """What is measured; with the network where the name has none, and the mode where there are several."""
    name, network, mode = row["name"], row.get("network"), row.get("mode")
    if network and network not in name:
        name = f"{network}, {name}"
    return name if mode in (None, "call", "latency") else f"{name}, {mode}"


def comparisons(results: Iterable[dict[str, Any]]) -> list[Comparison]:
    """All of them, the worst first."""
    found = []
    for result in results:
        ours = {_where(row): row for row in result["rows"] if row["provider"] in OURS}
        for row in result["rows"]:
            ratio = row.get("times_cmfast")
            if ratio is None or row["provider"] in (*OURS, *OTHERS) or _where(row) not in ours:
                continue
            mine = ours[_where(row)]
            found.append(Comparison(
                result["suite"], case_of(row), row["provider"], ratio["p20"], ratio["p50"], ratio["p80"],
                milliseconds(mine), milliseconds(row), mine,
            ))  # fmt: skip
    return sorted(found, key=lambda c: c.p50)


def counts(found: Sequence[Comparison]) -> str:
    """How many of each.

    >>> counts([])
    '0 wins, 0 ties, 0 losses'
    """
    verdicts = [c.verdict for c in found]
    wins, ties, losses = (verdicts.count(kind) for kind in ("win", "tie", "LOSS"))
    return f"{wins} win{'s' * (wins != 1)}, {ties} tie{'s' * (ties != 1)}, {losses} loss{'es' * (losses != 1)}"


def agreed(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> str:
    """How far the median ratios of two runs lie apart, the worst first: what a difference between runs must exceed.
    A line says so where one of them found the cores of its CPU apart, and the other did not.

    Raises: ValueError: they have no comparison in common.
    """
    others = {(c.suite, c.case, c.rival): c for c in comparisons(second)}
    pairs = [(c, others[key]) for c in comparisons(first) if (key := (c.suite, c.case, c.rival)) in others]
    if not pairs:
        raise ValueError("the two runs have no case and rival in common")
    nearest = min((c.row["sync_us"] for pair in pairs for c in pair if "sync_us" in c.row), default=0.0)

    def remark(*pair: Comparison) -> str:
        apart = [c.row.get("sync_us", 0.0) > APART * nearest for c in pair]
        return "  cores apart in one of them" if apart[0] != apart[1] else ""

    def difference(pair: tuple[Comparison, Comparison]) -> float:
        ratios = [c.p50 for c in pair]
        return max(ratios) / min(ratios) - 1

    found = sorted(pairs, key=difference, reverse=True)
    width = max(len(f"{c.suite} {c.case}") for c, _ in pairs)
    lines = [
        f"{f'{c.suite} {c.case}':{width}}  {c.rival:22} {c.p50:7.3f} {other.p50:7.3f}  {difference((c, other)):6.1%}"
        f"{remark(c, other)}"
        for c, other in found
    ]
    near = sum(difference(pair) <= AGREE for pair in found)
    return "\n".join([*lines, f"{near} of {len(found)} ratios within {AGREE:.0%}"])


def missing(results: Iterable[dict[str, Any]]) -> list[str]:
    """Who was not there, what was not started, what was off."""
    lines = []
    for result in results:
        lines += [f"missing: {result['suite']}: {name}: {reason}" for name, reason in result["missing"].items()]
        lines += [f"not started for lack of time: {result['suite']}: {trial}" for trial in result["not_started"]]
        lines += [f"FAILED, not timed: {f['trial']}: {f['provider']}: {f['reason']}" for f in result["failures"]]
    return lines


def table(found: Sequence[Comparison]) -> list[str]:
    """For a terminal, in the order given, and how many wins there are."""
    if not found:
        return ["nothing was timed beside cmfast"]
    width = max(len(f"{c.suite} {c.case}") for c in found)
    lines = ["", f"{'rival / cmfast, worst first':{width}}  rival                   ratio  (p20 to p80)     verdict   "
                 "cmfast ms    rival ms"]
    for c in found:
        lines.append(
            f"{c.suite + ' ' + c.case:{width}}  {c.rival:22} {c.p50:6.3f}  ({c.p20:.3f} to {c.p80:.3f})  {c.verdict:7} "
            f"{c.ours_ms:10.3f}  {c.rival_ms:10.3f}"
        )
    return [*lines, "", f"{counts(found)} (ties within {TIE:.0%})"]


def text(results: Sequence[dict[str, Any]]) -> str:
    """The whole of a run, for a terminal."""
    return "\n".join([*table(comparisons(results)), *missing(results)])
