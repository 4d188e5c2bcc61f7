"""What runs of trials have in common: their command line, their time limit, what becomes of trials that fail."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Record

Found = dict[str, Any]
#: With a time limit, a trial with compiled providers is not started when less is left: it would be cut off.
COMPILE_S = 240.0


def parser(program: str, description: str, providers: Iterable[str], rounds: int) -> argparse.ArgumentParser:
    """Options that every such program takes."""
    made = argparse.ArgumentParser(prog=f"benchmarks/{program}.py", description=description)
    made.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the JSON file")
    made.add_argument("--providers", type=lambda text: text.split(","), help=f"these alone, of {','.join(providers)}")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction,
                      help="also what takes minutes to compile (default: on a GPU)")
    made.add_argument("--openai", type=Path, metavar="CHECKOUT", help="a checkout of openai/consistency_models")
    made.add_argument("--rounds", type=int, default=rounds, help=f"samples of each at least (default {rounds})")
    made.add_argument("--seconds", type=float, help="start no new trial after so many seconds")
    made.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    made.add_argument("--list", action="store_true", help="print the trials and stop")
    made.add_argument("--report", type=Path, metavar="JSON", help="print the closing table of an earlier run")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None, providers: Collection[str]) -> argparse.Namespace:
    """The options; an error for a provider that is not known."""
    options = made.parse_args(argv)
    unknown = set(options.providers or ()) - set(providers)
    if unknown:
        made.error(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(providers)}")
    return options


def command(program: str, options: argparse.Namespace, rounds: int, own: Iterable[str]) -> str:
    """The command line without the folders that results went to and the original came from. own: the program's own
    options."""
    words = ["python", f"benchmarks/{program}.py"]
    for name in (*own, "providers"):
        value = getattr(options, name)
        if value:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    words += ["--openai", "CHECKOUT"] if options.openai else []
    words += [] if options.compile is None else ["--compile" if options.compile else "--no-compile"]
    words += ["--rounds", str(options.rounds)] if options.rounds != rounds else []
    words += ["--seconds", f"{options.seconds:g}"] if options.seconds is not None else []
    return shlex.join(words + (["--device", options.device] if options.device else []))


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def compiles(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether what takes minutes to compile is among the trials."""
    return device.type == "cuda" if options.compile is None else options.compile


def only(
    options: argparse.Namespace, trials: Callable[[torch.device], list[Any]], text: Callable[[dict[str, Any]], str]
) -> int | None:
    """The exit status of a run that only prints, or cannot be; None for one that measures."""
    if options.report:
        print(text(json.loads(options.report.read_text())))
        return 0
    if options.list:
        print("\n".join(str(trial) for trial in trials(device_of(options))))
        return 0
    if device_of(options).type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
        return 2
    return None


def run(
    record: Record,
    trials: list[Any],
    measure: Callable[[Any, int], Found],
    line: Callable[[Any, Found], str],
    *,
    compiled: Collection[str],
    seconds: float | None,
    begun: float,
) -> None:
    """Measure trial after trial into the record; one that fails stops no other, unless the device is lost.

    measure: (trial, its number) to `rows`, `failures` and `missing`. compiled: the providers that take minutes.
    seconds: after `begun`, when no trial is started any more.
    """
    result = record.result
    for i, trial in enumerate(trials):
        left = math.inf if seconds is None else seconds - (time.perf_counter() - begun)
        if left < (COMPILE_S if set(trial.providers) & set(compiled) else 0):
            result["truncated"] = True
            result["not_started"].append(str(trial))
            continue
        try:
            found = measure(trial, i)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            failures = [{"trial": str(trial), "provider": "all", "reason": reason}]
            found = {"rows": [], "missing": {}, "failures": failures}
            if isinstance(error, torch.AcceleratorError):
                result["failures"] += failures
                result["truncated"], result["not_started"] = True, [str(t) for t in trials[i + 1 :]]
                record.write()
                raise  # The device is lost to this process.
        result["rows"] += found["rows"]
        result["failures"] += found["failures"]
        result["missing"] |= found["missing"]
        record.write()
        print(f"[{time.perf_counter() - begun:6.1f} s] {line(trial, found)}", flush=True)
    record.write()
