"""Argument checks. Each error names the argument, what came and what was expected.

Values of a tensor are looked at on the CPU only: on a GPU that would stop the stream and break graph capture.
"""

import math

import torch
from torch import Tensor


def float_tensor(name: str, x: object, *, min_ndim: int = 1) -> None:
    """A floating tensor of at least `min_ndim` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if x.ndim < min_ndim:
        raise ValueError(f"{name} must be a batch [B, ...] of {min_ndim} or more dimensions, got {list(x.shape)}")


def same_shape(**tensors: Tensor) -> None:
    """All of the shape, and on the device, of the first."""
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.shape != x.shape:
            raise ValueError(f"{name} must have the shape of {first} {list(x.shape)}, got {list(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"{name} is on {y.device}, {first} on {x.device}: move one of them")


def sigma_dtype(x: Tensor) -> torch.dtype:
    """The dtype of noise levels for a state x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sigma_level(name: str, sigma: object, x: Tensor, *, allow_zero: bool = True) -> None:
    """A floating tensor, scalar or [B] with B = x.shape[0], not negative and not NaN."""
    if not isinstance(sigma, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (scalar or [B]), got {type(sigma).__name__}")
    if not sigma.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {sigma.dtype}")
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] != x.shape[0]):
        raise ValueError(f"{name} must be a scalar or [B] with B = {x.shape[0]}, got {list(sigma.shape)}")
    if sigma.device != x.device:
        raise ValueError(f"{name} is on {sigma.device}, the batch on {x.device}: move one of them")
    if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
        low = float("inf") if sigma.numel() == 0 else sigma.min().item()
        if math.isnan(low) or low < 0 or (low == 0 and not allow_zero):
            kind = "0 or more" if allow_zero else "positive"
            raise ValueError(f"{name} holds noise levels and must be {kind} and not NaN, got {low}")


def choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """One of the known names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def sigma_data_value(sigma_data: float | None) -> None:
    """Positive, or None for a network that is itself the denoiser."""
    if sigma_data is not None and not (sigma_data > 0 and math.isfinite(sigma_data)):
        raise ValueError(f"sigma_data must be positive, or None, got {sigma_data}")
