"""Which path a call takes: a fused Triton kernel, a form for the CPU, or plain PyTorch.

It is decided in Python, before anything is launched. `auto` takes the kernel where one can run and earns its place, the
form on a CPU, and else the reference path, whose numbers are the same within rounding. Inside `torch.compile` it takes
kernels for noise that they draw alone: everything else inductor fuses into what stands around it.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from textwrap import shorten
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cmfast import native
from cmfast.errors import Unavailable
from cmfast.native import losses, lpips, optimizer, steps
from cmfast.ops import _multi, _norm_cpu
from cmfast.reference import Draw
from cmfast.reference._common import in_transform

Function = TypeVar("Function", bound=Callable[..., Any])

BACKENDS = ("auto", "triton", "reference")
#: The operations that have a kernel.
FUSED = (
    "scale_input",
    "init_noise",
    "add_noise",
    "add_noise_pair",
    "draw_pair",
    "normal",
    "denoise",
    "denoise_to_uint8",
    "to_uint8",
    "renoise",
    "euler_step",
    "heun_predictor",
    "heun_corrector",
    "midpoint_corrector",
    "weighted_loss",
    "consistency_loss",
    "group_norm_silu",
    "dropout",
    "lpips_input",
    "lpips_layer",
    "ema_update_",
    "grad_norm",
    "radam_ema_",
    "adam_ema_",
)
#: Those that make a few numbers for each sample, and need none.
SMALL = ("scalings", "c_noise", "loss_weight", "snr_weight", "uniform_int", "draw_levels")
#: What kernels take; float64 is the reference's.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
#: Those that C does on a CPU for states of float32, and of these those with their gradients.
WITH_GRADIENTS = {**losses.FORMS, **lpips.FORMS}
IN_C = {**steps.FORMS, **WITH_GRADIENTS}
#: Forms for the CPU, and dtypes that they take.
FORMS: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    **{name: (form, steps.DTYPES) for name, form in IN_C.items()},
    **{name: (form, (steps.DTYPE,)) for name, form in lpips.FORMS.items()},
    "group_norm_silu": (_norm_cpu.group_norm_silu, _norm_cpu.DTYPES),
}
#: The oldest CUDA architecture that kernels are compiled and tested for.
LEAST_CAPABILITY = (8, 0)

_chosen: ContextVar[str | None] = ContextVar("cmfast_backend", default=None)


def _named(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


#: Read once: tracing a compiled region must not depend on it.
_ENVIRONMENT = _named(os.environ.get("CMFAST_BACKEND") or "auto", "the environment variable CMFAST_BACKEND")
HAS_TRITON = find_spec("triton") is not None
#: Whether Triton runs its kernels on the CPU, in its interpreter: for tests, and slow.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def current_backend() -> str:
    """`auto`, `triton` or `reference`: the innermost `cmfast.backend(...)` of this thread, else CMFAST_BACKEND."""
    return _chosen.get() or _ENVIRONMENT


# What `torch.compiler.assume_constant_result` does, without its import of Dynamo: asked while a region is traced, which
# keeps the backend it was compiled under. Dynamo before PyTorch 2.14 cannot trace a ContextVar.
current_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the path of every operation inside the `with` block, in this thread.

    `auto` (the default) takes a kernel where it can; `reference` none; `triton` always, and raises a RuntimeError that
    says why where it cannot. The environment variable CMFAST_BACKEND chooses for a whole process. A compiled region
    keeps the backend it was compiled under.

    Raises: ValueError: another name.

    >>> with backend("reference"):
    ...     current_backend()
    'reference'
    """
    token = _chosen.set(_named(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def keeping_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes the backend of now whenever it is called: also in a backward pass that makes activations
    again, which has a thread of its own on a GPU."""
    # A compiled region keeps its backend by itself.
    if torch.compiler.is_compiling() or _chosen.get() is None:
        return function
    name = current_backend()

    def again(*arguments: Any) -> Any:
        with backend(name):
            return function(*arguments)

    return again


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel runs on a device; None if one does."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if device.type == "cpu":
        return None if INTERPRETING else "Triton kernels run on a GPU, and the tensors are on the CPU"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} devices"
    if INTERPRETING:
        return "TRITON_INTERPRET is set, and the interpreter is for tensors on the CPU"
    return None if torch.compiler.is_compiling() else _old_gpu(device.index)


@functools.cache
def _old_gpu(index: int | None) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, and kernels need 8.0"


#: What the first launch on each GPU showed: why there can be none, or None.
_launches: dict[int | None, str | None] = {}


def launch_refusal(device: torch.device) -> str | None:
    """Why nothing can be launched on a GPU, as the smallest kernel shows, once; None if it can, or it is not known yet.

    Triton builds some C first, for which many machines lack a compiler or Python's headers; and its PTX may be too new
    for a driver. Asked where a kernel is about to be launched: inside of a transform the smallest one cannot be.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    if device.index not in _launches:
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return None
        _launches[device.index] = _first_launch(device)
    return _launches[device.index]


def _first_launch(device: torch.device) -> str | None:
    try:
        with _disable_current_modes():
            from cmfast.kernels.images import to_uint8_fwd

            to_uint8_fwd(torch.zeros(1, 1, device=device), rounding="trunc")
    except Exception as error:  # a compiler's, a linker's, a driver's, a file system's
        if "out of memory" in str(error).lower():
            raise
        said = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        reason = f"no kernel can be launched, for which Triton needs a C compiler and Python's headers ({said})"
        warnings.warn(f"{reason}: plain PyTorch serves, slower", stacklevel=2)
        return reason
    return None


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why no kernel takes or makes tensors of a dtype; None if one does."""
    if dtype in KERNEL_DTYPES:
        return None
    return f"kernels take {', '.join(str(known).removeprefix('torch.') for known in KERNEL_DTYPES)}, not {dtype}"


def refusal(tensors: list[Tensor], dtypes: list[torch.dtype], levels: bool = True) -> str | None:
    """Why no kernel serves a call with these tensors and result dtypes; None if one does.

    levels: its tensors of one dimension or none are noise levels, whose gradients kernels do not know.
    """
    device, compiling = tensors[0].device, torch.compiler.is_compiling()
    reason = device_refusal(device)
    if reason is not None:
        return reason
    reason = _subclass_refusal(tensors, compiling)
    if reason is not None:
        return reason
    for dtype in [*(tensor.dtype for tensor in tensors if tensor.is_floating_point()), *dtypes]:
        if dtype not in KERNEL_DTYPES:
            return dtype_refusal(dtype)
    if compiling:
        if levels and torch.is_grad_enabled() and any(tensor.requires_grad and tensor.ndim <= 1 for tensor in tensors):
            return "gradients of noise levels are inductor's inside torch.compile"
    elif native.recorded():
        return "torch.jit.trace and make_fx see PyTorch's operations alone"
    return transform_refusal() or launch_refusal(device)


def _subclass_refusal(tensors: Sequence[Tensor], compiling: bool) -> str | None:
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if not compiling and tensor.is_neg():
            return "a view that negates is not what lies in memory"
    return None


def transform_refusal() -> str | None:
    """The transform of PyTorch that is at work, which goes through ordinary operations; None if none is."""
    if in_transform():
        return "torch.func transforms go through the reference path"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through the reference path"
    return None


def use_kernel(
    name: str, *inputs: Any, dtypes: tuple[torch.dtype | None, ...] = (), levels: bool = True
) -> bool:
    """Whether operation `name` takes its kernel for these inputs, the first a tensor or a draw, and result dtypes.

    levels: as in `refusal`.
    Raises: Unavailable: `backend("triton")` was asked for and cannot be had; the message says why.
    """
    chosen = current_backend()
    if chosen == "reference":
        return False
    if chosen == "auto":
        # On a CPU this is all that a call pays.
        first = inputs[0]
        if not (first.index if isinstance(first, Draw) else first).is_cuda:
            return False
    drawn = [x.index for x in inputs if isinstance(x, Draw)]
    if chosen == "auto" and torch.compiler.is_compiling() and not drawn:
        return False
    tensors = [x for x in inputs if isinstance(x, Tensor)] + drawn
    reason = refusal(tensors, [dtype for dtype in dtypes if dtype is not None], levels)
    if reason is not None and chosen == "triton":
        raise Unavailable(f"{name}: backend 'triton' was asked for, but {reason}")
    return reason is None


def plain(function: Function, *inputs: Any, state: Tensor) -> Function:
    """What serves an operation of the reference for these inputs: itself, or a form for the CPU where one fits.

    state: whose dtype and layout results have. A form knows its gradients, or serves where none are recorded.
    """
    form, dtypes = FORMS[function.__name__]
    if not _undisturbed() or state.numel() == 0:
        return function
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not native.lie_here(tensors, dtypes):
        return function
    for x in inputs if len(tensors) < len(inputs) else ():
        if isinstance(x, Draw) and not native.lie_here([t for t in x if isinstance(t, Tensor)], INTEGERS):
            return function
    records = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if function.__name__ in IN_C:
        # Gradients also before a mode that looks on: that of torch.utils.checkpoint is there for one of two passes.
        fits = function.__name__ in WITH_GRADIENTS if records else not torch._C._len_torch_dispatch_stack()
        return cast(Function, form) if fits and steps.fits(state) else function
    return cast(Function, form)


def plain_list(function: Function, tensors: Sequence[Tensor]) -> Function:
    """The same for an operation on lists of tensors: its form for the CPU, where all are float32."""
    name = function.__name__
    if not plain_on_cpu(tensors) or name in _multi.IN_C and (native.watched() or optimizer.refusal() is not None):
        return function
    return cast(Function, _multi.FORMS[name])


def plain_on_cpu(tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether a form for the CPU may serve these tensors: memory of these dtypes, no transform, no other backend asked
    for, and nothing compiled or traced."""
    return _undisturbed() and native.lie_here(tensors, dtypes)


def _undisturbed() -> bool:
    """Whether no other backend was asked for, and nothing is compiled, traced or transformed."""
    return current_backend() == "auto" and not native.traced() and transform_refusal() is None


def explain(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Which path operation `name` takes for large tensors of a dtype on a device, and why not a faster one.

    `triton`: the kernel. `C`: one pass on a CPU; where a graph is recorded, of losses and LPIPS alone, and of LPIPS's
    maps in channels_last. `in place`: PyTorch in fewer passes. `reference`: the rest.

    Raises: ValueError: there is no such operation; the message lists those there are.

    >>> explain("scalings")
    ('reference', 'no kernel: a few numbers for each sample')
    """
    if name in SMALL:
        here = (current_backend(), torch.device(device).type, dtype) == ("auto", "cpu", torch.float32)
        by_c = name == "draw_levels" and here and steps.refusal() is None
        return "C" if by_c else "reference", "no kernel: a few numbers for each sample"
    if name not in FUSED:
        raise ValueError(f"unknown operation {name!r}; known: {', '.join((*FUSED, *SMALL))}")
    chosen = current_backend()
    if chosen == "reference":
        return "reference", "backend 'reference' was chosen"
    device = torch.device(device)
    reason = device_refusal(device) or dtype_refusal(dtype)
    if reason is None:
        try:
            reason = launch_refusal(device)
        except RuntimeError as error:  # it is full
            reason = f"nothing can be launched now: {error}"
    if reason is None and (chosen == "triton" or device.type == "cuda"):
        return "triton", "inside torch.compile, only where it draws noise: inductor fuses the rest"
    reason = reason or "Triton's interpreter is for tests: backend 'triton' chooses it"
    if chosen == "triton":
        return "refused", reason
    if device.type == "cpu":
        # Noise is C's too, and what draws levels for it.
        if name in IN_C or name in _multi.IN_C or name in ("normal", "draw_pair"):
            missing = "C is for float32" if dtype != torch.float32 else steps.refusal()
            return ("reference", f"{reason}; {missing}") if missing else ("C", reason)
        if dtype in FORMS.get(name, (None, (torch.float32,) if name in _multi.FORMS else ()))[1]:
            return "in place", reason
    return "reference", reason
