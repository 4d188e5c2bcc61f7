"""One layer of LPIPS, the learned perceptual distance."""

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype

# Added to the norm, outside the root, as lpips 0.1.4 and piq 0.8 do: a pixel of zeros stays zero.
EPS = 1e-10


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
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)
