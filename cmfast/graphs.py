"""Loops as CUDA graphs: static buffers, warm-up, capture, replay, and a cache of them with a bound."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cmfast.errors import Unavailable
from cmfast.levels import keep_levels
from cmfast.memory import capturing, out_of_memory
from cmfast.ops import _check
from cmfast.watch import name_of

#: What a loop is given: tensors; numbers, which a graph reads from a scalar; ranges, as int64 [n].
Value = Tensor | int | float | range
Values = dict[str, Value]
#: A loop, from its tensors and numbers to its result.
Loop = Callable[[dict[str, Any]], Tensor]

T = TypeVar("T")

#: Runs before a capture: kernels are compiled and chosen, and libraries are loaded.
WARM_UPS = 2
#: Graphs whose capture broke: PyTorch's allocators still know them by their addresses.
_broken: list[torch.cuda.CUDAGraph] = []


class GraphError(Unavailable):
    """A graph was asked for and cannot be had; the message says why."""


class CudaSpace:
    """Where the graphs of one sampler are captured and replayed: a stream, and a memory pool that they share.

    They may share it because they take turns, also between threads and their streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # PyTorch hands out its streams in turn, 32 of each priority. Those of the other one are for captures alone:
        # what another thread launched on such a stream would become part of the graph.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.pool = torch.cuda.graph_pool_handle()
        self._lock = threading.RLock()
        self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One program at a time: buffers filled, replayed, and the result taken away, on the current stream."""
        with self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run it on the stream it will be captured on."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    function()
        finally:
            current.wait_stream(self.stream)

    def capture(
        self, function: Callable[[], T], generators: Sequence[torch.Generator] = ()
    ) -> tuple[T, Callable[[], None]]:
        """The result, which every replay overwrites, and what replays."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        current = torch.cuda.current_stream()
        try:
            with _workspaces_in_the_pool(), self._capture(graph, self.pool):
                result = function()
        except BaseException:
            torch.cuda.set_stream(current)
            self._mend(graph, generators)
            raise
        finally:
            # A capture that fails leaves its stream the current one.
            torch.cuda.set_stream(current)
        return result, graph.replay

    def _mend(self, broken: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator]) -> None:
        """After a capture that broke: PyTorch ends the stream's part of it and then raises, so that its allocators and
        generators go on as if in a capture, in which nothing can be captured, no memory be given back, and no number be
        drawn. The first is ended here, the pool given up, and a whole capture, of a pool that goes with it, brings the
        generators back."""
        with suppress(RuntimeError):  # Nothing is recorded: PyTorch has ended it, and its graph gives up the pool.
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            _broken.append(broken)
            # A graph whose capture did not end never gives up its part of the pool, which would be kept for ever.
            torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
        self.renew_pool()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        place = torch.empty(1, device=self.device)
        with self._capture(graph):
            place.zero_()

    def _capture(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> torch.cuda.graph:
        return torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")

    def drain(self) -> None:
        """Wait until no program runs: before graphs are thrown away. Waiting for the whole device would break a capture
        of another thread."""
        with self._lock:
            self._done.synchronize()

    def renew_pool(self) -> None:
        """Take another pool, when all graphs of this one are gone: PyTorch, which is to give it back, lets no capture
        begin in it."""
        self.pool = torch.cuda.graph_pool_handle()


@contextmanager
def _workspaces_in_the_pool() -> Iterator[None]:
    """Around a capture, cuBLAS takes its memory anew, from the graph's pool, and leaves it there.

    PyTorch keeps a workspace for each stream, whose address a graph records, and gives it back when any graph of that
    stream is destroyed, or torch.compile makes one of its own; the graph would go on writing to it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


#: By type of device. Tests put an emulation beside it.
SPACES: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaSpace}


class Program:
    """A loop captured for values of one kind: `run` puts values into its buffers and replays.

    loop: from values by name to a tensor; it takes its noise levels through `cmfast.levels`.
    model: the module that is blamed where the capture breaks. Generators are left where they were.

    Raises: GraphError: the capture broke; the message names the innermost of the model's modules that ran.
    """

    def __init__(
        self, loop: Loop, values: Values, space: Any, model: object, generators: Sequence[torch.Generator] = ()
    ) -> None:
        # A graph keeps their states alone. Their ids, by which a program is found, are to stay theirs.
        self._generators = tuple(generators)
        self._buffers = {name: _buffer(value, space.device) for name, value in values.items()}
        self._filled: dict[str, Value] = {}
        self._levels: dict[Any, Tensor] = {}
        self._fill(values)

        def function() -> Tensor:
            with keep_levels(self._levels):
                return loop(dict(self._buffers))

        states = [generator.get_state() for generator in generators]
        try:
            space.warm_up(function)
            self._result, self._replay = _captured(function, space, model, generators)
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)

    def run(self, values: Values) -> Tensor:
        """The loop's result, which the next run overwrites."""
        self._fill(values)
        self._replay()
        return self._result

    def _fill(self, values: Values) -> None:
        """Put values into the buffers; numbers by kernels that take them, so that nothing is copied from the host."""
        for name, value in values.items():
            buffer = self._buffers[name]
            if isinstance(value, Tensor):
                buffer.copy_(value)
            elif value != self._filled.get(name):
                if isinstance(value, range):
                    torch.arange(value.start, value.stop, out=buffer, device=buffer.device)
                else:
                    buffer.fill_(_check.as_int64(value) if isinstance(value, int) else value)
                self._filled[name] = value


def run_eagerly(loop: Loop, values: Values, device: torch.device, levels: dict[Any, Tensor]) -> Tensor:
    """The loop's result, call by call; `levels` keeps its noise levels between runs."""
    given = {
        name: torch.arange(value.start, value.stop, device=device) if isinstance(value, range) else value
        for name, value in values.items()
    }
    with keep_levels(levels):
        return loop(given)


def _captured(
    function: Callable[[], Tensor], space: Any, model: object, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Callable[[], None]]:
    with capturing, _no_collection():
        try:
            return space.capture(function, generators)
        except Exception as error:
            broken: BaseException = error
            if "capture" in str(error) and error.__context__ is not None:
                # Ending a capture that is broken fails as well: what broke it came before.
                broken = error.__context__
            if out_of_memory(broken):
                raise broken from None
            message = str(broken).split("\n")[0]
        running = _innermost(model, lambda: space.capture(function, generators))
    where = f"in {running}" if running else "outside of the model's modules"
    raise GraphError(f"the capture of a CUDA graph broke {where}: {type(broken).__name__}: {message}") from broken


def _innermost(model: object, run: Callable[[], object]) -> str | None:
    """What of the model was running when `run` failed: the innermost module; None if none of it."""
    running: list[nn.Module] = []
    handles = []

    def enter(module: nn.Module, inputs: object) -> None:
        running.append(module)

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        running.pop()

    for module in model.modules() if isinstance(model, nn.Module) else ():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        run()
    except Exception:
        return name_of(model, running[-1]) if running and isinstance(model, nn.Module) else None
    finally:
        for handle in handles:
            handle.remove()
    # An optimised network does not take its fast pass where its parts have hooks.
    return f"the fast pass of {type(getattr(model, 'network', model)).__name__}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: a graph that it destroys would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _buffer(value: Value, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return torch.empty_like(value)
    if isinstance(value, range):
        return torch.empty(len(value), dtype=torch.int64, device=device)
    return torch.empty((), dtype=torch.int64 if isinstance(value, int) else torch.float64, device=device)


def kind(values: Values) -> Hashable:
    """What a program is made for: the names, and of tensors the shape, strides, dtype and device."""
    return tuple((name, _kind(value)) for name, value in values.items())


def _kind(value: Value) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return ("range", len(value)) if isinstance(value, range) else type(value).__name__


class ProgramCache:
    """The programs used last, up to a bound."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, key: Hashable) -> Program | None:
        """The program of this key, which is now the one used last."""
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
        return program

    def put(self, key: Hashable, program: Program, space: Any) -> None:
        """Keep a program, and let go of the one that was not used for longest where there are too many."""
        self._programs[key] = program
        if len(self._programs) > self.size:
            if space is not None:
                space.drain()
            self._programs.popitem(last=False)

    def clear(self, space: Any) -> None:
        """Let go of all."""
        if not self._programs:
            return
        if space is not None:
            space.drain()
        self._programs.clear()
        if space is not None:
            space.renew_pool()
