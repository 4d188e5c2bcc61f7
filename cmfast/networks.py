"""The network an engine runs: as given, optimised, or compiled, with the reasons."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from cmfast import fast
from cmfast.denoiser import Denoiser, input_dtype
from cmfast.errors import Unavailable
from cmfast.unet import UNetModel
from cmfast.unet_blocks import AttentionBlock, ResBlock

COMPILE = ("auto", "off", "whole", "regional")
#: What `torch.compile` is called with. Shapes are fixed: each is compiled for itself.
COMPILE_OPTIONS: dict[str, Any] = {"dynamic": False}
#: Kinds of blocks that torch.compile may meet before it gives up: every width and size of a U-Net is one.
RECOMPILE_LIMIT = 256


class Prepared(NamedTuple):
    """A model to run, what it is, and how to bring weights that were derived from the given ones up to date.

    refresh: force → whether buffers were replaced; None where nothing is derived.
    optimised, compiled: (path, why), as `Sampler.explain` shows them.
    """

    model: Any
    optimised: tuple[str, str]
    compiled: tuple[str, str]
    refresh: Callable[..., bool] | None


def prepare(model: Any, *, optimize: str | bool, compile: str, dtype: torch.dtype | None) -> Prepared:
    """The fastest form of a model that the arguments allow.

    Raises: ValueError: a dtype that needs a network which cannot be had, or a network without blocks to compile.
        Unavailable: `optimize=True`, or a compiler, cannot be had; the message says why.
    """
    prepared, reason = _optimised(model, optimize, dtype, compile)
    _check_dtype(model, dtype, reason)
    optimised = ("as given", reason) if reason else ("optimised", "the same weights in fewer passes over memory")
    refresh = refresher(prepared)
    if compile == "auto":
        why = "compile='auto' does not: start-up would take a minute or more; compile=True does"
        return Prepared(prepared, optimised, ("off", why), refresh)
    if compile == "off":
        return Prepared(prepared, optimised, ("off", "compile=False was asked for"), refresh)
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable) == "1":
            return Prepared(prepared, optimised, ("off", f"{variable}=1 has PyTorch compile nothing"), refresh)
    network = prepared.network if isinstance(prepared, Denoiser) else prepared
    if compile == "whole" and getattr(network, "faster_uncompiled", False) is True:
        why = "compile='whole' was asked for; on a CPU the optimised network has faster convolutions of its own"
        return Prepared(prepared, optimised, ("off", why), refresh)
    return Prepared(_compiled(prepared, compile), optimised, (compile, f"compile={compile!r} was asked for"), refresh)


def _optimised(model: Any, optimize: str | bool, dtype: torch.dtype | None, compile: str) -> tuple[Any, str | None]:
    """The model, and why it is not optimised; None if it is."""
    if not optimize:
        return model, "optimize=False was asked for"
    if not isinstance(model, nn.Module):
        reason: str | None = "the model is a function"
    elif compile == "regional":
        reason = "compile='regional' compiles the blocks of the network as given"
    elif (kind := _kind(model)) not in ("cpu", "cuda"):
        reason = f"what is fast was made for CPUs and GPUs by CUDA or ROCm, and the model is on a {kind} device"
    elif refresher(model) is not None and dtype in (None, input_dtype(model)):
        return model, "the model brings its own derived weights"
    else:
        model, reason = _fast(model, dtype)
    if reason and optimize != "auto":
        raise Unavailable(f"optimize=True cannot be had: {reason}")
    return model, reason


def _kind(model: nn.Module) -> str:
    """Of device, of a model's weights."""
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _fast(model: nn.Module, dtype: torch.dtype | None) -> tuple[nn.Module, str | None]:
    """The model made fast; or as it is, and why."""
    # Hooks, which come and go, are no reason here: they are asked for at each call.
    try:
        return fast.optimize(model, dtype=dtype).eval(), None
    except fast.Refused as refused:
        return model, str(refused)


def _check_dtype(model: Any, dtype: torch.dtype | None, reason: str | None) -> None:
    if dtype is None or reason is None:
        return
    own = input_dtype(model)
    if own != dtype:
        raise ValueError(
            f"dtype={dtype} needs a network that can be optimised, and this one cannot: {reason}. "
            f"Its own dtype is {own}: leave dtype out, or cast the model"
        )


def refresher(model: Any) -> Callable[..., bool] | None:
    """The `refresh` of a model or its network that brings derived weights up to date, as `cmfast.fast.FastUNet` has it.

    None if neither has one. The name says little, and modules of others use it: `derives_weights` goes with it.
    """
    for owner in (model, getattr(model, "network", None)):
        if isinstance(owner, nn.Module) and getattr(owner, "derives_weights", None) is True:
            method: Callable[..., bool] = getattr(owner, "refresh")  # noqa: B009  nn.Module's own is no function
            return method
    return None


def _compiled(model: Any, compile: str) -> Any:
    if COMPILE_OPTIONS.get("backend", "inductor") == "inductor":
        _check_compiler(model)
    if compile == "whole":
        if isinstance(model, Denoiser):
            return _with_network(model, torch.compile(model.network, **COMPILE_OPTIONS))
        return torch.compile(model, **COMPILE_OPTIONS)
    network = model.network if isinstance(model, Denoiser) else model
    if not isinstance(network, UNetModel):
        raise ValueError(f"compile='regional' compiles the blocks of a UNetModel, got a {type(network).__name__}")
    network = sharing(network)
    for module in network.modules():
        if isinstance(module, (ResBlock, AttentionBlock)):
            module.compile(**COMPILE_OPTIONS)
    return _with_network(model, network) if isinstance(model, Denoiser) else network


def _check_compiler(model: Any) -> None:
    """Raises: Unavailable: what torch.compile needs is not installed."""
    on_gpu = isinstance(model, nn.Module) and any(p.is_cuda for p in model.parameters())
    variable, names = ("CC", ("gcc", "clang", "cc")) if on_gpu else ("CXX", ("g++", "clang++", "c++", "cl"))
    if not any(name and shutil.which(name) for name in (os.environ.get(variable), *names)):
        raise Unavailable(
            f"torch.compile needs a {'C' if on_gpu else 'C++'} compiler, and none of {', '.join(names)} is found: "
            f"install one (Debian, Ubuntu: apt-get install g++), name it in {variable}, or leave compile out"
        )


def _with_network(model: Denoiser, network: Callable[..., Any]) -> Denoiser:
    """A Denoiser like `model` around another network."""
    copy: Denoiser = _copy(model)
    copy.network = network
    return copy


def sharing(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules that shares their parameters and buffers, replaced ones included."""
    copy: nn.Module = _copy(module)
    # Not `named_children()`, which leaves out a child that occurs again.
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else sharing(child)
    return copy


def _copy(module: Any) -> Any:
    """One module again: its attributes and parameters, but room for other children."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_modules"] = dict(module._modules)
    return copy


@contextmanager
def compiling() -> Iterator[None]:
    """Around a first run: as many kinds of blocks as a U-Net has are compiled, not eight."""
    import torch._dynamo

    names = ("recompile_limit", "accumulated_recompile_limit")
    limits = {name: max(RECOMPILE_LIMIT, getattr(torch._dynamo.config, name)) for name in names}
    with torch._dynamo.config.patch(limits):
        yield
