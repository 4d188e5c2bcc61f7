"""One call of an operation, and what its paths make of it: the same numbers, or the same error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cmfast
from cmfast import ops
from cmfast.tolerances import FLOOR, INPUT_ROUNDING, KERNEL_FLOOR
from tests.ops.matrix import upstream

#: What operations on lists write: parameters before what is made of them.
WRITTEN = ("exp_avgs", "exp_avg_sqs", "parameters", "averages", "copies", "step")
#: From here on float32 is near its end, which ratios of levels may reach before what they multiply does.
LARGE = 1e30
#: How often inputs are moved by a rounding, each time in other directions; and how many calls nearby have a say in what
#: the reference is off by, as the roundings within one call may happen to be harmless. Where samples have few elements,
#: few directions may all be.
MOVES, MOVES_OF_FEW, FEW = 4, 16, 8
#: How far away nearby is, in parts of each number.
NEARBY = 0.01
#: Leaves that all samples share: of their gradients, which are sums over the batch, no row is a sample.
SHARED = ("weight", "bias", "mean", "std")


@dataclass(frozen=True)
class Refusal:
    """An error that says what is wrong with the call."""

    kind: type
    message: str


Outcome = list[Tensor] | Refusal


def tree(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Every tensor in lists and tuples through a function."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [tree(part, function) for part in value]
    if isinstance(value, tuple):
        parts = [tree(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in lists and tuples, in their order."""
    found: list[Tensor] = []
    tree(value, found.append)
    return found


