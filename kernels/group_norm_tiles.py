"""What the passes of group normalisation share: how a batch is cut, and tiles [pixels, channels] of it on the device.

Contiguous and channels_last batches go through the same kernels; the shape of a tile differs. Where the whole map of a
few groups fits into the registers of a program (a slab), one launch does it all. Else there are three: sums over parts
of the map for every channel, a fold of these for every group, and the pass that writes. Loops over tiles are pipelined
(`num_stages`): tiles to come are on their way, by shared memory, while one is computed with. Else each thread waits for
one access of 16 bytes at a time, and all of them together ask for less than memory has on the way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import as_float32, load_state
from cmfast.kernels.launch import CONTIGUOUS, launch, layout, power_of_two
from cmfast.kernels.normal import _counter, _signed_word
from cmfast.kernels.philox import load_word, words

#: In either pass, forward and backward: elements of a tile where there are three launches, and those that a slab may
#: have at most. Twice as many do not fit into registers. Untuned.
BLOCK, WHOLE = (2048, 1024), (16384, 8192)
#: Channels of a tile in channels_last: one 128-byte line of bfloat16. Where planes lie apart a tile has 4.
LINE = 64
#: Pixels that a program sums or writes at most, unless there are more than PARTS times as many; and at least, unless
#: there are then no ENOUGH programs: sums of fewer are traffic to speak of. Sums that a program folds at a time.
PART, LEAST, PARTS, FOLD = 1024, 256, 256, 2048
#: Programs that keep a GPU busy: with fewer, time is that of the launches.
ENOUGH = 512
#: Programs that a GPU takes some turns for, in the last of which little of it stands idle.
MANY = 4096
#: Elements of a slab to a warp in either pass, where there are programs enough: with fewer threads fewer wait for each
#: other at a sum, and two programs fit where one did. Counted in compiled programs, not timed.
SHARE = (2048, 1024)
#: Bytes of a pixel that memory moves at once.
SECTOR = 32

# Seeds and draws vary without end: they must not make a new kernel each.
tile_jit = triton.jit(do_not_specialize=["seed", "seed_high", "draw", "least"])
fold_jit = triton.jit(do_not_specialize=["pixels", "parts"])


@triton.jit
def part_tile(tiles, parts, ROWS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's row, part of the map, first pixel and first channel, all int64. Programs walk channels first, then
    parts, then rows."""
    program = tl.program_id(0)
    part = (program // tiles % parts).to(tl.int64)
    first = (program % tiles).to(tl.int64) * CHANNELS
    return (program // tiles // parts).to(tl.int64), part, part * (ROWS * STEPS), first


@triton.jit
def slab_tile(
    C: tl.constexpr, PIXELS: tl.constexpr, SLAB: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
):
    """This program's row and first channel, both int64; which of the channels [CHANNELS] are its own; where the slab
    begins, int64; and where its elements lie from there on: in 32 bits, which halves the registers they take."""
    SLABS: tl.constexpr = (C + SLAB - 1) // SLAB
    program = tl.program_id(0)
    row, first = (program // SLABS).to(tl.int64), (program % SLABS).to(tl.int64) * SLAB
    k, pixel = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    live = (k < SLAB) & (first + k < C)
    if LAST:
        return row, first, live, row * (C * PIXELS) + first, pixel[:, None] * C + k[None, :]
    else:
        return row, first, live, row * (C * PIXELS) + first * PIXELS, k[None, :] * PIXELS + pixel[:, None]


@triton.jit
def tile_offsets(row, pixel, channel, channels, pixels, LAST: tl.constexpr):
    """Where the elements of a tile lie; LAST: channels_last, else plane by plane."""
    base = row * channels * pixels
    if LAST:
        return base + pixel[:, None] * channels + channel[None, :]
    else:
        return base + channel[None, :] * pixels + pixel[:, None]


@triton.jit
def _members(GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Which channels of a slab are of which group [GROUPS, CHANNELS]."""
    return (tl.arange(0, CHANNELS) // GROUP)[None, :] == tl.arange(0, GROUPS)[:, None]


@triton.jit
def group_means(value, count, GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The sum over each group of a slab, divided by count: [GROUPS, 1], or of one a scalar. There are no more divisions
    than groups. value [CHANNELS]: 0 where there is no channel."""
    if GROUPS == 1:
        return tl.div_rn(tl.sum(value, 0), count)
    else:
        sums = tl.sum(tl.where(_members(GROUP, GROUPS, CHANNELS), value[None, :], 0.0), 1)
        return tl.div_rn(sums, tl.zeros_like(sums) + count)[:, None]


@triton.jit
def of_channels(of_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """For each channel of a slab [CHANNELS] what its group has. of_groups: as `group_means` returns it."""
    if GROUPS == 1:
        return tl.zeros((CHANNELS,), tl.float32) + of_groups
    else:
        return tl.sum(tl.where(_members(GROUP, GROUPS, CHANNELS), of_groups, 0.0), 0)


@triton.jit
def load_affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, row, channel, live, scale_stride, shift_stride, FILM: tl.constexpr
):
    """w (1 + s) and b (1 + s) + h for channels of a row; z is the first times xhat plus the second."""
    weight, bias = load_state(weight_ptr, channel, live), load_state(bias_ptr, channel, live)
    if FILM:
        factor = 1.0 + load_state(scale_ptr, row * scale_stride + channel, live)
        return weight * factor, bias * factor + load_state(shift_ptr, row * shift_stride + channel, live)
    else:
        return weight, bias


@triton.jit
def sigmoid_and_rest(z):
    """s = 1 / (1 + e^-z) and 1 - s = e^-z s, each to a few units in its last place: by the hardware's exponential, and
    three Newton steps to the reciprocal, which have no slow path to branch to. Of a difference 1 - s with s near 1 only
    roundings would be left, and SiLU's slope takes it times z."""
    e = tl.exp(-tl.maximum(z, -80.0))
    d = 1.0 + e
    r = (0x7EF311C7 - d.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    r = r * (2.0 - d * r)
    r = r * (2.0 - d * r)
    r = r * (2.0 - d * r)
    return r, e * r


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z)."""
    s, _ = sigmoid_and_rest(z)
    return s


@triton.jit
def kept(
    index_ptr, row, pixel, first, channels, seed, seed_high, draw, least, keep_scale,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """What dropout multiplies a tile by: 0, or 1 / (1 - p). Four channels share a counter; `first` is a multiple of 4.

    index_ptr, seed, seed_high, draw: as in `philox.words`; least: the smallest word that is kept, as a signed number.
    """
    quad = first // 4 + tl.arange(0, CHANNELS // 4)
    group = pixel.to(tl.int64)[:, None] * ((channels + 3) // 4) + quad[None, :]
    a, b, c, d = words(index_ptr, row, group, seed, seed_high, draw, SEED_TENSOR, DRAW_TENSOR)
    word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, CHANNELS))
    return tl.where(word >= load_word(least, False).to(tl.uint32), as_float32(keep_scale), 0.0)


def dropping(p: float) -> dict[str, Any]:
    """What `kept` takes to drop the part p, by name."""
    return {"least": _signed_word(min(round(p * 2**32), 2**32 - 1)), "keep_scale": 1 / (1 - p)}


class Tensors(NamedTuple):
    """What is read beside the batch, and how: arguments of a kernel, in order and by name."""

    pointers: tuple[Tensor, ...]
    scalars: dict[str, Any]


def beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    draw: Any,
    dropout: float,
    silu: bool,
) -> Tensors:
    """Weight, bias, scale and shift with the distance of their rows, and what dropout draws from."""
    pair = (weight, bias) if scale is None or shift is None else (scale, shift)
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in pair]
    counter = _counter(0, 0) if draw is None else _counter(draw.seed, draw.draw)
    index = x if draw is None else draw.index.contiguous()
    scalars = {
        "scale_stride": rows[0].stride(0), "shift_stride": rows[1].stride(0), **counter, **dropping(dropout),
        "FILM": scale is not None, "SILU": silu, "DROPOUT": draw is not None,
    }
    return Tensors((weight.contiguous(), bias.contiguous(), *rows, index), scalars)


class Cut(NamedTuple):
    """A dense batch [B, C, ...] as rows x pixels x channels in groups, and its tiles.

    `slab`: channels of a slab, or 0 where there are three launches; `rows`, `block`: pixels and channels of a tile,
    powers of two; a program does `steps` tiles, one after the other.
    """

    batch: int
    channels: int
    pixels: int
    group: int
    last: bool
    slab: int
    rows: int
    block: int
    steps: int
    warps: int

    @property
    def parts(self) -> int:
        return 1 if self.slab else -(-self.pixels // (self.rows * self.steps))

    @property
    def groups(self) -> int:
        return self.channels // self.group

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """A launch over the batch: the sizes come after the arguments or as constexprs, the rest by name."""
        tiles = -(-self.channels // (self.slab or self.block))
        options = {"GROUP": self.group, "LAST": self.last, "ROWS": self.rows, "CHANNELS": self.block}
        sizes: tuple[int, ...] = ()
        if self.slab:
            # The other sizes are as many as these, so that they make no more programs.
            options |= {"C": self.channels, "PIXELS": self.pixels}
            options |= {"SLAB": self.slab, "GROUPS": power_of_two(self.slab // self.group)}
        else:
            sizes = tiles, self.parts, self.channels, self.pixels
            options |= {"STEPS": self.steps}
        programs = self.batch * tiles * self.parts
        launch(kernel, programs, *arguments, *sizes, **constants, **options, warps=self.warps)

    def fold(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """A launch of one program for each group of each sample, over the sums of all parts."""
        parts = power_of_two(self.parts)
        channels = min(power_of_two(self.group), max(FOLD // parts, 1))
        options = {"GROUP": self.group, "PART": self.rows * self.steps, "PARTS": parts, "CHANNELS": channels}
        sizes = self.groups, self.parts, self.channels, self.pixels
        warps = max(1, min(8, parts * channels // 256))
        launch(kernel, self.batch * self.groups, *arguments, *sizes, **constants, **options, warps=warps)


def cut(x: Tensor, num_groups: int, backward: bool, drops: bool) -> Cut:
    """The tiles of a dense batch in either pass."""
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    last = layout(x) != CONTIGUOUS
    group = channels // num_groups
    units = (SECTOR // x.element_size(), 16 // x.element_size(), 4) if last else (4,)
    # A slab's offsets have 32 bits. Dynamo of torch 2.11 takes no bool as an index.
    most = WHOLE[int(backward)] // power_of_two(pixels) if channels * pixels < 2**31 else 0
    slab = _slab(channels, group, units, most)
    # Slabs of less than a sector read more than they use.
    slabs = batch * -(-channels // slab) if slab else 0
    if slab and (slab >= units[0] or slabs <= ENOUGH):
        rows, block = power_of_two(pixels), max(4, power_of_two(slab))
        # Making the mask takes registers.
        share = 256 if drops else SHARE[int(backward)] if slabs > ENOUGH else 512
        warps = max(1, min(16, rows * block // share))
        return Cut(batch, channels, pixels, group, last, slab, rows, block, 1, warps)
    if last:
        block = max(4, min(LINE, power_of_two(channels)))
        rows = BLOCK[int(backward)] // block
    else:
        rows = min(BLOCK[int(backward)] // 4, power_of_two(pixels))
        block = max(4, min(BLOCK[int(backward)] // rows, power_of_two(channels)))
    blocks = -(-pixels // rows)
    programs = batch * blocks * -(-channels // block)
    steps = max(min(PART // rows, programs // MANY), min(LEAST // rows, programs // ENOUGH))
    steps = power_of_two(max(steps, -(-blocks // PARTS), 1))
    return Cut(batch, channels, pixels, group, last, 0, rows, block, steps, 4)


def _slab(channels: int, group: int, units: tuple[int, ...], most: int) -> int:
    """Channels of a slab: the fewest whole groups that are a multiple of the first unit (sectors of a pixel), else of
    the next (16-byte accesses), else of 4, which share no counter of dropout with another slab; or all channels.
    0: these are more than `most`."""
    for unit in units:
        slab = min(math.lcm(group, unit), channels)
        if max(4, power_of_two(slab)) <= most:
            return slab
    return 0


def room(like: Tensor, *shape: int) -> Tensor:
    """float32 for sums and coefficients."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
