"""Lists of tensors, as of a model's parameters: checks, and one layout for all tensors that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cmfast.ops._check import DTYPES

Tensors = list[Tensor]
Lists = list[Tensors]


class Like(NamedTuple):
    """What all lists of a call have in common: the parameters' shapes and device."""

    shapes: list[torch.Size]
    device: torch.device


def check_first(name: str, tensors: Iterable[Tensor]) -> tuple[Tensors, Like]:
    """Floating tensors on one device, as a list, and what the other lists of a call are compared with.

    Raises: TypeError, ValueError: the message names the list.
    """
    found = _listed(name, tensors)
    like = Like([x.shape for x in found], found[0].device if found else torch.device("cpu"))
    _compare(name, found, like)
    return found, like


def check(name: str, tensors: Iterable[Tensor], like: Like) -> Tensors:
    """As many floating tensors as there are parameters, each of its parameter's shape; all on one device; as a list.

    Raises: TypeError, ValueError: the message names the list and the tensor.
    """
    found = _listed(name, tensors)
    _compare(name, found, like)
    return found


def _compare(name: str, tensors: Tensors, like: Like) -> None:
    if not {x.dtype for x in tensors} <= set(DTYPES):
        wrong = next(x.dtype for x in tensors if x.dtype not in DTYPES)
        raise TypeError(f"{name} must have floating dtypes, got {wrong}")
    shapes, wanted = [x.shape for x in tensors], like.shapes
    if len(shapes) != len(wanted):
        raise ValueError(f"{name} has {len(shapes)} tensors for {len(wanted)} parameters")
    if shapes != wanted:
        i = next(i for i, pair in enumerate(zip(shapes, wanted)) if pair[0] != pair[1])
        raise ValueError(f"{name}[{i}] must have its parameter's shape {list(wanted[i])}, got {list(shapes[i])}")
    devices = {like.device, *(x.device for x in tensors)}
    if len(devices) > 1:
        raise ValueError(f"{name} and the parameters must be on one device, got {', '.join(map(str, devices))}")


def _listed(name: str, tensors: Iterable[Tensor]) -> Tensors:
    """A list of its own, of what may be a generator, as `model.parameters()` is."""
    found = None if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable) else list(tensors)
    if found is None or not all(issubclass(kind, Tensor) for kind in set(map(type, found))):
        raise TypeError(f"{name} must be a list of tensors")
    return found


def kinds(*lists: Sequence[Tensor]) -> list[Tensor]:
    """Some of the tensors, of every type and dtype in each list: what decides which path a call takes."""
    return [x for tensors in lists for x in {(type(x), x.dtype): x for x in tensors}.values()]


def one_dtype(name: str, lists: Sequence[Sequence[Tensor]]) -> None:
    """The tensors of each position have the same dtype in all lists."""
    for tensors in lists[1:]:
        if [x.dtype for x in tensors] != [x.dtype for x in lists[0]]:
            raise TypeError(f"the {name} of a parameter must have one dtype")


def scalar(name: str, value: object, device: torch.device) -> None:
    """A tensor of one element on a device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be one floating number, got {value.dtype} {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the parameters on {device}: move one of them")


@contextmanager
def alike(written: Lists, read: Lists) -> Iterator[tuple[Lists, Lists]]:
    """Both with the tensors of each position dense and in one order of memory, so that element i of their storages
    belongs together: mostly the tensors themselves, else stand-ins, of which those `written` are copied back."""
    lists = [*written, *read]
    strides = list(map(Tensor.stride, lists[0]))
    same = all(list(map(Tensor.stride, tensors)) == strides for tensors in lists[1:])
    if same and all(map(is_dense, lists[0])):
        yield written, read
        return
    lists = [list(tensors) for tensors in lists]
    back: list[tuple[Tensor, Tensor]] = []
    for i, tensors in enumerate(zip(*lists)):
        # Of a parameter that is not dense, one that is.
        first = tensors[0]
        like = first if is_dense(first) else torch.empty_like(first, memory_format=torch.contiguous_format)
        for j, x in enumerate(tensors):
            if is_dense(x) and _order(x) == _order(like):
                continue
            lists[j][i] = stand_in = torch.empty_like(like, dtype=x.dtype).copy_(x)
            if j < len(written):
                back.append((x, stand_in))
    yield lists[: len(written)], lists[len(written) :]
    for x, stand_in in back:
        x.copy_(stand_in)


def written_by_a_kernel(*lists: Sequence[Tensor]) -> None:
    """Count the writes as those of PyTorch's own functions are: whoever watches a tensor's version sees them."""
    torch.autograd.graph.increment_version([x for tensors in lists for x in tensors])


def is_dense(x: Tensor) -> bool:
    """Whether its elements are all that lies between its first and its last, each once."""
    return x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _order(x: Tensor) -> list[int]:
    """Strides of the dimensions in which there is a next element."""
    return [stride for stride, size in zip(x.stride(), x.shape) if size > 1]
