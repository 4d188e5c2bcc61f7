"""3x3 convolutions on a CPU in 4/9 of the multiplications: Winograd's F(2x2, 3x3), by the functions of winograd.c.

These are compiled when a convolution first needs them. Where there is no compiler, oneDNN's convolutions serve.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cmfast import native
from cmfast.ops._autograd import stands_for_many

#: What it is done in: bfloat16 has no digits to spare for the transforms.
DTYPE = torch.float32
#: What numbers of channels must be divisible by: the widest vector.
VECTOR = 16
#: Fewest channels that pay for the transforms, as the harmonic mean of inputs and outputs: the transforms grow with
#: their sum, and what is saved with their product.
LEAST_CHANNELS = 24
#: Fewest tiles of 2x2 pixels for each thread.
LEAST_TILES = 8
#: Fewest pixels, in all samples, that pay for filters which are made for one pass.
LEAST_PIXELS = 512
#: Most floats for the gradient of a weight, of which each thread sums 16/9 as many as the weight has: 128 MiB, which a
#: network keeps from its first backward pass on. Beyond, the gradient is PyTorch's.
MOST_SUMS = 1 << 25
#: Tiles that a thread does at once, at most: more would leave its cache, fewer read the filters too often.
BLOCK = 48



class _Functions:
    """Those of winograd.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in winograd.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, flag, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_int

        self.rows: int = function("winograd_rows", result=number)()
        self.size = function("winograd_size", *[number] * 2, result=number)
        self.room = function("winograd_room", *[number] * 2, result=number)
        self.gradient_room = function("winograd_gradient_room", *[number] * 3, result=number)
        self.filters = function("winograd_filters", *[pointer] * 2, *[number] * 5, flag, threads)
        self.convolve = function("winograd_convolve", *[pointer] * 6, *[number] * 5, flag, number, threads)
        self.gradient = function("winograd_gradient", *[pointer] * 4, *[number] * 5, flag, *[number] * 4, threads)

    def block(self, tiles: int, threads: int) -> int:
        """Tiles of a block: few enough, and as many for one thread as for another."""
        each = -(-tiles // threads)
        each = -(-each // -(-each // BLOCK)) if each else 1
        return -(-each // self.rows) * self.rows


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)
#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def wide(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be done so, and gains by it in images that are not small."""
    channels = conv.weight.shape[:2]
    return (
        conv.weight.shape[2:] == (3, 3)
        and (conv.stride, conv.padding) == ((1, 1), (1, 1))
        and 2 * math.prod(channels) >= LEAST_CHANNELS * sum(channels)
        and not any(count % VECTOR for count in channels)
        and refusal() is None
    )


def fits(conv: nn.Conv2d, h: Tensor, kept: bool, doubled: bool = False) -> bool:
    """Whether the convolution of h [B, C, H, W], or of h at twice its size, can be done so, and gains by it.

    kept: its filters are made once.
    """
    batch, height, width = _size(h, doubled)
    return (
        h.dtype == DTYPE
        and _tiles(batch, height, width) >= LEAST_TILES * torch.get_num_threads()
        and (kept or batch * height * width >= LEAST_PIXELS)
        and not native.watched()
        and wide(conv)
    )


def _check(name: str, x: Tensor | None, *shape: int) -> None:
    """What C is given a pointer to: float32 on the CPU, of a shape. Raises: TypeError, ValueError."""
    if x is None:
        return
    if x.dtype != DTYPE or x.device.type != "cpu":
        raise TypeError(f"{name} must be float32 on the CPU, got {x.dtype} on {x.device}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")


def _size(h: Tensor, doubled: bool) -> tuple[int, int, int]:
    """Images, and their height and width where they are convolved."""
    batch, _, height, width = h.shape
    return (batch, 2 * height, 2 * width) if doubled else (batch, height, width)


def _tiles(batch: int, height: int, width: int) -> int:
    return batch * ((height + 1) // 2) * ((width + 1) // 2)


def pack(weight: Tensor, turned: bool = False, cpu: str | None = None) -> Tensor:
    """G g G' of a weight [K, C, 3, 3], in the order in which `convolve` reads it.

    turned: for the gradient of the input, which is the convolution of the output's with this.
    """
    outputs, channels = weight.shape[:2]
    _check("weight", weight, outputs, channels, 3, 3)
    if weight.stride(2) != 3 * weight.stride(3):
        weight = weight.contiguous()
    of_output, of_channel, _, of_tap = weight.stride()
    if turned:
        outputs, channels, of_output, of_channel = channels, outputs, of_channel, of_output
    made, threads = functions(cpu), torch.get_num_threads()
    packed = torch.empty(made.size(channels, outputs), dtype=DTYPE, device=weight.device)
    strides = of_channel, of_output, of_tap
    made.filters(weight.data_ptr(), packed.data_ptr(), channels, outputs, *strides, turned, threads)
    return packed


class _Kept(NamedTuple):
    packed: Tensor
    weight: weakref.ref[Tensor]  # which takes all of this along
    seen: tuple[int, int]
    storage: StorageWeakRef


class Filters:
    """Those of weights that seldom change, as `pack` makes them: kept, and made again after a weight was written to."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], _Kept] = {}

    def of(self, weight: Tensor, turned: bool) -> Tensor:
        if weight.is_inference():  # nobody counts what is written to it
            return pack(weight, turned)
        kept = self._kept.get((id(weight), turned))
        if kept is None or kept.seen != (weight.data_ptr(), weight._version) or kept.storage.expired():
            key, everything = (id(weight), turned), self._kept
            reference = weakref.ref(weight, lambda _: everything.pop(key, None))
            seen, storage = (weight.data_ptr(), weight._version), StorageWeakRef(weight.untyped_storage())
            kept = everything[key] = _Kept(pack(weight, turned), reference, seen, storage)
        return kept.packed


class Workspace(threading.local):
    """Memory that one convolution leaves to the next, as fresh pages cost much: in each thread its own. It goes with
    its thread, or with what holds this object."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """A tensor of whatever was in it, until the next is taken."""
        if self.memory is None or self.memory.numel() < count:
            self.memory = None  # before there is another
            with torch.inference_mode(False):
                # Said, as defaults may be others.
                self.memory = torch.empty(count, dtype=DTYPE, device="cpu")
        return self.memory


def convolve(
    h: Tensor,
    packed: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    doubled: bool = False,
    workspace: Workspace | None = None,
    cpu: str | None = None,
) -> Tensor:
    """The 3x3 convolution of h [B, C, H, W] with zeros around it, plus bias [K] and residual [B, K, H, W]: in
    channels_last, and with the same bits in any batch and for any number of threads.

    packed: of `pack`. outputs: K. doubled: of h at twice its size, by nearest neighbour, as the residual and the result
    are then; in 9 of 36 multiplications. workspace: of the network; None: of this call alone.
    """
    form = torch.channels_last
    h = h.contiguous(memory_format=form)
    channels, (batch, height, width) = h.shape[1], _size(h, doubled)
    made, threads, shape = functions(cpu), torch.get_num_threads(), (batch, outputs, height, width)
    _check("h", h, *h.shape)
    _check("packed", packed, made.size(channels, outputs))
    _check("bias", bias, outputs)
    _check("residual", residual, *shape)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=form)
    out = torch.empty(shape, dtype=DTYPE, device=h.device, memory_format=form)
    block = made.block(_tiles(batch, height, width), threads)
    space = (workspace or Workspace()).take(threads * made.room(channels, block))
    given = [None if x is None else x.data_ptr() for x in (h, packed, bias, residual, out, space)]
    made.convolve(*given, batch, height, width, channels, outputs, doubled, block, threads)
    return out


def gradient(
    h: Tensor,
    grad: Tensor,
    weight: Tensor,
    *,
    doubled: bool = False,
    workspace: Workspace | None = None,
    cpu: str | None = None,
) -> Tensor:
    """The gradient of the weight [K, C, 3, 3] of a convolution of h [B, C, H, W], of that of its output
    [B, K, H, W], or twice as large; the same bits each time for one number of threads."""
    h, grad = (x.contiguous(memory_format=torch.channels_last) for x in (h, grad))
    channels, (batch, height, width) = h.shape[1], _size(h, doubled)
    _check("h", h, *h.shape)
    _check("grad", grad, batch, weight.shape[0], height, width)
    _check("weight", weight, weight.shape[0], channels, 3, 3)
    # In the weight's own layout, so that nobody copies it to the parameter's.
    out = torch.empty_like(weight)
    if out.stride(2) != 3 * out.stride(3):
        out = torch.empty_like(weight, memory_format=torch.channels_last)
    of_output, of_channel, _, of_tap = out.stride()
    made, threads = functions(cpu), torch.get_num_threads()
    block = made.block(_tiles(batch, height, width), threads)
    space = (workspace or Workspace()).take(threads * made.gradient_room(channels, weight.shape[0], block))
    given = (x.data_ptr() for x in (h, grad, out, space))
    sizes = batch, height, width, channels, weight.shape[0]
    made.gradient(*given, *sizes, doubled, of_channel, of_output, of_tap, block, threads)
    return out


class _Convolution(torch.autograd.Function):
    """With gradients, by the same algorithm. Gradients of gradients are PyTorch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        doubled: bool,
        workspace: Workspace | None,
        filters: Filters | None,
    ) -> Tensor:
        ctx.save_for_backward(h, weight)
        ctx.options, ctx.filters = {"doubled": doubled, "workspace": workspace}, filters
        return convolve(h, _packed(weight, filters), weight.shape[0], bias, residual, **ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (h, weight), grad = ctx.saved_tensors, grad.resolve_neg()
        wanted, doubled, workspace = ctx.needs_input_grad, ctx.options["doubled"], ctx.options["workspace"]
        found: list[Tensor | None] = [None] * 3
        if not (torch.is_grad_enabled() or stands_for_many(grad) or native.watched()):
            if wanted[0]:
                turned = _packed(weight, ctx.filters, turned=True)
                found[0] = convolve(grad, turned, weight.shape[1], workspace=workspace)
            if wanted[1] and torch.get_num_threads() * weight.numel() * 16 // 9 <= MOST_SUMS:
                found[1] = gradient(h, grad, weight, **ctx.options)
            if wanted[2]:
                found[2] = grad.sum((0, 2, 3))
        left = [want and made is None for want, made in zip(wanted[:3], found, strict=True)]
        if any(left):
            image = F.interpolate(h, scale_factor=2.0, mode="nearest") if doubled else h
            geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            others = torch.ops.aten.convolution_backward(grad, image, weight, [weight.shape[0]], *geometry, left)
            found = [other if mine is None else mine for mine, other in zip(found, others, strict=True)]
        if doubled and found[0] is not None:
            found[0] = F.avg_pool2d(found[0], 2, divisor_override=1)
        return *found, grad if wanted[3] else None, None, None, None


def _packed(weight: Tensor, filters: Filters | None, turned: bool = False) -> Tensor:
    return pack(weight, turned) if filters is None else filters.of(weight, turned)


def convolution(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    doubled: bool = False,
    workspace: Workspace | None = None,
    filters: Filters | None = None,
) -> Tensor:
    """As `F.conv2d(h, weight, bias, padding=1) + residual`, with its gradients.

    doubled, workspace: as of `convolve`. filters: where those of the weight are kept; None: made for this call.
    """
    made: Tensor = _Convolution.apply(h, weight, bias, residual, doubled, workspace, filters)
    return made
