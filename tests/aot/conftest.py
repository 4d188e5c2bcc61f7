"""What the run compiled and measured is printed at its end."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import pytest


@dataclass
class Report:
    launches: int = 0
    programs: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)


_KEY = pytest.StashKey[Report]()


@pytest.fixture(scope="session")
def report(pytestconfig):
    return pytestconfig.stash.setdefault(_KEY, Report())


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash.get(_KEY, None)
    if report is None:
        return
    programs = ", ".join(f"{count} for {arch}" for arch, count in report.programs.items())
    terminalreporter.section("ahead of time")
    terminalreporter.line(f"{report.launches} launches; programs compiled: {programs}")
    for note in report.notes:
        terminalreporter.line(note)
