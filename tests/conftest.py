"""For all tests."""

import pytest
from _pytest.doctest import DoctestModule


@pytest.hookimpl(hookwrapper=True)
def pytest_collect_file():
    """Tests before doctests. The latter pass over a file that cannot be imported (--doctest-ignore-import-errors, for
    modules of the package that need an extra) and leave half of it in sys.modules, which the former would take for the
    file: its tests would be left out without a word."""
    outcome = yield
    outcome.force_result(sorted(outcome.get_result(), key=lambda each: isinstance(each, DoctestModule)))
