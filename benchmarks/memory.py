"""Memory that something takes, from before it is made: of the device, or of this process on a CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import NamedTuple

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(NamedTuple):
    """Bytes. reserved: what the process has taken; allocated: of it, what tensors lie in (on a CPU the same).

    A CUDA graph's memory is reserved, and allocated only while it is captured.
    """

    reserved: int
    allocated: int


def settled(device: torch.device) -> Memory | None:
    """What lives now, all else given back; peaks start anew. None: this system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return Memory(torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))
    try:
        # Else freed memory stays with the process, and the next provider would seem to take none.
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def peak(device: torch.device) -> Memory | None:
    """The most since `settled`."""
    if device.type == "cuda":
        return Memory(torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device))
    return _resident("VmHWM")


def _resident(name: str) -> Memory | None:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return None if found is None else Memory(int(found[1]) * 1024, int(found[1]) * 1024)
