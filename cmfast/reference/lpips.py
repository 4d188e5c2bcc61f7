"""LPIPS, the learned perceptual distance: what goes into its trunk, and one layer of what comes out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast.reference._common import as_input, compute_dtype

# Added to the norm, outside the root, as lpips 0.1.4 and piq 0.8 do: a pixel of zeros stays zero.
EPS = 1e-10


def lpips_input(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Images [B, C, H, W] or gray [B, 1, H, W], resized bilinearly, mapped from `value_range` to [0, 1], and
    standardised by mean and std [C]; rounded once, to `dtype`."""
    wide = compute_dtype(image, mean, std)
    low, high = value_range
    x = image.to(wide)
    if size is not None:
        x = F.interpolate(x, size=size, mode="bilinear")
    mean, std = (t.to(wide)[:, None, None] for t in (mean, std))
    return as_input(((x - low) / (high - low) - mean) / std, dtype or image.dtype, memory_format)


def lpips_layer(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    """Distance of two feature maps [B, C, H, W], in the accumulation dtype [B].

    Both are brought to unit length over the channels; squared differences times `weight` [C] are summed over
    the channels and averaged over the pixels.
    """
    wide = compute_dtype(features, target_features)
    delta = _unit(features.to(wide)) - _unit(target_features.to(wide))
    return (weight.to(wide)[:, None, None] * delta.square()).sum(1).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    # vector_norm, not the root of a sum of squares: at a pixel of zeros its gradient is zero, the root's NaN.
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + EPS)
