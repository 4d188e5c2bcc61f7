"""Noising, and noise that depends on (seed, sample index, draw number, element) alone.

The counter of an element is (element // 4, draw, sample index low, high). Normals by Box-Muller.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype, per_sample
from cmfast.reference.philox import ON_CPU, draw_words, here
from cmfast.reference.precondition import _denoise, scale_input


class Draw(NamedTuple):
    """Noise that is not there yet: `normal(seed, index, shape, draw=draw)`, made where it is used.

    seed, draw: integers, or integer scalar tensors beside `index`; index: int64 [B], the samples of the batch.
    """

    seed: int | Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    draw: int | Tensor = 0


def normal(
    seed: int | Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    *,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, 1) of shape [B, *shape] for sample indices `index` [B] and draw number `draw`.

    Element i of a sample takes word i % 4 of the counter with first word i // 4. Per pair of words (a, b):
    u = (a + 1/2) / 2^32 in float32, r = sqrt(-2 ln u), and r cos(2 pi b / 2^32), r sin(2 pi b / 2^32).
    The transcendental functions run in float64: their float32 forms round differently in the tail of a vector
    than in its body, and noise must not depend on the batch size.
    """
    if index.device.type in ON_CPU:
        return normal(here(seed), index.cpu(), shape, draw=here(draw), dtype=dtype).to(index.device)
    numel = math.prod(shape)
    words = draw_words(seed, index, draw, -(-numel // 4))
    pairs = []
    for a, b in (words[:2], words[2:]):
        u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
        angle = b.double() * (2 * math.pi * 2.0**-32)
        radius = torch.sqrt(-2 * torch.log(u.double()))
        pairs += [(radius * torch.cos(angle)).to(dtype), (radius * torch.sin(angle)).to(dtype)]
    z = torch.stack(pairs, dim=-1).flatten(1)[:, :numel]
    return z.reshape(index.shape[0], *shape).contiguous()


def uniform_int(seed: int | Tensor, index: Tensor, high: int, *, draw: int | Tensor = 0) -> Tensor:
    """One integer in [0, high) per sample, int64 [B]: the top of the 64-bit product of a word and `high`."""
    (word, *_) = draw_words(seed, index, draw, 1)
    return (word[:, 0] * high) >> 32


def _epsilon(noise: Tensor | Draw, shape: torch.Size, wide: torch.dtype) -> Tensor:
    """Noise of that shape in the accumulation dtype: the given, or the draw's."""
    if isinstance(noise, Draw):
        return normal(noise.seed, noise.index, shape[1:], draw=noise.draw, dtype=wide)
    return noise.to(wide)


def init_noise(
    noise: Tensor | Draw,
    sigma: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    state_dtype: torch.dtype = torch.float32,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_T = sigma noise, the first network input and c_noise. A draw has samples of `shape` in `state_dtype`."""
    if isinstance(noise, Draw):
        noise = normal(noise.seed, noise.index, shape or (), draw=noise.draw, dtype=state_dtype)
    wide = compute_dtype(noise)
    x = (noise.to(wide) * per_sample(sigma, noise, wide)).to(noise.dtype)
    return x, *scale_input(x, sigma, sigma_data=sigma_data, dtype=dtype, memory_format=memory_format)


def add_noise(
    x_start: Tensor,
    noise: Tensor | Draw,
    sigma: Tensor,
    input_sigma: Tensor | None = None,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = x_start + sigma noise, the network input and c_noise at `input_sigma` (default sigma).

    The two levels differ where noise is added to a noisy state: churn and ancestral steps.
    """
    wide = compute_dtype(x_start, noise if isinstance(noise, Tensor) else None)
    epsilon = _epsilon(noise, x_start.shape, wide)
    x_t = (x_start.to(wide) + per_sample(sigma, x_start, wide) * epsilon).to(x_start.dtype)
    level = sigma if input_sigma is None else input_sigma
    return x_t, *scale_input(x_t, level, sigma_data=sigma_data, dtype=dtype, memory_format=memory_format)


def add_noise_pair(
    x_start: Tensor,
    noise: Tensor | Draw,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, ...]:
    """Both points of a pair on one trajectory from one draw: `add_noise` at sigma and at next_sigma, six tensors."""
    if isinstance(noise, Draw):
        noise = _epsilon(noise, x_start.shape, compute_dtype(x_start))
    return tuple(
        part
        for level in (sigma, next_sigma)
        for part in add_noise(x_start, noise, level, sigma_data=sigma_data, dtype=dtype, memory_format=memory_format)
    )


def renoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor | Draw,
    *,
    sigma_min: float = 0.002,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = D + sqrt(sigma'^2 - sigma_min^2) noise (Song et al. 2023, algorithm 1), the network input and c_noise."""
    wide = compute_dtype(model_output, x_t)
    denoised = _denoise(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    level = per_sample(next_sigma, x_t, wide)
    # As a product of differences it is exactly zero at sigma_min.
    scale = ((level - sigma_min) * (level + sigma_min)).clamp(min=0).sqrt()
    x_next = (denoised + scale * _epsilon(noise, x_t.shape, wide)).to(x_t.dtype)
    return x_next, *scale_input(x_next, next_sigma, sigma_data=sigma_data, dtype=dtype or model_output.dtype)
