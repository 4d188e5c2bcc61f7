"""Calls of an operation on three paths: float64, eager in the dtypes under test, and the kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import cmfast
from cmfast.tolerances import KERNEL_FLOOR
from tests.ops.cases import OUTPUTS, Case, flat, inputs

#: (state, model): what goes through the solver, and what the network takes and gives.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


def dtype_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


@dataclass
class Call:
    """Inputs of a case, and what one path makes of them."""

    case: Case
    states: dict[str, Tensor]
    sigmas: dict[str, Tensor]
    dtype: torch.dtype | None = None

    def to(self, dtype: torch.dtype) -> Call:
        """All of it in one dtype."""
        states, sigmas = ({k: v.to(dtype) for k, v in each.items()} for each in (self.states, self.sigmas))
        return Call(self.case, states, sigmas, None if self.dtype is None else dtype)

    def run(self, backend: str) -> list[Tensor]:
        with cmfast.backend(backend), torch.no_grad():
            return flat(self.case.call(self.states, self.sigmas, dtype=self.dtype))

    def graph(self, backend: str, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Leaves of the inputs named (default: all states and levels that have a gradient), and the results."""
        every = self.states | self.sigmas
        names = [k for k in every if k not in self.case.no_grad_to] if names is None else names
        leaves = {k: every[k].detach().requires_grad_() for k in names}
        states, sigmas = ({k: leaves.get(k, v) for k, v in each.items()} for each in (self.states, self.sigmas))
        with cmfast.backend(backend):
            return leaves, flat(self.case.call(states, sigmas, dtype=self.dtype))

    def run_with_grads(self, backend: str, levels: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Results, and gradients of every state and level for weights that differ from element to element."""
        names = None if levels else [k for k in self.states if k not in self.case.no_grad_to]
        leaves, results = self.graph(backend, names)
        values = [value for value in results if value.requires_grad]
        weights = [upstream(value) for value in values]
        grads = torch.autograd.grad(values, list(leaves.values()), weights, allow_unused=True)
        return [r.detach() for r in results], dict(zip(leaves, grads, strict=True))


def upstream(value: Tensor) -> Tensor:
    """A gradient for a result, the same whatever its dtype and layout: multiples of 1/8, exact in bfloat16."""
    steps = torch.arange(value.numel(), device=value.device) * 7 % 31 - 15
    return (steps / 8).reshape(value.shape).to(value.dtype)


def make(case: Case, shape, dtypes, device, seed: int = 0) -> Call:
    state_dtype, model_dtype = dtypes
    states, sigmas = inputs(case, shape, seed)
    states = {k: v.to(device, model_dtype if k in OUTPUTS else state_dtype) for k, v in states.items()}
    # At +-1 exactly the gradient of torch.clamp is 1 before PyTorch 2.14 and 0 since: rounding must not end there.
    states = {k: torch.where(v.abs() == 1, v / 2, v) for k, v in states.items()}
    return Call(case, states, {k: v.to(device, torch.float32) for k, v in sigmas.items()}, model_dtype)


def close(value: Tensor, eager: Tensor, exact: Tensor, what: str, size: float | None = None) -> None:
    """error(fast) <= 2 error(eager, same dtype) + floor, a part of `size` (default: of the largest value)."""
    assert value.shape == exact.shape, what
    assert value.dtype == eager.dtype, what
    # A mean over no elements is NaN on every path.
    assert torch.equal(value.isnan(), exact.isnan()), what
    value, eager, exact = (v[~exact.isnan()] for v in (value, eager, exact))
    if not value.numel():
        return
    error, eager_error = ((v.double() - exact).abs().max().item() for v in (value, eager))
    size = exact.abs().max().item() if size is None else size
    allowed = 2 * eager_error + KERNEL_FLOOR[value.dtype] * size
    assert error <= allowed, f"{what}: error {error:.3g}, eager {eager_error:.3g}, allowed {allowed:.3g}"


def check_path(call: Call, backend: str) -> None:
    """Values and gradients of a path against float64, within what eager PyTorch in the same dtypes does."""
    if not next(iter(call.states.values())).shape[0]:
        for value, expected in zip(call.run(backend), call.run("reference"), strict=True):
            assert value.shape == expected.shape and value.dtype == expected.dtype
        return
    exact, exact_grads = call.to(torch.float64).run_with_grads("reference")
    eager, eager_grads = call.run_with_grads("reference")
    fast, fast_grads = call.run_with_grads(backend)
    for i, (value, low, high) in enumerate(zip(fast, eager, exact, strict=True)):
        close(value, low, high, f"result {i}")
    for name, grad in fast_grads.items():
        if exact_grads[name] is None:
            assert grad is None or not grad.any(), name
        else:
            close(grad, eager_grads[name], exact_grads[name], f"gradient of {name}")
    for i, (value, low, high) in enumerate(zip(call.run(backend), eager, exact, strict=True)):
        close(value, low, high, f"result {i} where no gradient is wanted")
