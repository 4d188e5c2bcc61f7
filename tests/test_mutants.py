"""The tables of faults (tests/faults) fits the code: `make mutants` makes them."""

import ast

import pytest

from tests.faults import MUTANTS
from tests.mutants import ROOT

TEXTS = {file: (ROOT / file).read_text(encoding="utf-8") for file in {m.file for m in MUTANTS}}


def test_names_differ():
    assert len({(m.file, m.name) for m in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("file", sorted(TEXTS))
def test_each_fault_can_be_made(file):
    """Its line is there, as often as the table says, and what becomes of it is Python."""
    for mutant in (m for m in MUTANTS if m.file == file):
        assert TEXTS[file].count(mutant.old) == mutant.count >= mutant.nth >= 1, mutant.name
        if file.endswith(".py"):
            ast.parse(mutant.apply(TEXTS[file]))
        assert mutant.new != mutant.old, mutant.name


def test_each_test_is_there():
    for mutant in MUTANTS:
        file, *_, name = mutant.test.split("[")[0].split("::")
        assert file.startswith("tests/"), mutant.name
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), mutant.name
