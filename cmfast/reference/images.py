"""From the data range to pixels."""

import torch
from torch import Tensor


def to_uint8(x: Tensor, *, rounding: str = "trunc") -> Tensor:
    """[-1, 1] [B, C, H, W] to uint8 [B, H, W, C]; values outside are clamped, NaN becomes 0.

    `rounding="trunc"` cuts 127.5 (x + 1) off, as openai/consistency_models does; `"nearest"` rounds (x / 2 + 0.5) 255,
    as diffusers does.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pixels = (wide + 1) * 127.5
    if rounding == "nearest":
        pixels = pixels.round()
    return pixels.nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()
