"""Silences of the type checkers have reasons, and `make lint` runs the checkers on what users see.

tests/typed_user.py is a user's program with wrong calls in it, which `make lint` checks.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IGNORE = re.compile(r"#\s*(type|pyright):\s*ignore")
REASONED = re.compile(r"# (type: ignore\[[a-z, -]+\]|pyright: ignore(\[\w+\])?)(  # noqa: \w+)?  # \S")


def sources() -> list[Path]:
    folders = ("cmfast", "kernels", "benchmarks")
    found = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return [*sorted(found), ROOT / "tests" / "typed_user.py"]


def test_what_is_ignored_has_a_code_and_a_reason():
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if IGNORE.search(line) and not REASONED.search(line)
    ]
    assert len(sources()) > 100 and not bare


@pytest.mark.parametrize("line, fine", [
    ("x = 1  # type: ignore", False), ("x = 1  # type: ignore[misc]", False), ("x = 1  # pyright: ignore", False),
    ("x = 1  # type: ignore[misc]  # why", True), ("x = 1  # pyright: ignore  # why", True), ("x = 1", True),
])  # fmt: skip
def test_the_check_of_reasons_itself(line, fine):
    assert (not IGNORE.search(line) or bool(REASONED.search(line))) is fine


def test_make_lint_runs_both_checkers():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert lint and "-m mypy" in lint[1] and "$(PYRIGHT)" in lint[1]
    assert re.search(r"^PYRIGHT = (?:.*\\\n)*.*-m pyright --pythonpath", makefile, re.M)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    mypy = settings[settings.index("[tool.mypy]") : settings.index("[tool.pyright]")]
    assert "\nstrict = true\n" in mypy and 'files = ["cmfast", "tests/typed_user.py"]' in mypy
    relaxed = re.findall(r'^module = "(.*)"$', mypy, re.M)
    assert relaxed == ["cmfast.kernels.*", "cmfast.compat.diffusers.*", "cmfast.benchmarks.*"]
