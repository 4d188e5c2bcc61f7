"""The sampling engine: images from (seed, index) alone, in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmfast import ops
from cmfast.denoiser import Denoiser, DenoiserFn
from cmfast.noise import CounterNoise, NoiseFn, counter_labels
from cmfast.samplers import Sigmas, noise_range, sample, sampler_sigmas

Classes = int | Sequence[int] | Tensor | None


class Sampler:
    """Makes images with a model; sample i of a seed is the same whatever else is made with it.

    Args:
        model: a `Denoiser`, or any D(x, sigma[, labels]).
        batch_size: images per network call. The last batch is filled up to it, and the surplus dropped.
        steps, sigmas, ts, num_scales: one of the first three says which noise levels, as in
            `cmfast.samplers.sampler_sigmas`; by default one step, 18 for ODE solvers.
        sampler: `multistep`, `onestep`, `heun`, `euler`, `dpm`, `ancestral` or `progdist`.
        image_shape: (C, H, W); needed where the model does not know it.
        options: the sampler's own, such as `clip_denoised` or `s_churn`.

    Raises: ValueError: an unknown sampler, contradicting levels, a batch below 1, or no image shape.

    >>> sampler = Sampler(lambda x, sigma: 0.1 * x, batch_size=2, image_shape=(1, 8, 8))
    >>> images = sampler.sample(3, seed=0)
    >>> images.shape, images.dtype
    (torch.Size([3, 8, 8, 1]), torch.uint8)
    """

    def __init__(
        self,
        model: Denoiser | DenoiserFn,
        batch_size: int = 64,
        *,
        steps: int | None = None,
        sigmas: Sigmas | None = None,
        ts: Sequence[int] | None = None,
        num_scales: int = 40,
        sampler: str = "multistep",
        image_shape: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        shape = image_shape or getattr(model, "image_shape", None)
        if shape is None:
            raise ValueError("image_shape=(C, H, W) is needed: the model does not say what it makes")
        schedule: dict[str, Any] = {
            "steps": steps,
            "sigmas": sigmas,
            "ts": ts,
            "num_scales": num_scales,
            **noise_range(model),
        }
        self.sigmas = sampler_sigmas(sampler, **schedule)
        self.model, self.batch_size, self.sampler, self.options = model, batch_size, sampler, options
        self.image_shape = tuple(shape)
        self.num_classes: int | None = getattr(model, "num_classes", None)
        self.device = model.device if isinstance(model, Denoiser) else torch.device("cpu")

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor | ops.Draw,
        labels: Tensor | None = None,
        *,
        noise_fn: NoiseFn | None = None,
        pixels: str | None = None,
    ) -> Tensor:
        """Images in [-1, 1], [B, C, H, W], from unit noise of that shape or a draw; `noise_fn` draws what steps add.

        `pixels`: make uint8 [B, H, W, C] instead, with this rounding.
        """
        options = {"image_shape": self.image_shape, "pixels": pixels, **self.options}
        if noise_fn is not None and self.sampler in ("multistep", "heun", "dpm", "ancestral"):
            options["noise_fn"] = noise_fn
        with _evaluating(self.model):
            return sample(self.model, noise, sampler=self.sampler, sigmas=self.sigmas, labels=labels, **options)

    def labels(self, n: int, *, seed: int = 0, classes: Classes = None) -> Tensor | None:
        """The labels int64 [n] that `sample` uses: those given, or drawn from (seed, index); None if unconditional.

        Raises: ValueError: classes for an unconditional model, not n of them, or out of range.
        """
        if self.num_classes is None:
            if classes is not None:
                raise ValueError("classes were given to an unconditional model: leave them out")
            return None
        if classes is None:
            return counter_labels(seed, torch.arange(n), self.num_classes)
        labels = torch.as_tensor(classes, dtype=torch.int64, device="cpu")
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if labels.shape != (n,):
            raise ValueError(f"classes must be one class or {n} of them, got {list(labels.shape)}")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            came = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"classes must be from 0 to {self.num_classes - 1}, got {came}")
        return labels

    def stream(
        self, n: int, *, seed: int = 0, classes: Classes = None, progress: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of (uint8 images [b, H, W, C], labels [b] or None) on the CPU; n images in all."""
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        labels = self.labels(n, seed=seed, classes=classes)
        starts: Any = range(0, n, self.batch_size)
        if progress:
            from tqdm.auto import tqdm

            starts = tqdm(starts, unit="batch")
        for start in starts:
            kept = min(self.batch_size, n - start)
            index = torch.arange(start, start + self.batch_size, device=self.device)
            batch_labels = None
            if labels is not None:
                # The surplus of the last batch repeats its first label: nothing of it is kept.
                surplus = labels[start].expand(self.batch_size - kept)
                batch_labels = torch.cat([labels[start : start + kept], surplus]).to(self.device)
            noise_fn = CounterNoise(seed, index)
            images = self.generate(noise_fn.next(), batch_labels, noise_fn=noise_fn, pixels="trunc")
            yield images[:kept].cpu(), None if labels is None else labels[start : start + kept]

    def sample(self, n: int, *, seed: int = 0, classes: Classes = None, progress: bool = False) -> Tensor:
        """n images, uint8 [n, H, W, C] on the CPU.

        Args: seed: noise, and labels if not given, follow from it and the sample's index alone;
            classes: one for all, or n of them; progress: show a bar.
        """
        channels, height, width = self.image_shape
        batches = [images for images, _ in self.stream(n, seed=seed, classes=classes, progress=progress)]
        return torch.cat(batches) if batches else torch.empty(0, height, width, channels, dtype=torch.uint8)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """The model in evaluation mode, and back in its own after."""
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]
