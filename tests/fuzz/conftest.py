import pytest

from cmfast.ops import _inplace
from tests.fuzz.report import summary


def pytest_terminal_summary(terminalreporter):
    summary(terminalreporter)


@pytest.fixture
def in_place(monkeypatch):
    """Forms that write in place serve small batches too."""
    monkeypatch.setattr(_inplace, "LEAST", 0)
    monkeypatch.setattr(_inplace, "LEAST_WITH_GRADIENTS", 0)
