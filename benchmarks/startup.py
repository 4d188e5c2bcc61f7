"""Times from nothing to the first images, and memory, each in a process of its own: README.md says how.

    python -m cmfast.benchmarks.startup --out DIR [--network NAME] [--batch N] [--compile] [--openai CHECKOUT]
    python -m cmfast.benchmarks.startup --report DIR/startup-....json      the closing table again
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cmfast.benchmarks import runs, timing
from cmfast.benchmarks.home import HOME
from cmfast.benchmarks.networks import NETWORKS
from cmfast.benchmarks.providers import COMPILED

#: Ends the name of a provider whose compilers find what its process before this one has left them.
AGAIN = "_again"
PROVIDERS = ("reference", "openai", "diffusers", "cmfast", "cmfast_again", "inductor", "openai_compile",
             "diffusers_compile", "cmfast_compile")
#: Processes of each provider, in turn; on a GPU, whose time is dear, and of one that compiles, one.
ROUNDS = 3
#: Where compilers keep what they made, and `cmfast.native` what it has compiled: empty for each process.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
#: Seconds that a process has.
LIMIT_S = 600.0


@dataclass(frozen=True)
class Trial:
    """Who starts, with which network and batch size."""

    network: str
    batch: int
    providers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.network}, batch {self.batch}, first images"

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.providers)}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this suite alone."""
    parser.add_argument("--network", choices=sorted(NETWORKS), help="default: imagenet64; --quick or on a CPU: unet32")
    parser.add_argument("--batch", type=int, default=1)


def chosen_trials(options: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The trials of a command line: those that compile apart from those that do not."""
    network = options.network or ("unet32" if options.quick or device.type == "cpu" else "imagenet64")
    plain = tuple(name for name in PROVIDERS if name not in COMPILED)
    slow = ("cmfast", *(name for name in PROVIDERS if name in COMPILED))
    wanted = options.providers
    found = [Trial(network, options.batch, plain)]
    if wanted is None and runs.compiles(options, device) or set(wanted or ()) & set(COMPILED):
        found.append(Trial(network, options.batch, slow))
    return runs.of_providers(found, wanted, dataclasses.replace)


def child(trial: Trial, provider: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a new process says of itself: `benchmarks/startup_child.py`. Compilers find nothing in their caches, but for
    a provider's second process by its name.

    Raises: RuntimeError: it failed; the message is the end of what it printed.
    """
    command = [sys.executable, "-m", "cmfast.benchmarks.startup_child", "--provider", provider.removesuffix(AGAIN)]
    command += ["--network", trial.network, "--batch", str(trial.batch), "--device", device.type]
    command += ["--openai", str(options.openai.resolve())] if options.openai else []
    with tempfile.TemporaryDirectory(prefix="cmfast-startup-") as folder:
        paths = [str(HOME), os.environ.get("PYTHONPATH")]
        caches = {name: f"{folder}/{name}" for name in CACHES}
        environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if not provider.startswith("cmfast"):
            environment["CMFAST_NATIVE"] = "0"  # plain PyTorch's noise is cmfast's, whose C it need not wait for
        for _ in range(2 if provider.endswith(AGAIN) else 1):
            done = subprocess.run(
                [*command, "--begun", repr(time.time())], cwd=folder, env=environment, capture_output=True, text=True,
                timeout=LIMIT_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError((done.stderr or done.stdout).strip()[-600:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(trial: Trial, options: argparse.Namespace, device: torch.device) -> runs.Found:
    """Rows, failures and missing providers of one trial."""
    found: runs.Found = {"rows": [], "failures": [], "missing": {}}
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in trial.providers}
    once = options.quick or device.type == "cuda" or set(trial.providers) & set(COMPILED)
    rounds = 1 if once else options.rounds
    for i in range(rounds):
        for name in list(said)[:: 1 if i % 2 == 0 else -1]:
            if runs.left_out([one for several in said.values() for one in several]):
                continue
            try:
                one = child(trial, name, options, device)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                one = {"wrong": f"{type(error).__name__}: {error}"}
            if one.get("missing") or one.get("wrong"):
                del said[name]
                if one.get("missing"):
                    found["missing"][name] = one["missing"]
                else:
                    found["failures"].append({"trial": str(trial), "provider": name, "reason": one["wrong"]})
                continue
            said[name].append(one)
    found["missing"] |= {name: "no time was left for it" for name, several in said.items() if not several}
    said = {name: several for name, several in said.items() if several}
    ours = [one["first_images_s"] for one in said.get("cmfast", [])] or None
    for name, several in said.items():
        times = [one["first_images_s"] for one in several]
        middle = {key: timing.percentile([one[key] for one in several], 50) for key in ("import_s", "make_s", "call_s")}
        found["rows"].append({
            "network": trial.network, "batch": trial.batch, "provider": name, "dtype": several[0]["dtype"],
            **timing.statistics_ms(times), "times_cmfast": timing.times_of(times, ours),
            **{key: round(value, 3) for key, value in middle.items()},
            "peak_bytes": several[0]["peak_bytes"], "weight_bytes": several[0]["weight_bytes"],
            "note": several[0]["note"],
        })  # fmt: skip
    return found


def start(
    options: argparse.Namespace, device: torch.device, chosen: Sequence[Trial]
) -> tuple[dict[str, Any], runs.Measure]:
    """Nothing but rows in the result; and what measures a trial."""
    return {}, lambda trial, number: measure(trial, options, device)


def line(trial: Trial, found: runs.Found) -> str:
    """One trial while a run goes on."""
    return runs.found_line(trial, found, [f"{row['provider']} {row['p50_ms'] / 1e3:.2f} s" for row in found["rows"]])


def text(result: dict[str, Any]) -> str:
    """The closing table."""
    lines = ["", *runs.about(result), ""]
    for row in result["rows"]:
        memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:.2f} GB at most"
        times = f"  {row['times_cmfast']['p50']:.2f} x cmfast" if row["times_cmfast"] else ""
        lines.append(
            f"{row['network']} batch {row['batch']}  {row['provider']:18} {row['p50_ms'] / 1e3:8.2f} s to the first "
            f"images{times} (import {row['import_s']:.2f}, first call {row['make_s']:.2f}; then {row['call_s']:.3f} s)"
            f"{memory}"
        )
    return "\n".join([*lines, *runs.leftovers(result)])


SUITE = runs.Suite(
    "startup", "the way from nothing to the first images, and memory", PROVIDERS, chosen_trials, start, line, text,
    COMPILED, add_options, ("network", "batch"), ROUNDS,
)  # fmt: skip
main = SUITE.main


if __name__ == "__main__":
    sys.exit(main())
