"""How far apart a CPU's cores are while something is timed.

The host of a virtual machine moves its cores about: for half a minute they share a cache, then they do not, and what
waits for the other thread takes a third longer, while a large product takes as long as before. So the ratio of two
programs has two values, and which of them a run finds is chance: U-Nets of 6.9 million parameters, one image, plain
PyTorch beside cmfast, were 1.055 and 1.29 within 150 seconds, on the machine of `results/cpu-amd-epyc`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

#: Times the waiting of cores side by side, from where on they are apart: there it was 1.0 in 207 of 491 rounds, 1.1 or
#: 1.2 in 5, and 1.3 to 2.1 in the others.
APART = 1.2
#: Elements of the smallest operation that two threads share, and how often it is timed: for a millisecond.
ELEMENTS, TIMES = 2**16, 100


class Cores:
    """Whether they are side by side, by the time of an operation that is all waiting for one another.

    nearest: the least that it took, in seconds, as far as is known.
    """

    def __init__(self, nearest: float = math.inf) -> None:
        self.nearest = nearest
        #: Of the rounds that counted last.
        self.seconds_of_last: float | None = None
        self._x, self._out = torch.zeros(ELEMENTS), torch.empty(ELEMENTS)

    def seconds(self) -> float:
        """What the operation takes now."""
        times = []
        for _ in range(TIMES):
            start = time.perf_counter()
            torch.add(self._x, 1.0, out=self._out)
            times.append(time.perf_counter() - start)
        now = statistics.median(times)
        self.nearest = min(self.nearest, now)
        return now

    def near(self, rounds: Iterable[float]) -> list[int]:
        """Which rounds, of which each has its `seconds`, had the cores side by side."""
        return [i for i, seconds in enumerate(rounds) if seconds <= APART * self.nearest]

    def counted(self, rounds: list[float], least: int) -> list[int]:
        """Which rounds count: those with the cores side by side, or all where these are fewer than `least`."""
        near = self.near(rounds)
        counted = near if len(near) >= least else list(range(len(rounds)))
        self.seconds_of_last = statistics.median(rounds[i] for i in counted) if counted else None
        return counted


def known(folder: Path, pattern: str) -> float:
    """The least `sync_us` of earlier results of this machine, in seconds; infinite where there is none."""
    least = math.inf
    for path in folder.glob(pattern):
        rows = json.loads(path.read_text())["rows"]
        least = min([least, *(row["sync_us"] / 1e6 for row in rows if row.get("sync_us"))])
    return least
