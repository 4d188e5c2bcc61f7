"""Steps of samplers, noise added, and pixels on a CPU, each in one pass over its batch: by the functions of steps.c.

Forms of the operations of `cmfast.reference`, with their arguments and, within rounding, their results, for states that
`fits`: a network's output may have other dtypes and strides. Not with gradients.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmfast import native
from cmfast.native import noise as native_noise
from cmfast.reference import Draw
from cmfast.reference._common import as_input

#: Of a state, and what everything is computed in.
DTYPE = torch.float32
#: Of what else is taken, a network's outputs above all.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Numbers in a batch from which on all threads do it.
LEAST = 1 << 15

_INPUT, _INIT, _NOISE, _DENOISE, _RENOISE, _EULER, _HEUN, _MIDPOINT = range(8)

Results = tuple[Tensor, ...]


class _Functions:
    """Those of steps.c for a CPU."""

    def __init__(self, cpu: str | None = None) -> None:
        # Arguments as in steps.c.
        function = functools.partial(native.function, native.library(cpu))
        pointer, number, real, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
        level, sizes = (pointer, number), (*[number] * 3, flag)

        draw = pointer, ctypes.c_ulong, ctypes.c_uint
        self.step = function(
            "steps_step", flag, *[pointer] * 10, *draw, *level * 3, *[real] * 3, flag, *[number] * 4, flag
        )
        self.pixels = function("steps_pixels", *[pointer] * 3, *level, real, real, flag, *sizes)


#: Those for a CPU, None: this one. Raises: Unavailable: they cannot be had here.
functions = functools.cache(_Functions)
#: Why they cannot be had here; None if they can.
refusal = functools.cache(functools.partial(native.refusal, functions))


def fits(x: Tensor) -> bool:
    """Whether a batch x [B, ...] can be gone through so: float32, and one sample after the other without gaps."""
    return x.dtype == DTYPE and x.numel() > 0 and (x.is_contiguous() or native.channels_last(x)) and refusal() is None


def beside(x: Tensor | None, state: Tensor) -> Tensor:
    """x in float32 and as the state lies in memory; for nothing the state, which is not read."""
    if x is None or (x.dtype == DTYPE and x.stride() == state.stride()):
        return state if x is None else x
    # Not by its strides, of which those of dimensions of one element say nothing.
    memory_format = torch.contiguous_format if state.is_contiguous() else native.CHANNELS_LAST[x.ndim]
    return x.to(DTYPE).contiguous(memory_format=memory_format)


def level(sigma: Tensor) -> tuple[Tensor, int]:
    """Levels of samples in float32, a scalar or [B], and how far in memory one sample's is from the next's."""
    if sigma.dtype != DTYPE:
        sigma = sigma.to(DTYPE)
    return sigma, sigma.stride(0) if sigma.ndim else 0


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, numbers in each, threads."""
    total, batch = x.numel(), x.shape[0]
    return batch, total // batch, native.threads(total, LEAST)


def real(sigma_data: float | None) -> float:
    """NaN for a network that is D itself."""
    return math.nan if sigma_data is None else sigma_data


def step(
    kind: int,
    x: Tensor,
    output: Tensor | None = None,
    output2: Tensor | None = None,
    noise: Tensor | Draw | None = None,
    *,
    levels: tuple[Tensor, Tensor, Tensor],
    sigma_data: float | None,
    boundary: float = 0.0,
    sigma_min: float = 0.0,
    clip: bool = False,
    keeps: bool = True,
    tells: bool = True,
    pair: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    cpu: str | None = None,
) -> Results:
    """x' if it `keeps` it, and if it `tells` the network its input at x' and the last level, with its c_noise [B].

    levels: that of x, that of the second slope, that of the input; of a `pair`, the second is its second point's.
    """
    index, seed, draw = None, 0, 0
    if isinstance(noise, Draw):
        if x.is_contiguous():
            index, seed, draw = native_noise.words(noise)
            noise = None
        else:
            noise = native_noise.normal(noise.seed, noise.index, tuple(x.shape[1:]), noise.draw)
    output, output2, noise = beside(output, x), beside(output2, x), beside(noise, x)
    (sigma, of_sigma), (middle, of_middle), (end, of_end) = map(level, levels)
    batch, count, threads = sizes(x)
    x_next, model_input, c_noise = (torch.empty_like(x) if keeps else None), None, None
    if tells:
        model_input, c_noise = torch.empty_like(x), torch.empty_like(end)
    second = (torch.empty_like(x), torch.empty_like(x), torch.empty_like(middle)) if pair else None
    functions(cpu).step(
        kind,
        None if x_next is None else x_next.data_ptr(),
        None if model_input is None else model_input.data_ptr(),
        None if c_noise is None else c_noise.data_ptr(),
        *((None, None, None) if second is None else [each.data_ptr() for each in second]),
        x.data_ptr(), output.data_ptr(), output2.data_ptr(), noise.data_ptr(),
        None if index is None else index.data_ptr(), seed, draw,
        sigma.data_ptr(), of_sigma, middle.data_ptr(), of_middle, end.data_ptr(), of_end,
        real(sigma_data), boundary, sigma_min, bool(clip),
        batch, count, 0 if c_noise is None else c_noise.numel(), 0 if second is None else second[2].numel(), threads,
    )  # fmt: skip
    results = () if x_next is None else (x_next,)
    for first, told in ((model_input, c_noise), (None, None) if second is None else second[1:]):
        if first is None or told is None:
            continue
        if memory_format is not None or dtype not in (None, DTYPE):
            first = as_input(first, dtype or DTYPE, memory_format)
        results = *results, first, told if told.ndim else told.expand(batch)
    return results if second is None else (*results[:3], second[0], *results[3:])


