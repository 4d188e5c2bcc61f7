"""From a device to the host, while the device goes on."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor


class _Own(threading.local):
    """Streams for copies, of each thread its own: PyTorch hands out 32 in turn, so that one for every call would sooner
    or later be the one on which another thread works."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


_own = _Own()


def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """This thread's for copies from a GPU; None for another device."""
    if device.type != "cuda":
        return None
    if device not in _own.streams:
        _own.streams[device] = torch.cuda.Stream(device)
    return _own.streams[device]


class HostCopies:
    """Copies to the host, first in, first out; each result is a tensor of its own.

    On a GPU, `send` makes a copy on the current stream, from where another stream takes it to pinned memory. `ahead`
    says how many copies should be under way before the first is received: one on a GPU, which then computes a batch
    while the one before travels; none where nothing runs meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.ahead = 1 if device.type == "cuda" else 0
        self._stream = _copy_stream(device)
        self._sent: deque[_Copy] = deque()
        self._free: list[_Copy] = []

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._sent)

    def send(self, x: Tensor) -> None:
        """Start with x, which may be overwritten after this call."""
        copy = self._free.pop() if self._free and self._free[-1].fits(x) else _Copy(x, self._stream)
        copy.start(x)
        self._sent.append(copy)

    def receive(self) -> Tensor:
        """The oldest, when it has arrived."""
        copy = self._sent.popleft()
        result = copy.finish()
        self._free.append(copy)
        return result


class _Copy:
    """Room for one copy: on the device, where the next batch does not overwrite it, and in pinned memory."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None) -> None:
        # A stream of batches may begin in inference mode and go on outside of it.
        with torch.inference_mode(False):
            self.staged, self.stream = torch.empty_like(x), stream
        if stream is not None:
            self.pinned = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self.arrived = torch.cuda.Event()
            # Else this memory could be given away while the copy still reads it.
            self.staged.record_stream(stream)

    def fits(self, x: Tensor) -> bool:
        return self.staged.shape == x.shape and self.staged.dtype == x.dtype

    def start(self, x: Tensor) -> None:
        self.staged.copy_(x)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self.stream):
                self.pinned.copy_(self.staged, non_blocking=True)
                self.arrived.record()

    def finish(self) -> Tensor:
        if self.stream is None:
            return self.staged.to("cpu", copy=True)
        # Waits for this copy alone, not for what the device does next.
        self.arrived.synchronize()
        return self.pinned.clone()
