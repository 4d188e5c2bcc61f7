"""CUDA graphs emulated on the CPU, for tests of what is captured and replayed.

As with a real graph, a capture records every call on tensors with the numbers that came from the host, and the memory
that tensors had; a replay makes the same calls on the same memory. What a real capture forbids is forbidden: values
read on the host, tensors made of the host's values, generators that are not registered.
"""

import sys
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cmfast import graphs
from cmfast.native import attention, group_norm, noise, steps, winograd

aten = torch.ops.aten
FORBIDDEN = {aten._local_scalar_dense, aten.lift_fresh, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
#: Checks of values on the CPU, which on a GPU are not made.
CPU_CHECKS = {"sigma_level", "check_labels", "_check_inputs"}


class Recorder(TorchDispatchMode):
    """Makes calls, and notes them."""

    def __init__(self, generators) -> None:
        super().__init__()
        self.calls, self.generators = [], {generator._cdata for generator in generators}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in FORBIDDEN and not called_from(CPU_CHECKS):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        for generator in tree_leaves((args, kwargs)):
            if isinstance(generator, torch.Generator) and generator._cdata not in self.generators:
                raise RuntimeError("a generator that is not registered draws inside a capture")
        out = func(*args, **kwargs)
        # Aliases keep the memory that there is now, also where a parameter is given another.
        self.calls.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs, out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def called_from(names) -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in names:
        frame = frame.f_back
    return frame is not None


class EmulatedSpace:
    """In place of `graphs.CudaSpace`; counts what happens, over all spaces."""

    captures = replays = drains = 0

    def __init__(self, device) -> None:
        self.device, self.lock = device, threading.RLock()
        self.renew_pool()

    def renew_pool(self) -> None:
        self.graphs, self.used = weakref.WeakSet(), False

    @contextmanager
    def turn(self):
        with self.lock:
            yield

    def warm_up(self, function) -> None:
        for _ in range(graphs.WARM_UPS):
            function()

    def capture(self, function, generators):
        EmulatedSpace.captures += 1
        if self.used and not self.graphs:
            pytest.fail("PyTorch lets no capture begin in a pool whose graphs are all gone")
        self.used = True
        try:
            with Recorder([*generators, torch.default_generator]) as recorder:
                result = function()
        except Exception:
            self.renew_pool()
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        self.graphs.add(recorder)

        def replay() -> None:
            EmulatedSpace.replays += 1
            with torch.no_grad():
                recorder.replay()

        return result, replay

    def drain(self) -> None:
        EmulatedSpace.drains += 1


@pytest.fixture(name="emulated")
def emulated_graphs(monkeypatch):
    """Graphs on the CPU; the counters, from zero."""
    monkeypatch.setitem(graphs.SPACES, "cpu", EmulatedSpace)
    # Not PyTorch's calls, so that no recorder sees them: a GPU does not make them, and these are tests of what it does.
    for functions in (winograd, group_norm, attention, noise, steps):
        monkeypatch.setattr(functions, "refusal", lambda: "graphs are emulated")
    EmulatedSpace.captures = EmulatedSpace.replays = EmulatedSpace.drains = 0
    return EmulatedSpace
