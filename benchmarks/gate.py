"""Right before fast: what a provider of images makes, beside the same network in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmfast import Denoiser, Sampler
from cmfast.benchmarks.providers import PLAIN, SEED, ConvolutionsAlone, Models, Provider, Trial
from cmfast.tolerances import FLOOR, NETWORK


class Gate:
    """The yardsticks of a trial, for the first and the last image of its batch.

    Two are looked at: D at the largest noise level, and the pixels that the timed call makes. D of plain PyTorch is
    within `NETWORK` of float64, that of others within twice plain PyTorch's error in the same dtype and the floor. The
    pixels are within twice plain PyTorch's levels and one more, which rounding makes of nothing.
    """

    def __init__(self, models: Models, trial: Trial) -> None:
        self.models, self.trial = models, trial
        self.rows = [0] if trial.batch == 1 else [0, trial.batch - 1]
        self.noise, self.labels = models.noise(trial.batch), models.labels(trial.batch)
        exact = models.cast(torch.float64)
        self.exact = self._denoised(exact).double(), self._pixels(exact)
        self._plain: dict[torch.dtype, tuple[float, int]] = {}

    def wrong(self, provider: Provider) -> str | None:
        """What is off; None for a provider that may be timed."""
        if isinstance(provider, ConvolutionsAlone):
            return provider.wrong()
        error, levels = self._plain_errors(provider.dtype)
        if not error <= NETWORK[provider.dtype]:
            return f"plain PyTorch in {provider.dtype} is off by {error:.3g}, allowed {NETWORK[provider.dtype]:.3g}"
        denoised, pixels = provider.denoised(self.noise, self.labels), provider.pixels(self.noise, self.labels)
        batch, (channels, height, width) = self.trial.batch, self.models.image_shape
        made = tuple(pixels.shape), pixels.dtype, pixels.device.type
        wanted = (batch, height, width, channels), torch.uint8, "cpu"
        if made != wanted:
            return f"gives {made}, not {wanted}"
        off, levels_off = self._errors(denoised[self.rows], pixels[self.rows])
        if not off <= 2 * error + FLOOR[provider.dtype]:
            return f"relative error {off:.3g}, allowed {2 * error + FLOOR[provider.dtype]:.3g}"
        if levels_off > 2 * levels + 1:
            return f"a pixel is off by {levels_off} levels, allowed {2 * levels + 1}"
        return None

    def _errors(self, denoised: Tensor, pixels: Tensor) -> tuple[float, int]:
        """max |D - exact| / max |exact|, in which NaN is infinite; and the most levels that a pixel is off."""
        exact, exact_pixels = self.exact
        off = (denoised.double() - exact).abs().nan_to_num(nan=float("inf")).max()
        return (off / exact.abs().max()).item(), int((pixels.int() - exact_pixels.int()).abs().max())

    def _plain_errors(self, dtype: torch.dtype) -> tuple[float, int]:
        if dtype not in self._plain:
            model = self.models.contiguous if dtype == self.models.dtype else self.models.cast(dtype)
            self._plain[dtype] = self._errors(self._denoised(model), self._pixels(model))
        return self._plain[dtype]

    def _denoised(self, model: Denoiser) -> Tensor:
        labels = None if self.labels is None else self.labels[self.rows]
        sigma = model.sigma_max
        return Sampler(model, **PLAIN).denoise(sigma * self.noise[self.rows], sigma, labels)

    def _pixels(self, model: Denoiser) -> Tensor:
        """Those images, one at a time; an image does not depend on those beside it."""
        options: dict[str, Any] = {"sampler": self.trial.loop, "steps": self.trial.steps, **PLAIN}
        sampler = Sampler(model, 1, **options)
        labels = sampler.labels(self.trial.batch, seed=SEED)
        made = sampler.batches(self.rows, self.trial.batch, labels, seed=SEED)
        return torch.cat([images.clone() for images, _ in made])
