"""Argument checks. Each error names the argument, what came and what was expected.

Values of a tensor are looked at on the CPU only: on a GPU that would stop the stream and break graph capture.
"""

import math
import operator
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast.reference import Draw
from cmfast.reference._common import in_transform

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, bfloat16, float16 or float64"
#: Numbers that Python looks through faster than PyTorch.
FEW = 64
#: Looked for in this order: Python's own are found at once.
_NUMBERS: tuple[Any, ...] = (float, int, Real)
_INTEGERS: tuple[Any, ...] = (int, torch.SymInt, Integral)


def float_tensor(name: str, x: object, *, min_ndim: int = 1) -> None:
    """A floating tensor of at least `min_ndim` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}; taken: {_DTYPE_NAMES}")
    if x.ndim < min_ndim:
        raise ValueError(f"{name} must be a batch [B, ...] of {min_ndim} or more dimensions, got {list(x.shape)}")


class _Reading(threading.local):
    allowed = True


_reading = _Reading()


@contextmanager
def unread() -> Iterator[None]:
    """Inside, no value of a tensor is looked at, on the CPU neither: for a step that makes its levels itself."""
    before, _reading.allowed = _reading.allowed, False
    try:
        yield
    finally:
        _reading.allowed = before


def has_values(x: Tensor) -> bool:
    """Whether values can be looked at: not in a fake tensor, nor under torch.compile or a torch.func transform, nor
    inside `unread`."""
    return _reading.allowed and has_memory(x)


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has its own: not a fake one, or one of another class, nor under torch.compile or a torch.func
    transform."""
    if torch.compiler.is_compiling():
        return False
    if in_transform():
        return False
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def same_shape(**tensors: Tensor) -> None:
    """All of the shape, and on the device, of the first."""
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.shape != x.shape:
            raise ValueError(f"{name} must have the shape of {first} {list(x.shape)}, got {list(y.shape)}")
        if y.device != x.device:
            raise ValueError(f"{name} is on {y.device}, {first} on {x.device}: move one of them")


def sigma_dtype(x: Tensor) -> torch.dtype:
    """The dtype of noise levels for a state x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def input_format(x: Tensor, dtype: object, memory_format: object) -> None:
    """What a network input is asked to be: a floating dtype or None, a memory format for x or None."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be {_DTYPE_NAMES}, or None, got {dtype}")
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)  # type: ignore[call-overload]  # any object may come
    if memory_format not in (None, torch.contiguous_format) and dims is None:
        raise ValueError(f"memory_format must be contiguous_format, channels_last or None, got {memory_format}")
    if dims is not None and x.ndim != dims:
        raise ValueError(f"memory_format {memory_format} is for batches of {dims} dimensions, got {list(x.shape)}")


def integer(name: str, value: Any, device: torch.device) -> Any:
    """An integer, or an integer scalar tensor on the device: what seeds and draw numbers are. One of NumPy's as
    Python's, which does not wrap."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or value.numel() != 1:
            raise TypeError(f"{name} must be an integer or an integer scalar, got {value.dtype} {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, index on {device}: move one of them")
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer or an integer scalar tensor, got {type(value).__name__}")
    return value if isinstance(value, int) else operator.index(value)


def as_int64(value: int) -> int:
    """The low 64 bits of a number as int64 has them: all that a seed is read for."""
    return (value + 2**63) % 2**64 - 2**63


def without_numpy(value: Any) -> Any:
    """A number of NumPy's as Python's, and anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def sample_index(index: object) -> None:
    """An integer tensor [B]."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
        came = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an integer tensor [B] of sample indices, got {came}")


def noise_like(noise: Any, x: Tensor, x_name: str) -> Tensor | Draw:
    """A floating tensor of the shape and device of x, or a `Draw` of as many samples there."""
    if not isinstance(noise, Draw):
        float_tensor("noise", noise)
        same_shape(**{x_name: x, "noise": noise})
        return noise
    return draw_for("noise", noise, x, x_name)


def counter(name: str, draw: object) -> Draw:
    """A `Draw` with a seed, sample indices and a draw number."""
    if not isinstance(draw, Draw):
        raise TypeError(f"{name} must be a Draw(seed, index, draw), got {type(draw).__name__}")
    sample_index(draw.index)
    seed = integer(f"{name}.seed", draw.seed, draw.index.device)
    number = integer(f"{name}.draw", draw.draw, draw.index.device)
    return Draw(seed, draw.index, number)


def draw_for(name: str, draw: object, x: Tensor, x_name: str) -> Draw:
    """A `Draw` of as many samples as x has, on its device."""
    draw = counter(name, draw)
    if draw.index.shape[0] != x.shape[0]:
        raise ValueError(f"{name} draws {draw.index.shape[0]} samples, {x_name} has {x.shape[0]}")
    if draw.index.device != x.device:
        raise ValueError(f"{name}.index is on {draw.index.device}, {x_name} on {x.device}: move one of them")
    return draw


def parameter(name: str, value: object, shape: tuple[int, ...], letters: str, x: Tensor) -> None:
    """A floating tensor of a shape, called by its letters in errors, on the device of x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{letters}], got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must have a floating dtype, got {value.dtype}; taken: {_DTYPE_NAMES}")
    if value.shape != shape:
        raise ValueError(f"{name} must be [{letters}] = {list(shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}: move one of them")


