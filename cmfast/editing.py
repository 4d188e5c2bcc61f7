"""Zero-shot editing with a consistency model: Song et al. 2023, algorithm 4 and appendix D.

One editor serves all: an image is mapped by `transform`, the known part of it (mask = 1) is kept, the model fills the
rest in, `inverse` maps back. Under `torch.autocast` it is the model alone that runs in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast import ops
from cmfast.denoiser import Model, evaluator, is_bounded, without_autocast
from cmfast.levels import Sigmas, on_device, read_levels
from cmfast.noise import NoiseFn
from cmfast.ops import _check
from cmfast.samplers import least_sigma

Map = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def edit(
    model: Model,
    reference: Tensor,
    x: Tensor,
    sigmas: Sigmas,
    *,
    mask: Tensor,
    transform: Map = _identity,
    inverse: Map = _identity,
    labels: Tensor | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    sigma_min: float | None = None,
    end_sigma: float | None = None,
) -> Tensor:
    """Images [B, C, H, W] that agree with `reference` where the transformed mask is 1.

    At each level: D, clamped (but of a model that is not `bounded`); y = mask transform(reference) + (1 - mask)
    transform(D); x = inverse(y) + noise of the next level. The model runs in the mode it is in: call `model.eval()`
    where it has dropout.

    Args:
        model: a `Denoiser`, or D(x, sigma[, labels]).
        reference: [B, C, H, W] in [-1, 1]; of its transform only the known part is looked at.
        x: [B, C, H, W] noise to start from, of level sigmas[0].
        sigmas: the levels at which the model is evaluated, in data units.
        mask: broadcasts to transform(reference); 1 keeps, 0 is filled in, and between the two they are mixed.
        transform, inverse: a linear map and its inverse.
        labels, noise_fn, sigma_min, end_sigma: as in `samplers.sample_multistep`.

    Raises: ValueError: shapes differ, the mask does not broadcast, or has other values (looked at on a CPU only).
        TypeError: a mask that is no tensor, or images that are no floating numbers.
    """
    reference = _like(reference, x, "reference")
    if reference.shape != x.shape:
        raise ValueError(f"reference must have the shape of x {list(x.shape)}, got {list(reference.shape)}")
    known = transform(reference)
    mask = _mask(mask, known, "the transformed image")
    known = torch.where(mask == 0, 0, known)  # not even a NaN of it
    sigma_min = least_sigma(model) if sigma_min is None else sigma_min
    clip = is_bounded(model)
    evaluate = evaluator(model, labels, clip)
    levels = read_levels(sigmas, least=1)
    sigma = on_device([*levels, 0.0 if end_sigma is None else end_sigma], x)
    noise_scale = ((sigma - sigma_min) * (sigma + sigma_min)).clamp(min=0).sqrt()
    for i in range(len(levels)):
        model_output = evaluate(*evaluate.scale_input(x, sigma[i]))
        denoised = ops.denoise(model_output, x, sigma[i], clip=clip, **evaluate.scaling)
        edited = inverse(torch.lerp(transform(denoised), known, mask))
        if i + 1 == len(levels) and end_sigma is None:
            return edited
        # The state keeps its layout: `edited` may lie transposed, where torch's generator fills in another order.
        x, _, _ = ops.add_noise(torch.empty_like(x).copy_(edited), noise_fn(x), noise_scale[i + 1])
    return x


def _like(images: Tensor, x: Tensor, name: str) -> Tensor:
    """The images in the dtype of x."""
    _check.float_tensor(name, images)
    _check.float_tensor("x", x)
    return images.to(x.dtype)


def _mask(mask: Tensor, images: Tensor, what: str) -> Tensor:
    """The mask in the shape and dtype of the images."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    readable = mask.numel() and mask.device.type == "cpu" and _check.has_values(mask)
    if readable and not (mask.min() >= 0 and mask.max() <= 1):
        raise ValueError(f"mask must be from 0 (filled in) to 1 (kept), got {mask.min().item()} to {mask.max().item()}")
    try:
        return torch.broadcast_to(mask.to(images), images.shape)
    except RuntimeError:
        shapes = f"{list(mask.shape)} against {list(images.shape)}"
        raise ValueError(f"mask does not broadcast to {what}: {shapes}") from None


