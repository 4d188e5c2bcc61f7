"""`python -m cmfast bench`: benchmarks by one command, each suite a process of its own, and one table of them all.

Nothing is imported here that takes time: the command line of cmfast shows these options, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

#: Seconds of a suite, in full and quick: together at most 10 minutes, and at most 2. 0: only where --case asks for it.
SECONDS: dict[str, tuple[float, float]] = {
    "sampling": (165, 38),
    "training": (185, 38),
    "kernels": (80, 24),
    "parameters": (90, 18),
    "perceptual": (0, 0),
    "doubling": (0, 0),
    "startup": (70, 0),
}
#: Of such a one that --case names.
ALONE_S = 300


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--quick", action="store_true", help="at most two minutes: few cases, small sizes")
    parser.add_argument("--case", metavar="TEXT", default="", help="those whose name holds TEXT, as --list prints them")
    parser.add_argument("--provider", metavar="NAMES", help="these alone, such as cmfast,openai")
    parser.add_argument("--out", type=Path, default=None, help="folder for results and logs (default: out/benchmarks)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results in one file, too")
    parser.add_argument("--openai", type=Path, metavar="CHECKOUT", help="a checkout of openai/consistency_models")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="also what takes minutes to compile (default: on a GPU)")
    parser.add_argument("--seconds", type=float, help="for all together (default: 590, with --quick 118)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--gpu", action="store_true", help="all that a GPU machine can measure and test: make gpu")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0; 1 where a provider was off or failed or a suite ran out of time; 2 where there is no such case.

    Raises: ValueError: an option that the suites, or --gpu, would not take.
    """
    if options.gpu:
        return _gpu(options)
    from cmfast.benchmarks.steps import SECONDS as GIVEN
    from cmfast.benchmarks.steps import Step, failed, run_all
    from cmfast.benchmarks.suites import SUITES

    out = (options.out or Path("out/benchmarks")).resolve()
    wanted = options.provider.split(",") if options.provider else None
    known = {name for suite in SUITES.values() for name in suite.providers}
    if wanted and not known >= set(wanted):
        unknown = ", ".join(sorted(set(wanted) - known))
        raise ValueError(f"--provider: unknown {unknown}; known: {', '.join(sorted(known))}")
    steps = []
    for name, suite in SUITES.items():
        arguments = _arguments(options, None if wanted is None else [w for w in wanted if w in suite.providers])
        if arguments is None:
            continue
        trials = suite.chosen(suite.arguments(arguments))
        if options.list:
            for trial in trials:
                print(f"{name} {trial}")
        elif trials and (seconds := SECONDS[name][options.quick] or bool(options.case) * ALONE_S):
            command = ["-m", f"cmfast.benchmarks.{name}", "--out", str(out), *arguments, "--seconds", GIVEN]
            steps.append(Step(name, command, seconds))
    if options.list:
        return 0
    if not steps:
        print(f"no case's name holds {options.case!r}, or none is measured so: --list prints them", file=sys.stderr)
        return 2
    report = run_all(steps, out, options.seconds or (118 if options.quick else 590))
    results = _results(out, [step.name for step in steps], report["date"])
    _write(options.json, report, results)
    from cmfast.benchmarks.comparisons import text

    print(text(list(results.values())))
    return int(failed(report))


def _arguments(options: argparse.Namespace, providers: list[str] | None) -> list[str] | None:
    """Of a suite's command line; None for one that has none of the providers."""
    if providers == []:
        return None
    words = ["--only", options.case] if options.case else []
    words += ["--providers", ",".join(providers)] if providers else []
    words += ["--quick"] if options.quick else []
    words += ["--openai", str(options.openai.resolve())] if options.openai else []
    words += [] if options.compile is None else ["--compile" if options.compile else "--no-compile"]
    return words + (["--device", options.device] if options.device else [])


def _results(out: Path, names: list[str], since: str) -> dict[str, Any]:
    """What the suites wrote, by suite; an older file of the same folder is not theirs."""
    found = {}
    for name in names:
        for path in sorted(out.glob(f"{name}-*.json")):
            result = json.loads(path.read_text())
            if result["suite"] == name and result["environment"]["date"] >= since:
                found[name] = result
    return found


def _write(path: Path | None, report: dict[str, Any], results: dict[str, Any]) -> None:
    """What --json wants, if it is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"steps": report["steps"], "results": results}, indent=1) + "\n")


def _gpu(options: argparse.Namespace) -> int:
    from cmfast.benchmarks import gpu

    given = {
        "--quick": options.quick, "--provider": options.provider, "--device cpu": options.device == "cpu",
        "--compile": options.compile is True, "--no-compile": options.compile is False,
    }  # fmt: skip
    refused = [name for name, value in given.items() if value]
    if refused:
        raise ValueError(f"--gpu takes no {', '.join(refused)}: what its steps measure is fixed")
    out = options.out or Path("out/gpu")
    words = ["--out", str(out)]
    words += ["--openai", str(options.openai)] if options.openai else []
    words += ["--seconds", f"{options.seconds:g}"] if options.seconds else []
    words += ["--only", options.case] if options.case else []
    if options.list:
        return gpu.main([*words, "--dry"])
    status = gpu.main(words)
    report = json.loads((out / "report.json").read_text())
    _write(options.json, report, _results(out, [entry["step"] for entry in report["steps"]], report["date"]))
    return status
