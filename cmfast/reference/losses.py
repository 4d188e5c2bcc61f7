"""Weights and distances of the losses."""

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype
from cmfast.reference.precondition import _denoise

#: Loss weights from the signal-to-noise ratio 1 / sigma^2, by name.
WEIGHTINGS = ("snr", "snr+1", "karras", "truncated-snr", "uniform")


def loss_weight(sigma: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """The weight of each sample's loss, shaped and typed as `sigma` [B]."""
    dtype, sigma = sigma.dtype, sigma.to(compute_dtype(sigma))
    return snr_weight(sigma**-2, weighting, sigma_data=sigma_data).to(dtype)


def snr_weight(snr: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """`loss_weight` from the signal-to-noise ratio."""
    if weighting == "snr":
        return snr.clone()
    if weighting == "snr+1":
        return snr + 1
    if weighting == "karras":
        return snr + 1.0 / sigma_data**2
    if weighting == "truncated-snr":
        return snr.clamp(min=1)
    if weighting == "uniform":
        return torch.ones_like(snr)
    raise ValueError(f"unknown weighting {weighting!r}; known: {', '.join(WEIGHTINGS)}")


def weighted_loss(x: Tensor, target: Tensor, weight: Tensor, *, norm: str = "l2", huber_c: float = 0.0) -> Tensor:
    """Per sample: weight times a distance of x and target [B, ...], in the accumulation dtype [B].

    `l1`, `l2`: the mean of |x - y| or (x - y)^2. `huber`: sqrt(||x - y||^2 + c^2) - c of the whole sample vector,
    no mean (Song & Dhariwal 2023, section 3.3), with gradient zero at x = y when c = 0.
    """
    wide = compute_dtype(x, target)
    delta = (x.to(wide) - target.to(wide)).unsqueeze(-1).flatten(1)
    if norm == "l1":
        distance = delta.abs().mean(1)
    elif norm == "l2":
        distance = delta.square().mean(1)
    else:
        squared = delta.square().sum(1)
        # The square root of an exact zero has an infinite slope: replace it before, not after.
        radicand = squared + huber_c**2
        # NaN is not zero, and stays.
        positive = radicand != 0
        distance = torch.where(positive, torch.where(positive, radicand, 1).sqrt(), 0) - huber_c
    return distance * weight.to(wide)


def consistency_loss(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    target: Tensor,
    weight: Tensor | str = "uniform",
    x_t2: Tensor | None = None,
    next_sigma: Tensor | None = None,
    *,
    norm: str = "l2",
    huber_c: float = 0.0,
    weight_sigma_data: float = 0.5,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
) -> Tensor:
    """`weighted_loss` of D(x_t, sigma), computed from the network output, against the target's D.

    `target` is that D, or with (x_t2, next_sigma) the target network's output. `weight`: [B], or the name of a
    weighting of sigma. Neither D is rounded to the dtype of the state.
    """
    wide = compute_dtype(model_output, x_t, target, x_t2)
    denoised = _denoise(model_output, x_t, sigma, sigma_data, boundary, False, wide)
    if x_t2 is not None:
        level = sigma if next_sigma is None else next_sigma
        target = _denoise(target, x_t2, level, sigma_data, boundary, False, wide)
    if isinstance(weight, str):
        weight = loss_weight(sigma.to(wide), weight, sigma_data=weight_sigma_data)
    return weighted_loss(denoised, target, weight, norm=norm, huber_c=huber_c)