def _orthogonal(first: np.ndarray) -> Tensor:
    """An orthogonal matrix whose first column points along `first`, by QR; float64."""
    matrix = np.eye(len(first))
    matrix[:, 0] = first / np.linalg.norm(first)
    matrix = np.linalg.qr(matrix)[0]
    return torch.from_numpy(-matrix if matrix[:, 0].sum() < 0 else matrix)


def colorize(model: Model, images: Tensor, x: Tensor, sigmas: Sigmas, **options: Any) -> tuple[Tensor, Tensor]:
    """Colour for grey images. Returns the result and the reference, which holds the luminance of `images` alone.

    Args: images [B, 3, H, W] in [-1, 1]; model, x, sigmas and options as in `edit`.
    Raises: ValueError: images without three channels, or what `edit` refuses.
    """
    images = _like(images, x, "images")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"colorize needs images [B, 3, H, W], got {list(images.shape)}")
    basis = _orthogonal(np.asarray([0.2989, 0.5870, 0.1140])).to(images)
    mask = images.new_tensor([1.0, 0.0, 0.0]).view(3, 1, 1)

    def transform(image: Tensor) -> Tensor:
        with without_autocast(image.device):
            return torch.einsum("bchw,cd->bdhw", image, basis)

    def inverse(channels: Tensor) -> Tensor:
        with without_autocast(channels.device):
            return torch.einsum("bdhw,cd->bchw", channels, basis)

    reference = inverse(transform(images) * mask)
    result = edit(model, reference, x, sigmas, mask=mask, transform=transform, inverse=inverse, **options)
    return result, reference


def super_resolve(
    model: Model, images: Tensor, x: Tensor, sigmas: Sigmas, *, patch_size: int = 8, **options: Any
) -> tuple[Tensor, Tensor]:
    """Detail for images known as means of patch_size x patch_size pixels. Returns the result and those means.

    Args: images [B, C, H, W] in [-1, 1], H and W multiples of patch_size; model, x, sigmas and options as in `edit`.
    Raises: ValueError: other sizes, or what `edit` refuses.
    """
    patch_size = _check.whole("patch_size", patch_size, least=1)
    images = _like(images, x, "images")
    if images.ndim != 4 or images.shape[-1] % patch_size or images.shape[-2] % patch_size:
        raise ValueError(
            f"super_resolve needs images [B, C, H, W] with H and W multiples of {patch_size}, got {list(images.shape)}"
        )
    height, width = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    basis = _orthogonal(np.ones(patch_size**2)).to(images)
    mask = images.new_zeros(patch_size**2)
    mask[0] = 1

    def patches(image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, patches, pixels of a patch]."""
        split: Tensor = image.unflatten(-1, (width, patch_size)).unflatten(-3, (height, patch_size))
        return split.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def assemble(split: Tensor) -> Tensor:
        grid: Tensor = split.unflatten(-2, (height, width)).unflatten(-1, (patch_size, patch_size))
        return grid.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def transform(image: Tensor) -> Tensor:
        with without_autocast(image.device):
            return patches(image) @ basis

    def inverse(coefficients: Tensor) -> Tensor:
        with without_autocast(coefficients.device):
            return assemble(coefficients @ basis.T)

    split = patches(images)
    reference = assemble(split.mean(-1, keepdim=True).expand_as(split))
    result = edit(model, reference, x, sigmas, mask=mask, transform=transform, inverse=inverse, **options)
    return result, reference


def inpaint(
    model: Model, images: Tensor, x: Tensor, sigmas: Sigmas, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Fill in where `mask` is 0. Returns the result and the reference, black (-1) where it is not known.

    Args: images [B, C, H, W] in [-1, 1]; mask, any that broadcasts to images, 1 where they are known, and between 0 and
        1 mixed; model, x, sigmas and options as in `edit`.
    Raises: ValueError: a mask that does not broadcast, or what `edit` refuses.
    """
    images = _like(images, x, "images")
    mask = _mask(mask, images, "images")
    black = torch.full_like(images, -1.0)
    reference = torch.lerp(black, torch.where(mask == 0, black, images), mask)
    return edit(model, images, x, sigmas, mask=mask, **options), reference
