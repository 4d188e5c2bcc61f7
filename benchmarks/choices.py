"""What a setting is worth, and where cmfast loses: the tables of docs/performance.md, from result files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cmfast.benchmarks.comparisons import Comparison, milliseconds


@dataclass(frozen=True)
class Choice:
    """Two rows of one run: `first` and `second` are (a part of the case's name, the provider), and the second row's
    name is the first's with that part exchanged."""

    setting: str
    suite: str
    first: tuple[str, str]
    second: tuple[str, str]


#: In the order in which docs/performance.md speaks of them.
CHOICES = (
    Choice("two steps for one", "sampling", ("1 step", "cmfast"), ("2 steps", "cmfast")),
    Choice("batch 4 for 1", "sampling", ("batch 1,", "cmfast"), ("batch 4,", "cmfast")),
    Choice("batch 64 for 1", "sampling", ("batch 1,", "cmfast"), ("batch 64,", "cmfast")),
    Choice("`compile=True`", "sampling", ("", "cmfast"), ("", "cmfast_compile")),
    Choice("bfloat16 for float32", "sampling", ("1 step", "cmfast"), ("1 step, bfloat16", "cmfast")),
    Choice("channels_last, plain PyTorch", "sampling", ("", "reference"), ("", "reference_channels_last")),
    Choice("weights packed, convolutions alone", "sampling", ("", "convolutions_unpacked"), ("", "convolutions")),
    Choice("bfloat16 for float32", "training", ("float32", "cmfast"), ("bfloat16", "cmfast")),
    Choice("consistency training for distillation", "training", ("cd l2", "cmfast"), ("ct l2", "cmfast")),
    Choice("LPIPS for l2, batch 4 for 16", "training", ("batch 16, cd l2", "cmfast"), ("batch 4, cd lpips", "cmfast")),
)


def _per_image(row: dict[str, Any]) -> float:
    return milliseconds(row) / row["batch"]


def pairs(results: Iterable[dict[str, Any]]) -> Iterator[tuple[Choice, dict[str, Any], dict[str, Any]]]:
    """(choice, first row, second row), each case of a run once; of a trial's own pair if it has both."""
    results = list(results)
    for choice in CHOICES:
        (old, before), (new, after) = choice.first, choice.second
        for result in results:
            if result["suite"] != choice.suite:
                continue
            seen = set()
            rows = result["rows"]
            for first in rows:
                key = first["name"], first.get("network"), first.get("mode")
                if first["provider"] != before or old not in first["name"] or key in seen:
                    continue
                wanted = (first["name"].replace(old, new) if old else first["name"], *key[1:], after)
                found = [r for r in rows if (r["name"], r.get("network"), r.get("mode"), r["provider"]) == wanted]
                own = [row for row in found if row.get("trial") == first.get("trial")]
                if found:
                    seen.add(key)
                    yield choice, first, (own or found)[0]


@dataclass(frozen=True)
class Loss:
    """What cmfast lost to a rival in a suite, of how many comparisons."""

    suite: str
    rival: str
    lost: int
    of: int
    worst: Comparison
    median: float


def losses(found: Iterable[Comparison]) -> list[Loss]:
    """One for each suite and rival that won anything, the largest share first; median: of all their ratios."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in found:
        groups.setdefault((one.suite, one.rival), []).append(one)
    lost = [
        Loss(suite, rival, sum(c.verdict == "LOSS" for c in some), len(some), min(some, key=lambda c: c.p50),
             statistics.median(c.p50 for c in some))
        for (suite, rival), some in groups.items()
    ]  # fmt: skip
    return sorted((one for one in lost if one.lost), key=lambda one: -one.lost / one.of)


def per_image(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds for an image, of both.

    >>> per_image({"p50_ms": 8.0, "batch": 1}, {"p50_ms": 16.0, "batch": 4})
    (8.0, 4.0)
    """
    return _per_image(first), _per_image(second)
