"""Runs in processes of their own, for tests of what ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
#: A run that would take for ever.
ENDLESS = ["--recipe", "edm", "--network", "tiny", "--batch-size", "2", "--steps", "1000000", "--log-interval", "1"]


def pictures(folder: Path) -> Path:
    """Four of them, 8 x 8."""
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def command(processes: int, what: str, *arguments: object, rank: int = 0, at: int = 3) -> list[str]:
    launcher = LAUNCHER if processes > 1 else []
    return [sys.executable, *launcher, str(HERE.with_name("fault_run.py")), what, str(rank), str(at),
            *map(str, arguments)]  # fmt: skip


def run(*arguments: object, **options) -> tuple[subprocess.CompletedProcess, float]:
    """A command, in a session of its own, to its end, and the seconds it took."""
    start = time.monotonic()
    done = subprocess.run(command(*arguments, **options), env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
                          start_new_session=True)  # fmt: skip
    return done, time.monotonic() - start
