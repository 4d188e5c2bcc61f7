"""What pytest's report says of the fuzz: its seed, and how many calls of each operation it made."""

from __future__ import annotations

import os
from typing import Any

#: Calls of each operation; None in CI.
EXAMPLES = os.environ.get("CMFAST_FUZZ_EXAMPLES")
#: The property of a test that holds what it counted.
KEY = "fuzz"


def summary(reporter: Any) -> None:
    """For pytest_terminal_summary."""
    properties = [
        value
        for reports in reporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == KEY and getattr(report, "when", None) == "call"
    ]
    if not properties or EXAMPLES is None and reporter.verbosity < 1:
        return
    seed = reporter.config.getoption("hypothesis_seed", None)
    reporter.section(f"fuzz: seed {'fixed' if EXAMPLES is None else seed}, {EXAMPLES or 'few'} calls of each operation")
    for name, backend, counts in sorted(properties):
        parts = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        reporter.write_line(f"{name:20} {backend:8} {sum(counts.values()):6}  {parts}")
    reporter.write_line(f"{sum(sum(counts.values()) for _, _, counts in properties)} calls")
