"""cmfast beside every other provider, from the results of all suites: one table, the worst ratio first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A difference of the median ratio up to this is a tie.
TIE = 0.03
#: What cmfast is called where it is not called so: an operation inside a region that is compiled.
OURS = ("cmfast", "auto")
#: Not rivals: other ways of ours, and what measures a limit.
OTHERS = ("kernel", "cmfast_compile", "cmfast_float32", "convolutions", "convolutions_unpacked")


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


def agreement(first: Sequence[Comparison], second: Sequence[Comparison]) -> list[tuple[float, Comparison, Comparison]]:
    """The comparisons that two runs have both, and the larger median ratio of each as a multiple of the smaller, the
    worst first: what a difference between runs must exceed on this machine."""
    others = {(c.suite, c.case, c.rival): c for c in second}
    found = []
    for one in first:
        other = others.get((one.suite, one.case, one.rival))
        if other is not None:
            found.append((max(one.p50, other.p50) / min(one.p50, other.p50), one, other))
    return sorted(found, key=lambda pair: -pair[0])


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
