"""Everything that needs a GPU, one step after the other: `make gpu OUT=dir`; `make gpu DRY=1` lists what it would run.

Each step is a process with a time limit of its own, to which comes what the steps before it left over. What it prints
goes to OUT/<step>.log as it comes, and OUT/report.json says after each how it went. A step that fails, runs out of time
or misses a tool does not keep the next from running; the exit status is 1 if one failed or ran out of time. Needs no
network and no virtual environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from cmfast.benchmarks.home import CHECKOUT
from cmfast.benchmarks.steps import SECONDS, Step, failed, listing, run_all

#: Seconds for all steps together.
TOTAL_S = 530
#: Steps that can measure beside the original's code.
BESIDE_OPENAI = ("sampling", "training", "startup", "profile")
#: Kernel tests that compute-sanitizer, which is slow, runs: every operation and gradient, once at a size that fills no
#: block, once in many blocks.
SANITIZED = "test_one_level_for_all or test_same_bits_on_repetition or test_mixed_dtypes or test_clips_by_its_own_norm"
#: Kernel tests that come first: every operation in the dtypes of use, and what only a GPU shows. The others, which
#: compile hundreds of kernels more, take the time that is left at the end.
CORE = "float32-bfloat16 or test_gpu or test_noise or test_exact or test_engine_gpu or test_optimize or test_averages"
CORE += " or test_lpips"
PYTEST = ["-m", "pytest", "tests/kernels", "tests/test_engine_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider"]


def _no_pytest() -> str | None:
    if CHECKOUT is None:
        return "the tests are in a checkout, not in an installed package"
    return None if find_spec("pytest") else "pytest is not installed for this Python"


def _no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer, which is part of the CUDA toolkit, is not on the PATH"
    return _no_pytest()


def _sanitizer(tool: str, seconds: float) -> Step:
    return Step(
        tool,
        [*PYTEST, "-x", "-k", SANITIZED],
        seconds,
        # The children of these tests are compilers.
        wrapper=("compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes",
                 "application-only"),
        missing=_no_sanitizer,
        # One allocation for each tensor: else an access past the end of one lies in another of PyTorch's pool.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def steps(out: Path) -> list[Step]:
    def suite(name: str, seconds: float, *arguments: str, needs: str | None = None) -> Step:
        """One of `cmfast.benchmarks.suites`; needs: a package without which it cannot run at all."""
        missing = None if needs is None or find_spec(needs) else f"{needs} is not installed for this Python"
        command = ["-m", f"cmfast.benchmarks.{name}", "--device", "cuda", "--out", str(out), *arguments]
        return Step(name, [*command, "--seconds", SECONDS], seconds, missing=lambda: missing)

    # Most of a test's time is its kernels' compilation, on the CPU.
    workers = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))] if find_spec("xdist") else []
    return [
        Step("environment", ["-m", "cmfast.benchmarks.environment"], 15),
        Step("tests", [*PYTEST, *workers, "-k", CORE], 95, missing=_no_pytest),
        suite("kernels", 95),
        # Its compiled rivals take minutes to start: `--only sampling --seconds 1500` has them for them.
        suite("sampling", 75),
        # The same: what this is enough for is the first trial.
        suite("training", 90),
        suite("parameters", 35),
        suite("profile", 25),
        # Its compiled rival takes most of this to start.
        suite("perceptual", 25, needs="torchvision"),
        suite("startup", 20, "--no-compile"),
        _sanitizer("memcheck", 25),
        _sanitizer("racecheck", 25),
        Step("all-tests", [*PYTEST, *workers, "-k", f"not ({CORE})"], 15, missing=_no_pytest),
    ]


def _beside(step: Step, openai: Path | None) -> Step:
    """The step with the original's code, where it measures beside that."""
    if openai is None or step.name not in BESIDE_OPENAI:
        return step
    return replace(step, arguments=[*step.arguments, "--openai", str(openai.resolve())])


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a step failed or ran out of time."""
    parser = argparse.ArgumentParser(prog="cmfast.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="list the steps and their limits, run none")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all steps together (default {TOTAL_S})")
    parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="for what is measured beside it")
    parser.add_argument("--only", metavar="STEP", action="append", help="run this step alone; may be given again")
    options = parser.parse_args(argv)
    chosen = steps(options.out if options.dry else options.out.resolve())
    unknown = set(options.only or ()) - {step.name for step in chosen}
    if unknown:
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; known: {', '.join(step.name for step in chosen)}")
    chosen = [_beside(step, options.openai) for step in chosen if not options.only or step.name in options.only]
    if options.dry:
        print(listing(chosen, options.seconds))
        return 0
    return int(failed(run_all(chosen, options.out.resolve(), options.seconds)))


if __name__ == "__main__":
    sys.exit(main())
