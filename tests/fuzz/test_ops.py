"""Any call of any operation: what `auto` takes on a CPU against the reference, which stands in tests/fuzz/trial.py."""

import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")

from tests.fuzz.run import fuzz
from tests.fuzz.strategies import OPERATIONS
from tests.ops.cases import CASES


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_call(name, record_property):
    fuzz(name, "auto", 25, record_property)


def test_every_operation_is_fuzzed():
    """All of the tables: what has a kernel, what needs none, what the general tests call."""
    assert {name.split()[0] for name in CASES} <= set(OPERATIONS)
