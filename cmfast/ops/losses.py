"""Loss weights and weighted distances."""

from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import fused
from cmfast.ops._dispatch import plain, use_kernel
from cmfast.ops.precondition import check_step
from cmfast.reference import WEIGHTINGS

NORMS = ("l1", "l2", "huber")
#: Numbers in a batch up to which means take PyTorch on a CPU less time than to ask for something else.
FEW = 2**14


def loss_weight(sigma: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """The weight of each sample's loss from snr = 1 / sigma^2; shape and dtype of `sigma`.

    `snr`, `snr+1`, `karras` = snr + 1 / sigma_data^2 (Karras et al. 2022), `truncated-snr` = max(snr, 1), `uniform`.

    Raises: TypeError: sigma is no floating tensor. ValueError: unknown weighting, where the message lists the known
        ones; sigma_data is not positive.

    >>> import torch
    >>> loss_weight(torch.tensor([0.5, 2.0]), "snr+1")
    tensor([5.0000, 1.2500])
    """
    _check.float_tensor("sigma", sigma, min_ndim=0)
    _check.choice("weighting", weighting, WEIGHTINGS)
    _check.positive("sigma_data", sigma_data)
    return reference.loss_weight(sigma, weighting, sigma_data=sigma_data)


def snr_weight(snr: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """`loss_weight` from the signal-to-noise ratio 1 / sigma^2; shape and dtype of `snr`.

    Raises: as of `loss_weight`, for its weighting and sigma_data.

    >>> import torch
    >>> snr_weight(torch.tensor([0.25, 4.0]), "truncated-snr")
    tensor([1., 4.])
    """
    _check.float_tensor("snr", snr, min_ndim=0)
    _check.choice("weighting", weighting, WEIGHTINGS)
    _check.positive("sigma_data", sigma_data)
    return reference.snr_weight(snr, weighting, sigma_data=sigma_data)


def _check_norm(norm: str, huber_c: float) -> None:
    _check.choice("norm", norm, NORMS)
    _check.number("huber_c", huber_c)


def _check_weight(weight: Tensor, x: Tensor) -> None:
    _check.float_tensor("weight", weight, min_ndim=0)
    if weight.ndim > 1 or (weight.ndim == 1 and weight.shape[0] != x.shape[0]):
        raise ValueError(f"weight must be a scalar or [B] with B = {x.shape[0]}, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, the batch on {x.device}: move one of them")


def weighted_loss(x: Tensor, target: Tensor, weight: Tensor, *, norm: str = "l2", huber_c: float = 0.0) -> Tensor:
    """Per sample [B]: weight times the mean of |x - y| (`l1`) or (x - y)^2 (`l2`), or times the pseudo-Huber
    distance sqrt(||x - y||^2 + c^2) - c of the whole sample vector (`huber`), float32 or wider.

    Args: x, target [B, ...]; weight scalar or [B]; norm: `l1`, `l2` or `huber`, whose c is huber_c.
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> import torch
    >>> weighted_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor(2.0))
    tensor([10.])
    """
    _check.float_tensor("x", x)
    _check.float_tensor("target", target)
    _check.same_shape(x=x, target=target)
    _check_norm(norm, huber_c)
    _check_weight(weight, x)
    inputs = x, target, weight
    options: dict[str, Any] = {"norm": norm, "huber_c": huber_c}
    if use_kernel("weighted_loss", *inputs):
        from cmfast.kernels.losses import weighted_loss_bwd, weighted_loss_fwd

        return fused(weighted_loss_fwd, weighted_loss_bwd, reference.weighted_loss, *inputs, keep=1, **options)
    if norm != "huber" and x.is_cpu and not torch.compiler.is_compiling() and x.numel() <= FEW:
        return reference.weighted_loss(*inputs, **options)
    return plain(reference.weighted_loss, *inputs, state=x)(*inputs, **options)


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
    """`weighted_loss` of D(x_t, sigma) and the target's D [B], straight from network outputs: Song et al. 2023, eq. 7.

    Args:
        model_output, x_t, sigma: the student's output F [B, ...], its state, and scalar or [B].
        target: D of the target network at the other point; or, with x_t2 and next_sigma, that network's output there.
        weight: scalar or [B], or the name of a weighting of sigma (`WEIGHTINGS`), computed in the kernel.
        norm, huber_c: as in `weighted_loss`; weight_sigma_data: of the `karras` weighting.
        sigma_data, boundary: the scalings of both networks.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> import torch
    >>> x = torch.ones(1, 3, 4, 4)
    >>> consistency_loss(torch.zeros_like(x), x, torch.tensor([0.002]), torch.zeros_like(x), "snr+1")
    tensor([250001.])
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary)
    _check.positive("weight_sigma_data", weight_sigma_data)
    _check.float_tensor("target", target)
    _check.same_shape(x_t=x_t, target=target)
    if (x_t2 is None) != (next_sigma is None):
        raise ValueError("x_t2 and next_sigma go together: give both, or neither if target is the target's D")
    if x_t2 is not None:
        _check.float_tensor("x_t2", x_t2)
        _check.same_shape(x_t=x_t, x_t2=x_t2)
        _check.sigma_level("next_sigma", next_sigma, x_t)
    _check_norm(norm, huber_c)
    if isinstance(weight, str):
        _check.choice("weight", weight, WEIGHTINGS)
    else:
        _check_weight(weight, x_t)
    inputs = model_output, x_t, sigma, target, weight, x_t2, next_sigma
    options: dict[str, Any] = {
        "norm": norm,
        "huber_c": huber_c,
        "weight_sigma_data": weight_sigma_data,
        "sigma_data": sigma_data,
        "boundary": boundary,
    }
    if use_kernel("consistency_loss", *inputs):
        from cmfast.kernels.losses import consistency_loss_bwd, consistency_loss_fwd

        return fused(consistency_loss_fwd, consistency_loss_bwd, reference.consistency_loss, *inputs, keep=1, **options)
    return plain(reference.consistency_loss, *inputs, state=x_t)(*inputs, **options)
