"""Images of other sizes and channels made into those that a network takes."""

from __future__ import annotations

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

#: Images are fitted so many at a time.
CHUNK = 256


def check_fit(image_size: int | None, channels: int | None) -> None:
    """Raises: ValueError: neither None nor a size, or 1 or 3 channels."""
    if image_size is not None and (not _whole(image_size) or image_size < 1):
        raise ValueError(f"image_size must be 1 or more, or None for the size the images have, got {image_size!r:.80}")
    if channels is not None and (not _whole(channels) or channels not in (1, 3)):
        raise ValueError(f"channels must be 1 (grey), 3 (RGB) or None, got {channels!r:.80}")


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def fit(images: Tensor, image_size: int | None, channels: int | None) -> Tensor:
    """Images [..., C, H, W] as [..., channels, image_size, image_size]; None leaves a size as it is.

    The square in the middle is resized, bicubic and antialiased: in one step what openai's guided-diffusion does in
    several. Grey is 0.299 R + 0.587 G + 0.114 B, RGB of grey the same three times.

    Raises: ValueError: channels of images that are neither grey nor RGB.
    """
    if channels is not None and images.shape[-3] not in (1, 3):
        raise ValueError(
            f"channels={channels} is of grey or RGB images, and these have {images.shape[-3]} channels: leave it out"
        )
    if image_size is not None:
        images = _resize(_centre(images), image_size)
    if channels == 1 and images.shape[-3] == 3:
        return _grey(images)
    if channels == 3 and images.shape[-3] == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    return images


def fit_all(images: Tensor, image_size: int | None, channels: int | None) -> Tensor:
    """`fit` of images [N, C, H, W], of which a chunk at a time is looked at; the same tensor where nothing changes."""
    if fit(images[:0], image_size, channels).shape == images[:0].shape:
        return images
    return torch.cat([fit(chunk, image_size, channels) for chunk in images.split(CHUNK)])


def _centre(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def _resize(images: Tensor, size: int) -> Tensor:
    """torchvision's `resize` with its bicubic interpolation. It rings: floating-point values are cut off at 1."""
    if images.shape[-1] == size:
        return images
    if not images.numel():
        return images.new_empty(*images.shape[:-2], size, size)
    flat = images.reshape(-1, *images.shape[-3:])
    flat = F.interpolate(flat, (size, size), mode="bicubic", antialias=True)
    if flat.is_floating_point():
        flat = flat.clamp(-1, 1)
    return flat.view(*images.shape[:-2], size, size)


def _grey(images: Tensor) -> Tensor:
    """Integer weights that add up to 2^16, as Pillow's: a grey pixel stays what it is."""
    weights = torch.tensor((19595, 38470, 7471), device=images.device)[:, None, None]
    if images.is_floating_point():
        return (images * (weights / 2**16).to(images.dtype)).sum(-3, keepdim=True)
    return (((images * weights).sum(-3, keepdim=True) + 2**15) >> 16).to(torch.uint8)
