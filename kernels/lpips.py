"""One layer of LPIPS: two feature maps at unit length over the channels, and weighted squares of what they differ by.

A program has all channels of a few pixels in registers: either pass reads the maps once. Sums over parts of a map go to
memory and are added in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import load_state, store_state
from cmfast.kernels.launch import CONTIGUOUS, dense, gradients, launch, layout, outputs, power_of_two

Grads = tuple[Tensor | None, ...]

#: Elements of a tile of one map, forward and backward, which holds a gradient beside both maps; and those of a thread.
#: Untuned.
BLOCK, SHARE = (4096, 2048), (32, 16)
#: Bytes of a plane that memory moves at once: pixels of a tile at least, where planes lie apart.
SECTOR = 32
#: Elements of a tile at most, unless a single pixel has more.
MOST = 16384
#: Tiles that a program sums at most, and programs that keep a GPU busy.
STEPS, ENOUGH = 4, 4096

_EPS = tl.constexpr(1e-10)


@triton.jit
def _tile(
    f_ptr, g_ptr, row, start, pixels,
    C: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """Both maps [ROWS, CHANNELS] from pixel `start` of a row on, 0 where there is no element; where they lie, as a
    number of 64 bits and offsets from there; and which elements exist."""
    pixel, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    mask = (pixel < pixels - start)[:, None] & (channel < C)[None, :]
    if LAST:
        base, at = (row * pixels + start) * C, pixel[:, None] * C + channel[None, :]
    else:
        base, at = row * pixels * C + start, channel.to(tl.int64)[None, :] * pixels + pixel[:, None]
    return load_state(f_ptr + base, at, mask), load_state(g_ptr + base, at, mask), base, at, mask


@triton.jit
def _length(x):
    """|x| over the channels of a tile, and 1 / (|x| + 1e-10): [ROWS] each."""
    length = tl.sqrt_rn(tl.sum(x * x, 1))
    return length, tl.div_rn(1.0, length + _EPS)


@triton.jit
def _difference(f, g, by_f, by_g):
    """f by_f - g by_g, as (f - g) times the smaller factor and the rest: exactly 0 where the maps are equal, also where
    products and sums are contracted."""
    least = tl.minimum(by_f, by_g)
    return (f - g) * least[:, None] + (f * (by_f - least)[:, None] - g * (by_g - least)[:, None])


@triton.jit
def _through_length(grad, x, length, by):
    """The gradient of x from that of x / (|x| + 1e-10); at |x| = 0 that of x / 1e-10."""
    lies = length > 0.0
    slope = tl.where(lies, tl.div_rn(tl.sum(grad * x, 1) * by, tl.where(lies, length, 1.0)), 0.0)
    return (grad - x * slope[:, None]) * by[:, None]


@triton.jit(do_not_specialize=["parts"])
def _lpips_layer_fwd_kernel(
    partial_ptr, f_ptr, g_ptr, weight_ptr, parts, pixels,
    C: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """Σ w (f / (|f| + ε) - g / (|g| + ε))² / HW over a part of a map, |.| over the channels    Zhang et al. 2018, eq. 1
    partial_ptr   [B, parts]  float32, out               weight_ptr  [C]
    f_ptr, g_ptr  [B, C, HW]  or channels_last if LAST
    Grid (B * parts,). Traffic: 2m bytes per element. Accumulates in float32.
    """
    program = tl.program_id(0)
    row, part = (program // parts).to(tl.int64), (program % parts).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    weight = load_state(weight_ptr, channel, channel < C)
    total = tl.zeros((ROWS,), tl.float32)
    for step in range(STEPS):
        f, g, _, _, _ = _tile(f_ptr, g_ptr, row, (part * STEPS + step) * ROWS, pixels, C, LAST, ROWS, CHANNELS)
        _, by_f = _length(f)
        _, by_g = _length(g)
        delta = _difference(f, g, by_f, by_g)
        total += tl.sum(weight[None, :] * (delta * delta), 1)
    tl.store(partial_ptr + program, tl.div_rn(tl.sum(total), tl.cast(pixels, tl.float32)))


@triton.jit(do_not_specialize=["parts"])
def _lpips_layer_bwd_kernel(
    grad_f_ptr, grad_g_ptr, grad_ptr, f_ptr, g_ptr, weight_ptr, parts, pixels,
    NEED_F: tl.constexpr, NEED_G: tl.constexpr,
    C: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):
    """df = (a - f (a·f) / (|f| (|f| + ε))) / (|f| + ε), a = 2 G w (f / (|f| + ε) - g / (|g| + ε)) / HW; dg with -a
    grad_f_ptr, grad_g_ptr  [B, C, HW]  out if NEED_F, NEED_G      grad_ptr    [B]  float32, G
    f_ptr, g_ptr            [B, C, HW]  or channels_last if LAST   weight_ptr  [C]
    Grid (B * parts,). Traffic: 2m bytes per element, and m for each gradient. Computes in float32.
    """
    program = tl.program_id(0)
    row, part = (program // parts).to(tl.int64), (program % parts).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    scale = tl.div_rn(2.0 * tl.load(grad_ptr + row).to(tl.float32), tl.cast(pixels, tl.float32))
    weight = scale * load_state(weight_ptr, channel, channel < C)
    for step in range(STEPS):
        f, g, base, at, mask = _tile(
            f_ptr, g_ptr, row, (part * STEPS + step) * ROWS, pixels, C, LAST, ROWS, CHANNELS
        )
        length_f, by_f = _length(f)
        length_g, by_g = _length(g)
        grad = weight[None, :] * _difference(f, g, by_f, by_g)
        if NEED_F:
            store_state(grad_f_ptr + base, at, _through_length(grad, f, length_f, by_f), mask)
        if NEED_G:
            store_state(grad_g_ptr + base, at, _through_length(-grad, g, length_g, by_g), mask)


class _Maps(NamedTuple):
    """Two dense feature maps in one layout, and tiles of `rows` pixels and `channels`, powers of two, of which a
    program does `steps`, one after the other."""

    f: Tensor
    g: Tensor
    rows: int
    channels: int
    steps: int
    warps: int

    @property
    def pixels(self) -> int:
        return self.f.shape[2] * self.f.shape[3]

    @property
    def parts(self) -> int:
        return -(-self.pixels // (self.rows * self.steps))

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """A launch over the parts: sizes come after the arguments, the rest by name."""
        batch, channels = self.f.shape[:2]
        tile = {"C": channels, "ROWS": self.rows, "CHANNELS": self.channels, "STEPS": self.steps}
        last = layout(self.f) != CONTIGUOUS
        launch(
            kernel, batch * self.parts, *arguments, self.parts, self.pixels, **constants, LAST=last, **tile,
            warps=self.warps,
        )


def _maps(f: Tensor, g: Tensor, backward: bool) -> _Maps:
    f = dense(f)
    batch, channels, height, width = f.shape
    block = power_of_two(channels)
    least = 1 if layout(f) != CONTIGUOUS else SECTOR // f.element_size()
    rows = max(BLOCK[int(backward)] // block, min(least, MOST // block), 1)
    rows = min(rows, power_of_two(height * width))
    programs = batch * -(-height * width // rows)
    steps = max(1, min(STEPS, programs // ENOUGH))
    warps = max(1, min(16, rows * block // (32 * SHARE[int(backward)])))
    return _Maps(f, dense(g, f), rows, block, 1 << (steps.bit_length() - 1), warps)


def lpips_layer_fwd(features: Tensor, target_features: Tensor, weight: Tensor) -> Tensor:
    """The distances [B], float32, of maps that have elements."""
    maps = _maps(features, target_features, False)
    partial = torch.empty((len(maps.f), maps.parts), dtype=torch.float32, device=maps.f.device)
    maps.run(_lpips_layer_fwd_kernel, partial, maps.f, maps.g, weight.contiguous())
    return partial.sum(1)


def lpips_layer_bwd(
    needed: tuple[bool, ...], grads: Grads, features: Tensor, target_features: Tensor, weight: Tensor
) -> Grads:
    """Gradients of the maps that need one; that of the weight is the reference's."""
    (grad,), (need_f, need_g, _) = grads, needed
    if grad is None or not (need_f or need_g):
        return (None,) * 3
    maps = _maps(features, target_features, True)
    made = gradients((need_f, need_g), maps.f, maps.g)
    maps.run(
        _lpips_layer_bwd_kernel, *outputs(maps.f, *made), grad.contiguous(), maps.f, maps.g, weight.contiguous(),
        NEED_F=need_f, NEED_G=need_g,
    )
    return *made, None
