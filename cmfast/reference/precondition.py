"""The two scalings around the network: Karras et al. 2022 (EDM), table 1, and Song et al. 2023, appendix C.

`sigma_data=None` means "the network is the denoiser": c_skip = 0, c_out = 1, c_in = 1, c_noise = sigma.
A plain function D(x, sigma) so goes through the same solvers as a network with its scalings.
"""

import torch
from torch import Tensor

from cmfast.reference._common import as_input, clip_unit, compute_dtype, laid_out_as, per_sample
from cmfast.reference.images import to_uint8


def scalings(
    sigma: Tensor, *, sigma_data: float | None = 0.5, boundary: float = 0.002
) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of D(x, s) = c_skip x + c_out F(c_in x, c_noise); same shape as `sigma`.

    c_skip = sd^2 / ((s - b)^2 + sd^2),  c_out = sd (s - b) / sqrt(s^2 + sd^2),  c_in = 1 / sqrt(s^2 + sd^2)
    with sd = `sigma_data` and b = `boundary`, the noise level at which D is the identity: the smallest sigma for
    a consistency model, 0 for EDM.
    """
    if sigma_data is None:
        return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)
    # The square of a float16 sigma of 256 would be infinite.
    dtype, sigma = sigma.dtype, sigma.to(compute_dtype(sigma))
    offset = sigma - boundary
    c_in = 1 / (sigma**2 + sigma_data**2) ** 0.5
    # By a division, exactly 1 at the boundary: a number divided by a tensor is a product with its reciprocal.
    c_skip = torch.full_like(offset, sigma_data**2) / (offset**2 + sigma_data**2)
    c_out = sigma_data * offset / (sigma**2 + sigma_data**2) ** 0.5
    return c_skip.to(dtype), c_out.to(dtype), c_in.to(dtype)


def c_noise(sigma: Tensor, *, sigma_data: float | None = 0.5) -> Tensor:
    """What the network is told of the noise level: 250 ln(sigma + 1e-44), or sigma itself if it is the denoiser."""
    if sigma_data is None:
        return sigma.clone()
    dtype, sigma = sigma.dtype, sigma.to(compute_dtype(sigma))
    return (250.0 * torch.log(sigma + 1e-44)).to(dtype)


def scale_input(
    x: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:
    """The network's input c_in(sigma) x in `dtype` (default: that of x), and c_noise [B]."""
    wide = compute_dtype(x)
    _, _, c_in = scalings(per_sample(sigma, x, wide), sigma_data=sigma_data)
    noise_level = c_noise(sigma.to(wide), sigma_data=sigma_data).expand(x.shape[0])
    return as_input(c_in * x.to(wide), dtype or x.dtype, memory_format), noise_level


def denoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
) -> Tensor:
    """D = c_skip x_t + c_out F in the dtype of x_t, clamped to [-1, 1] if `clip`."""
    wide = compute_dtype(model_output, x_t)
    denoised = _denoise(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    # A tensor of its own where it is the output itself, too.
    return denoised.to(x_t.dtype, copy=sigma_data is None and not clip)


def _denoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    wide: torch.dtype,
) -> Tensor:
    """D in the accumulation dtype, for the operations that go on computing with it."""
    if sigma_data is None:
        # c_skip = 0 must not let an infinite x_t through as NaN.
        return clip_unit(laid_out_as(model_output.to(wide), x_t), clip)
    c_skip, c_out, _ = scalings(per_sample(sigma, x_t, wide), sigma_data=sigma_data, boundary=boundary)
    return clip_unit(c_skip * x_t.to(wide) + c_out * model_output.to(wide), clip)


def denoise_to_uint8(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    rounding: str = "trunc",
) -> Tensor:
    """The last step of a sampler: D, clamped, as uint8 pixels [B, H, W, C]."""
    wide = compute_dtype(model_output, x_t)
    return to_uint8(_denoise(model_output, x_t, sigma, sigma_data, boundary, True, wide), rounding=rounding)
