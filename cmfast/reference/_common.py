"""Broadcasting and accumulation dtype, shared by the reference operations; and who looks on at them."""

import torch
from torch import Tensor

_PROXY, _PRE_DISPATCH = torch._C._TorchDispatchModeKey.PROXY, torch._C.DispatchKey.PreDispatch


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype coefficients and sums are computed in."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def per_sample(sigma: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`sigma` [B] or scalar, shaped to broadcast against `like` [B, ...]."""
    sigma = sigma.to(dtype)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - 1)) if sigma.ndim else sigma


def clip_unit(x: Tensor, clip: bool) -> Tensor:
    """Clamp to the data range [-1, 1] when `clip`."""
    return x.clamp(-1, 1) if clip else x


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x [B, ...] in the order that `like` has in memory; a copy where it must be.

    A state keeps its layout whatever a model returns: torch's generator fills a tensor in the order of its memory.
    """
    strides = like.stride()
    if like.is_contiguous() or 0 in strides:
        return x.contiguous()
    order = sorted(range(like.ndim), key=lambda dim: strides[dim], reverse=True)
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(like.ndim)])


def as_input(x: Tensor, dtype: torch.dtype, memory_format: torch.memory_format | None) -> Tensor:
    """A network input in its dtype and, if one is asked for, in a memory format."""
    x = x.to(dtype)
    # vmap knows of no other layout than the contiguous one.
    if memory_format is None or in_transform():
        return x
    return x.contiguous(memory_format=memory_format)


def in_transform() -> bool:
    """Whether a torch.func transform is at work: what it wraps has neither memory nor values to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore  # made at run time


# Called while a region is traced, as `torch.compiler.assume_constant_result` has it: to Dynamo no answer of PyTorch's
# here is None.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


def watched() -> bool:
    """Whether somebody looks on who sees PyTorch's operations alone: a mode, such as one that counts them, a compiler,
    `torch.jit.trace`, or forward-mode differentiation."""
    return traced() or bool(torch._C._len_torch_dispatch_stack()) or torch.autograd.forward_ad._current_level >= 0


def traced() -> bool:
    """Whether operations are written down, to be done again with other tensors."""
    return torch.compiler.is_compiling() or recorded()


def recorded() -> bool:
    """The same, by `torch.jit.trace` or `make_fx`, who see PyTorch's operations alone, and not by a compiler."""
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    proxies = torch._C._get_dispatch_mode(_PROXY) is not None
    return torch._C._get_tracing_state() is not None or proxies or before_dispatch
