"""How a sampler runs a loop: with which form of the model, and as a CUDA graph or call by call."""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cmfast import graphs, ops
from cmfast.denoiser import Denoiser
from cmfast.errors import Unavailable
from cmfast.graphs import GraphError, Program, ProgramCache, Values, run_eagerly
from cmfast.networks import compiling, prepare
from cmfast.watch import Change, Watch, evaluating

Result = TypeVar("Result")
#: From a model and values by name to a tensor.
ModelLoop = Callable[[Any, dict[str, Any]], Tensor]


#: Kinds of loops that a runner remembers to have run. Forgetting them costs a look at the model after a run.
KINDS = 1024


class Runner:
    """Runs loops with a model, and looks before each whether the model, or what was made of it, is still the same.

    host_work: why loops would need the host between their steps now; None if they do not.
    Other arguments as of `cmfast.Sampler`.
    """

    def __init__(
        self,
        model: Any,
        *,
        cuda_graph: str | bool,
        cache_size: int,
        host_work: str | None,
        optimize: str | bool,
        compile: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.model = model
        self.startup = 0.0
        self._cuda_graph, self._cache_size = cuda_graph, cache_size
        self._options: dict[str, Any] = {"optimize": optimize, "compile": compile, "dtype": dtype}
        self._programs = ProgramCache(cache_size)
        self._space: Any = None
        #: Why capturing this model failed.
        self._broken: str | None = None
        #: The kinds of loops that ran since the model was prepared.
        self._ran: set[Hashable] = set()
        self._levels: dict[Any, Tensor] = {}
        self._lock = threading.RLock()
        #: The change that is to be followed: an update that fails leaves it to the next one.
        self._due = Change.NOTHING
        #: How often the model was prepared.
        self._version = 0
        self._forked = False
        _runners.add(self)
        self._watch = Watch(model) if isinstance(model, nn.Module) else None
        self._prepare()
        refusal = self._refusal() or host_work
        if refusal and cuda_graph is True:
            raise GraphError(f"cuda_graph=True cannot be had: {refusal}")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: what was made of the model is made again."""
        own = {"cuda_graph": self._cuda_graph, "cache_size": self._cache_size, "host_work": None}
        return {"model": self.model, **own, **self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # as it was made

    @property
    def device(self) -> torch.device:
        """Where the model is now; the CPU if it has neither weights nor buffers."""
        tensors: Iterator[Tensor] = chain(self.model.parameters(), self.model.buffers()) if self._watch else iter(())
        return next((x.device for x in tensors), torch.device("cpu"))

    def explain(self, host_work: str | None = None) -> dict[str, tuple[str, str]]:
        """As `Sampler.explain`; host_work as of `run`."""
        with self._lock:
            self._update()
            refusal, hooked = self._refusal() or host_work, self._hooked()
        network, compiled = self._prepared.optimised, self._prepared.compiled
        if hooked:
            network, compiled = ("as given", hooked), ("off", hooked)
        loop = ("eager", refusal) if refusal else ("graph", "captured once for each shape, and replayed")
        return {"loop": loop, "network": network, "compile": compiled}

    def refresh(self) -> None:
        """As `Sampler.refresh`."""
        with self._lock:
            self._update()
            self._refresh_derived(force=True)

    def run(
        self,
        name: Hashable,
        loop: ModelLoop,
        values: Values,
        take: Callable[[Tensor], Result],
        *,
        generators: Sequence[torch.Generator] = (),
        host_work: str | None = None,
    ) -> Result:
        """What `take` makes of the loop's result, which is a graph's own and must not be kept.

        name: of the loop; one name and kind of values is one program. generators: those it draws from. host_work: why
            this loop needs the host; None if it does not.
        Raises: GraphError: a graph was asked for with True, and cannot be had.
        """
        with self._lock:
            self._update()
            # Hooks want to be called: then it is the model as given.
            model = self.model if self._hooked() else self._prepared.model
            version = self._version
        device = self.device
        # Another thread may prepare the model anew before this one captures it as it was.
        key = name, version, graphs.kind(values), _settings(device), *map(id, generators)
        # Buffers and what is derived outlive a user's inference mode.
        with self._evaluating(), torch.no_grad():
            with self._lock:
                refusal = host_work or self._refusal()
                if refusal is None:
                    with torch.inference_mode(False), self._graph_space().turn():
                        program = self._program(key, model, loop, values, generators)
                        if program is not None:
                            return take(program.run(values))
                elif self._cuda_graph is True:
                    raise GraphError(f"cuda_graph=True cannot be had: {refusal}")
            with self._first(key):
                return take(run_eagerly(functools.partial(loop, model), values, device, self._levels))

    # The model.

    def _evaluating(self) -> Any:
        return evaluating(self._watch.modules) if self._watch else nullcontext()

    def _hooked(self) -> str | None:
        return self._watch.hooked() if self._watch else None

    def _prepare(self) -> None:
        start = time.perf_counter()
        self._version += 1
        with self._evaluating(), torch.inference_mode(False):
            made = prepare(self.model, **self._options)
        self._prepared = made._replace(model=_in_place(self.model, made.model))
        self.startup += time.perf_counter() - start

    def _refresh_derived(self, *, force: bool) -> None:
        """Bring derived weights up to date; if that replaced them, programs are worthless."""
        if force and self._prepared.refresh is None:
            self.forget()
        if self._prepared.refresh is None or self._watch is None:
            return
        # In turn with replays: on another thread's stream, one could read what is being written.
        turn = self._space.turn() if self._space else nullcontext()
        with turn, self._evaluating(), torch.inference_mode(False), torch.no_grad():
            replaced = self._prepared.refresh(force=force)
        # What it wrote into the model is no change to see next time.
        self._watch.settle()
        if replaced:
            self.forget()

    def _update(self) -> None:
        """See what changed in the model, and make anew what that makes worthless."""
        self.check_process()
        if self._watch is None:
            return
        change = max(self._due, self._watch.change(values=self._prepared.refresh is not None))
        if change is Change.NOTHING:
            return
        self._due = change
        if change is Change.STRUCTURE:
            self._prepare()
            self._ran.clear()
            self._broken = None
        if change in (Change.STORAGE, Change.STRUCTURE):
            self.forget()
        self._refresh_derived(force=False)
        self._due = Change.NOTHING

    def check_process(self) -> None:
        """Raises: Unavailable: in a forked process where PyTorch would fail by another name, or wait for ever."""
        if not self._forked:
            return
        if self.device.type == "cuda":
            raise Unavailable(
                "this process was forked from one that used the GPU, and CUDA does not work in it: start it by "
                "'spawn' or 'forkserver' of multiprocessing, and give it the sampler"
            )
        if torch.get_num_threads() > 1:
            raise Unavailable(
                f"this process was forked, and {torch.get_num_threads()} threads of PyTorch did not come along: call "
                "torch.set_num_threads(1) in it, as workers of a DataLoader do, or start it by 'spawn'"
            )

    def forget(self) -> None:
        """Let go of all programs, and of their memory."""
        # Not while another thread takes or keeps one.
        with self._lock:
            self._programs.clear(self._space)

    @contextmanager
    def _first(self, key: Hashable, *, captured: bool = False) -> Iterator[None]:
        """Around a run. The first of its kind may compile, and shows what the model writes into itself."""
        if key in self._ran:
            yield
            return
        # What is written between steps may be a callback's, and a graph has it as it was when it was captured.
        if captured and self._watch is not None:
            self._watch.settle(anew=True)
        compiled = self._prepared.compiled[0] != "off"
        start = time.perf_counter()
        with compiling() if compiled else nullcontext():
            yield
        with self._lock:
            if compiled or self._refusal() is None:
                self.startup += time.perf_counter() - start
            if self._watch is not None and (captured or not self._programs):
                self._watch.settle()
            if len(self._ran) >= KINDS:
                self._ran.clear()
            self._ran.add(key)

    # Graphs.

    def _refusal(self) -> str | None:
        """Why loops run call by call; None if they are captured."""
        if self._cuda_graph is False:
            return "cuda_graph=False was asked for"
        device = self.device
        if device.type not in graphs.SPACES:
            return f"the model is on a {device.type} device: CUDA graphs are for GPUs"
        if torch.is_autocast_enabled(device.type):
            return "torch.autocast is on, and keeps cast weights that a graph would go on reading: cast the model"
        return self._hooked() or self._unseen() or self._broken

    def _unseen(self) -> str | None:
        network = self.model.network if isinstance(self.model, Denoiser) else self.model
        if self._watch is None or not isinstance(network, nn.Module):
            # Asked for outright, it is the user who sees to it.
            return None if self._cuda_graph is True else "changes of a function cannot be seen: pass a module"
        return self._watch.unseen

    def _graph_space(self) -> Any:
        if self._space is None or self._space.device != self.device:
            self._space = graphs.SPACES[self.device.type](self.device)
        return self._space

    def _program(
        self, key: Hashable, model: Any, loop: ModelLoop, values: Values, generators: Sequence[torch.Generator]
    ) -> Program | None:
        """The captured loop; None if capturing it failed, and that is no error."""
        program = self._programs.get(key)
        if program is None:
            try:
                self._ran.discard(key)
                with self._first(key, captured=True):
                    program = Program(functools.partial(loop, model), values, self._space, model, generators)
            except GraphError as error:
                if self._cuda_graph is True:
                    raise
                self._broken = str(error)
                warnings.warn(f"{error}. Sampling goes on without a graph", RuntimeWarning, stacklevel=4)
                return None
            self._programs.put(key, program, self._space)
        return program


def _in_place(model: Any, form: Any) -> Any:
    """`form`, if it is a copy of the model around another network, with the model's own attributes for those copied:
    what a callback sets in the model counts at once, and what the model notes down in a run is there after it."""
    if form is model or type(form) is not type(model) or not isinstance(model, nn.Module):
        return form
    parts = {name: part for name, part in form._modules.items() if part is not model._modules.get(name)}
    if not parts or parts.keys() - {"network", "unet"}:
        return form
    # The other network has a place of its own, which comes before that of the same name in the model's table.
    kind: Any = type(type(model).__name__, (_Unannounced, type(model)), {"__slots__": tuple(parts)})
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", vars(model))
    for name, part in parts.items():
        object.__setattr__(made, name, _in_place(model._modules[name], part))
    return made


class _Unannounced:
    """Before a class of the user's: no `__init_subclass__` of that hears of the class made here."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        pass


_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked process: locks may be held, and changes be half followed, by threads that it does not have."""
    for runner in _runners:
        runner._lock, runner._due, runner._forked = threading.RLock(), Change.STRUCTURE, True
        # A space has a lock as well. Those of a GPU are refused, and not to be touched.
        if runner._space is not None and runner._space.device.type != "cuda":
            runner._space = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _settings(device: torch.device) -> Hashable:
    """What a graph holds of the settings that were in force when it was captured."""
    return (
        device,
        ops.current_backend(),
        # What both of PyTorch's ways to allow TF32 set; the older of its questions fails where the newer way was taken.
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # put there at run time
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )
