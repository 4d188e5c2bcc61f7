"""Tensors made of parameters: in another dtype or layout, joined, or packed for the CPU's convolutions.

They are kept, and follow their parameters: one that was written to or replaced is made again before it is next used,
into the same memory where that is possible, so that a captured graph sees it as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.fast import doubling
from cmfast.native import winograd
from cmfast.watch import storage_of

Make = Callable[..., Tensor]
#: Of one convolution: shapes of input whose layout is known, and layouts that are kept. On most machines all batch
#: sizes have the same.
SHAPES, LAYOUTS = 16, 2


class Weights:
    """What is made of a network's parameters, in `dtype` (None: each in its own).

    `live` weights are made in the pass that uses them, and gradients flow through them to the parameters; the others
    are made once and kept.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        # No method of this object, which what is kept would hold as it is held.
        self._cast = functools.partial(_cast, dtype)
        self._kept: dict[Any, _Kept] = {}
        #: Of convolutions, for shapes of input, of which many share what is kept.
        self._packs: dict[Any, dict[tuple[int, ...], _Kept]] = {}

    def plain(self, parameter: Tensor, live: bool) -> Tensor:
        """The parameter in the dtype wanted; itself if it is in that dtype."""
        if self.dtype in (None, parameter.dtype):
            return parameter
        return self._made("plain", (parameter,), self._cast, live)

    def filters(self, parameter: Tensor, live: bool) -> Tensor:
        """A convolution's weight [K, C, h, w] in channels_last."""
        if self.dtype in (None, parameter.dtype) and parameter.is_contiguous(memory_format=torch.channels_last):
            return parameter
        cast, form = self._cast, torch.channels_last
        return self._made("filters", (parameter,), lambda w: cast(w).contiguous(memory_format=form), live)

    def doubled(self, parameter: Tensor, live: bool) -> Tensor:
        """A convolution's weight [K, C, 3, 3] as `doubling.fold` makes it, [C, K, 4, 4]."""
        return self._made("doubled", (parameter,), functools.partial(doubling.fold, dtype=self.dtype), live)

    def joined(self, parameters: tuple[Tensor, ...], live: bool) -> Tensor:
        """Matrices [O, I] or [O, I, 1, 1], or vectors [O], one below the other."""
        if len(parameters) == 1 and self.dtype in (None, parameters[0].dtype):
            return _matrix(parameters[0])
        cast = self._cast
        return self._made("joined", parameters, lambda *all: torch.cat([cast(_matrix(p)) for p in all]), live)

    def summed(self, parameters: tuple[Any, ...], live: bool) -> Tensor:
        """The sum of vectors [O]."""
        cast = self._cast

        def total(first: Tensor, *others: Tensor) -> Tensor:
            for other in others:
                first = first + other
            return cast(first)

        return self._made("summed", parameters, total, live)

    def packed(self, convs: tuple[nn.Module, ...], shape: torch.Size) -> Tensor:
        """The weight of a convolution as oneDNN wants it for inputs of `shape`; of several 1x1, or linear, joined."""
        cast = self._cast

        def pack(*weights: Tensor) -> Tensor:
            joined = torch.cat([w if w.ndim == 4 else w.reshape(*w.shape[:2], 1, 1) for w in weights])
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            return reorder(cast(joined), *geometry(convs[0]), 1, list(shape))

        weights: Any = tuple(c.weight for c in convs)
        return self._laid_out("packed", weights, pack, tuple(shape))

    def winograd(self, conv: Any) -> Tensor:
        """The weight of a 3x3 convolution for `winograd.convolve`."""
        cast = self._cast
        return self._made("winograd", (conv.weight,), lambda w: winograd.pack(cast(w)), False)

    def packed_doubled(self, conv: Any, shape: torch.Size) -> Tensor:
        """The weight of a 3x3 convolution for `doubling.convolve` of inputs of `shape`."""
        dtype = self.dtype
        return self._laid_out("doubling", (conv.weight,), lambda w: doubling.pack(w, dtype, shape), tuple(shape))

    def refresh(self, force: bool = False) -> bool:
        """Make anew what is out of date, or everything; True if memory that a graph may read was replaced."""
        replaced = False
        # Lists, as another thread may be in its first pass.
        packs = [kept for shapes in list(self._packs.values()) for kept in list(shapes.values())]
        for kept in dict.fromkeys([*self._kept.values(), *packs]):
            if force or kept.outdated:
                replaced |= kept.make_again()
            kept.wait()
        return replaced

    def clear(self) -> None:
        """Forget everything that was made."""
        self._kept.clear()
        self._packs.clear()

    def kinds(self) -> set[str]:
        """Names of what has been made."""
        return {kind for kind, *_ in (*self._kept, *self._packs)}

    def _made(self, kind: str, parameters: tuple[Tensor, ...], make: Make, live: bool) -> Tensor:
        if live:
            return make(*parameters)
        key = (kind, *map(id, parameters))
        kept = self._kept.get(key)
        if kept is None:
            # That of the first of several threads: a graph may have been captured with it, which does not hold it.
            kept = self._kept.setdefault(key, _Kept(parameters, make))
        return kept.current()

    def _laid_out(self, kind: str, parameters: tuple[Tensor, ...], make: Make, shape: tuple[int, ...]) -> Tensor:
        """A weight as oneDNN wants it for a shape of input, which only making it tells: once for each shape."""
        packs = self._packs.setdefault((kind, *map(id, parameters)), {})
        kept = packs.get(shape)
        if kept is None:
            kept, layouts = _Kept(parameters, make), list(dict.fromkeys(packs.values()))
            layout = _layout(kept.value)
            kept = next((other for other in layouts if _layout(other.value) == layout), kept)
            if kept not in layouts and len(layouts) >= LAYOUTS:
                for gone in [each for each, other in list(packs.items()) if other is layouts[0]]:
                    packs.pop(gone, None)
            if len(packs) >= SHAPES:
                packs.pop(next(iter(list(packs))), None)
            packs[shape] = kept
        return kept.current()


class _Kept:
    """A tensor made of parameters, and what these were then. It holds the parameters: their ids stay theirs."""

    def __init__(self, parameters: tuple[Tensor, ...], make: Make) -> None:
        self.parameters, self._make = parameters, make
        self._seen, self.value = self._look(), self._made()
        self._ready, self._streams = _recorded(self.value), _streams(self.value)

    def current(self) -> Tensor:
        """The tensor, made again if it is out of date."""
        if self.outdated:
            self.make_again()
        self.wait()
        return self.value

    def wait(self) -> None:
        """Have the current stream of a GPU wait for the one on which another thread has made the tensor, and the memory
        stay until both have read it."""
        ready, streams, value = self._ready, self._streams, self.value
        if streams is None:
            return
        here = _current_stream(value)
        # A capture must not look outside; all is made before it, on the same stream.
        if (ready is None and here in streams) or torch.cuda.is_current_stream_capturing():
            return
        if here not in streams:
            # Of itself, memory that is given up is free at once to the stream on which it was taken.
            value.record_stream(torch.cuda.current_stream(value.device))
            streams.add(here)
        if ready is None:
            return
        if ready.query():
            self._ready = None
        else:
            torch.cuda.current_stream(self.value.device).wait_event(ready)

    def _look(self) -> tuple[list[Any], list[Any]]:
        return _signature(self.parameters), list(map(storage_of, self.parameters))

    @property
    def outdated(self) -> bool:
        """Whether parameters have changed since; of tensors made in inference mode nobody can say."""
        signature, storages = self._seen
        return (
            signature != _signature(self.parameters)
            or any(storage.expired() for storage in storages)
            or any(map(Tensor.is_inference, self.parameters))
        )

    def _made(self) -> Tensor:
        # Not tensors of inference mode, which could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._make(*(parameter.detach() for parameter in self.parameters))

    def make_again(self) -> bool:
        """Into the same memory if that fits; True if it did not."""
        seen, made, old = self._look(), self._made(), self.value
        fits = (made.shape, made.dtype, made.device, made.layout) == (old.shape, old.dtype, old.device, old.layout)
        replaced = not fits or made.is_mkldnn
        if replaced:
            self.value, self._streams = made, _streams(made)
        else:
            old.copy_(made)
        self._ready = _recorded(self.value)
        # Last, so that it is out of date to other threads until it is made, and after a failure, for want of memory.
        self._seen = seen
        return replaced


def _cast(dtype: torch.dtype | None, parameter: Tensor) -> Tensor:
    return parameter if dtype is None else parameter.to(dtype)


def _streams(x: Tensor) -> set[int] | None:
    """Streams that a new tensor's memory is kept for, as numbers; None on a CPU, and of a capture's own memory."""
    return None if not x.is_cuda or torch.cuda.is_current_stream_capturing() else {_current_stream(x)}


def _current_stream(x: Tensor) -> int:
    """The current one of a tensor's GPU, as a number, in a fraction of a microsecond."""
    number: int = torch._C._cuda_getCurrentRawStream(x.device.index)
    return number


def _recorded(x: Tensor) -> torch.cuda.Event | None:
    """The moment when a tensor on a GPU is made; None on a CPU, and in a capture, where it is made at each replay."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(x.device))
    return ready


def _layout(packed: Tensor) -> bytes:
    """What oneDNN calls the memory descriptor."""
    described: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return described.numpy().tobytes()


def geometry(module: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Padding, stride and dilation of a planned convolution; a linear layer is one of 1x1."""
    return list(getattr(module, "padding", (0, 0))), list(getattr(module, "stride", (1, 1))), [1, 1]


def _matrix(parameter: Tensor) -> Tensor:
    return parameter.flatten(1) if parameter.ndim > 1 else parameter


def _signature(parameters: tuple[Tensor, ...]) -> list[Any]:
    """What changes when parameters are written to or replaced, but not when that is done through `.data`."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.device) for p in parameters]
