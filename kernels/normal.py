"""Normal numbers from counters, and the noise of the operations that take it: given, or drawn in the kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmfast.kernels.common import store_state, tile_offsets
from cmfast.kernels.launch import CONTIGUOUS, Plan, dense, layout, plan
from cmfast.kernels.philox import noise_tile

# Seeds and draws vary without end: they must not make a new kernel each.
drawing_jit = triton.jit(do_not_specialize=["blocks", "seed", "seed_high", "draw"])


def _signed_word(value: int) -> int:
    """The low 32 bits as a signed number, which is a 32-bit argument whatever the value."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _counter(seed: int | Tensor, draw: int | Tensor) -> dict[str, Any]:
    """What a kernel draws from, by name; a seed or a draw may be a tensor on the device."""
    seeds = (seed, 0) if isinstance(seed, Tensor) else (_signed_word(seed), _signed_word(seed >> 32))
    return {
        "seed": seeds[0], "seed_high": seeds[1], "draw": draw if isinstance(draw, Tensor) else _signed_word(draw),
        "SEED_TENSOR": isinstance(seed, Tensor), "DRAW_TENSOR": isinstance(draw, Tensor),
    }


@drawing_jit
def _normal_fwd_kernel(
    out_ptr, index_ptr, planes, blocks, pixels, seed, seed_high, draw,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr,
    STATE_LAST: tl.constexpr, MODEL_LAST: tl.constexpr, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):
    """ε = √(-2 ln u) (cos 2πv, sin 2πv); u, v from Philox4x32-10    Salmon et al. 2011, Box and Muller 1958
    out_ptr     [B, N]  state dtype, out    index_ptr  [B]  integers
    seed, draw  words, or pointers to integers if SEED_TENSOR, DRAW_TENSOR
    Grid (rows * planes * blocks,). Traffic: s bytes per element. Computes in float32.
    """
    _, at, _, mask = tile_offsets(planes, blocks, pixels, STATE_LAST, MODEL_LAST, BLOCK)
    value = noise_tile(
        out_ptr, index_ptr, at, mask, planes, blocks, pixels, seed, seed_high, draw,
        True, SEED_TENSOR, DRAW_TENSOR, BLOCK,
    )
    store_state(out_ptr, at, value, mask)


def normal_fwd(
    seed: int | Tensor, index: Tensor, shape: tuple[int, ...], *, draw: int | Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.empty((index.shape[0], *shape), dtype=dtype, device=index.device)
    plan(out, None, rows=True, dear=True).run(_normal_fwd_kernel, out, index.contiguous(), **_counter(seed, draw))
    return out


class Noise:
    """The noise of a launch: a tensor in the states' layout, or a draw.

    `pointers` and `options` are a kernel's arguments for either: noise_ptr and index_ptr, of which it reads one, and
    by name what it draws from.
    """

    def __init__(self, noise: Any, state: Tensor, model: Tensor | None) -> None:
        self.drawn = not isinstance(noise, Tensor)
        # A group of four elements must not reach over two channels where these lie apart.
        self.planes = self.drawn and any(x is not None and layout(x) != CONTIGUOUS for x in (state, model))
        if self.planes and math.prod(state.shape[2:]) % 4:
            noise = normal_fwd(noise.seed, noise.index, state.shape[1:], draw=noise.draw, dtype=torch.float32)
            self.drawn = self.planes = False
        if self.drawn:
            self.pointers = state, noise.index.contiguous()
            self.options = {**_counter(noise.seed, noise.draw), "DRAWN": True}
        else:
            self.pointers = dense(noise, state), state
            self.options = {**_counter(0, 0), "DRAWN": False}

    def plan(self, state: Tensor, model: Tensor | None, *levels: Tensor) -> Plan:
        return plan(state, model, *levels, rows=self.drawn, planes=self.planes, dear=self.drawn)
