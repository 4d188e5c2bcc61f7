"""Calls of `ops.group_norm_silu` on three paths: float64, eager in the dtypes under test, and the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cmfast
from cmfast import ops
from tests.ops.matrix import close, upstream

#: What stands around the normalisation, by name: tensors beside x, weight and bias, and options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("", {}),
    "no silu": ("", {"silu": False}),
    "film": ("scale shift", {}),
    "x_bias": ("x_bias", {}),
    "residual": ("residual", {}),
    "sum": ("scale shift x_bias residual", {}),
    "dropout": ("", {"dropout": 0.3}),
    "all": ("scale shift x_bias residual", {"dropout": 0.3, "eps": 1e-3}),
}


@dataclass(frozen=True)
class Norm:
    """Inputs by name, and options, of one call."""

    tensors: dict[str, Tensor]
    num_groups: int
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Norm:
        """All of it in one dtype."""
        return replace(self, tensors={k: v.to(dtype) for k, v in self.tensors.items()})

    def call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = ops.group_norm_silu(num_groups=self.num_groups, **tensors, **self.options)
        return result if isinstance(result, tuple) else (result,)

    def run(self, backend: str) -> tuple[Tensor, ...]:
        with cmfast.backend(backend), torch.no_grad():
            return self.call(self.tensors)

    def graph(self, backend: str, *names: str) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Leaves of the inputs named (default: all), and the results."""
        leaves = {k: v.detach().requires_grad_() for k, v in self.tensors.items() if k in (names or self.tensors)}
        with cmfast.backend(backend):
            return leaves, self.call({**self.tensors, **leaves})

    def run_with_grads(self, backend: str, *names: str) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Results, and gradients for weights that differ from element to element."""
        leaves, results = self.graph(backend, *names)
        grads = torch.autograd.grad(results, list(leaves.values()), [upstream(r) for r in results])
        return tuple(r.detach() for r in results), dict(zip(leaves, grads, strict=True))


def make(
    shape: tuple[int, ...],
    num_groups: int,
    kind: str = "all",
    *,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    last: bool = False,
    mean: float = 0.5,
    device: Any = "cpu",
    seed: int = 0,
    **options: Any,
) -> Norm:
    """A call with x ~ N(mean, 1). Scale and shift are the halves of one projection."""
    generator = torch.Generator().manual_seed(seed)
    names, given = KINDS[kind]
    batch, channels = shape[:2]
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias, x_bias = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    projection = torch.randn(batch, 2 * channels, generator=generator, dtype=torch.float64)
    values = {
        "x": layout(x + mean, last).to(device, dtype), "residual": layout(residual, last).to(device, dtype),
        **{k: v.to(device, parameters or torch.float32) for k, v in (("weight", 1 + 0.3 * weight), ("bias", bias))},
        "x_bias": x_bias.to(device, parameters or torch.float32),
        **dict(zip(("scale", "shift"), (projection / 2).to(device, parameters or dtype).chunk(2, 1))),
    }  # fmt: skip
    options = {**given, **options}
    if options.get("dropout"):
        options.setdefault("draw", ops.Draw(2**40 + 7, torch.arange(batch, device=device) + 2**33, 3))
    return Norm({k: values[k] for k in ("x", "weight", "bias", *names.split())}, num_groups, options)


def layout(x: Tensor, last: bool) -> Tensor:
    """x with its channels last, where it has two or three dimensions to put before them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if last and x.ndim in formats else x


def strides(x: Tensor) -> list[int]:
    """Of the dimensions in which there is a next element."""
    return [stride for stride, size in zip(x.stride(), x.shape) if size > 1]


def check_path(norm: Norm, backend: str) -> None:
    """Values and gradients of a path against float64, within what eager PyTorch in the same dtypes does."""
    if not norm.tensors["x"].numel():
        check_empty(norm, backend)
        return
    x = norm.tensors["x"]
    known = [strides(x.contiguous()), strides(layout(x.contiguous(), True))]
    exact, exact_grads = norm.to(torch.float64).run_with_grads("reference")
    eager, eager_grads = norm.run_with_grads("reference")
    fast, fast_grads = norm.run_with_grads(backend)
    for i, (value, low, high) in enumerate(zip(fast, eager, exact, strict=True)):
        assert strides(value) == strides(x) or strides(x) not in known, f"layout of result {i}"
        close(value, low, high, f"result {i}")
    if backend == "auto":
        # Where no gradient is wanted, in place.
        for i, (value, low, high) in enumerate(zip(norm.run(backend), eager, exact, strict=True)):
            assert strides(value) == strides(x) or strides(x) not in known, f"layout of result {i} in place"
            close(value, low, high, f"result {i} in place")
    for name, grad in fast_grads.items():
        floor = None
        if name == "x_bias":
            # The gradients of a channel's pixels cancel, and what is left is the rounding of what they have in common.
            floor = exact_grads["x"].abs().transpose(0, 1).flatten(1).sum(1).max().item()
        close(grad, eager_grads[name], exact_grads[name], f"gradient of {name}", floor)


def check_empty(norm: Norm, backend: str) -> None:
    """Shapes and dtypes of nothing; gradients of parameters are zero."""
    values, grads = norm.run_with_grads(backend)
    for value, expected in zip(values, norm.run("reference"), strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype
    for name, grad in grads.items():
        like = norm.tensors[name]
        assert grad.shape == like.shape and grad.dtype == like.dtype and not grad.any(), name
