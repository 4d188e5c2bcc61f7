"""Kernels run in Triton's interpreter where TRITON_INTERPRET=1, else on a GPU: the same tests for both.

Every test here has its memory guarded: what kernels write into starts as NaN and lies between canaries.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmfast.ops import _dispatch
from tests.fuzz.report import summary
from tests.kernels.memory import Guard

HERE = Path(__file__).parent
# Without either, there is nothing to collect; pytest_terminal_summary says so.
collect_ignore_glob = [] if _dispatch.INTERPRETING or torch.cuda.is_available() else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    summary(terminalreporter)
    if collect_ignore_glob:
        terminalreporter.write_line(
            "tests/kernels: not collected, as there is no GPU. TRITON_INTERPRET=1 runs them in the interpreter, "
            "in a process of their own, as in make test."
        )


def pytest_collection_modifyitems(items):
    if not _dispatch.INTERPRETING:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if _dispatch.INTERPRETING else "cuda")


@pytest.fixture(autouse=True)
def guard(monkeypatch, request):
    if request.node.get_closest_marker("unguarded"):
        yield None
        return
    with Guard(monkeypatch) as guard:
        yield guard