def scale_input(x: Tensor, sigma: Tensor, **options: Any) -> Results:
    return step(_INPUT, x, levels=(sigma, sigma, sigma), keeps=False, **options)


def init_noise(noise: Tensor, sigma: Tensor, *, shape: Any, state_dtype: torch.dtype, **options: Any) -> Results:
    return step(_INIT, noise, levels=(sigma, sigma, sigma), **options)


def add_noise(
    x_start: Tensor, noise: Tensor | Draw, sigma: Tensor, input_sigma: Tensor | None = None, **options: Any
) -> Results:
    end = sigma if input_sigma is None else input_sigma
    return step(_NOISE, x_start, noise=noise, levels=(sigma, sigma, end), **options)


def add_noise_pair(
    x_start: Tensor, noise: Tensor | Draw, sigma: Tensor, next_sigma: Tensor, **options: Any
) -> Results:
    return step(_NOISE, x_start, noise=noise, levels=(sigma, next_sigma, sigma), pair=True, **options)


def denoise(model_output: Tensor, x_t: Tensor, sigma: Tensor, **options: Any) -> Tensor:
    return step(_DENOISE, x_t, model_output, levels=(sigma, sigma, sigma), tells=False, **options)[0]


def renoise(
    model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, noise: Tensor | Draw, **options: Any
) -> Results:
    return _solver(_RENOISE, x_t, model_output, noise=noise, levels=(sigma, sigma, next_sigma), **options)


def euler_step(model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any) -> Results:
    return _solver(_EULER, x_t, model_output, levels=(sigma, sigma, next_sigma), **options)


def heun_predictor(model_output: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any) -> Results:
    return _solver(_EULER, x_t, model_output, levels=(sigma, sigma, next_sigma), keeps=False, **options)


def heun_corrector(
    model_output: Tensor, model_output_next: Tensor, x_t: Tensor, sigma: Tensor, next_sigma: Tensor, **options: Any
) -> Results:
    levels = sigma, next_sigma, next_sigma
    return _solver(_HEUN, x_t, model_output, model_output_next, levels=levels, **options)


def midpoint_corrector(
    model_output: Tensor,
    model_output_mid: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    mid_sigma: Tensor,
    next_sigma: Tensor,
    **options: Any,
) -> Results:
    levels = sigma, mid_sigma, next_sigma
    return _solver(_MIDPOINT, x_t, model_output, model_output_mid, levels=levels, **options)


def _solver(kind: int, x_t: Tensor, model_output: Tensor, *outputs: Tensor, dtype: Any, **options: Any) -> Results:
    """A step whose network input has the dtype of the output before, if no other is asked for."""
    return step(kind, x_t, model_output, *outputs, dtype=dtype or model_output.dtype, **options)


def denoise_to_uint8(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None,
    boundary: float,
    rounding: str,
    cpu: str | None = None,
) -> Tensor:
    return _pixels(x_t, beside(model_output, x_t), sigma, real(sigma_data), boundary, rounding, cpu)


def to_uint8(x: Tensor, *, rounding: str, cpu: str | None = None) -> Tensor:
    return _pixels(x, None, x, math.nan, 0.0, rounding, cpu)


def _pixels(
    x: Tensor, output: Tensor | None, sigma: Tensor, sigma_data: float, boundary: float, rounding: str, cpu: str | None
) -> Tensor:
    batch, count, threads = sizes(x)
    # In channels_last pixels stay where they are: one channel, to C.
    channels = 1 if x.ndim == 2 or native.channels_last(x) else x.shape[1]
    if channels == 1 and output is None:
        batch, count = 1, batch * count
    out = torch.empty(x.shape[0], *x.shape[2:], x.shape[1], dtype=torch.uint8, device="cpu")
    sigma, of_sigma = level(sigma)
    functions(cpu).pixels(
        out.data_ptr(), x.data_ptr(), None if output is None else output.data_ptr(), sigma.data_ptr(), of_sigma,
        sigma_data, boundary, rounding == "nearest", batch, channels, count // channels, threads,
    )  # fmt: skip
    return out


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form
    for form in (
        scale_input,
        init_noise,
        add_noise,
        add_noise_pair,
        denoise,
        renoise,
        euler_step,
        heun_predictor,
        heun_corrector,
        midpoint_corrector,
        denoise_to_uint8,
        to_uint8,
    )
}
