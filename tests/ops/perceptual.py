"""Calls of the operations of LPIPS on three paths: float64, eager in the dtypes under test, and the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cmfast
from cmfast import ops
from tests.ops.matrix import close, upstream


@dataclass(frozen=True)
class Call:
    """An operation of tensors by name, with one result."""

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """All of it in one dtype."""
        options = {k: dtype if k == "dtype" else v for k, v in self.options.items()}
        return replace(self, tensors={k: v.to(dtype) for k, v in self.tensors.items()}, options=options)

    def having(self, **tensors: Tensor) -> Call:
        """With other tensors in the place of some."""
        return replace(self, tensors={**self.tensors, **tensors})

    def run(self, backend: str) -> Tensor:
        with cmfast.backend(backend), torch.no_grad():
            return self.function(**self.tensors, **self.options)

    def graph(self, backend: str, *names: str) -> tuple[dict[str, Tensor], Tensor]:
        """Leaves of the inputs named (default: all), and the result."""
        leaves = {k: v.detach().requires_grad_() for k, v in self.tensors.items() if k in (names or self.tensors)}
        with cmfast.backend(backend):
            return leaves, self.function(**{**self.tensors, **leaves}, **self.options)

    def run_with_grads(self, backend: str, *names: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and gradients for weights that differ from element to element."""
        leaves, result = self.graph(backend, *names)
        grads = torch.autograd.grad(result, list(leaves.values()), upstream(result))
        return result.detach(), dict(zip(leaves, grads, strict=True))


def layout(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def layer(
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    last: bool = False,
    distance: float = 0.5,
    device: Any = "cpu",
    seed: int = 0,
) -> Call:
    """`lpips_layer` of maps as a ReLU leaves them, with relative `distance`, and weights in float32."""
    generator = torch.Generator().manual_seed(seed)
    f, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    maps = {"features": f.relu() + 0.05, "target_features": (f + distance * other).relu() + 0.05}
    maps = {k: layout(v, last).to(device, dtype) for k, v in maps.items()}
    weight = torch.rand(shape[1], generator=generator).to(device)
    return Call(ops.lpips_layer, {**maps, "weight": weight}, {})


def images(
    shape: tuple[int, int, int, int],
    size: int | tuple[int, int] | None,
    *,
    image_dtype: torch.dtype = torch.float32,
    last: bool = False,
    device: Any = "cpu",
    **options: Any,
) -> Call:
    """`lpips_input` of images in [-1, 1], with ImageNet's statistics or others for other channels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if shape[1] not in (1, 3):
        mean, std = torch.rand(2, shape[1], generator=generator) + 0.1
    tensors = {"image": layout(image, last).to(device, image_dtype), "mean": mean.to(device), "std": std.to(device)}
    return Call(ops.lpips_input, tensors, {"size": size, **options})


def check_path(call: Call, backend: str, *names: str) -> None:
    """Value and gradients (of the inputs named, or all) of a path against float64, within what eager PyTorch in the
    same dtypes does."""
    exact, exact_grads = call.to(torch.float64).run_with_grads("reference", *names)
    eager, eager_grads = call.run_with_grads("reference", *names)
    fast, fast_grads = call.run_with_grads(backend, *names)
    close(fast, eager, exact, "result")
    close(call.run(backend), eager, exact, "result where no gradient is wanted")
    for name, grad in fast_grads.items():
        close(grad, eager_grads[name], exact_grads[name], f"gradient of {name}")


def same(call: Call, other: Call) -> None:
    """The kernels make the same of both, but for the order of sums."""
    (value, grads), (other_value, other_grads) = (each.run_with_grads("triton") for each in (call, other))
    torch.testing.assert_close(other_value, value, rtol=2e-6, atol=2e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=2e-6, atol=2e-6)
