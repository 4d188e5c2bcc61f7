"""RAdam and Adam for training loops: torch.optim's, with clipping, averages and low-precision copies in the same pass
over memory, and no value that is read on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from cmfast import ops
from cmfast.ema import Averages, local, whole


class _Cohort(NamedTuple):
    """Parameters of a group that took as many steps, and of which all or none have averages and copies."""

    group: dict[str, Any]
    parameters: list[Tensor]
    averaged: bool
    copied: bool


class _Fused(torch.optim.Optimizer):
    """What both have beside torch.optim's arguments:

    max_norm   clip gradients to this norm, over all parameters; infinity measures and does not clip
    averages   updated in the same pass: `cmfast.ema.Averages` of the same parameters, or of some of them
    copies     become the parameters after each step, in their own dtype: a module with parameters in the same order, or
               a list of tensors

    `grad_norm` is the norm of the last step before clipping, with max_norm; `skipped` counts the steps that were
    skipped: where `torch.amp.GradScaler` found an overflow, and with max_norm wherever the norm is not finite. A step
    that is skipped changes nothing else, averages included. Both are scalars on the device.

    state_dict() and load_state_dict() exchange states with torch.optim's class of the same name. `foreach`, `fused` and
    `capturable` are accepted and change nothing: a step always is what they promise. `set_optimizer_state_dict` of
    torch.distributed.checkpoint takes a step of its own, with gradients and a learning rate of 0, which averages count:
    load the optimizer first, then the averages.

    Raises: ValueError, TypeError: an argument that torch.optim refuses, `amsgrad`, `differentiable`, averages of other
        parameters, or copies that do not fit.
    """

    _update: Callable[..., Tensor]
    #: GradScaler then sets `grad_scale` and `found_inf`, and leaves unscaling and skipping to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        *arguments: Any,
        max_norm: float | None = None,
        averages: Averages | None = None,
        copies: nn.Module | Iterable[Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, *arguments, **options)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self.max_norm, self.averages = max_norm, averages
        parameters = [p for group in self.param_groups for p in group["params"]]
        if averages is not None and all(averages.of(p) is None for p in parameters):
            raise ValueError("averages have none of these parameters: make Averages of this model, after fully_shard")
        tensors = list(copies.parameters() if isinstance(copies, nn.Module) else copies or ())
        if copies is not None and [t.shape for t in tensors] != [p.shape for p in parameters]:
            raise ValueError("copies must have the shapes of the parameters, in their order")
        self._copies = dict(zip(parameters, tensors))
        self.skipped = torch.zeros((), device=parameters[0].device)
        self.grad_norm = torch.zeros((), device=parameters[0].device) if max_norm is not None else None

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "averages", "_copies", "skipped", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Returns what the closure does, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        cohorts = self._cohorts()
        if not cohorts:
            return loss
        # Of GradScaler, which may have made DTensors of them.
        scale, found = (whole(getattr(self, name, None)) for name in ("grad_scale", "found_inf"))
        gradients = [_gradient(p) for cohort in cohorts for p in cohort.parameters]
        norm = None
        if self.max_norm is not None:
            norm = self.grad_norm = _norm(gradients, scale)
        elif found is not None:
            found = _anywhere(found, gradients)
        rates = None if self.averages is None else self.averages.rates()
        flags = [
            self._apply(cohort, rates, grad_scale=scale, found_inf=found, grad_norm=norm, max_norm=self.max_norm)
            for cohort in cohorts
        ]
        self.skipped.add_(flags[0])
        if self.averages is not None and rates is not None:
            stepped = [p for cohort in cohorts if cohort.averaged for p in cohort.parameters]
            rest, averages = self.averages.except_for(stepped)
            if rest:
                ops.ema_update_(rest, averages, torch.where(flags[0] > 0, 1.0, rates))
            self.averages.advance(flags[0])
        return loss

    def _apply(self, cohort: _Cohort, rates: Tensor | None, **shared: Any) -> Tensor:
        parameters, group = cohort.parameters, cohort.group
        states = [self.state[p] for p in parameters]
        averages: Sequence[Sequence[Tensor]] = ()
        if cohort.averaged and self.averages is not None:
            averages = list(zip(*(self.averages.of(p) or [] for p in parameters)))
        return type(self)._update(
            [local(p) for p in parameters],
            [local(_gradient(p)) for p in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            states[0]["step"],
            averages,
            rates if averages and rates is not None else (),
            copies=[local(self._copies[p]) for p in parameters] if cohort.copied else None,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")},
            decoupled_weight_decay=group["decoupled_weight_decay"],
            **shared,
        )

    def _cohorts(self) -> list[_Cohort]:
        stepping = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameters in stepping:
            self._start(parameters)
        self._part([p for parameters in stepping for p in parameters])
        cohorts: dict[tuple[int, ...], _Cohort] = {}
        #: Who counts with a step count first; others that shared it get a clone, or it would count once for each.
        first: dict[int, tuple[int, ...]] = {}
        clones: dict[tuple[int, ...], Tensor] = {}
        for number, (group, parameters) in enumerate(zip(self.param_groups, stepping)):
            for p in parameters:
                averaged = self.averages is not None and self.averages.of(p) is not None
                step = self.state[p]["step"]
                key = number, averaged, p in self._copies, id(step)
                if first.setdefault(id(step), key) != key:
                    self.state[p]["step"] = clones.setdefault(key, step.clone())
                cohorts.setdefault(key, _Cohort(group, [], averaged, key[2])).parameters.append(p)
        return list(cohorts.values())

    def _start(self, parameters: list[Tensor]) -> None:
        """The state of parameters that have none, with one step count for all of them."""
        new = [p for p in parameters if not self.state[p]]
        if new:
            step = torch.zeros((), device=new[0].device)
            for p in new:
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def _part(self, stepping: list[Tensor]) -> None:
        """Parameters without a gradient now keep their step count, which they shared with others that go on."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if len(stepping) == len(parameters):
            return
        shared = {id(self.state[p]["step"]) for p in stepping}
        stay = [p for p in parameters if p.grad is None and self.state.get(p)]
        clones: dict[int, Tensor] = {}
        for p in stay:
            step = self.state[p]["step"]
            if id(step) in shared:
                self.state[p]["step"] = clones.setdefault(id(step), step.clone())

    def state_dict(self) -> dict[str, Any]:
        """As of torch.optim's class: a step count of its own for each parameter."""
        state = super().state_dict()
        own = {i: {**entry, "step": entry["step"].clone()} for i, entry in state["state"].items()}
        return {**state, "state": own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch.optim's class. Raises: ValueError: `amsgrad` or `differentiable`."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("amsgrad", "differentiable"):
            if name in self.defaults and group.get(name):
                raise ValueError(f"{type(self).__name__} has no {name}; torch.optim.{type(self).__name__} does")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of torch.optim's; and of torch.optim.AdamW, by an Adam with `decoupled_weight_decay`.

        Raises: ValueError: it has other groups, or `amsgrad` or `differentiable` in one.
        """
        # States of AdamW in older versions of PyTorch don't say so, and torch would take it for Adam.
        missing = {"decoupled_weight_decay": self.defaults["decoupled_weight_decay"]}
        groups = [{**missing, **group} for group in state_dict["param_groups"]]
        for group in groups:
            self._check_options(group)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            # Parameters that took as many steps share one count again, on their device.
            counts: dict[float, Tensor] = {}
            for p in group["params"]:
                if self.state.get(p):
                    step = self.state[p]["step"]
                    shared = counts.get(float(step))
                    if shared is None:
                        shared = counts[float(step)] = torch.as_tensor(step).to(p.device, torch.float32, copy=True)
                    self.state[p]["step"] = shared


class RAdam(_Fused, torch.optim.RAdam):
    __doc__ = f"""torch.optim.RAdam in one pass (`cmfast.ops.radam_ema_`), with its params, arguments and state.

    {_Fused.__doc__}

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = RAdam([weight], lr=0.1, max_norm=1.0)
    >>> (weight * 10).sum().backward()
    >>> optimizer.step()
    >>> optimizer.grad_norm, optimizer.skipped
    (tensor(14.1421), tensor(0.))
    """

    _update = staticmethod(ops.radam_ema_)


class Adam(_Fused, torch.optim.Adam):
    __doc__ = f"""torch.optim.Adam in one pass (`cmfast.ops.adam_ema_`), with its params, arguments and state; AdamW
    with `decoupled_weight_decay=True`.

    {_Fused.__doc__}
    """

    _update = staticmethod(ops.adam_ema_)


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise RuntimeError("sparse gradients are not supported: torch.optim.SparseAdam is for them")
    return gradient


def _norm(gradients: list[Tensor], scale: Tensor | None) -> Tensor:
    """Of all gradients, the parts on other ranks included."""
    parts: dict[Any, list[Tensor]] = {}
    for g in gradients:
        parts.setdefault(_sharding(g), []).append(local(g))
    norms = [
        _reduced(ops.grad_norm(tensors, grad_scale=scale), sharding, squares=True)
        for sharding, tensors in parts.items()
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _anywhere(found: Tensor, gradients: list[Tensor]) -> Tensor:
    """Not 0 where a rank that holds parts of the gradients found an overflow."""
    for sharding in dict.fromkeys(map(_sharding, gradients)):  # in one order on all ranks
        found = _reduced(found, sharding, squares=False)
    return found


def _sharding(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Mesh and its dimensions over which the parts of a DTensor lie; None for one that is whole on each rank."""
    placements = getattr(tensor, "placements", ())
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError("a gradient is a partial sum: reduce it before the step")
    # Not `is_shard()`, which is False of the strided parts that FSDP makes of tensor parallel ones.
    dims = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return (tensor.device_mesh, dims) if dims else None  # type: ignore[attr-defined]  # a DTensor


def _reduced(scalar: Tensor, sharding: tuple[Any, tuple[int, ...]] | None, *, squares: bool) -> Tensor:
    """The root of the sum of squares, or else the sum, over the ranks that hold other parts."""
    if sharding is None:
        return scalar
    mesh, dims = sharding
    total = scalar.square() if squares else scalar.clone()
    for dim in dims:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total.sqrt() if squares else total
