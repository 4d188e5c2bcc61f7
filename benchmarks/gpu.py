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
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from cmfast.benchmarks.home import CHECKOUT
from cmfast.benchmarks.steps import PACKED, SECONDS, Step, failed, listing, run_all

#: Seconds for all steps together; --long has as many as its steps.
TOTAL_S = 530
#: Steps that can measure beside the original's code.
BESIDE_OPENAI = ("sampling", "training", "startup", "profile")
#: Where the tests lie, and those that come first, in their order.
FILES = ["tests/kernels", "tests/test_engine_gpu.py"]
FIRST = [
    *(f"tests/kernels/test_{name}.py" for name in ("every_op", "group_norm", "gpu", "optimizer_gpu")), FILES[1],
    *(f"tests/kernels/test_{name}.py" for name in ("lpips", "averages", "optimizer")),
]
#: Of these: every operation in the dtypes of use, and what only a GPU shows.
SMOKE = "float32-bfloat16 or test_kinds or test_gpu and not compiled_whole or test_engine_gpu or repetition"
SMOKE += " or test_optimizer_gpu or test_low_dtypes or test_number_of_averages"
#: What compute-sanitizer, which is slow, runs: operations and gradients, most of whose kernels are compiled by then, at
#: a size that fills no block and in many blocks, and nothing else on the device. Every kernel is among them.
SANITIZED = "repetition or test_auto_takes_the_kernel or test_number_of_averages or test_low_dtypes"
SANITIZED += " or test_norm_of_many_elements or test_sums_of_long_samples or test_pixels_carry_no_gradient"
SANITIZED += " or test_levels_do_not_depend or test_dropout_by_tensors or test_a_sample_depends_on_its_index"
SANITIZED_FILES = [*FIRST, *(f"tests/kernels/test_{name}.py" for name in ("exact", "draw", "noise"))]
#: Of memcheck. Libraries ask the driver for what it may not have, and go on without: else these calls count as errors.
#: One that fails and should not is an error of PyTorch's.
ACCESSES = ("--report-api-errors", "no")
#: Threads of a block share memory in reductions alone.
REDUCTIONS = "repetition and (test_group_norm or test_lpips or loss)"
REDUCTIONS += " or test_norm_of_many_elements or test_sums_of_long_samples"
#: Else every process starts one for each core, to compile a few kernels at a time.
ONE_COMPILER = (("TORCHINDUCTOR_COMPILE_THREADS", "1"),)
#: Where kernels are counted, the profiler is to be gone when the next trial is timed.
NO_PROFILER = (("TEARDOWN_CUPTI", "1"),)


def _no_pytest() -> str | None:
    if CHECKOUT is None:
        return "the tests are in a checkout, not in an installed package"
    return None if find_spec("pytest") else "pytest is not installed for this Python"


def _no_sanitizer() -> str | None:
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer, which is part of the CUDA toolkit, is not on the PATH"
    return _no_pytest()


def _tests(name: str, seconds: float, files: list[str], chosen: str, *options: str) -> Step:
    """Tests of some files, their names chosen as by pytest's -k."""
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "tests.at_once", *options]
    return Step(
        name,
        ["-m", "pytest", *files, *words, "-k", chosen],
        seconds,
        missing=_no_pytest,
        environment=ONE_COMPILER,
    )


def _sanitizer(tool: str, seconds: float, chosen: str, *options: str) -> Step:
    return replace(
        _tests(tool, seconds, SANITIZED_FILES, chosen, "-x"),
        # The children of these tests are compilers. Of itself it gives up, and hangs or finds nothing, where a process
        # has made no call of CUDA after 10 seconds, in which PyTorch may not be imported yet.
        wrapper=("compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes",
                 "application-only", "--launch-timeout", "0", *options),
        missing=_no_sanitizer,
        # One allocation for each tensor: else an access past the end of one lies in another of PyTorch's pool.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    )


def steps(out: Path, long: bool = False) -> list[Step]:
    """The important first: results of those that bars are about, in 9 minutes. long: all there is, in two hours."""
    def suite(name: str, seconds: float, *arguments: str, needs: str | None = None) -> Step:
        """One of `cmfast.benchmarks.suites`; needs: a package without which it cannot run at all."""
        missing = None if needs is None or find_spec(needs) else f"{needs} is not installed for this Python"
        command = ["-m", f"cmfast.benchmarks.{name}", "--device", "cuda", "--out", str(out), *arguments]
        environment = {"kernels": ONE_COMPILER, "sampling": NO_PROFILER, "training": NO_PROFILER}.get(name, ())
        return Step(name, [*command, "--seconds", SECONDS], seconds, missing=lambda: missing, environment=environment)

    # Most of a test's time is its kernels' compilation, on the CPU.
    workers = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))] if find_spec("xdist") else []
    # The first to import PyTorch, from a disk that may not have been read yet.
    environment = Step("environment", ["-m", "cmfast.benchmarks.environment"], 30)
    smoke = _tests("smoke", 60, FIRST, SMOKE, *workers)
    if not long:
        # Without rivals that compile for minutes.
        return [
            environment,
            smoke,
            suite("sampling", 110, "--no-compile", "--batches", "1,256"),
            suite("training", 125, "--no-compile"),
            suite("kernels", 80),
            suite("parameters", 25, "--no-compile"),
            _sanitizer("memcheck", 55, SANITIZED, *ACCESSES),
            suite("profile", 45),
        ]
    return [
        environment,
        smoke,
        suite("sampling", 1800),
        suite("training", 1200),
        suite("kernels", 900),
        suite("parameters", 400),
        _sanitizer("memcheck", 120, SANITIZED, *ACCESSES),
        suite("profile", 120),
        suite("doubling", 120),
        suite("perceptual", 400, needs="torchvision"),
        suite("startup", 900),
        _tests("compiled", 300, FILES, "compiled_whole", *workers),
        _tests("all-tests", 900, FILES, f"not ({SMOKE}) and not compiled_whole", *workers),
        _sanitizer("racecheck", 300, REDUCTIONS),
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
    parser.add_argument("--long", action="store_true", help="all there is to test and measure, in two hours")
    parser.add_argument("--pack", action="store_true", help=f"leave two files: report.json, and {PACKED} with the rest")
    parser.add_argument("--seconds", type=float, help=f"for all steps together (default {TOTAL_S})")
    parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="for what is measured beside it")
    parser.add_argument("--only", metavar="STEP", action="append", help="run this step alone; may be given again")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cmfast-gpu-") as folder:
        given = options.out if options.dry else options.out.resolve()
        out = Path(folder) if options.pack and not options.dry else given
        chosen = steps(out, options.long)
        unknown = set(options.only or ()) - {step.name for step in chosen}
        if unknown:
            known = ", ".join(step.name for step in chosen)
            parser.error(f"unknown steps {', '.join(sorted(unknown))}; known: {known}")
        chosen = [_beside(step, options.openai) for step in chosen if not options.only or step.name in options.only]
        seconds = options.seconds or (sum(step.seconds for step in chosen) if options.long else TOTAL_S)
        if options.dry:
            print(listing(chosen, seconds))
            return 0
        return int(failed(run_all(chosen, out, seconds, given if options.pack else None)))


if __name__ == "__main__":
    sys.exit(main())
