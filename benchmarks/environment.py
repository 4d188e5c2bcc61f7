"""What a measurement was taken on: `python -m cmfast.benchmarks.environment` prints it as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmfast import __version__
from cmfast.benchmarks.home import CHECKOUT


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
    answer = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    state = dict(zip(names, (answer or "").split(", "))) if answer else {}
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": state.pop("driver_version", None),
        # As found when the run began, idle.
        "state": state,
    }


def environment(device: torch.device | str) -> dict[str, Any]:
    """Hardware, versions, commit and date; `device_type` says whether times are a GPU's or a CPU's.

    A copy of a checkout that has no .git gets the commit from CMFAST_COMMIT.
    """
    device = torch.device(device)
    gpu = _gpu(device) if device.type == "cuda" else None
    # An installed package may lie in a folder of some other repository.
    status = _output("git", "status", "--porcelain", "--untracked-files=no") if CHECKOUT else None
    return {
        "device_type": device.type,
        "device": gpu["name"] if gpu else f"CPU: {_cpu_name()}",
        "gpu": gpu,
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cmfast": __version__,
        "commit": os.environ.get("CMFAST_COMMIT") or (_output("git", "rev-parse", "HEAD") if CHECKOUT else None),
        "uncommitted_changes": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    print(json.dumps(environment("cuda" if torch.cuda.is_available() else "cpu"), indent=1))
