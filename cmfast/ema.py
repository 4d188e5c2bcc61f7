"""Averages of a model's parameters over training: several, in one pass; a target network may be one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cmfast import ops
from cmfast.rates import Given, Rate, WarmUp, parse_rate

_T = TypeVar("_T")
Parameters = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
#: The layer that owns a buffer, and its name there: a layer may put another tensor in the place of its own.
Place = tuple[nn.Module, str]


class Averages:
    """K averages of parameters: average_k <- average_k + (1 - rate_k) (parameter - average_k) at every update.

    They start as the parameters are, lie as these do in memory, and are float32 (float64 for float64), whatever the
    parameters' dtype. Parameters that are `DTensor`s (FSDP) have averages that are sharded alike, each rank's part
    updated there.

    parameters   a module, wrapped by DDP or torch.compile or not, or (name, tensor) pairs
    rates        one for each average: a `cmfast.rates.Rate`, a number, or the text of one ("power:0.05")
    targets      modules whose weights are an average, by its number: a target network. They get the parameters' values
                 now, and those of the average at every update; float32 weights are the average's own memory. A module's
                 buffers follow those of the module that is averaged.

    Raises: TypeError, ValueError: no parameters, or a rate, dtype or target that does not fit; the message names it.

    >>> model = nn.Linear(2, 1)
    >>> averages = Averages(model, [0.5, "power:0.05"])
    >>> _ = nn.init.zeros_(model.weight)
    >>> averages.update_()
    >>> bool((averages.tensors(1)[0] == 0).all())  # after one step a power function has forgotten where it started
    True
    """

    def __init__(
        self,
        parameters: Parameters,
        rates: Sequence[Rate | float | str],
        *,
        targets: Mapping[int, nn.Module] | None = None,
    ) -> None:
        if isinstance(rates, str) or not isinstance(rates, Iterable):
            raise TypeError(f"rates must be a list, with a rate for each average, got {rates!r}")
        if not isinstance(parameters, nn.Module | Iterable):
            raise TypeError(f"parameters must be a module, or tensors and their names, got {parameters!r}")
        self.model = unwrap(parameters) if isinstance(parameters, nn.Module) else None
        pairs = list(_named(parameters))
        if not pairs:
            raise ValueError("there are no parameters to average")
        #: The parameters' names, without what DDP and torch.compile put before them.
        self.names = [name for name, _ in pairs]
        self._parameters = [parameter for _, parameter in pairs]
        for name, parameter in pairs:
            if not parameter.is_floating_point():
                raise TypeError(f"parameter {name!r} is {parameter.dtype}: averages are of floating numbers")
        self.device = self._parameters[0].device
        #: How fast each forgets.
        self.schedules = [parse_rate(rate) for rate in rates]
        #: Updates so far, int64 on the device.
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self._rates = torch.tensor([rate.constant or 0.0 for rate in self.schedules], dtype=torch.float64, device="cpu")
        self._rates = self._rates.to(self.device)
        for given in self._given():
            given.value = given.value.to(self.device)
        with torch.no_grad():
            self._averages = [[_average_of(p) for p in self._parameters] for _ in self.schedules]
        #: Weights of targets, each with the numbers of its average and of its parameter.
        self._weights: list[tuple[int, int, Tensor]] = []
        #: Where buffers of targets are, and those that they follow.
        self._followed: list[tuple[Place, Place]] = []
        for k, target in (targets or {}).items():
            self._share(k, unwrap(target))
        self._tie()

    def _tie(self) -> None:
        """What lies in memory of other tensors or is found by their ids, which a copy of these averages has anew."""
        #: Weights of targets in another dtype, and the averages they are rounded from.
        self._rounded: tuple[list[Tensor], list[Tensor]] = ([], [])
        for k, i, weight in self._weights:
            average = self._averages[k][i]
            if weight.dtype == average.dtype:
                # Not `.data`, whose writes leave no trace in the weight's version.
                self._averages[k][i] = weight.detach()
            else:
                self._rounded[0].append(local(weight.detach()))
                self._rounded[1].append(local(average))
        self._position = {id(p): i for i, p in enumerate(self._parameters)}
        self._locals = [list(map(local, tensors)) for tensors in self._averages]

    def __getstate__(self) -> dict[str, Any]:
        tied = ("_rounded", "_position", "_locals")
        return {name: value for name, value in self.__dict__.items() if name not in tied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tie()

    def __len__(self) -> int:
        return len(self.schedules)

    def rates(self, step: Tensor | None = None) -> Tensor:
        """The rates [K] of update number `step` (1 is the first; default: the next), float64 on the device, where the
        number may be a tensor. The same memory at every call."""
        step = self.step + 1 if step is None else step
        for k, rate in enumerate(self.schedules):
            if rate.constant is None:
                self._rates[k].copy_(rate(step))
        return self._rates

    @torch.no_grad()
    def update_(self, parameters: Parameters | None = None) -> None:
        """One update, from the parameters they were made of or from others in the same order."""
        tensors = self._parameters if parameters is None else [p for _, p in _named(parameters)]
        ops.ema_update_(list(map(local, tensors)), self._locals, self.rates())
        self.advance()

    def advance(self, skipped: Tensor | None = None) -> None:
        """What follows an update of the averages: count it, unless `skipped` is 1, and bring the targets along."""
        self.step.add_(1 if skipped is None else (1 - skipped).to(torch.int64))
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Bring the targets along: their weights in another dtype, and their buffers."""
        found = [(held(ours), held(theirs)) for ours, theirs in self._followed]
        pairs = [(x, y) for x, y in found if x is not None and y is not None and x.shape == y.shape]
        for values, sources in (self._rounded, ([x for x, _ in pairs], [y for _, y in pairs])):
            if values:
                torch._foreach_copy_(values, sources)

    def of(self, parameter: Tensor) -> list[Tensor] | None:
        """The K averages of a parameter, one of those given, this rank's part of them; None for another tensor."""
        i = self._position.get(id(parameter))
        return None if i is None else [tensors[i] for tensors in self._locals]

    def except_for(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The parameters that are not among these, and their averages [K]."""
        known = set(map(id, parameters))
        rest = [i for i, p in enumerate(self._parameters) if id(p) not in known]
        return [local(self._parameters[i]) for i in rest], [[tensors[i] for i in rest] for tensors in self._locals]

    def tensors(self, k: int) -> list[Tensor]:
        """Average k, in the order of `names`: the memory itself."""
        return self._averages[k]

    def module(self, k: int, model: nn.Module | None = None) -> nn.Module:
        """A copy of the model, or of another that has its parameters, whose weights are average k: to sample or save.

        Raises: ValueError: these averages were made of tensors, and no model is given.
        """
        model = self.model if model is None else unwrap(model)
        if model is None:
            raise ValueError("these averages were made of tensors, not of a module: give the model to copy")
        duplicate = copy.deepcopy(model).requires_grad_(False)
        self.copy_to(duplicate, k)
        return duplicate

    @torch.no_grad()
    def copy_to(self, module: nn.Module, k: int) -> None:
        """Set a module's parameters to average k, each in its own dtype, and its buffers to those of the model.

        Raises: ValueError: its parameters have other names or shapes. IndexError: no average has that number.
        """
        if not -len(self) <= k < len(self):
            raise IndexError(f"k must be the number of an average, from 0 to {len(self) - 1}, got {k}")
        parameters = self._parameters_of(unwrap(module))
        for parameter, average in zip(parameters, self._averages[k]):
            parameter.copy_(average if hasattr(parameter, "full_tensor") else whole(average))
        for buffer, source in zip(*self._buffers_of(unwrap(module))):
            buffer.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """`step`, `rates` (the text of each), `given` (values set from outside) and `averages`: a name -> tensor for
        each. The tensors are the memory itself: copy what must not change."""
        return {
            "step": self.step,
            "rates": [str(rate) for rate in self.schedules],
            "given": [rate.value for rate in self._given()],
            "averages": [dict(zip(self.names, tensors)) for tensors in self._averages],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises: ValueError: it is no such state, has other rates, or averages of other parameters; the message names
            them.
        """
        if missing := [name for name in ("rates", "averages", "step", "given") if name not in state]:
            raise ValueError(f"this is no state of Averages: it has no {', '.join(missing)}")
        rates = [str(rate) for rate in self.schedules]
        if list(state["rates"]) != rates:
            raise ValueError(f"the state has averages with rates {list(state['rates'])}, not {rates}")
        for k, tensors in enumerate(state["averages"]):
            _same_names(list(tensors), self.names, f"average {k} of the state")
            for name, average in zip(self.names, self._averages[k]):
                if tensors[name].shape != average.shape:
                    raise ValueError(
                        f"{name!r} of the state is {list(tensors[name].shape)}, the parameter {list(average.shape)}"
                    )
        for tensors, averages in zip(state["averages"], self._averages):
            for name, average in zip(self.names, averages):
                average.copy_(tensors[name])
        self.step.copy_(state["step"])
        for rate, value in zip(self._given(), state["given"], strict=True):
            rate.value.copy_(value)
        self.follow()

    def _given(self) -> list[Given]:
        """The rates that are set from outside, those that are warmed up included."""
        inner = [rate.rate if isinstance(rate, WarmUp) else rate for rate in self.schedules]
        return [rate for rate in inner if isinstance(rate, Given)]

    @torch.no_grad()
    def _share(self, k: int, target: nn.Module) -> None:
        """Make the weights of a target average k."""
        if not 0 <= k < len(self):
            raise ValueError(f"there is no average {k} for a target: there are {len(self)}")
        for i, weight in enumerate(self._parameters_of(target)):
            weight.copy_(self._averages[k][i])
            self._weights.append((k, i, weight))
        followed = {} if self.model is None else places(self.model)
        self._followed += [(place, followed[name]) for name, place in places(target).items() if name in followed]

    def _parameters_of(self, module: nn.Module) -> list[Tensor]:
        """A module's parameters, in the order of `names`."""
        parameters = dict(_named(module))
        _same_names(list(parameters), self.names, f"{type(module).__name__}")
        for name, like in zip(self.names, self._parameters):
            if parameters[name].shape != like.shape:
                raise ValueError(
                    f"{name!r} is {list(parameters[name].shape)} in the {type(module).__name__}, and "
                    f"{list(like.shape)} where it is averaged"
                )
        return [parameters[name] for name in self.names]

    def _buffers_of(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """A module's buffers, and those of the model that has them too."""
        if self.model is None:
            return [], []
        sources, buffers = (dict(map(_unwrapped, each.named_buffers())) for each in (self.model, module))
        names = [name for name in buffers if name in sources]
        return [buffers[name] for name in names], [sources[name] for name in names]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def places(module: nn.Module) -> dict[str, Place]:
    """Where a module's buffers are, by their names without what torch.compile puts in, one by two names once."""
    found: dict[int, tuple[str, Place]] = {}
    for prefix, inner in module.named_modules():
        for name, tensor in inner._buffers.items():
            if tensor is not None:
                found.setdefault(id(tensor), (f"{prefix}.{name}" if prefix else name, (inner, name)))
    return dict(map(_unwrapped, found.values()))


def held(place: Place) -> Tensor | None:
    """The buffer that is at a place now."""
    module, name = place
    return module._buffers.get(name)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def whole(tensor: _T) -> _T:
    """A DTensor put together on every rank; any other tensor, or none, itself."""
    full_tensor: Callable[[], _T] | None = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def _named(parameters: Parameters) -> Iterator[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        yield from map(_unwrapped, unwrap(parameters).named_parameters())
        return
    item: Any
    for i, item in enumerate(parameters):
        yield (str(i), item) if isinstance(item, Tensor) else (item[0], item[1])


def _unwrapped(named: tuple[str, _T]) -> tuple[str, _T]:
    """What has a name, by that without what torch.compile puts into it around a module inside."""
    name, value = named
    return name.replace("_orig_mod.", ""), value


def _average_of(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return parameter.detach().to(dtype, copy=True)


def _same_names(names: list[str], wanted: list[str], what: str) -> None:
    missing, unknown = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    if missing or unknown:
        differ = {"missing": missing, "unknown": unknown}
        lists = "; ".join(f"{kind} {', '.join(found)}" for kind, found in differ.items() if found)
        raise ValueError(f"{what} has other parameters: {lists}")
