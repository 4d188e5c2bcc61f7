"""A layer of LPIPS on a CPU: strips of pixels go through all of it while they are in the cache.

Plain PyTorch passes over the maps some twenty times for a distance and its gradient. Here the maps are read once, and
the gradient is made with the distance, for an upstream gradient of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.ops._autograd import fused
from cmfast.reference.lpips import EPS

#: Elements of a map from which on strips pay.
LEAST = 2**17
#: Elements of a strip of one map.
STRIP = 2**17


def lpips_layer(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    """For large maps of float32 in channels_last, of which the first alone needs a gradient; else the reference."""
    inputs = features, target_features, weight
    records = torch.is_grad_enabled()
    if features.numel() < LEAST or not all(map(native.channels_last, inputs[:2])):
        return reference.lpips_layer(*inputs)
    if records and (target_features.requires_grad or weight.requires_grad):
        return reference.lpips_layer(*inputs)
    if records and features.requires_grad:
        return fused(_lpips_layer_fwd, _lpips_layer_bwd, reference.lpips_layer, *inputs, keep=1)
    return _pass(*inputs, None)


def _rows(x: Tensor) -> Tensor:
    """Maps in channels_last as [B, HW, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pass(features: Tensor, target_features: Tensor, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """The distances [B]; and into `gradient` [B, HW, C] that of the features where each distance's own is 1."""
    f, g = _rows(features.detach()), _rows(target_features.detach())
    batch, pixels, channels = f.shape
    count = max(1, STRIP // channels)
    spare = f.new_empty(2, min(count, pixels), channels)
    slope = weight * (2 / pixels)
    distance = f.new_zeros(batch)
    for b in range(batch):
        for start in range(0, pixels, count):
            f_b, g_b = f[b, start : start + count], g[b, start : start + count]
            delta, other = spare[0, : len(f_b)], spare[1, : len(f_b)]
            length = torch.linalg.vector_norm(f_b, dim=1, keepdim=True)
            by_f = (length + EPS).reciprocal_()
            torch.mul(f_b, by_f, out=delta)
            torch.mul(g_b, torch.linalg.vector_norm(g_b, dim=1, keepdim=True).add_(EPS).reciprocal_(), out=other)
            delta.sub_(other)
            distance[b] += torch.mv(torch.mul(delta, delta, out=other), weight).sum()
            if gradient is not None:
                # As in the kernel: (a - f (a . f) / (|f| (|f| + eps))) / (|f| + eps), where |f| = 0 without the rest.
                delta.mul_(slope)
                along = torch.mul(delta, f_b, out=other).sum(1, keepdim=True).mul_(by_f)
                along.div_(length).masked_fill_(length == 0, 0)
                made = gradient[b, start : start + count]
                torch.addcmul(delta, f_b, along, value=-1, out=made).mul_(by_f)
    return distance.div_(pixels)


def _lpips_layer_fwd(features: Tensor, target_features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The distances, and for the backward pass the gradient of the features."""
    batch, channels, height, width = features.shape
    gradient = features.new_empty(batch, height * width, channels)
    distance = _pass(features, target_features, weight, gradient)
    return distance, gradient.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _lpips_layer_bwd(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], *inputs: Any, saved: tuple[Tensor]
) -> tuple[Tensor | None, ...]:
    (grad,), (gradient,) = grads, saved
    return None if grad is None else gradient * grad[:, None, None, None], None, None
