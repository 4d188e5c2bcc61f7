"""What tests counted or measured, at the end of pytest's report."""

import pytest

KEY = "counted"


@pytest.fixture
def counted(record_property):
    """Call it with a line of text."""
    return lambda text: record_property(KEY, text)


def pytest_terminal_summary(terminalreporter):
    lines = [
        (report.nodeid.split("/")[-1], value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in getattr(report, "user_properties", ())
        if key == KEY
    ]
    if lines:
        terminalreporter.section("counted")
        for name, value in sorted(lines):
            terminalreporter.write_line(f"{name}: {value}")
