"""What benchmark programs have in common: their command line, their time limit, what becomes of trials that fail."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cmfast.benchmarks import timing
from cmfast.benchmarks.cores import Cores, known
from cmfast.benchmarks.record import Record

#: `rows`, `failures` and `missing` of a trial. `later`, if there is any: provider, field of its rows, and what measures
#: that, in their order, when the rows are written.
Found = dict[str, Any]
#: With a time limit, a trial with compiled providers is not started when less is left: it would be cut off.
COMPILE_S = 240.0


class Trial(Protocol):
    """What is measured in turn."""

    @property
    def name(self) -> str:
        """What is measured, whoever does it; rows have it."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Who does it."""


#: Measures a trial, given its number, which its rows get here.
Measure = Callable[[Any, int], Found]


@dataclass(frozen=True)
class Suite:
    """One kind of benchmark, which is one program: `main`.

    what: in a few words, for lists. providers: all there are; compiled: those that take minutes to start. options: adds
    the suite's own options to a parser; own: their names, for the command that a result holds. trials: of a command
    line, the important first, those of `--only` and `--providers` not yet chosen. start: fields of the result besides
    its rows, and what measures a trial. line: a trial while a run goes on. text: the closing table of a result.
    """

    name: str
    what: str
    providers: tuple[str, ...]
    trials: Callable[[argparse.Namespace, torch.device], Sequence[Any]]
    start: Callable[[argparse.Namespace, torch.device, Sequence[Any]], tuple[dict[str, Any], Measure]]
    line: Callable[[Any, Found], str]
    text: Callable[[dict[str, Any]], str]
    compiled: tuple[str, ...] = ()
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    own: tuple[str, ...] = ()
    rounds: int = 7

    def arguments(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options of a command line; an error for a provider that is not known."""
        parser = argparse.ArgumentParser(
            prog=f"cmfast.benchmarks.{self.name}", description=f"Times of {self.what}: benchmarks/README.md."
        )
        parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for the JSON file")
        parser.add_argument("--only", metavar="TEXT", help="trials whose name holds TEXT, as --list prints them")
        parser.add_argument("--providers", type=_words, help=f"these alone, of {','.join(self.providers)}")
        parser.add_argument("--quick", action="store_true", help="few trials, small sizes, few samples")
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                            help="also what takes minutes to compile (default: on a GPU)")
        parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="a checkout of openai/consistency_models")
        parser.add_argument("--rounds", type=int, default=self.rounds,
                            help=f"samples of each at least (default {self.rounds})")
        parser.add_argument("--seconds", type=float, help="start no new trial after so many seconds")
        parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
        parser.add_argument("--list", action="store_true", help="print the trials and stop")
        parser.add_argument("--report", type=Path, metavar="JSON", help="print the closing table of an earlier run")
        self.options(parser)
        options = parser.parse_args(argv)
        unknown = set(options.providers or ()) - set(self.providers)
        if unknown:
            parser.error(f"unknown providers {', '.join(sorted(unknown))}; known: {', '.join(self.providers)}")
        return options

    def chosen(self, options: argparse.Namespace) -> list[Any]:
        """The trials of a command line, with the providers that it names."""
        found = [t for t in self.trials(options, device_of(options)) if (options.only or "") in f"{self.name} {t}"]
        return [trial for trial in dict.fromkeys(found) if trial.providers]

    def command(self, options: argparse.Namespace) -> str:
        """The command line without the folders that results went to and the original came from."""
        words = ["python", "-m", f"cmfast.benchmarks.{self.name}"]
        for name in (*self.own, "only", "providers"):
            value = getattr(options, name)
            if value:
                words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
        words += ["--quick"] if options.quick else []
        words += ["--openai", "CHECKOUT"] if options.openai else []
        words += [] if options.compile is None else ["--compile" if options.compile else "--no-compile"]
        words += ["--rounds", str(options.rounds)] if options.rounds != self.rounds else []
        words += ["--seconds", f"{options.seconds:g}"] if options.seconds is not None else []
        return shlex.join(words + (["--device", options.device] if options.device else []))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """0; 1 where a provider was off or failed; 2 where nothing can be measured."""
        begun = time.perf_counter()
        options = self.arguments(argv)
        if options.report:
            print(self.text(json.loads(options.report.read_text())))
            return 0
        device, trials = device_of(options), self.chosen(options)
        if options.list:
            print("\n".join(str(trial) for trial in trials))
            return 0
        if not trials:
            print(f"no trial of {self.name} has that name and one of those providers: --list prints all",
                  file=sys.stderr)
            return 2
        if device.type == "cuda" and not torch.cuda.is_available():
            print("--device cuda: PyTorch sees no GPU here", file=sys.stderr)
            return 2
        fields, measure = self.start(options, device, trials)
        record = Record(self.name, options.out, device, self.command(options), rates=[], missing={}, **fields)
        record.result["rates"].append(timing.rates(device, options.quick))
        timing.end = math.inf if options.seconds is None else begun + options.seconds
        if device.type == "cpu" and torch.get_num_threads() > 1:
            timing.cores = Cores(known(record.path.parent, f"*{record.path.name.removeprefix(self.name)}"))
        try:
            self._run(record, trials, measure, options.seconds, begun)
        finally:
            timing.end, timing.cores = math.inf, None
        record.result["rates"].append(timing.rates(device, options.quick))
        for row in record.result["rows"]:
            rated(row, record.result["rates"])
        record.write()
        print(self.text(record.result))
        print(f"written: {record.path}")
        return 1 if record.result["failures"] else 0

    def _run(
        self, record: Record, trials: Sequence[Any], measure: Measure, seconds: float | None, begun: float
    ) -> None:
        """Measure trial after trial into the record; one that fails stops no other, unless the device is lost."""
        result, took = record.result, list[float]()
        for i, trial in enumerate(trials):
            start = time.perf_counter()
            left = math.inf if seconds is None else seconds - (start - begun)
            # One that would be cut off tells nothing, and the time limit of its process would be a failure. Not by the
            # longest so far: the first has compilers to start, and one that is `timing.late` ends after a few rounds.
            least = COMPILE_S if set(trial.providers) & set(self.compiled) else 0.0
            if left < max(least, statistics.median(took or [0.0])):
                result["truncated"] = True
                result["not_started"].append(str(trial))
                continue
            try:
                found = _measured(measure, trial, i)
                took.append(time.perf_counter() - start)
                about = {"name": trial.name, "trial": i}
                if timing.cores and timing.cores.seconds_of_last:
                    about["sync_us"] = round(timing.cores.seconds_of_last * 1e6, 2)
                rows = [rated(about | row, result["rates"]) for row in found["rows"]]
                result["rows"] += rows
                result["failures"] += found["failures"]
                result["missing"] |= found["missing"]
                record.write()
                print(f"[{time.perf_counter() - begun:6.1f} s] {self.line(trial, found)}", flush=True)
                # Not kept any longer: it holds the memory of what was timed.
                _later(record, rows, found.pop("later", []))
            except torch.AcceleratorError as error:
                reason = f"{type(error).__name__}: {error}"
                result["failures"].append({"trial": str(trial), "provider": "all", "reason": reason})
                result["truncated"] = True
                result["not_started"] += [str(t) for t in trials[i + 1 :]]
                record.write()
                raise


def _measured(measure: Measure, trial: Trial, number: int) -> Found:
    """What is found of a trial; of one that fails as a whole, why.

    Raises: torch.AcceleratorError: the device is lost.
    """
    try:
        return measure(trial, number)
    except Exception as error:
        failure = {"trial": str(trial), "provider": "all", "reason": timing.reason_of(error)}
        return {"rows": [], "missing": {}, "failures": [failure]}


def _later(record: Record, rows: list[dict[str, Any]], later: Iterable[Any]) -> None:
    """Into the rows of a trial, what is measured when they are written: a profiler may fail, or crash.

    Raises: torch.AcceleratorError: the device is lost.
    """
    for provider, field, measure in later:
        try:
            value = measure()
        except Exception as error:
            record.result["missing"][f"{field} of {provider}"] = timing.reason_of(error)
            value = None
        for row in rows:
            if row["provider"] == provider:
                row[field] = value
        record.write()


def left_out(made: Collection[Any]) -> str | None:
    """Why a provider is not begun where others of its trial are `made`; None for one that may be."""
    return "no time was left for it" if made and timing.late() else None


def rated(row: dict[str, Any], rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row beside what the device can do at most: a copy, a large matrix product (on a CPU: convolution). Of several
    readings the largest counts: a slow one would flatter all."""
    if row.get("gb_per_s") is not None:
        copy = max(reading["copy"]["gb_per_s"] for reading in rates)
        row["percent_of_copy"] = round(100 * row["gb_per_s"] / copy, 2)
    if row.get("tflop_per_s") is not None:
        of_dtype = [reading["matrix"].get(row.get("dtype"), {}).get("tflop_per_s", 0.0) for reading in rates]
        row["percent_of_matrix"] = round(100 * row["tflop_per_s"] / max(of_dtype), 2) if any(of_dtype) else None
    return row


def of_providers(trials: Iterable[Any], wanted: Collection[str] | None, replace: Callable[..., Any]) -> list[Any]:
    """Trials with the wanted providers alone, in their order. replace: as dataclasses.replace."""
    if wanted is None:
        return list(trials)
    return [replace(trial, providers=tuple(name for name in wanted if name in trial.providers)) for trial in trials]


def found_line(trial: Any, found: Found, times: Iterable[str]) -> str:
    """One trial while a run goes on: times, what is off, what is missing."""
    wrong = [f"{failure['provider']} FAILED: {failure['reason'].splitlines()[0]}" for failure in found["failures"]]
    missing = [f"{name} missing: {reason}" for name, reason in found["missing"].items()]
    return f"{trial}\n    " + "\n    ".join([*times, *wrong, *missing])


def milliseconds_line(trial: Any, found: Found) -> str:
    """One trial while a run goes on, of a suite whose rows are in microseconds."""
    return found_line(trial, found, [f"{row['provider']} {row['p50_us'] / 1e3:.2f} ms" for row in found["rows"]])


def _words(text: str) -> list[str]:
    return text.split(",")


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def compiles(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether what takes minutes to compile is among the trials."""
    return device.type == "cuda" if options.compile is None else options.compile


def about(result: dict[str, Any]) -> list[str]:
    """What a run was taken on, its command, what the device can do at most, and what was not measured."""
    found = result["environment"]
    lines = [
        f"{found['device']}, {found['cpu']['threads']} threads; torch {found['torch']}, triton {found['triton']}, CUDA "
        f"{found['cuda']}, python {found['python']}; commit {found['commit']}"
        f"{' + changes' if found['uncommitted_changes'] else ''}; {found['date']}",
        f"command: {found['command']}",
    ]
    for when, rates in zip(("first", "last"), result["rates"]):
        matrices = ", ".join(f"{dtype} {rate['tflop_per_s']:.3g} TFLOP/s" for dtype, rate in rates["matrix"].items())
        lines.append(f"copy, {when}: {rates['copy']['gb_per_s']:.1f} GB/s read + written; {rates['what']}: {matrices}")
    return lines


def leftovers(result: dict[str, Any]) -> list[str]:
    """What a run did not time, and why."""
    lines = [f"missing: {name}: {reason}" for name, reason in result["missing"].items()]
    notes = {row["provider"]: row["note"] for row in result["rows"] if row.get("note")}
    lines += [f"note: {name}: {note}" for name, note in notes.items()]
    if result["truncated"]:
        lines += [f"not started, TRUNCATED by --seconds: {trial}" for trial in result["not_started"]]
    return lines + [f"FAILED, not timed: {f['trial']}: {f['provider']}: {f['reason']}" for f in result["failures"]]
