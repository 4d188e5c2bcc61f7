"""Dropout that two network calls share: drawn from counters, or else from torch's generators put back in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmfast import ops
from cmfast.ops import _check
from cmfast.ops._dispatch import keeping_backend

#: The draw number of a network's first layer that drops; the next layers count up. Noise counts up from 0, too.
DROPOUT_DRAW = 0x80000000
_MIX = 0x9E3779B97F4A7C15


class _Now:
    """What dropout draws from. Of the process, not of a thread: backward passes recompute layers in threads of theirs,
    and Dynamo looks it up where it is."""

    draw: ops.Draw | None = None


_now = _Now()

#: The layers, by id, of which the last pass drew from counters.
_counted: set[int] = set()


@contextmanager
def paired(draw: ops.Draw) -> Iterator[None]:
    """Inside, dropout follows from (draw.seed, draw.index[b], draw.draw) and the layer alone.

    So every network call in such a block, and in another of the same draw, drops the same elements of a sample: on any
    device, inside `torch.compile`, in captured graphs, for any batch size and number of ranks. It holds for networks
    of this package, optimised ones included, and for every `Dropout` with a number. A compiled network reads seed and
    index as tensors: it is not compiled anew for another step.

    Activations that a backward pass makes again are the same where the network does it, as with `use_checkpoint=True`;
    torch.utils.checkpoint around it needs the backward pass inside, too, and else is a RuntimeError (not of a compiled
    network, where nobody looks).

    >>> layer = Dropout(0.5, layer=0)
    >>> x = torch.ones(2, 3, 4, 4)
    >>> with paired(ops.Draw(0, torch.arange(2))):
    ...     bool((layer(x) == layer(x)).all())
    True
    """
    with at(_first(draw)):
        yield


@contextmanager
def at(draw: ops.Draw) -> Iterator[None]:
    """`paired`, with what `current` gave there: for a network call that is captured, and reads a draw from buffers."""
    before, _now.draw = _now.draw, draw
    try:
        yield
    finally:
        _now.draw = before


def _first(draw: ops.Draw) -> ops.Draw:
    """The draw of layer 0. The draw number goes into the seed, for its own word counts layers."""
    seed, index, number = _check.counter("draw", draw)
    if isinstance(seed, Tensor):
        seed = seed.to(torch.int64)
    else:
        # Made on the device: a copy from the host would break the capture of a CUDA graph.
        seed = index.new_full((), _check.as_int64(seed), dtype=torch.int64)
    if isinstance(number, Tensor):
        seed = seed ^ (number.to(torch.int64) * _check.as_int64(_MIX))
    elif number:
        seed = seed ^ _check.as_int64(number * _MIX)
    return ops.Draw(seed, index, DROPOUT_DRAW)


def current() -> ops.Draw | None:
    """The draw of layer 0 inside `paired`, the k-th layer's draw number being k more; None outside."""
    return _now.draw


def note(layer: nn.Module, counts: bool) -> None:
    """Note how a layer that drops does so in this pass; counts: by counters.

    Raises: RuntimeError: a backward pass makes its activations again without the draw that it had.
    """
    if torch.compiler.is_compiling():
        return
    if counts:
        _counted.add(id(layer))
    elif id(layer) in _counted:
        if torch._C._current_graph_task_id() != -1:  # -1: outside of backward passes
            raise RuntimeError(
                "a backward pass makes the activations of a network with dropout again, without the draw that it "
                "dropped by: set use_checkpoint=True in the network (checkpointing=True in TrainOptions) in place of "
                "torch.utils.checkpoint around it, or call backward() inside cmfast.dropout.paired(draw)"
            )
        _counted.discard(id(layer))


class Dropout(nn.Dropout):
    """`nn.Dropout`, which inside `paired` draws from counters if it has a number. See `number` for whole networks.

    p, inplace: as of nn.Dropout. layer: its number, 0 or more; None: it has none.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, layer: int | None = None) -> None:
        super().__init__(p, inplace)
        self.layer = layer

    @property
    def counts(self) -> bool:
        """Whether it would draw from counters now."""
        return self.layer is not None and _now.draw is not None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] with a part of its elements 0 and the rest scaled, in training mode."""
        draw = _now.draw
        # All of it dropped needs no draw.
        if self.layer is None or not self.training or not 0 < self.p < 1:
            return super().forward(x)
        note(self, draw is not None)
        if draw is None:
            return super().forward(x)
        return ops.dropout(x, self.p, draw._replace(draw=DROPOUT_DRAW + self.layer))


def number(network: nn.Module) -> None:
    """Give the `Dropout` layers of a network the numbers 0, 1, ... in the order of its modules.

    Without numbers they are nn.Dropout: layers that shared one would drop the same elements.
    """
    for layer, module in enumerate(m for m in network.modules() if isinstance(m, Dropout)):
        module.layer = layer


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that draws as now whenever it is called, and on the backend of now, for activations that the backward
    pass makes again."""
    draw, function = _now.draw, keeping_backend(function)
    # Of what is compiled, the backward pass takes the draw that the forward pass was given.
    if draw is None or torch.compiler.is_compiling():
        return function

    def again(*arguments: Any) -> Any:
        with at(draw):
            return function(*arguments)

    return again


class Pairing:
    """`with pairing:` around each of the network calls that are to drop the same.

    With a draw, what counts is `paired`. Networks that may drop in another way, and all of them without a draw, have
    torch's generators put back to where the first call found them; not inside `torch.compile` or the capture of a CUDA
    graph, where that cannot be done.

    device: whose generators, beside the CPU's. models: those that are called.
    """

    def __init__(self, draw: ops.Draw | None, device: torch.device, *models: Any) -> None:
        self._draw = None if draw is None else _first(draw)
        self._before: ops.Draw | None = None
        self._device = device
        self._states: tuple[Tensor, Tensor | None] | None = None
        fixed = torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        self._restores = not fixed and not (draw is not None and all(map(counts, models)))

    def __enter__(self) -> None:
        if self._restores:
            self._restore()
        self._before = _now.draw
        if self._draw is not None:
            _now.draw = self._draw

    def __exit__(self, *_: object) -> None:
        _now.draw = self._before

    def _restore(self) -> None:
        """The original restores the CPU's generator alone, so that its masks differ on a GPU."""
        on_gpu = self._device.type == "cuda"
        if self._states is None:
            gpu_state = torch.cuda.get_rng_state(self._device) if on_gpu else None
            self._states = torch.get_rng_state(), gpu_state
            return
        cpu_state, gpu_state = self._states
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, self._device)


def counts(model: Any) -> bool:
    """Whether all that drops in a model is known to draw from counters: a U-Net of this package, wrapped or not."""
    while model is not None:
        if getattr(type(model), "drops_by_counter", False):
            return True
        inner = (getattr(model, name, None) for name in ("network", "module", "_orig_mod"))
        model = next((part for part in inner if isinstance(part, nn.Module)), None)
    return False


def drops(modules: Iterable[nn.Module]) -> bool:
    """Whether a dropout layer among these modules is at work: its masks are another's at every call."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules)