def twin(x: Tensor) -> Tensor:
    """A copy that lies in memory as x does."""
    room = x.as_strided((x.untyped_storage().size() // x.element_size(),), (1,), 0).clone()
    return room.as_strided(x.shape, x.stride(), x.storage_offset())


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@dataclass(frozen=True)
class Trial:
    """`ops.name(**arguments)`; leaves: the arguments of which gradients are looked at, too."""

    name: str
    arguments: dict[str, Any]
    leaves: tuple[str, ...] = ()

    @property
    def row(self) -> int:
        """The fewest elements that a sample has in a tensor of several dimensions; of one dimension, 1."""
        shapes = [x.shape for x in tensors_of(list(self.arguments.values())) if x.ndim and x.shape[0]]
        return min((math.prod(shape[1:]) for shape in shapes if len(shape) > 1), default=1)

    def map(self, function: Callable[[Tensor], Any]) -> Trial:
        return replace(self, arguments={k: tree(v, function) for k, v in self.arguments.items()})

    def double(self) -> Trial:
        """All of it in float64."""
        arguments = self.map(_double).arguments
        wide = {k: torch.float64 for k, v in arguments.items() if isinstance(v, torch.dtype) and v.is_floating_point}
        return replace(self, arguments={**arguments, **wide})

    def moved(self, seed: int) -> Trial:
        """In float64, of inputs that lie one rounding of float32 away: what no float32 computation need tell apart."""
        generator = torch.Generator().manual_seed(seed)

        def move(x: Tensor) -> Tensor:
            sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
            return x.double() * (1 + sign * INPUT_ROUNDING)

        return self._moved(move).double()

    def nearby(self, seed: int) -> Trial:
        """Of other numbers in its dtypes: the same computation with other roundings within."""
        generator = torch.Generator().manual_seed(seed)

        def move(x: Tensor) -> Tensor:
            part = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (x.double() * (1 + part * NEARBY)).to(x.dtype)

        return self._moved(move)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Trial:
        def moved(x: Tensor) -> Tensor:
            narrow = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == "cpu"
            return move(x) if narrow else x

        return replace(self, arguments={k: v if k == "step" else tree(v, moved) for k, v in self.arguments.items()})

    def run(self, backend: str) -> Outcome:
        """Results, with what was written in place; or the error, if it is one of those that are promised."""
        call = self.map(twin)
        try:
            with cmfast.backend(backend), torch.no_grad():
                result = getattr(ops, self.name)(**call.arguments)
        except (TypeError, ValueError) as error:
            return Refusal(type(error), str(error))
        except RuntimeError as error:
            if backend != "triton" or "backend 'triton' was asked for, but" not in str(error):
                raise
            return Refusal(RuntimeError, str(error))
        if self.name.endswith("_"):
            return [x.detach() for x in tensors_of([result, [call.arguments.get(name) for name in WRITTEN]])]
        before, after = tensors_of(list(self.arguments.values())), tensors_of(list(call.arguments.values()))
        assert all(map(_same, before, after)), "an argument has changed"
        return tensors_of(result)

    def gradients(self, backend: str) -> list[Tensor | None]:
        """Of the leaves, for weights that differ from element to element."""
        leaves = {k: self.arguments[k].detach().requires_grad_() for k in self.leaves}
        with cmfast.backend(backend):
            results = tensors_of(getattr(ops, self.name)(**{**self.arguments, **leaves}))
        values = [r for r in results if r.requires_grad]
        if not values:
            return [None] * len(leaves)
        weights = [upstream(value) for value in values]
        return list(torch.autograd.grad(values, list(leaves.values()), weights, allow_unused=True))


def _same(before: Tensor, after: Tensor) -> bool:
    if before.device.type != "cpu":
        return True
    return bool(((before == after) | ((before != before) & (after != after))).all())


def check(trial: Trial, backend: str) -> str:
    """A path against float64, within what the reference does in the same dtypes. Returns what was compared."""
    eager, fast = trial.run("reference"), trial.run(backend)
    if isinstance(fast, Refusal) and fast.kind is RuntimeError:
        dtypes = [*(x.dtype for x in tensors_of(list(trial.arguments.values()))), *trial.arguments.values()]
        meta = any(x.is_meta for x in tensors_of(list(trial.arguments.values())))
        assert isinstance(eager, Refusal) or torch.float64 in dtypes or meta, fast.message
        return "refused"
    if isinstance(eager, Refusal) or isinstance(fast, Refusal):
        assert fast == eager, f"{backend}: {fast}, reference: {eager}"
        return "refused"
    seeds = range(MOVES_OF_FEW if trial.row < FEW else MOVES)
    moved, nearby = [trial.moved(seed) for seed in seeds], [trial.nearby(seed) for seed in seeds]
    exact = trial.double().run("reference")
    assert not isinstance(exact, Refusal), exact
    nearby = [each for each in nearby if not isinstance(each.run("reference"), Refusal)]
    compare(
        fast, eager, exact, _answers(moved), [_answers([each, each.double()]) for each in nearby], "result",
        _LEVELS_FLOOR if isinstance(trial.arguments.get("levels"), ops.LogNormal) else 0.0, _least(trial),
    )  # fmt: skip
    if not trial.leaves:
        return "values"
    pairs = [run for each in nearby for run in (each, each.double())]
    runs = (trial, trial.double(), *pairs, *moved)
    paths = (trial.gradients(backend), *(run.gradients("reference") for run in runs))
    for name, value, low, high, *others in zip(trial.leaves, *paths, strict=True):
        if low is None or high is None:
            assert value is None or not value.any(), f"gradient of {name}"
        else:
            assert value is not None, f"gradient of {name}"
            every = [[x[None] if name in SHARED else x] for x in (value, low, high, *others)]
            near = [every[i : i + 2] for i in range(3, 3 + len(pairs), 2)]
            compare(*every[:3], every[3 + len(pairs) :], near, f"gradient of {name}")
    return "gradients"


def _answers(trials: list[Trial]) -> list[list[Tensor]]:
    """What the reference makes of them, but for those that it refuses."""
    outcomes = [trial.run("reference") for trial in trials]
    return [outcome for outcome in outcomes if not isinstance(outcome, Refusal)]


#: Of levels exp(mean + std z): what a kernel's normal is off by (tests/kernels/test_noise.py), at 6 deviations.
_LEVELS_FLOOR = 4 * 2**-23 * 6 + 2e-7


def _least(trial: Trial) -> float:
    """What a result may be off by, whatever its size."""
    if trial.name != "lpips_layer":
        return 0.0
    # Features are normalised first: of maps with one channel that is not 0, a rounding of 1 is all that differs.
    weight = trial.arguments["weight"]
    return float(weight.double().abs().sum()) * (4 * torch.finfo(torch.float32).eps) ** 2


def compare(
    fast: list[Tensor], eager: list[Tensor], exact: list[Tensor], moved: list[list[Tensor]],
    nearby: list[list[list[Tensor]]], what: str, floor: float = 0.0, least: float = 0.0,
) -> None:  # fmt: skip
    """error(fast) <= 2 error(eager) + 4 error(exact of moved inputs) + floor, sample by sample.

    nearby: eager and exact of other calls; error(eager) is the largest. Where the reference overflows, or has no
    number, so does the path, unless it is right; beyond LARGE it may overflow first. What comes later in a result is
    made of what comes before, as rounded there: the floor is that of the widest rounding so far.
    """
    assert len(fast) == len(eager) == len(exact)
    for i, (value, low, high) in enumerate(zip(fast, eager, exact)):
        where = f"{what} {i}"
        assert value.shape == low.shape and value.dtype == low.dtype, where
        if value.is_meta:
            continue
        if not value.is_floating_point():
            _compare_integers(value, low, where)
            continue
        floor = max(floor, (KERNEL_FLOOR | {torch.float64: FLOOR[torch.float64]})[value.dtype])
        if value.numel():
            errors = [_error(_rows(near[i]), _rows(far[i]), value.dtype) for near, far in nearby]
            spread = [_error(_rows(x[i]), _rows(high), value.dtype) for x in moved]
            _compare(
                _rows(value), _rows(low), _rows(high), errors, spread,
                floor=floor, least=least, dtype=value.dtype, where=where,
            )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Float64, a row for each sample."""
    return x.double().reshape(x.shape[0] if x.ndim else 1, -1)


def _error(x: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest of each row [B, 1], of what is finite in both."""
    finite = exact.to(dtype).isfinite() & x.isfinite()
    return torch.where(finite, x - exact, 0.0).abs().amax(1, keepdim=True)


def _compare(
    value: Tensor, low: Tensor, high: Tensor, errors: list[Tensor], spread: list[Tensor], *,
    floor: float, least: float, dtype: torch.dtype, where: str,
) -> None:  # fmt: skip
    # What overflows in the dtype of the result is infinite there.
    high_low = high.to(dtype).double()
    finite = high_low.isfinite() & low.isfinite()
    size = torch.where(high_low.isfinite(), high, 0.0).abs().amax(1, keepdim=True)
    least += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    eager = torch.cat([_error(low, high, dtype), *errors], 1).amax(1, keepdim=True)
    moved = torch.cat([torch.zeros_like(size), *spread], 1).amax(1, keepdim=True)
    allowed = 2 * eager + 4 * moved + floor * size + least
    close = ((value - high_low).abs() <= allowed) | ((value - high).abs() <= allowed)
    lost = ~value.isfinite() & (~finite | (high.abs() > LARGE))
    # There the reference sets no measure of its own. Of a step from a level near 0 x - D cancels, and what is left is
    # made 1e6 and more times as large: two digits remain.
    near = ((value - high).abs() <= allowed + 1e-2 * size) | ((value - low).abs() <= allowed)
    right = close | lost | (~finite & near)
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        row = at[0]
        raise AssertionError(
            f"{where} at {at}: {value[at].item():.9g}, reference {low[at].item():.9g}, float64 {high[at].item():.9g}, "
            f"allowed {allowed[row].item():.3g}"
        )


def _compare_integers(value: Tensor, low: Tensor, where: str) -> None:
    """Pixels may fall on either side of an edge, one in a hundred; other integers are equal."""
    off = (value.long() - low.long()).abs()
    assert not off.any() or value.dtype == torch.uint8 and off.max() <= 1 and off.sum() <= 1 + off.numel() / 100, where