def _ends(x: Tensor) -> tuple[float, float]:
    """The least and the largest number; NaN where there is one."""
    count = x.shape[0] if x.ndim else 1
    if count == 1:
        value = x.item()
        return value, value
    if count > FEW:
        return x.min().item(), x.max().item()
    values = x.tolist()
    # Which do not tell of a NaN among others.
    return (math.nan, math.nan) if any(map(math.isnan, values)) else (min(values), max(values))


def sigma_level(name: str, sigma: object, x: Tensor, *, divides: bool = False) -> None:
    """A floating tensor, scalar or [B] with B = x.shape[0], not negative and not NaN; of an operation that divides by
    it, neither 0 nor infinite."""
    if not isinstance(sigma, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (scalar or [B]), got {type(sigma).__name__}")
    if sigma.dtype not in DTYPES:
        raise TypeError(f"{name} must have a floating dtype, got {sigma.dtype}; taken: {_DTYPE_NAMES}")
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] != x.shape[0]):
        raise ValueError(f"{name} must be a scalar or [B] with B = {x.shape[0]}, got {list(sigma.shape)}")
    if sigma.device != x.device:
        raise ValueError(f"{name} is on {sigma.device}, the batch on {x.device}: move one of them")
    if sigma.is_cpu and sigma.numel() and has_values(sigma):
        low, high = _ends(sigma)
        if not (low > 0 if divides else low >= 0):
            kind = "positive" if divides else "0 or more"
            raise ValueError(f"{name} holds noise levels and must be {kind} and not NaN, got {low}")
        if divides and high == math.inf:
            raise ValueError(f"{name} holds noise levels and must be finite, got inf")


def choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """One of the known names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def positive(name: str, value: Any, *, finite: bool = True) -> None:
    """A number above 0, finite or not. By comparisons, which torch.compile traces where a number varies: not
    math.isfinite."""
    if not (isinstance(value, _NUMBERS) and 0 < value and (value < math.inf or not finite)):
        _no_tensor(name, value)
        raise ValueError(f"{name} must be positive, got {value!r}")


def number(name: str, value: Any) -> None:
    """A finite number of 0 or more."""
    if not (isinstance(value, _NUMBERS) and 0 <= value < math.inf):
        _no_tensor(name, value)
        raise ValueError(f"{name} must be a number of 0 or more, got {value}")


def real(name: str, value: Any) -> None:
    """A number of any kind, a tensor's included."""
    if not (isinstance(value, (*_NUMBERS, Tensor)) or isinstance(value, np.ndarray) and value.ndim == 0):
        raise TypeError(f"{name} must be a number, got {value!r}")


def finite(name: str, value: Any) -> None:
    """A finite number."""
    if not (isinstance(value, _NUMBERS) and -math.inf < value < math.inf):
        _no_tensor(name, value)
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def part(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if not (isinstance(value, _NUMBERS) and 0 <= value < 1):
        _no_tensor(name, value)
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def _no_tensor(name: str, value: object) -> None:
    """Before a refusal of values: whatever number it holds, a tensor is none."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Python number, got a tensor")


def sizes(name: str, value: object) -> tuple[int, ...]:
    """The shape of a sample."""
    shape: tuple[Any, ...] | None
    try:
        shape = None if isinstance(value, Set | Mapping) else tuple(value)  # type: ignore[arg-type]  # or else:
    except TypeError:
        shape = None
    if shape is None or not all(isinstance(n, _INTEGERS) and type(n) is not bool and n >= 0 for n in shape):
        raise TypeError(f"{name} must be a shape of integers of 0 or more, got {value!r}")
    # NumPy's as Python's.
    return tuple(n if type(n) in (int, torch.SymInt) else int(n) for n in shape)


def sigma_data_value(sigma_data: float | None) -> None:
    """Positive, or None for a network that is itself the denoiser."""
    if sigma_data is not None and not (isinstance(sigma_data, _NUMBERS) and 0 < sigma_data < math.inf):
        _no_tensor("sigma_data", sigma_data)
        raise ValueError(f"sigma_data must be positive, or None, got {sigma_data}")


def whole(name: str, value: object, least: int | None = None) -> int:
    """The number as an int. Raises: TypeError: it is no whole number; ValueError: it is below `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # or else:
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}")
    return number
