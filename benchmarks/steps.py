"""Processes that run one after the other, each with a time limit: what `make bench` and `make gpu` are.

What a process prints goes to OUT/<step>.log as it comes, and OUT/report.json says after each how it went. One that
fails, runs out of time or misses a tool does not keep the next from running.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmfast.benchmarks.home import CHECKOUT, HOME
from cmfast.whole import write_text, written_whole

#: The end of a step's output that the report holds, in characters.
TAIL = 4000
#: Seconds that a process has between being asked to stop and being killed.
GRACE_S = 5
#: All files of a run in one, where few files come back from a machine.
PACKED = "gpu.tar.gz"
#: See `Step`.
SECONDS, FINISH_S = "SECONDS", 30


@dataclass(frozen=True)
class Step:
    """`python` and `arguments`, under `wrapper` where there is one. `missing()` says what the machine lacks for it.

    The argument `SECONDS` stands for the seconds that the step has, less `FINISH_S` (or a quarter, if that is less) for
    what is running then.
    """

    name: str
    arguments: list[str]
    seconds: float
    wrapper: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, python: str, limit_s: float | None = None) -> list[str]:
        limit = limit_s or self.seconds
        seconds = str(max(1, int(limit - min(FINISH_S, limit / 4))))
        return [*self.wrapper, python, *(seconds if word == SECONDS else word for word in self.arguments)]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children. First it is interrupted, as from a keyboard: pytest then says what has failed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _interruptible() -> None:
    """For a child: what a shell runs in the background ignores interrupts, and so would the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, python: str, out: Path, limit_s: float) -> dict[str, Any]:
    """One step: its status, its seconds, and the end of what it printed."""
    entry: dict[str, Any] = {
        "step": step.name, "command": shlex.join(step.command("python3", limit_s)), "limit_s": round(limit_s, 1)
    }
    reason = step.missing()
    if reason:
        return entry | {"status": "missing", "seconds": 0.0, "reason": reason}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), environment.get("PYTHONPATH")]))
    # Else what a process that is killed has printed is lost.
    environment["PYTHONUNBUFFERED"] = "1"
    environment |= dict(step.environment)
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command(python, limit_s), cwd=CHECKOUT or out, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_interruptible,
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


def listing(steps: Sequence[Step], seconds: float) -> str:
    """The steps with their limits and commands, for those who want to know before."""
    lines = []
    for step in steps:
        lines.append(f"{step.name:12} {step.seconds:4.0f} s  {shlex.join(step.command('python3'))}")
        reason = step.missing()
        lines += [f"{'':12} would not run here: {reason}"] if reason else []
    total = min(seconds, sum(step.seconds for step in steps))
    lines.append(f"{'total':12} {total:4.0f} s at most; a step may also use what those before it leave over")
    return "\n".join(lines)


def run_all(steps: Sequence[Step], out: Path, seconds: float, pack: Path | None = None) -> dict[str, Any]:
    """All of them, in `seconds` together; each may use what those before it left over. What OUT/report.json holds.

    pack: a folder that gets, after each step, that report and all of OUT in `PACKED`.
    """
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "steps": []
    }
    start = time.monotonic()
    for i, step in enumerate(steps):
        left = seconds - (time.monotonic() - start)
        later = sum(other.seconds for other in steps[i + 1 :] if not other.missing())
        limit = min(left, max(step.seconds, left - later))
        entry: dict[str, Any]
        if left < 1:
            entry = {"step": step.name, "status": "skipped", "seconds": 0.0, "reason": "no time was left for it"}
        else:
            print(f"{step.name}: at most {limit:.0f} s ...", flush=True)
            entry = run(step, sys.executable, out, limit)
        report["steps"].append(entry)
        text = json.dumps(report, indent=1) + "\n"
        write_text(out / "report.json", text)
        if pack is not None:
            pack.mkdir(parents=True, exist_ok=True)
            write_text(pack / "report.json", text)
            with written_whole(pack / PACKED) as path, tarfile.open(path, "w:gz") as archive:
                archive.add(out, ".")
        print(f"{step.name}: {entry['status']} after {entry['seconds']} s {entry.get('reason', '')}", flush=True)
        if "tail" in entry:
            print("    " + entry["tail"][-1500:].rstrip().replace("\n", "\n    "), flush=True)
    print("; ".join(f"{entry['step']} {entry['status']}" for entry in report["steps"]))
    return report


def failed(report: dict[str, Any]) -> bool:
    """Whether a step failed or ran out of time."""
    return any(entry["status"] in ("failed", "timeout") for entry in report["steps"])
