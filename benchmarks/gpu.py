"""Everything that needs a GPU, one step after the other: `make gpu OUT=dir`; `make gpu DRY=1` lists what it would run.

Each step is a process with a time limit of its own, to which comes what the steps before it left over. What it prints
goes to OUT/<step>.log as it comes, and OUT/report.json says after each how it went. A step that fails, runs out of time
or misses a tool does not keep the next from running; the exit status is 1 if one failed or ran out of time. Needs no
network and no virtual environment.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The end of a step's output that the report holds, in characters.
TAIL = 4000
#: Seconds that a process has between being asked to stop and being killed.
GRACE_S = 5
#: Seconds for all steps together.
TOTAL_S = 530
#: See `Step`.
SECONDS, FINISH_S = "SECONDS", 30
#: Steps that can measure beside the original's code.
BESIDE_OPENAI = ("sampling", "training")
#: Kernel tests that compute-sanitizer, which is slow, runs: every operation and gradient, once at a size that fills no
#: block, once in many blocks.
SANITIZED = "test_one_level_for_all or test_same_bits_on_repetition or test_mixed_dtypes or test_clips_by_its_own_norm"
#: Kernel tests that come first: every operation in the dtypes of use, and what only a GPU shows. The others, which
#: compile hundreds of kernels more, take the time that is left at the end.
CORE = "float32-bfloat16 or test_gpu or test_noise or test_exact or test_engine_gpu or test_optimize or test_averages"
CORE += " or test_lpips"
PYTEST = ["-m", "pytest", "tests/kernels", "tests/test_engine_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Step:
    """`python` and `arguments`, under `wrapper` where there is one. `missing()` says what the machine lacks for it.

    The argument `SECONDS` stands for the seconds that the step has, less `FINISH_S` for what is running then.
    """

    name: str
    arguments: list[str]
    seconds: float
    wrapper: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, python: str, limit_s: float | None = None) -> list[str]:
        seconds = str(max(1, int((limit_s or self.seconds) - FINISH_S)))
        return [*self.wrapper, python, *(seconds if word == SECONDS else word for word in self.arguments)]


def _no_pytest() -> str | None:
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
    benchmark_s = 70
    # Most of a test's time is its kernels' compilation, on the CPU.
    workers = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))] if find_spec("xdist") else []
    return [
        Step("environment", ["-m", "benchmarks.environment"], 20),
        Step("tests", [*PYTEST, *workers, "-k", CORE], 100, missing=_no_pytest),
        Step(
            "benchmarks",
            ["benchmarks/kernels.py", "--device", "cuda", "--out", str(out), "--seconds", str(benchmark_s)],
            benchmark_s + FINISH_S,
        ),
        # Its compiled rivals take minutes to start: `--only sampling --seconds 1500` has them for them.
        Step("sampling", ["benchmarks/sampling.py", "--device", "cuda", "--out", str(out), "--seconds", SECONDS], 70),
        # The same: what this is enough for is the first trial.
        Step("training", ["benchmarks/training.py", "--device", "cuda", "--out", str(out), "--seconds", SECONDS], 100),
        Step(
            "parameters", ["benchmarks/parameters.py", "--device", "cuda", "--out", str(out), "--seconds", SECONDS], 40
        ),
        # Its compiled rival takes most of this to start.
        Step(
            "perceptual", ["benchmarks/perceptual.py", "--device", "cuda", "--out", str(out), "--seconds", SECONDS], 30,
            missing=lambda: None if find_spec("torchvision") else "torchvision is not installed for this Python",
        ),
        _sanitizer("memcheck", 30),
        _sanitizer("racecheck", 30),
        Step("all-tests", [*PYTEST, *workers, "-k", f"not ({CORE})"], 20, missing=_no_pytest),
    ]


def _beside(step: Step, openai: Path | None) -> Step:
    """The step with the original's code, where it measures beside that."""
    if openai is None or step.name not in BESIDE_OPENAI:
        return step
    return replace(step, arguments=[*step.arguments, "--openai", str(openai.resolve())])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run(step: Step, python: str, out: Path, limit_s: float) -> dict[str, Any]:
    """One step: its status, its seconds, and the end of what it printed."""
    entry: dict[str, Any] = {
        "step": step.name, "command": shlex.join(step.command("python3", limit_s)), "limit_s": round(limit_s, 1)
    }
    reason = step.missing()
    if reason:
        return entry | {"status": "missing", "seconds": 0.0, "reason": reason}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment |= dict(step.environment)
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command(python, limit_s), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )
        except OSError as error:
            return entry | {"status": "failed", "seconds": 0.0, "reason": str(error)}
        try:
            code = process.wait(limit_s)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            _stop(process)
            code, status = None, "timeout"
        except BaseException:
            _stop(process)
            raise
    seconds = round(time.monotonic() - start, 1)
    tail = log.read_text(errors="replace")[-TAIL:]
    return entry | {"status": status, "exit_code": code, "seconds": seconds, "log": log.name, "tail": tail}


def _write(path: Path, report: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="list the steps and their limits, run none")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for all steps together (default {TOTAL_S})")
    parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="for what is measured beside it")
    parser.add_argument("--only", metavar="STEP", action="append", help="run this step alone; may be given again")
    options = parser.parse_args(argv)
    chosen = steps(options.out.resolve())
    unknown = set(options.only or ()) - {step.name for step in chosen}
    if unknown:
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; known: {', '.join(step.name for step in chosen)}")
    chosen = [_beside(step, options.openai) for step in chosen if not options.only or step.name in options.only]
    if options.dry:
        for step in (_beside(step, options.openai) for step in steps(options.out)):
            if step.name in {s.name for s in chosen}:
                note = step.missing()
                print(f"{step.name:12} {step.seconds:4.0f} s  {shlex.join(step.command('python3'))}"
                      + (f"\n{'':12} would not run here: {note}" if note else ""))
        total = min(options.seconds, sum(step.seconds for step in chosen))
        print(f"{'total':12} {total:4.0f} s at most; a step may also use what those before it leave over")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "steps": []
    }
    start = time.monotonic()
    for i, step in enumerate(chosen):
        left = options.seconds - (time.monotonic() - start)
        later = sum(other.seconds for other in chosen[i + 1 :] if not other.missing())
        limit = min(left, max(step.seconds, left - later))
        if left < 1:
            entry = {"step": step.name, "status": "skipped", "seconds": 0.0, "reason": "no time was left for it"}
        else:
            print(f"{step.name}: at most {limit:.0f} s ...", flush=True)
            entry = run(step, sys.executable, options.out, limit)
        report["steps"].append(entry)
        _write(options.out / "report.json", report)
        print(f"{step.name}: {entry['status']} after {entry['seconds']} s {entry.get('reason', '')}", flush=True)
        if "tail" in entry:
            print("    " + entry["tail"][-1500:].rstrip().replace("\n", "\n    "), flush=True)
    print("; ".join(f"{entry['step']} {entry['status']}" for entry in report["steps"]))
    return int(any(entry["status"] in ("failed", "timeout") for entry in report["steps"]))


if __name__ == "__main__":
    sys.exit(main())
