"""Kernels run in Triton's interpreter where TRITON_INTERPRET=1, else on a GPU: the same tests for both.

Every test here has its memory guarded: what kernels write into starts as NaN and lies between canaries.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cmfast.ops import _dispatch
from tests.kernels.memory import Guard

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if _dispatch.INTERPRETING:
        return
    missing = None if torch.cuda.is_available() else "needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if _dispatch.INTERPRETING else "cuda")


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    with Guard(monkeypatch) as guard:
        yield guard


@pytest.fixture(autouse=True)
def no_backend_from_outside():
    assert os.environ.get("CMFAST_BACKEND", "auto") in ("auto", "triton")
