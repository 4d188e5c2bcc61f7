"""How many calls are drawn: in CI few, and always the same. Where CMFAST_FUZZ_EXAMPLES is set, as in `make fuzz`, any;
--hypothesis-seed says which."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis

from tests.fuzz.report import EXAMPLES, KEY
from tests.fuzz.strategies import trials
from tests.fuzz.trial import check


def settings(examples: int) -> hypothesis.settings:
    """examples: in CI."""
    return hypothesis.settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def fuzz(
    name: str, backend: str, examples: int, record_property: Any, *, device: Any = "cpu", after: Any = None
) -> None:
    """Calls of an operation on a path, each against the reference. after: is called after each."""
    counts: Counter[str] = Counter()

    @settings(examples)
    @hypothesis.given(trials(name))
    def run(trial: Any) -> None:
        counts[check(trial.map(lambda x: x if x.is_meta else x.to(device)), backend)] += 1
        if after is not None:
            after()

    try:
        run()
    finally:
        record_property(KEY, (name, backend, dict(counts)))
