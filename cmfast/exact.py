"""Denoisers and consistency functions that are known exactly: teachers without training, and what a student should be.

For data from a mixture of Gaussians N(mean_k, std^2), the best denoiser has a closed form, and its probability-flow
trajectories are those that a consistency model learns to jump along. With std = 0 the means are a data set itself.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cmfast import samplers, schedules
from cmfast.denoiser import Denoiser, DenoiserFn, without_autocast
from cmfast.ops import _check
from cmfast.precondition import Preconditioner


class MixtureDenoiser(Denoiser):
    """E[x_start | x_t = x] for data from a mixture of Gaussians of one width, or for a data set: no network in it.

        D(x, sigma) = sum_k p_k (mean_k + std^2 / (std^2 + sigma^2) (x - mean_k))
        p_k ~ weight_k exp(-||x - mean_k||^2 / (2 (std^2 + sigma^2)))

    Args:
        means: [K, C, H, W], data units; images of a data set where std is 0.
        std: of every component, in each dimension.
        weights: [K], 0 or more; all alike if not given.
        labels: int64 [K], the class of each component: D(x, sigma, labels) knows those of a class alone.
        sigma_min, sigma_max, rho: as of a `Denoiser`.

    Raises: ValueError: std or weights negative, or means, weights or labels of other shapes.

    >>> teacher = MixtureDenoiser(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
    >>> teacher(torch.tensor([0.5, -9.0]).view(2, 1, 1, 1), 1.0).flatten()  # tanh(x / sigma^2)
    tensor([ 0.4621, -1.0000])
    """

    means: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor,
        std: float = 0.0,
        *,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        sigma_min: float = schedules.SIGMA_MIN,
        sigma_max: float = schedules.SIGMA_MAX,
        rho: float = schedules.RHO,
    ) -> None:
        if means.ndim != 4 or not len(means):
            raise ValueError(f"means must be [K, C, H, W] with K of 1 or more, got {list(means.shape)}")
        if not std >= 0:
            raise ValueError(f"std must be 0 or more, got {std}")
        for name, values in (("weights", weights), ("labels", labels)):
            if values is not None and values.shape != means.shape[:1]:
                raise ValueError(f"{name} must be [{len(means)}], one for each mean, got {list(values.shape)}")
        channels, height, width = means.shape[1:]
        super().__init__(
            _no_network,
            Preconditioner.edm(),
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            rho=rho,
            image_shape=(channels, height, width),
            num_classes=None if labels is None else int(labels.max()) + 1,
        )
        self.std = std
        if weights is not None and not (weights.min() >= 0 and weights.sum() > 0):
            raise ValueError(f"weights must be 0 or more, and not all 0, got {weights.tolist()!r:.80}")
        weights = means.new_ones(len(means)) if weights is None else weights.to(means)
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("labels", labels)

    @property
    def device(self) -> torch.device:
        """Where the means are."""
        return self.means.device

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None, *, clip: bool = False) -> Tensor:
        """D [B, C, H, W] in the dtype of x, computed in the wider of its dtype, that of the means and float32.
        Arguments as of `Denoiser.forward`."""
        self.check_labels(labels, x.shape[0])
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.means.dtype), torch.float32)
        means, flat = self.means.flatten(1).to(dtype), x.flatten(1).to(dtype)
        level = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(x.shape[0])[:, None]
        variance = self.std**2 + level**2
        # ||x - mean||^2 without ||x||^2, which all components share: far less is left to round at high levels.
        with without_autocast(x.device):
            distances = means.square().sum(1) - 2 * flat @ means.T
        logits = self.log_weights.to(dtype) - distances / (2 * variance)
        if labels is not None:
            logits = logits.masked_fill(cast(Tensor, labels[:, None] != self.labels), -torch.inf)
        with without_autocast(x.device):
            mean = logits.softmax(1) @ means
        denoised = mean + self.std**2 / variance * (flat - mean)
        return (denoised.clamp(-1, 1) if clip else denoised).view_as(x).to(x.dtype)

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """ValueError unless `labels` fit this model and a batch of that size, and each class has means."""
        super().check_labels(labels, batch)
        if labels is None or labels.device.type != "cpu" or not _check.has_values(labels):
            return
        without = labels[~torch.isin(labels, cast(Tensor, self.labels))]
        if len(without):
            raise ValueError(f"labels must be of classes that have means, and {without[0].item()} has none")

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Data: [num, C, H, W], of all components; generator: torch's, by default the global one."""
        chosen = torch.multinomial(self.log_weights.exp().cpu(), num, replacement=True, generator=generator)
        means = self.means[chosen.to(self.device)]
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype)
        return means + self.std * noise.to(self.device)


def gaussian_map(x: Tensor, sigma: Tensor | float, boundary: float, *, mean: Tensor | float, std: float) -> Tensor:
    """The consistency function of data from N(mean, std^2): where the trajectory through (x, sigma) is at `boundary`.

        f(x, sigma) = mean + (x - mean) sqrt((std^2 + boundary^2) / (std^2 + sigma^2))

    With D = (std^2 x + sigma^2 mean) / (std^2 + sigma^2) the probability-flow ODE dx/dsigma = (x - D) / sigma is
    d(x - mean)/dsigma = (x - mean) sigma / (std^2 + sigma^2), whose solutions are x - mean = const sqrt(std^2 +
    sigma^2). The boundary is sigma_min for a consistency model, f(x, sigma_min) = x, and 0 for EDM scalings.

    x [B, ...], whose dtype the result has, computed in float32 or wider; sigma [B] or a number.

    >>> gaussian_map(torch.tensor([5.0]), 1.0, 0.0, mean=1.0, std=0.75)
    tensor([3.4000])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    level = torch.as_tensor(sigma, dtype=wide, device=x.device)
    level = level.reshape(level.shape + (1,) * (x.ndim - level.ndim)) if level.ndim else level
    mapped = mean + (x.to(wide) - mean) * ((std**2 + boundary**2) / (std**2 + level**2)).sqrt()
    return mapped.to(x.dtype)


def solved_map(
    denoiser: DenoiserFn,
    x: Tensor,
    sigma: float,
    boundary: float,
    *,
    steps: int = 256,
    rho: float = schedules.RHO,
    labels: Tensor | None = None,
) -> Tensor:
    """A consistency function by integration: the trajectory from (x, sigma) to `boundary`, in so many Heun steps.

    x [B, C, H, W], whose dtype is what is computed in; labels int64 [B] for a denoiser that is class-conditional.
    """
    if sigma <= boundary:
        return x
    sigmas = schedules.karras_sigmas(
        steps + 1, sigma_min=boundary, sigma_max=sigma, rho=rho, append_zero=False, dtype=torch.float64
    )
    return samplers.sample_heun(denoiser, x, sigmas, labels=labels, clip_denoised=False)


def _no_network(*_: Tensor) -> Tensor:
    raise NotImplementedError("an exact denoiser has no network: call it as D(x, sigma)")
