"""Noise: drawn from counters, added to data, and added back between sampling steps.

Where an operation takes noise, that is a tensor, or a `Draw(seed, index, draw)` which a kernel makes on the spot and
never stores: the numbers of `normal(seed, index, shape, draw=draw)`.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cmfast import native, reference
from cmfast.native import noise as native_noise
from cmfast.ops import _check
from cmfast.ops._autograd import fused
from cmfast.ops._dispatch import INTEGERS, plain, plain_on_cpu, use_kernel
from cmfast.ops.precondition import check_step
from cmfast.reference import Draw
from cmfast.reference._common import compute_dtype


def normal(
    seed: int | Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    *,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, 1) of shape [B, *shape] that depends on (seed, index[b], draw, element) alone: Philox4x32-10.

    Args: seed: an integer, of which 64 bits count, or an integer scalar tensor; index: [B] sample indices, whose device
        the result is on; draw: 0 for a sample's first draw, 1 for the next, and so on.
    Raises: TypeError: an index, seed or draw that is no integer, or a dtype that is not floating.

    >>> a = normal(7, torch.tensor([0, 1, 2]), (3, 4, 4))
    >>> b = normal(7, torch.tensor([2]), (3, 4, 4))
    >>> bool((a[2] == b[0]).all())
    True
    """
    _check.sample_index(index)
    seed = _check.integer("seed", seed, index.device)
    draw = _check.integer("draw", draw, index.device)
    if dtype not in _check.DTYPES:
        raise TypeError(f"dtype must be floating, got {dtype}")
    shape = _check.sizes("shape", shape)
    if use_kernel("normal", Draw(seed, index, draw), dtypes=(dtype,)):
        from cmfast.kernels.normal import normal_fwd

        return normal_fwd(seed, index, shape, draw=draw, dtype=dtype)
    noise = _made(Draw(seed, index, draw), shape, dtype)
    return reference.normal(*noise[:2], shape, draw=draw, dtype=dtype) if isinstance(noise, Draw) else noise


