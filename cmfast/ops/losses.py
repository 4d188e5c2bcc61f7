"""Loss weights and weighted distances."""

from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops.precondition import check_step
from cmfast.reference import WEIGHTINGS

NORMS = ("l1", "l2", "huber")


def loss_weight(sigma: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """The weight of each sample's loss from snr = 1 / sigma^2; shape and dtype of `sigma`.

    `snr`, `snr+1`, `karras` = snr + 1 / sigma_data^2 (Karras et al. 2022), `truncated-snr` = max(snr, 1), `uniform`.

    Raises: ValueError: unknown weighting; the message lists the known ones.
    """
    _check.float_tensor("sigma", sigma, min_ndim=0)
    _check.choice("weighting", weighting, WEIGHTINGS)
    return reference.loss_weight(sigma, weighting, sigma_data=sigma_data)


def snr_weight(snr: Tensor, weighting: str = "uniform", *, sigma_data: float = 0.5) -> Tensor:
    """`loss_weight` from the signal-to-noise ratio 1 / sigma^2; shape and dtype of `snr`."""
    _check.float_tensor("snr", snr, min_ndim=0)
    _check.choice("weighting", weighting, WEIGHTINGS)
    return reference.snr_weight(snr, weighting, sigma_data=sigma_data)


def _check_norm(norm: str, huber_c: float, weight: Tensor, x: Tensor) -> None:
    _check.choice("norm", norm, NORMS)
    _check.float_tensor("weight", weight, min_ndim=0)
    if weight.ndim > 1 or (weight.ndim == 1 and weight.shape[0] != x.shape[0]):
        raise ValueError(f"weight must be a scalar or [B] with B = {x.shape[0]}, got {list(weight.shape)}")
    if not huber_c >= 0:
        raise ValueError(f"huber_c must be 0 or more, got {huber_c}")


def weighted_loss(x: Tensor, target: Tensor, weight: Tensor, *, norm: str = "l2", huber_c: float = 0.0) -> Tensor:
    """Per sample [B]: weight times the mean of |x - y| (`l1`) or (x - y)^2 (`l2`), or times the pseudo-Huber
    distance sqrt(||x - y||^2 + c^2) - c of the whole sample vector (`huber`), float32 or wider.

    Args: x, target [B, ...]; weight scalar or [B].
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.
    """
    _check.float_tensor("x", x)
    _check.float_tensor("target", target)
    _check.same_shape(x=x, target=target)
    _check_norm(norm, huber_c, weight, x)
    return reference.weighted_loss(x, target, weight, norm=norm, huber_c=huber_c)


def consistency_loss(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    norm: str = "l2",
    huber_c: float = 0.0,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
) -> Tensor:
    """`weighted_loss` of D(x_t, sigma), straight from the network output, against the target's D [B, ...]."""
    check_step(model_output, x_t, sigma, sigma_data)
    _check.float_tensor("target", target)
    _check.same_shape(x_t=x_t, target=target)
    _check_norm(norm, huber_c, weight, x_t)
    return reference.consistency_loss(
        model_output,
        x_t,
        sigma,
        target,
        weight,
        norm=norm,
        huber_c=huber_c,
        sigma_data=sigma_data,
        boundary=boundary,
    )
