"""Self-attention on a CPU where no gradient is recorded: by the functions of attention.c."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from cmfast import native

DTYPE = torch.float32
#: What the size of a head must be divisible by: the widest panel. Most tokens: weights of a few queries fit in a cache.
PANEL, MOST_TOKENS = 32, 8192
#: Fewest products, about, that all threads share.
LEAST = 2**18


class _Functions:
    """Those of attention.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in attention.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, threads, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float

        self.space = function("attention_space", *[number] * 4, threads, result=number)
        self.forward = function("attention_forward", *[pointer] * 3, *[number] * 4, real, threads)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)
#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def fits(qkv: Tensor) -> bool:
    """Whether qkv [B, N, 3, H, D] can be attended to so."""
    return (
        qkv.dtype == DTYPE
        and not (torch.is_grad_enabled() and qkv.requires_grad)
        and qkv.shape[-1] % PANEL == 0
        and qkv.shape[1] <= MOST_TOKENS
        and qkv.numel() > 0
        and not native.watched()
        and qkv.is_contiguous()
        and refusal() is None
    )


def attend(qkv: Tensor, cpu: str | None = None) -> Tensor:
    """softmax(q k' / sqrt(D)) v of qkv [B, N, 3, H, D]: [B, N, H, D]. With the same bits in any batch."""
    batch, tokens, _, heads, dim = qkv.shape
    made, sizes, threads = functions(cpu), (batch, heads, tokens, dim), native.threads(qkv.numel() * tokens, LEAST)
    out = torch.empty(batch, tokens, heads, dim, dtype=DTYPE, device="cpu")
    space = torch.empty(made.space(*sizes, threads), dtype=DTYPE, device="cpu")
    made.forward(qkv.data_ptr(), out.data_ptr(), space.data_ptr(), *sizes, dim**-0.5, threads)
    return out
