"""For all tests: Triton's interpreter as it should be; a test draws the same wherever it runs; tests come before
doctests; what was counted or measured ends pytest's report."""

import random
import zlib

import numpy as np
import pytest
import torch
from _pytest.doctest import DoctestModule

from cmfast.ops import _dispatch

if _dispatch.INTERPRETING:
    from tests.interpreter import patch

    patch()

COUNTED = "counted"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Generators of the process by the test's name, so that its numbers do not hang on what ran before it."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def counted(record_property):
    """Call it with a line of text."""
    return lambda text: record_property(COUNTED, text)


def pytest_terminal_summary(terminalreporter):
    lines = [
        (report.nodeid.split("/")[-1], value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in getattr(report, "user_properties", ())
        if key == COUNTED
    ]
    if lines:
        terminalreporter.section("counted")
        for name, value in sorted(lines):
            terminalreporter.write_line(f"{name}: {value}")


@pytest.hookimpl(hookwrapper=True)
def pytest_collect_file():
    """Tests before doctests. The latter pass over a file that cannot be imported (--doctest-ignore-import-errors, for
    modules of the package that need an extra) and leave half of it in sys.modules, which the former would take for the
    file: its tests would be left out without a word."""
    outcome = yield
    outcome.force_result(sorted(outcome.get_result(), key=lambda each: isinstance(each, DoctestModule)))