def _made(noise: Tensor | Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | Draw:
    """The numbers of a draw [B, *shape] where C makes them, on a CPU; else what was given."""
    if not isinstance(noise, Draw) or dtype != torch.float32:
        return noise
    tensors = [x for x in noise if isinstance(x, Tensor)]
    if not plain_on_cpu(tensors, INTEGERS) or native.watched() or native_noise.refusal() is not None:
        return noise
    return native_noise.normal(noise.seed, noise.index, shape, noise.draw)


def _served(function: Callable[..., Any], *inputs: Any, state: Tensor, **options: Any) -> Any:
    """An operation of the reference, or what serves it: noise that is drawn is made on the way, or else before."""
    form = plain(function, *inputs, state=state)
    if form is function:
        shape, dtype = tuple(state.shape[1:]), compute_dtype(state)
        inputs = tuple(_made(x, shape, dtype) if isinstance(x, Draw) else x for x in inputs)
    return form(*inputs, **options)


def uniform_int(seed: int | Tensor, index: Tensor, high: int, *, draw: int | Tensor = 0) -> Tensor:
    """One integer in [0, high) per sample, int64 [B], from (seed, index[b], draw) alone. index [B]: as in `normal`.

    Raises: TypeError: an index, seed or draw that is no integer. ValueError: high not from 1 to 2**31.

    >>> uniform_int(0, torch.arange(4), 10).shape
    torch.Size([4])
    """
    _check.sample_index(index)
    seed = _check.integer("seed", seed, index.device)
    draw = _check.integer("draw", draw, index.device)
    if not isinstance(high, int | Integral) or not 0 < high <= 2**31:
        raise ValueError(f"high must be an integer from 1 to 2**31, got {high}")
    return reference.uniform_int(seed, index, high, draw=draw)


def init_noise(
    noise: Tensor | Draw,
    sigma: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    state_dtype: torch.dtype | None = None,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_T = sigma noise [B, ...], the first network input in `dtype`, and c_noise [B].

    Args: noise [B, ...], or a `Draw` of samples of `shape` in `state_dtype` (default float32); sigma scalar or [B];
        dtype, memory_format: of the network input (default: as the state lies); sigma_data: None for D itself.
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x, model_input, c_noise = init_noise(Draw(0, torch.arange(2)), torch.tensor(80.0), shape=(3, 8, 8))
    >>> x.shape, c_noise.shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2]))
    """
    options: dict[str, Any] = {"shape": shape, "sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    if isinstance(noise, Draw):
        if shape is None:
            raise ValueError("shape is missing: a draw needs the shape of a sample, such as shape=(3, 64, 64)")
        options["state_dtype"] = state_dtype = state_dtype or torch.float32
        _check.sample_index(noise.index)
        options["shape"] = shape = _check.sizes("shape", shape)
        batch = torch.empty(noise.index.shape[0], *shape, dtype=state_dtype, device="meta")
        _check.input_format(batch, state_dtype, None)
        noise = _check.draw_for("noise", noise, noise.index, "index")
        _check.sigma_level("sigma", sigma, noise.index)
    else:
        if shape is not None or state_dtype is not None:
            raise ValueError("shape and state_dtype go with a Draw: given noise has its own")
        _check.float_tensor("noise", noise)
        _check.sigma_level("sigma", sigma, noise)
        options["state_dtype"], batch = noise.dtype, noise
    _check.sigma_data_value(sigma_data)
    _check.input_format(batch, dtype, memory_format)
    if use_kernel("init_noise", noise, sigma, dtypes=(dtype, state_dtype)):
        from cmfast.kernels.noise import init_noise_bwd, init_noise_fwd

        return fused(init_noise_fwd, init_noise_bwd, reference.init_noise, noise, sigma, c_noise=(2,), **options)
    noise = _made(noise, shape or (), options["state_dtype"])
    if isinstance(noise, Draw):
        return reference.init_noise(noise, sigma, **options)
    return plain(reference.init_noise, noise, sigma, state=noise)(noise, sigma, **options)


def _check_data(
    x_start: Tensor,
    noise: Tensor | Draw,
    sigma: Tensor,
    sigma_data: float | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> Tensor | Draw:
    """The noise."""
    _check.float_tensor("x_start", x_start)
    noise = _check.noise_like(noise, x_start, "x_start")
    _check.sigma_level("sigma", sigma, x_start)
    _check.sigma_data_value(sigma_data)
    _check.input_format(x_start, dtype, memory_format)
    return noise


def add_noise(
    x_start: Tensor,
    noise: Tensor | Draw,
    sigma: Tensor,
    *,
    input_sigma: Tensor | None = None,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = x_start + sigma noise [B, ...], the network input in `dtype`, and c_noise [B].

    `input_sigma`: the level of x_t where that is not sigma, because x_start was noisy already. In consistency training
    the Euler step is this op too: D is x_start, so that the next point is x_start + sigma' noise with the same noise.

    Args: x_start [B, ...]; noise like it, or a `Draw` of as many samples; sigma, input_sigma scalar or [B], in data
        units; sigma_data, dtype, memory_format: of the network input, as in `init_noise`.
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x_t, model_input, c_noise = add_noise(torch.zeros(2, 3, 8, 8), Draw(0, torch.arange(2)), torch.tensor(1.0))
    >>> bool((x_t == normal(0, torch.arange(2), (3, 8, 8))).all())
    True
    """
    noise = _check_data(x_start, noise, sigma, sigma_data, dtype, memory_format)
    if input_sigma is not None:
        _check.sigma_level("input_sigma", input_sigma, x_start)
    inputs = x_start, noise, sigma, input_sigma
    options: dict[str, Any] = {"sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    if use_kernel("add_noise", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.noise import add_noise_bwd, add_noise_fwd

        return fused(add_noise_fwd, add_noise_bwd, reference.add_noise, *inputs, c_noise=(2,), **options)
    return _served(reference.add_noise, *inputs, state=x_start, **options)


def add_noise_pair(
    x_start: Tensor,
    noise: Tensor | Draw,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`add_noise` at sigma and at next_sigma with one draw: both points of a pair on one trajectory.

    Returns (x_t, network input, c_noise) of either. Arguments as in `add_noise`; next_sigma scalar or [B].

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> (x_t, *_), (x_t2, *_) = add_noise_pair(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor(2.0),
    ...                                        torch.tensor(1.0))
    >>> x_t.max().item(), x_t2.max().item()
    (2.0, 1.0)
    """
    noise = _check_data(x_start, noise, sigma, sigma_data, dtype, memory_format)
    _check.sigma_level("next_sigma", next_sigma, x_start)
    inputs = x_start, noise, sigma, next_sigma
    options: dict[str, Any] = {"sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    if use_kernel("add_noise_pair", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.noise import add_noise_pair_bwd, add_noise_pair_fwd

        pair = add_noise_pair_fwd, add_noise_pair_bwd, reference.add_noise_pair
        six: Any = fused(*pair, *inputs, c_noise=(2, 5), **options)
    else:
        six = _served(reference.add_noise_pair, *inputs, state=x_start, **options)
    return six[:3], six[3:]


def renoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor | Draw,
    *,
    sigma_min: float = 0.002,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = D + sqrt(sigma'^2 - sigma_min^2) noise: a step of multistep sampling, Song et al. 2023, algorithm 1.

    Returns x' in the dtype of x_t, the next network input in `dtype` (default: that of model_output, and laid out as
    it), c_noise [B].

    Args: model_output F [B, ...]; x_t [B, ...]; sigma, next_sigma scalar or [B], in data units; noise like x_t, or a
        `Draw`; sigma_min: where no noise is left; boundary: where D is the identity; clip: clamp D to [-1, 1].
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x = torch.ones(1, 3, 8, 8)
    >>> renoise(x, x, torch.tensor(0.002), torch.tensor(0.002), Draw(0, torch.tensor([0])))[0].unique()
    tensor([1.])
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary)
    noise = _check.noise_like(noise, x_t, "x_t")
    _check.sigma_level("next_sigma", next_sigma, x_t)
    _check.number("sigma_min", sigma_min)
    _check.input_format(x_t, dtype, None)
    inputs = model_output, x_t, sigma, next_sigma, noise
    options: dict[str, Any] = {
        "sigma_min": sigma_min,
        "sigma_data": sigma_data,
        "boundary": boundary,
        "clip": clip,
        "dtype": dtype,
    }
    if use_kernel("renoise", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.renoise import renoise_bwd, renoise_fwd

        return fused(renoise_fwd, renoise_bwd, reference.renoise, *inputs, c_noise=(2,), **options)
    return _served(reference.renoise, *inputs, state=x_t, **options)
