"""What the kernels share on the host: memory layouts, the tiles of a batch, and the launch itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements of a program: two 16-byte accesses per thread in float32, one in bfloat16.
BLOCK = 1024
WARPS = 4
#: Blocks that keep a GPU busy in twos as well.
MANY = 2048

CONTIGUOUS = torch.contiguous_format


def layout(x: Tensor) -> torch.memory_format | None:
    """How a dense batch lies in memory; None if it is not dense in an order we know."""
    if x.is_contiguous():
        return CONTIGUOUS
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in the layout of a dense `like`, or in its own if it has one; a copy where it must be."""
    if like is None:
        return x if layout(x) is not None else x.contiguous()
    memory_format = layout(like) or CONTIGUOUS
    return x if x.is_contiguous(memory_format=memory_format) else x.contiguous(memory_format=memory_format)


def power_of_two(n: int) -> int:
    """The next, or n itself."""
    return 1 << max(n - 1, 0).bit_length()


def empty(like: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None) -> Tensor:
    """Room for a tensor like a dense one."""
    return torch.empty_like(like, dtype=dtype or like.dtype, memory_format=memory_format or layout(like) or CONTIGUOUS)


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = WARPS, **constants: Any) -> None:
    """Every launch goes through here."""
    if torch.compiler.is_compiling():
        # Dynamo knows no such option, and inductor sets it.
        kernel[(programs,)](*arguments, **constants, num_warps=warps)
        return
    with _on_device(arguments[0]):
        # Set, since the default differs between Triton versions.
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


class Plan(NamedTuple):
    """A batch as rows x planes x pixels, cut into blocks of pixels; one program for each block.

    Where all tensors lie in memory in one order, a row is one plane; else planes are channels, and `state_last` and
    `model_last` say which tensors have them last. A program does `steps` blocks, one after the other. `levels` are the
    noise levels, as [B] if `per_row`, else single.
    """

    batch: int
    rows: int
    planes: int
    pixels: int
    block: int
    steps: int
    warps: int
    levels: tuple[Tensor, ...]
    per_row: bool
    state_last: bool
    model_last: bool

    @property
    def blocks(self) -> int:
        """At least one, so that noise levels are written for samples without pixels too."""
        return max(1, -(-self.pixels // (self.block * self.steps)))

    def level_out(self, like: Tensor) -> Tensor:
        """Room for c_noise: [B], or [1] where there is one level for all, which is expanded to [B] later."""
        return torch.empty(self.batch if self.per_row else 1, dtype=torch.float32, device=like.device)

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch with the tiles' sizes after the arguments, which are pointers; scalars and constexprs come by name."""
        if self.batch:
            tile = {"STATE_LAST": self.state_last, "MODEL_LAST": self.model_last, "BLOCK": self.block}
            sizes = self.planes, self.blocks, self.pixels
            programs = self.rows * self.planes * self.blocks
            launch(kernel, programs, *arguments, *sizes, **constants, **tile, PER_ROW=self.per_row, warps=self.warps)

    def fold(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch one program for each row, with no tiles."""
        if self.batch:
            launch(kernel, self.rows, *arguments, **constants, PER_ROW=self.per_row)


def plan(
    state: Tensor,
    model: Tensor | None,
    *levels: Tensor,
    rows: bool = False,
    planes: bool = False,
    dear: bool = False,
) -> Plan:
    """The tiles for a launch over a batch [B, C, ...].

    Args: state, model: a dense tensor in the layout of all states, and one in that of all network inputs and outputs;
        levels: noise levels, each a scalar or [B]; rows: samples differ in more than their levels; planes: a program
        must not reach over two channels; dear: what is computed takes as long as its accesses.
    """
    batch = state.shape[0]
    sample = state.numel() // max(batch, 1)
    per_row = not all(level.numel() == 1 for level in levels)
    if per_row:
        levels = tuple(level.expand(batch).contiguous() for level in levels)
    state_layout, model_layout = layout(state), layout(state if model is None else model)
    if planes or state_layout != model_layout:
        shape = batch, state.shape[1], sample // state.shape[1]
        last = state_layout != CONTIGUOUS, model_layout != CONTIGUOUS
    else:
        # One row for all samples keeps accesses aligned whatever the size of a sample is.
        shape = (batch, 1, sample) if per_row or rows else (1, 1, batch * sample)
        last = False, False
    block = BLOCK if shape[2] > BLOCK // 2 else max(power_of_two(shape[2]), 128)
    if dear and shape[2] > BLOCK and not (planes or last[0] or last[1]) and batch * sample > MANY * BLOCK:
        block *= 2  # elements of a thread, which share what it computes once
    return Plan(batch, *shape, block, 1, WARPS, levels, per_row, *last)


def outputs(spare: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Arguments for results that may not be wanted: a kernel gets `spare` for those, and does not touch it."""
    return tuple(spare if tensor is None else tensor for tensor in tensors)


def gradients(needed: Sequence[bool], *inputs: Tensor) -> list[Tensor | None]:
    """Room for the gradients of dense inputs; None where none is needed."""
    return [empty(x) if need else None for x, need in zip(inputs, needed, strict=False)]


def scaling(sigma_data: float | None, boundary: float | None = None) -> dict[str, Any]:
    """How a kernel makes D and the network's input, by name; PLAIN: the network is the denoiser, and the numbers are
    not read. A kernel that makes no D has no boundary."""
    scalars = {"sigma_data": float(sigma_data or 1)}
    if boundary is not None:
        scalars["boundary"] = float(boundary)
    return {**scalars, "PLAIN": sigma_data is None}


def _on_device(x: Tensor) -> Any:
    """A context in which x's GPU is the current one, which is where Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
