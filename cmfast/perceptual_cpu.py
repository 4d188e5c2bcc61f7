"""The trunk of LPIPS on a CPU: its 3x3 convolutions by `native.winograd`, a few images at a time.

What the layers keep for the gradient is soon gone in this way: the gradient of the distances is made with them, image
by image, for an upstream gradient of one. No memory is for more images than are computed at once, and all of it is used
again by the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.native import lpips, winograd
from cmfast.ops._autograd import fused, without_hooks
from cmfast.ops._dispatch import plain_on_cpu
from cmfast.watch import called_plainly, see_fused_optimizers

#: Pixels that so many threads compute at once: an image of the size to which they are resized.
PIXELS, THREADS = 224 * 224, 4

#: The distances of two batches of images [B].
Measure = Callable[[Tensor, Tensor], Tensor]


class Trunk:
    """Runs the layers of a frozen trunk, of whose weights it keeps what `native.winograd` wants."""

    def __init__(self) -> None:
        see_fused_optimizers()
        self._filters, self._workspace = winograd.Filters(), winograd.Workspace()

    def __reduce__(self) -> tuple[Any, ...]:
        return Trunk, ()  # what it keeps is of weights that a copy has not

    def __call__(self, layer: nn.Module, h: Tensor) -> Tensor:
        """layer(h)"""
        if type(layer) is nn.Conv2d and winograd.fits(layer, h, kept=True):
            kept: dict[str, Any] = {"filters": self._filters, "workspace": self._workspace}
            return winograd.convolution(h, layer.weight, layer.bias, **kept)
        out: Tensor = layer(h)
        return out


def serves(image: Tensor, target: Tensor, weights: list[Tensor], trunk: nn.Module) -> bool:
    """Whether images can be measured so: float32 on a CPU, frozen weights, and nothing that looks on, such as a hook of
    the caller's, which may want all images at once."""
    frozen = not (torch.is_grad_enabled() and any(x.requires_grad for x in (target, *weights)))
    if not frozen or not plain_on_cpu([image, target, *weights]):
        return False
    return all(map(called_plainly, trunk.modules()))


def at_once(height: int, width: int) -> int:
    """How many images of a size are measured at once: of more threads, more."""
    return max(1, PIXELS * max(1, torch.get_num_threads() // THREADS) // (height * width))


def in_parts(measure: Measure, image: Tensor, target: Tensor, count: int) -> Tensor:
    """measure(image, target), so many samples at a time; its gradient is that of the image."""
    options: dict[str, Any] = {"measure": measure, "count": count}
    if torch.is_grad_enabled() and image.requires_grad:
        return fused(_with_gradient, _gradient, _whole, image, target, keep=1, **options)
    parts = zip(image.split(count), target.split(count), strict=True)
    return torch.cat([measure(*part) for part in parts])


def _whole(image: Tensor, target: Tensor, *, measure: Measure, count: int) -> Tensor:
    return measure(image, target)


def _with_gradient(image: Tensor, target: Tensor, *, measure: Measure, count: int) -> tuple[Tensor, Tensor]:
    """The distances, and their gradients, for the backward pass."""
    distances, gradients = [], []
    for part, of_target in zip(image.split(count), target.split(count), strict=True):
        with torch.enable_grad(), without_hooks():
            part = part.detach().requires_grad_()
            distance = measure(part, of_target.detach())
            gradients += torch.autograd.grad(distance.sum(), part)
        distances.append(distance.detach())
    return torch.cat(distances), torch.cat(gradients)


def _gradient(
    needed: tuple[bool, ...], grads: tuple[Tensor | None, ...], *inputs: Any, saved: tuple[Tensor], **options: Any
) -> tuple[Tensor | None, ...]:
    (grad,), (gradient,) = grads, saved
    return lpips.times(gradient, grad), None
