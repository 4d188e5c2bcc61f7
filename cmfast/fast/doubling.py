"""Nearest neighbour x 2 and the 3x3 convolution after it as one transposed convolution, in 4/9 of the multiplications:
where `winograd` does not do them in fewer.

The nine taps of a pixel of the large image fall on 2x2 pixels of the small one, so their weights can be added first.
All four kinds of pixel together are a transposed convolution of stride 2, whose filter of 4x4 holds the sums: every
output is the same sum in another order, and there is no large image to write and to read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Fewest pixels of the small image, in all samples, that pay for a filter which is made for one pass.
LEAST_PIXELS = 512
#: Of the transposed convolution.
STRIDE, PADDING = (2, 2), (1, 1)
#: By output: which rows (or columns) of the 3x3 filter each of the 4x4 is the sum of.
_SUMS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def fits(conv: nn.Conv2d, h: Tensor, kept: bool) -> bool:
    """Whether doubling h [B, C, H, W], then `conv`, can be done so, and gains by it; kept: the filter is made once.

    For a CPU whose oneDNN has kernels for it; for a GPU nobody has measured it.
    """
    return (
        h.device.type == "cpu"
        and conv.kernel_size == (3, 3)
        and (conv.stride, conv.padding) == ((1, 1), (1, 1))
        and (kept or h.numel() // h.shape[1] >= LEAST_PIXELS)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def fold(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The filter [C, K, 4, 4] in channels_last of a weight [K, C, 3, 3]: sums in float32, in `dtype` or its own."""
    sums = torch.tensor(_SUMS, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    places = torch.einsum("ai,bj->abij", sums, sums).reshape(16, 9)
    # One multiplication of 16 x 9 by the outputs for each input channel.
    taps = weight.permute(1, 2, 3, 0).reshape(weight.shape[1], 9, weight.shape[0])
    return (places @ taps.to(sums.dtype)).to(dtype or weight.dtype).unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def transposed(h: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution of h [B, C, H, W] at twice its size; filters: of `fold`."""
    return F.conv_transpose2d(h, filters, bias, STRIDE, PADDING)


def pack(weight: Tensor, dtype: torch.dtype | None, shape: torch.Size) -> Tensor:
    """The filter as oneDNN wants it for inputs of `shape`."""
    reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
    return reorder(fold(weight, dtype), PADDING, [0, 0], STRIDE, [1, 1], 1, list(shape))


def convolve(h: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """As `transposed`; packed: of `pack` for the shape of h."""
    apply = torch.ops.mkldnn._convolution_transpose_pointwise
    return apply(h, packed, bias, PADDING, [0, 0], STRIDE, [1, 1], 1, "none", [], "")
