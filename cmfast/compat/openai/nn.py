"""`cm.nn`: layers and small helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import SiLU

from cmfast import unet_blocks
from cmfast.unet_blocks import GroupNorm32, normalization
from cmfast.unet_blocks import zero_ as zero_module

__all__ = [
    "GroupNorm32",
    "SiLU",
    "append_dims",
    "append_zero",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "linear",
    "mean_flat",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "update_ema",
    "zero_module",
]


def _layer(kind: str, dims: int) -> type[nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    return getattr(nn, f"{kind}{dims}d")


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-d, 2-d or 3-d convolution."""
    return _layer("Conv", dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """1-d, 2-d or 3-d average pooling."""
    return _layer("AvgPool", dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """`torch.nn.Linear`."""
    return nn.Linear(*args, **kwargs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Cosines and sines of `timesteps` [B] at geometrically spaced frequencies: [B, dim] float32."""
    return unet_blocks.timestep_embedding(timesteps, dim, max_period=max_period)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """target = rate target + (1 - rate) source, in place. Raises: ValueError: not as many of both."""
    targets, given = list(target_params), list(source_params)
    if len(targets) != len(given):
        raise ValueError(f"there are {len(targets)} target_params and {len(given)} source_params: give one for each")
    sources = [source.to(target) for target, source in zip(targets, given, strict=True)]
    if targets:
        torch._foreach_lerp_(targets, sources, 1 - rate)


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter by `scale`, in place; returns the module."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the first."""
    return tensor.mean(dim=tuple(range(1, tensor.ndim)))


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with dimensions of size 1 appended until it has `target_dims`."""
    if target_dims < x.ndim:
        raise ValueError(f"target_dims must be {x.ndim} or more, the dimensions of x, got {target_dims}")
    return x.reshape(x.shape + (1,) * (target_dims - x.ndim))


def append_zero(x: Tensor) -> Tensor:
    """x [N] with a zero appended: [N + 1]."""
    return torch.cat([x, x.new_zeros(1)])


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """func(*inputs); with `flag`, activations are recomputed in the backward pass. `params` need not be given."""
    if not flag:
        return func(*inputs)
    return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
