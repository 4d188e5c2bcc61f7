"""Faults that a test must catch, which tests/mutants.py makes: one module for each part of the package.

Each has a `FAULTS`: file -> (name, old, new, test[, count, nth]) of each fault in it, as in `Mutant`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: `old` becomes `new` in `file`, and `test`, a pytest node, must fail.

    `old` occurs `count` times, of which the `nth` is changed.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    count: int = 1
    nth: int = 1

    @property
    def interpreted(self) -> bool:
        """Whether its test runs kernels in Triton's interpreter."""
        return self.test.startswith("tests/kernels/")

    def apply(self, text: str) -> str:
        """The text of its file with the fault in it."""
        parts = text.split(self.old)
        return self.old.join(parts[: self.nth]) + self.new + self.old.join(parts[self.nth :])


MUTANTS = [
    Mutant(name, file, *rest)
    for module in sorted(part.name for part in pkgutil.iter_modules(__path__))
    for file, faults in getattr(importlib.import_module(f"{__name__}.{module}"), "FAULTS", {}).items()
    for name, *rest in faults
]
