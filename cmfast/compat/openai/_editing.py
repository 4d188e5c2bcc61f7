"""Zero-shot editing of `cm.karras_diffusion`, in its names and argument orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmfast import editing
from cmfast.compat.openai._loops import Denoise, evaluator_of, multistep_levels
from cmfast.compat.openai.random_util import get_generator


def _edit(
    run: Callable[..., tuple[Tensor, Tensor]],
    distiller: Denoise,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float,
    t_max: float,
    rho: float,
    steps: int,
    generator: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    levels, end = multistep_levels(ts, t_min, t_max, rho, steps)
    options |= {"noise_fn": (generator or get_generator("dummy")).randn_like, "sigma_min": t_min, "end_sigma": end}
    one_for_all = images.shape[0] == 1
    reference = images.expand(x.shape[0], *images.shape[1:]) if one_for_all else images
    result, known = run(evaluator_of(distiller, x), reference, x, levels, **options)
    # As in the original: of one image there is one reference, unless a mask makes several of it.
    return result, known[:1] if one_for_all and "mask" not in options else known


class _ColorNoise:
    """A generator that draws for x as it lies in the original's colorization, since torch fills in that order.

    From the second draw on, that is how einsum leaves what it maps back to colours; its values are not looked at.
    """

    def __init__(self, generator: Any) -> None:
        self.generator, self.drawn = generator, False

    def randn_like(self, x: Tensor) -> Tensor:
        like = torch.einsum("bdhw,cd->bchw", x, x.new_zeros(3, 3)) if self.drawn else x
        self.drawn = True
        return torch.empty_like(x).copy_(self.generator.randn_like(like))


def iterative_colorization(
    distiller: Denoise,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator: Any = None,
) -> tuple[Tensor, Tensor]:
    """Colour for images: (result, reference of the luminance alone). `editing.colorize`. One image serves all of x."""
    draw = _ColorNoise(generator or get_generator("dummy"))
    return _edit(editing.colorize, distiller, images, x, ts, t_min, t_max, rho, steps, draw)


def iterative_inpainting(
    distiller: Denoise,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator: Any = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill in where the mask is 0: (result, reference with -1 there). `editing.inpaint`.

    mask: 1 where images are known, broadcasts to them. None: an "S" as in the original, which is unknown in seven
    images, all that is known in the next seven, and so on. The original draws it in Arial and needs that font as a
    file; here it is in the font that comes with Pillow, and grows with the image.
    """
    mask = _letter_mask(x) if mask is None else mask
    return _edit(editing.inpaint, distiller, images, x, ts, t_min, t_max, rho, steps, generator, mask=mask)


def iterative_superres(
    distiller: Denoise,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator: Any = None,
) -> tuple[Tensor, Tensor]:
    """Detail for images known as means of 8 x 8 pixels: (result, those means). `editing.super_resolve`."""
    return _edit(editing.super_resolve, distiller, images, x, ts, t_min, t_max, rho, steps, generator)


def _letter_mask(x: Tensor) -> Tensor:
    """[B, 1, H, W]: an "S" of zeros for seven images, its complement for the next seven."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    height, width = x.shape[-2:]
    image = Image.new("L", (width, height), color=255)
    font = ImageFont.load_default(size=width * 250 / 256)
    ImageDraw.Draw(image).text((width * 50 / 256, 0), "S", font=font, fill=0)
    outside = torch.from_numpy(np.array(image) > 0).to(x.device)
    inside_known = torch.arange(x.shape[0], device=x.device) // 7 % 2 == 1
    return (outside ^ inside_known.view(-1, 1, 1, 1)).to(x.dtype)
