"""One layer of LPIPS, the learned perceptual distance."""

from torch import Tensor

from cmfast import reference
from cmfast.ops import _check


def lpips_layer(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    """Distance of two feature maps of one layer (Zhang et al. 2018, eq. 1, weights outside the square) [B]:

        mean_hw sum_c weight_c (f_c / (|f| + 1e-10) - g_c / (|g| + 1e-10))^2,     |.| over the channels

    in float32, or float64 if a feature map is float64; half precision accumulates in float32.

    At a pixel where all channels of f are zero the gradient is that of f / 1e-10: huge, but not NaN as in piq
    and the lpips package. The ReLU that made the zeros stops it.

    Args: features f and target_features g [B, C, H, W]; weight [C]. Differentiable in all three.
    Raises: TypeError, ValueError: an argument of the wrong dtype, shape or device; the message names it.

    >>> import torch
    >>> f, g = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    >>> weight = torch.tensor([1.0, 10.0])
    >>> lpips_layer(f.view(1, 2, 1, 1), g.view(1, 2, 1, 1), weight)     # (0.6 - 1)^2 + 10 (0.8 - 0)^2
    tensor([6.5600])
    """
    _check.float_tensor("features", features)
    _check.float_tensor("target_features", target_features)
    _check.float_tensor("weight", weight)
    if features.ndim != 4:
        raise ValueError(f"features must be [B, C, H, W], got {list(features.shape)}")
    _check.same_shape(features=features, target_features=target_features)
    if weight.shape != features.shape[1:2]:
        raise ValueError(f"weight must be [C] with C = {features.shape[1]}, got {list(weight.shape)}")
    return reference.lpips_layer(features, target_features, weight)
