"""Faults that a test must catch: `make mutants`.

Each is one line of the package, changed as a person might get it wrong, and the test that turns red by it. The tests
are run in a copy of the checkout, once as it is and once for each fault.

    python tests/mutants.py [--only TEXT] [--list]
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.faults import MUTANTS, Mutant  # noqa: E402

AT_A_TIME = 2
#: Seconds that the test of a fault may take, and all of them together, without one.
LIMIT, LIMIT_OF_ALL = 300, 3600
#: Exceptions of a program that is no program: a fault that raises them was written wrong.
BROKEN = re.compile(r"^E +(?:\w+\.)*(SyntaxError|IndentationError|NameError|ImportError|ModuleNotFoundError)\b", re.M)


def copy_of_the_checkout(folder: Path) -> Path:
    """What git tracks or would add, links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def pytest(tree: Path, interpreted: bool, *arguments: str, limit: int = LIMIT) -> subprocess.CompletedProcess:
    """pytest in a copy, whose package is the one imported; nothing compiled is kept from one run to the next."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CMFAST_BACKEND", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(tree / ".cache")  # where C with a fault in it is not found again
    # A second of each run, and no test here uses them.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, f"no end after {limit} seconds", "")


def red_without_a_fault(trees: list[Path], mutants: list[Mutant]) -> str:
    """What pytest says of the tests where one fails or is skipped with no fault in; else nothing."""
    tests = [sorted({m.test for m in mutants if m.interpreted == interpreted}) for interpreted in (False, True)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [
            pool.submit(pytest, trees[i % len(trees)], bool(i), *ids, limit=LIMIT_OF_ALL)
            for i, ids in enumerate(tests)
            if ids
        ]
        done = [run.result() for run in runs]
    bad = [run for run in done if run.returncode or "skipped" in run.stdout.splitlines()[-1]]
    return "\n".join(run.stdout + run.stderr for run in bad)


def verdict(run: subprocess.CompletedProcess) -> tuple[str, str]:
    """(killed, SURVIVED or error, why)."""
    summary = next((line for line in reversed(run.stdout.splitlines()) if line.strip()), "")
    if run.returncode == 0:
        return "SURVIVED", summary
    broken = BROKEN.search(run.stdout)
    # A canary is looked at after its test, which is an error to pytest.
    red = re.search(r"\b\d+ failed\b", summary) or re.search(r"^E +AssertionError", run.stdout, re.M)
    if run.returncode != 1 or broken or not red:
        return "error", broken.group(1) if broken else summary or run.stderr[-300:]
    return "killed", ""


def try_out(mutant: Mutant, trees: queue.Queue[Path]) -> tuple[str, str]:
    tree, start = trees.get(), time.monotonic()
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        if text.count(mutant.old) != mutant.count:
            result, why = "error", f"its line occurs {text.count(mutant.old)} times, not {mutant.count}"
        else:
            path.write_text(mutant.apply(text), encoding="utf-8")
            result, why = verdict(pytest(tree, mutant.interpreted, mutant.test))
    finally:
        path.write_text(text, encoding="utf-8")
        trees.put(tree)
    where = "" if result == "killed" else f"\n          {mutant.test}\n          {why}"
    print(f"{result:9} {mutant.file}: {mutant.name} ({time.monotonic() - start:.0f} s){where}", flush=True)
    return result, why


def main() -> int:
    parser = argparse.ArgumentParser(description="Make faults one by one, each of which must turn a test red.")
    parser.add_argument("--only", default="", metavar="TEXT", help="those with TEXT in their name, file or test")
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, and make none")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if arguments.only in f"{m.file}: {m.name} {m.test}"]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.file}: {mutant.name}\n    {mutant.test}")
        return 0
    if not mutants:
        parser.error(f"no fault has {arguments.only!r} in its name, file or test")
    with tempfile.TemporaryDirectory(prefix="cmfast-mutants-") as folder:
        copies = [copy_of_the_checkout(Path(folder, str(i))) for i in range(AT_A_TIME)]
        print(f"{len(mutants)} faults; first their tests without one", flush=True)
        red = red_without_a_fault(copies, mutants)
        if red:
            print(red, "The tests must pass, and not be skipped, before a fault is made.", sep="\n")
            return 2
        trees: queue.Queue[Path] = queue.Queue()
        for copy in copies:
            trees.put(copy)
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            results = [result for result, _ in pool.map(lambda mutant: try_out(mutant, trees), mutants)]
    killed = results.count("killed")
    print(f"{killed} passed, {len(results) - killed} failed")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
