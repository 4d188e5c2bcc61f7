"""What the trunk of LPIPS gets: images, resized and standardised in one pass, in its dtype and layout.

Either pass gathers: a pixel of the result takes from up to four of the image, and in the backward pass a pixel of the
image from those that took from it, in a fixed order. What is read again lies in the cache: a program does one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import as_float32, load_state, store_state
from cmfast.kernels.launch import CONTIGUOUS, dense, empty, launch, layout, power_of_two

#: Elements that a program does at a time, at most.
BLOCK = 1024

_SIZES = ["height", "in_height"]


@triton.jit
def _place(height, C: tl.constexpr, LAST: tl.constexpr):
    """This program's sample, channel and row of pixels, all int64. LAST: a row has all channels, and 0 is the first."""
    program = tl.program_id(0)
    rows = program // height
    y = (program % height).to(tl.int64)
    if LAST:
        return rows.to(tl.int64), y * 0, y
    else:
        return (rows // C).to(tl.int64), (rows % C).to(tl.int64), y


@triton.jit
def _in_row(step, channel, C: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of a row in a step, their columns, and their channels, int64."""
    element = step * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        return element, element // C, (element % C).to(tl.int64)
    else:
        return element, element, (element * 0).to(tl.int64) + channel


@triton.jit
def _row(sample, channel, y, height, width, C: tl.constexpr, LAST: tl.constexpr):
    """Where a row of pixels begins, of a channel, or of all if LAST."""
    if LAST:
        return (sample * height + y) * width * C
    else:
        return ((sample * C + channel) * height + y) * width


@triton.jit
def _along(x, channel, height, width, C: tl.constexpr, LAST: tl.constexpr):
    """Where a column of a channel lies, from where its row of channel 0 begins."""
    if LAST:
        return x.to(tl.int64) * C + channel
    else:
        return channel * height * width + x


@triton.jit
def _source(position, size, in_size):
    """The two pixels that one of `size` lies between, along an axis of `in_size`, and how far from the first.

    (i + 1/2) in_size / size - 1/2, from 0 on, in whole numbers up to the last step.
    """
    place = tl.maximum((2 * position + 1) * in_size - size, 0)
    first = place // size // 2
    part = (place - first * 2 * size).to(tl.float32) * tl.div_rn(0.5, tl.cast(size, tl.float32))
    return first, tl.where(first + 1 < in_size, first + 1, first), part


@triton.jit
def _share(of, position, size, in_size):
    """What pixel `of` of the image contributes to one of the result, along an axis; 0 beyond its end."""
    first, second, part = _source(position, size, in_size)
    share = tl.where(first == of, 1.0 - part, 0.0) + tl.where(second == of, part, 0.0)
    return tl.where(position < size, share, 0.0)


@triton.jit
def _first_taker(of, size, in_size):
    """A pixel of the result from which on pixel `of` of the image contributes, along an axis: or one before it."""
    return tl.maximum((2 * of - 1) * size - in_size, 0) // in_size // 2


@triton.jit
def _gain(std_ptr, channel, mask, span):
    """1 / (std span) of channels."""
    return tl.div_rn(1.0, tl.load(std_ptr + channel, mask=mask, other=1.0).to(tl.float32) * span)


@triton.jit(do_not_specialize=_SIZES)
def _lpips_input_fwd_kernel(
    out_ptr, image_ptr, mean_ptr, std_ptr, height, in_height, width, in_width, low, span,
    RESIZE: tl.constexpr, C: tl.constexpr, IN_C: tl.constexpr, LAST: tl.constexpr, IN_LAST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):
    """((resized x - low) / span - mean) / std, bilinear between the centers of pixels
    out_ptr            [B, C, H, W]     or channels_last if LAST, out
    image_ptr          [B, IN_C, h, w]  or channels_last if IN_LAST; IN_C is C, or 1 for gray
    mean_ptr, std_ptr  [C]
    Grid (B * C * H,), if LAST (B * H,). Traffic: s bytes per element of the image, m of the result.
    """
    low, span = as_float32(low), as_float32(span)
    sample, plane, y = _place(height, C, LAST)
    start = _row(sample, plane, y, height, width, C, LAST)
    if RESIZE:
        above, below, down = _source(y, height, in_height)
        above_ptr = image_ptr + _row(sample, 0, above, in_height, in_width, IN_C, IN_LAST)
        below_ptr = image_ptr + _row(sample, 0, below, in_height, in_width, IN_C, IN_LAST)
    else:
        row_ptr = image_ptr + _row(sample, 0, y, in_height, in_width, IN_C, IN_LAST)
    for step in range(STEPS):
        element, x, channel = _in_row(step, plane, C, LAST, BLOCK)
        mask = element < (width * C if LAST else width)
        gain = _gain(std_ptr, channel, mask, span)
        offset = load_state(mean_ptr, channel, mask) * span + low
        of = channel if IN_C == C else channel * 0
        if RESIZE:
            left, right, across = _source(x, width, in_width)
            at_left = _along(left, of, in_height, in_width, IN_C, IN_LAST)
            at_right = _along(right, of, in_height, in_width, IN_C, IN_LAST)
            a, b = load_state(above_ptr, at_left, mask), load_state(above_ptr, at_right, mask)
            c, d = load_state(below_ptr, at_left, mask), load_state(below_ptr, at_right, mask)
            value = (a * (1.0 - across) + b * across) * (1.0 - down) + (c * (1.0 - across) + d * across) * down
        else:
            value = load_state(row_ptr, _along(x, of, in_height, in_width, IN_C, IN_LAST), mask)
        store_state(out_ptr + start, element, (value - offset) * gain, mask)


@triton.jit(do_not_specialize=[*_SIZES, "taps_y", "taps_x"])
def _lpips_input_bwd_kernel(
    grad_image_ptr, grad_ptr, std_ptr, height, in_height, width, in_width, taps_y, taps_x, span,
    RESIZE: tl.constexpr, C: tl.constexpr, IN_C: tl.constexpr, LAST: tl.constexpr, IN_LAST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):
    """dx = Σ of what a pixel contributed times the gradients there, over std and span; gray sums over the channels
    grad_image_ptr  [B, IN_C, h, w]  or channels_last if IN_LAST, out    std_ptr  [C]
    grad_ptr        [B, C, H, W]     or channels_last if LAST
    Grid (B * IN_C * h,), if IN_LAST (B * h,). Traffic: m bytes per element of the result, s of the image.
    """
    span = as_float32(span)
    sample, plane, y = _place(in_height, IN_C, IN_LAST)
    start = _row(sample, plane, y, in_height, in_width, IN_C, IN_LAST)
    for step in range(STEPS):
        element, x, own = _in_row(step, plane, IN_C, IN_LAST, BLOCK)
        mask = element < (in_width * IN_C if IN_LAST else in_width)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(C if IN_C < C else 1):
            channel = own + i
            if RESIZE:
                top, left = _first_taker(y, height, in_height), _first_taker(x, width, in_width)
                taken = tl.zeros((BLOCK,), tl.float32)
                for across in range(taps_x):
                    share = _share(x, left + across, width, in_width)
                    # There may be no such column, or row; what has a share, there is.
                    shared = mask & (share > 0.0)
                    at = _along(left.to(tl.int64) + across, channel, height, width, C, LAST)
                    for down in range(taps_y):
                        upright = _share(y, top + down, height, in_height)
                        row_ptr = grad_ptr + _row(sample, 0, top + down, height, width, C, LAST)
                        taken += upright * share * load_state(row_ptr, at, shared & (top + down < height))
            else:
                row_ptr = grad_ptr + _row(sample, 0, y, height, width, C, LAST)
                taken = load_state(row_ptr, _along(x, channel, height, width, C, LAST), mask)
            total += taken * _gain(std_ptr, channel, mask, span)
        store_state(grad_image_ptr + start, element, total, mask)


def _cut(height: int, width: int, channels: int, last: bool) -> tuple[int, dict[str, int]]:
    """Programs for a sample, and the steps in which each does its row."""
    elements = width * channels if last else width
    block = min(BLOCK, max(128, power_of_two(elements)))
    tile = {"STEPS": -(-elements // block), "BLOCK": block, "warps": max(1, block // 256)}
    return height if last else height * channels, tile


def _sizes(image: Tensor, channels: int, height: int, width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes that both passes get after their pointers, and what else they get by name."""
    in_channels, in_height, in_width = image.shape[1:]
    options = {"RESIZE": (height, width) != (in_height, in_width), "C": channels, "IN_C": in_channels}
    return (height, in_height, width, in_width), options | {"IN_LAST": layout(image) != CONTIGUOUS}


def lpips_input_fwd(
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    value_range: tuple[float, float],
    dtype: torch.dtype,
    memory_format: torch.memory_format | None,
) -> Tensor:
    """[B, C, H, W] of images that have pixels."""
    image = dense(image)
    batch, channels = len(image), len(mean)
    sizes, options = _sizes(image, channels, *size)
    out = torch.empty(
        (batch, channels, *size), dtype=dtype, device=image.device, memory_format=memory_format or layout(image)
    )
    last = layout(out) != CONTIGUOUS
    programs, tile = _cut(*size, channels, last)
    low, high = value_range
    launch(
        _lpips_input_fwd_kernel, batch * programs, out, image, mean.contiguous(), std.contiguous(), *sizes,
        low=float(low), span=float(high - low), **options, LAST=last, **tile,
    )
    return out


def lpips_input_bwd(
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: tuple[int, int],
    value_range: tuple[float, float],
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """The gradient of the image; those of mean and std are the reference's."""
    (grad,) = grads
    if grad is None or not needed[0]:
        return (None,) * 3
    image, grad = dense(image), dense(grad)
    batch, in_channels, *in_size = image.shape
    sizes, options = _sizes(image, len(mean), *size)
    grad_image = empty(image)
    programs, tile = _cut(in_size[0], in_size[1], in_channels, options["IN_LAST"])
    # Pixels that take from one of the image, and one before them.
    taps = [min(out, 2 * out // each + 2) for out, each in zip(size, in_size)]
    low, high = value_range
    launch(
        _lpips_input_bwd_kernel, batch * programs, grad_image, grad, std.contiguous(), *sizes, *taps,
        span=float(high - low), **options, LAST=layout(grad) != CONTIGUOUS, **tile,
    )
    return grad_image, None, None
