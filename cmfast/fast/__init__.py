"""Networks made fast, for sampling and for training: `optimize`."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from cmfast.fast import diffusers
from cmfast.fast.network import FastUNet, fast_unet, is_fast
from cmfast.fast.plan import Refused, check_parts, of_unet
from cmfast.unet import UNetModel
from cmfast.watch import Watch

__all__ = ["FastUNet", "Refused", "optimize", "refusal"]

Module = TypeVar("Module", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimize(model: Module, dtype: torch.dtype | None = None, *, pack: bool = True) -> Module:
    """The same network with a fast forward pass, for inference and for training; the model stays as it is.

    It computes in channels_last from end to end. GroupNorm, the embedding's scale and shift, SiLU, dropout and the
    additions before them are one operation (`ops.group_norm_silu`); the projections of the time embedding are one
    matrix multiplication; q, k and v go into attention without copies.

    On a CPU, in float32, 3x3 convolutions take 4/9 of the multiplications, and so do their gradients; a quarter where
    the image is doubled before (`native.winograd`). GroupNorm is `native.group_norm`'s, and attention without gradients
    `native.attention`'s. All are C, compiled when they are first needed, in about a second and once on a machine;
    without a compiler PyTorch's serve. In bfloat16 those of doubled images take 4/9 (`fast.doubling`). Where no
    gradient is recorded, weights are kept as these want them: that takes up to twice the memory of the weights more,
    and as much again where images of two sizes want other layouts. The first call of each input shape lays them out.

    Parameters, buffers and modules are shared with the model, and so is the state dict: training, loading or averaging
    either is seen by both. What is made of weights (another dtype or layout, joined projections) is made anew when they
    change. A write through `.data` shows no change: call `refresh(force=True)` after it. A hook on a part, a part of
    another class such as a LoRA's, or a patch of a class has the ordinary forward pass serve until it is gone;
    `refusal` says so.

    Args:
        model: a `UNetModel`, a `diffusers.UNet2DModel`, or a module that holds one as its `network` or `unet`, such as
            a `Denoiser`.
        dtype: what to compute in; the weights keep theirs, and gradients come in it. None: that of the weights, or of
            `torch.autocast` where it is on.
        pack: keep weights packed on a CPU. False for a network whose weights change before every call, as a target's
            in training: packing them takes longer than it saves in one.

    Raises: TypeError: another network, or parts that the fast pass does not know; the message names the first.

    >>> model = UNetModel(8, 3, 32, 3, 1, attention_resolutions=(2,), channel_mult=(1, 2))
    >>> fast = optimize(model)
    >>> isinstance(fast, UNetModel), fast.time_embed is model.time_embed
    (True, True)
    """
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, or None, got {dtype}")
    if isinstance(model, UNetModel):
        _plan_of(model)
        return fast_unet(model, dtype, pack)  # type: ignore[return-value]  # of the same class
    if diffusers.is_unet2d(model):
        _plan_of(model)
        return diffusers.fast_unet2d(model, dtype, pack)
    held = _held(model)
    if held is not None:
        name, inner = held
        outer: Any = copy.copy(model)
        # A copy shares its table of parts with the original: this one's has another network in it.
        outer.__dict__["_modules"] = {**model._modules, name: optimize(inner, dtype, pack=pack)}
        return outer
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise Refused("the model was compiled by torch.compile: give the model itself, and compile=True to a Sampler")
    raise Refused(
        f"cannot optimize a {type(model).__name__}: expected a UNetModel, a diffusers.UNet2DModel, or a module with "
        "one of them as its network, such as a Denoiser"
    )


def refusal(model: Any) -> str | None:
    """Why `optimize` does not take a model, or has its ordinary pass serve; None if the fast pass does.

    >>> refusal(nn.Linear(2, 2))[:29]
    'cannot optimize a Linear: exp'
    """
    try:
        if isinstance(model, UNetModel) or diffusers.is_unet2d(model):
            if hasattr(model, "_fast"):
                return getattr(model, "refusal")  # noqa: B009  nn.Module's own says Tensor | Module
            _plan_of(model)
            return Watch(model).hooked(root=False)
        held = _held(model)
        if held is not None:
            return refusal(held[1])
        optimize(model)
    except Refused as refused:
        return str(refused)
    return None


def _held(model: Any) -> tuple[str, nn.Module] | None:
    """The network that a module holds, and its name; None if it has none of its own. What a wrapper says to have by
    its `__getattr__` is another's, as with `torch.compile`."""
    own = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
    parts = model._modules if own else {}
    return next(((name, inner) for name in ("network", "unet") if (inner := parts.get(name)) is not None), None)


def _plan_of(model: Any) -> None:
    """Refused, if it has no plan, or another forward pass than that of its class."""
    ours = isinstance(model, UNetModel)
    original = UNetModel if ours else diffusers.unet2d_class()
    if not is_fast(model) and type(model).forward is not original.forward:
        raise Refused(f"the {type(model).__name__} has a forward pass of its own")
    if model._compiled_call_impl is not None:
        raise Refused(f"the {type(model).__name__} was compiled by its compile()")
    check_parts(model)
    (of_unet if ours else diffusers.of_unet2d)(model)
