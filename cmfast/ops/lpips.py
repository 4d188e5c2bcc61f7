"""LPIPS, the learned perceptual distance: what goes into its trunk, and one layer of what comes out."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import fused
from cmfast.ops._dispatch import plain, use_kernel
from cmfast.reference._common import compute_dtype

#: Sides of an image from here on are the reference's: the kernel counts columns in 32 bits.
_LONG_SIDE = 2**15


def lpips_input(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Images as a network trained on standardised ones takes them [B, C, H, W], in one pass over memory:

        ((resized x - low) / (high - low) - mean) / std

    computed in float32 (float64 where an argument is) and rounded once. Gray images count as C equal channels. The
    gradient of a resized image is gathered in a fixed order: the same input gives the same bits.

    Args:
        image: [B, C, h, w] or [B, 1, h, w], contiguous or channels_last: others are copied.
        mean, std: of each channel [C], of values in [0, 1].
        size: (H, W), or one number for both: bilinear, as `F.interpolate(image, size, mode="bilinear")`, which is with
            align_corners=False and no antialiasing. None: the image's own.
        value_range: the values (low, high) that stand for black and for full intensity.
        dtype, memory_format: of the result; by default those of the image.

    Differentiable in image, mean and std.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> import torch
    >>> gray = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    >>> lpips_input(gray, torch.tensor([0.5, 0.0]), torch.tensor([0.5, 1.0]))[0, :, 0]
    tensor([[-1.,  1.],
            [ 0.,  1.]])
    """
    _check.float_tensor("image", image)
    if not isinstance(mean, Tensor) or mean.ndim != 1:
        raise ValueError(f"mean must be a torch.Tensor [C], got {list(getattr(mean, 'shape', ())) or mean!r}")
    _check.parameter("mean", mean, tuple(mean.shape), "C", image)
    _check.parameter("std", std, tuple(mean.shape), "C", image)
    channels = len(mean)
    if image.ndim != 4 or image.shape[1] not in (1, channels):
        raise ValueError(f"image must be [B, {channels}, H, W] or [B, 1, H, W], got {list(image.shape)}")
    _check.input_format(image, dtype, memory_format)
    value_range_of(value_range)
    own = tuple(image.shape[2:])
    out = own if size is None else _check.sizes("size", (size, size) if isinstance(size, int | Integral) else size)
    if len(out) != 2 or (size is not None and min(*out, *own) < 1):
        raise ValueError(f"size must be (H, W) of 1 or more, of an image that has pixels, got {size} for {list(own)}")
    inputs = image, mean, std
    options: dict[str, Any] = {"value_range": value_range, "dtype": dtype, "memory_format": memory_format}
    served = use_kernel("lpips_input", *inputs, dtypes=(dtype,))
    if served and image.numel() and channels and max(*out, *own) < _LONG_SIDE:
        from cmfast.kernels.lpips_input import lpips_input_bwd, lpips_input_fwd

        options |= {"size": out, "dtype": dtype or image.dtype}
        return fused(lpips_input_fwd, lpips_input_bwd, reference.lpips_input, *inputs, **options)
    options["size"] = None if size is None else out
    if dtype == torch.float32 != image.dtype:  # as the reference reads halves, and C does not
        inputs = image.to(compute_dtype(image, mean, std)), mean, std
    return plain(reference.lpips_input, *inputs, state=inputs[0])(*inputs, **options)


def value_range_of(value_range: object) -> None:
    """Raises: ValueError: not (low, high) with low < high."""
    if not (isinstance(value_range, tuple | list) and len(value_range) == 2 and value_range[0] < value_range[1]):
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")


def lpips_layer(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    """Distance of two feature maps of one layer (Zhang et al. 2018, eq. 1, weights outside the square) [B]:

        mean_hw sum_c weight_c (f_c / (|f| + 1e-10) - g_c / (|g| + 1e-10))^2,     |.| over the channels

    in float32, or float64 if a feature map is float64; half precision accumulates in float32. Either pass reads the
    maps once, the backward pass writes the gradients that are wanted.

    At a pixel where all channels of f are zero the gradient is that of f / 1e-10: huge, but not NaN as in piq
    and the lpips package. The ReLU that made the zeros stops it.

    Args: features f and target_features g [B, C, H, W], contiguous or channels_last, others are copied, as is g where
        it lies otherwise than f; weight [C]. Differentiable in all three.
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
    if weight.device != features.device:
        raise ValueError(f"weight is on {weight.device}, features on {features.device}: move one of them")
    inputs = features, target_features, weight
    if use_kernel("lpips_layer", *inputs) and features.numel():
        from cmfast.kernels.lpips import lpips_layer_bwd, lpips_layer_fwd

        return fused(lpips_layer_fwd, lpips_layer_bwd, reference.lpips_layer, *inputs)
    return plain(reference.lpips_layer, *inputs, state=features)(*inputs)
