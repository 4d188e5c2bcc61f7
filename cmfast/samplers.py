"""The sampling algorithms. Each is a loop of network calls and one operation between them.

A model is a `Denoiser`, or any D(x, sigma[, labels]) -> denoised batch, whose outputs may share one memory, as those of
a CUDA graph do: heun and dpm then call it once more, and keep copies. Noise levels are known before a loop starts,
so that no step reads a tensor on the host: `sigmas` may be floats or a tensor, which is read once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast import ops, schedules
from cmfast.denoiser import Evaluator, Model, evaluator, is_bounded, noise_range
from cmfast.levels import Sigmas, on_device, read_levels
from cmfast.noise import NoiseFn, take
from cmfast.ops import _check
from cmfast.ops.images import ROUNDINGS

#: Called once a step with x, i, sigma, sigma_hat and denoised.
Callback = Callable[[dict[str, Any]], None]
#: The network's input at the first level and its c_noise, where they are there already.
First = tuple[Tensor, Tensor] | None


def _steps(count: int, progress: bool) -> Iterable[int]:
    if not progress:
        return range(count)
    from tqdm.auto import trange

    return trange(count)


def _report(
    callback: Callback | None,
    evaluate: Evaluator,
    model_output: Tensor,
    x: Tensor,
    i: int,
    sigma: Tensor,
    sigma_hat: Tensor,
) -> None:
    """Give a callback what it needs; D is computed for its sake only."""
    if callback is not None:
        denoised = evaluate.denoised(model_output, x, sigma_hat)
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})


def sample_onestep(model: Model, x: Tensor, sigmas: Sigmas, **options: Any) -> Tensor:
    """D(x, sigmas[0]): one network call. x = sigmas[0] noise, [B, C, H, W]. Options: as in `sample_multistep`.

    >>> sample_onestep(lambda x, sigma: 0.1 * x, 80.0 * torch.randn(2, 1, 8, 8), [80.0]).shape
    torch.Size([2, 1, 8, 8])
    """
    return sample_multistep(model, x, read_levels(sigmas, least=1)[:1], **options)


@torch.no_grad()
def sample_multistep(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    *,
    labels: Tensor | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    clip_denoised: bool = True,
    sigma_min: float | None = None,
    end_sigma: float | None = None,
    pixels: str | None = None,
    first: First = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Song et al. 2023, algorithm 1: denoise, add noise of the next level, denoise again.

    Args: x [B, C, H, W] = sigmas[0] noise; sigmas: the levels at which the model is evaluated, in data units.
        labels: int64 [B], of a class-conditional model.
        noise_fn: x -> standard normal noise like x, called between two steps.
        clip_denoised: clamp D to [-1, 1].
        sigma_min: where noise ends: noise of a level l is sqrt(l^2 - sigma_min^2). None: what the model says, or 0.002.
        end_sigma: add noise of this level to the result too, sqrt(end_sigma^2 - sigma_min^2); the original always
        does (with a level of sigma_min that adds nothing, but draws). None: do not.
        pixels: return uint8 [B, H, W, C] with this rounding, `"trunc"` or `"nearest"`; needs end_sigma=None.
        first: the network's input at (x, sigmas[0]) and its c_noise, if known.
        progress: show a bar. callback: called once a step with a dict: i, sigma, sigma_hat, x (before the step) and
        denoised (D, the picture so far).

    Raises: ValueError: no level, one that is negative, NaN or infinite, a 0 that is not the last of several, or pixels
        with an end_sigma. Their order is not looked at.

    >>> sample_multistep(lambda x, sigma: 0.1 * x, 80.0 * torch.randn(2, 1, 8, 8), [80.0, 1.382]).shape
    torch.Size([2, 1, 8, 8])
    """
    if pixels is not None and end_sigma is not None:
        raise ValueError("pixels are made of the last D: leave end_sigma out")
    sigma_min = least_sigma(model) if sigma_min is None else sigma_min
    evaluate = evaluator(model, labels, clip_denoised)
    levels = read_levels(sigmas, least=1)
    sigma = on_device([*levels, 0.0 if end_sigma is None else end_sigma], x)
    model_input, c_noise = first or evaluate.scale_input(x, sigma[0])
    for i in _steps(len(levels), progress):
        model_output = evaluate(model_input, c_noise)
        _report(callback, evaluate, model_output, x, i, sigma[i], sigma[i])
        if i + 1 == len(levels) and end_sigma is None:  # no return from here: the bar would stop one short of its end
            if pixels is not None:
                x = evaluate.pixels(model_output, x, sigma[i], pixels)
            else:
                x = evaluate.denoised(model_output, x, sigma[i])
            continue
        x, model_input, c_noise = ops.renoise(
            model_output,
            x,
            sigma[i],
            sigma[i + 1],
            take(noise_fn, x),
            sigma_min=sigma_min,
            **evaluate.step_options,
        )
    return x


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    *,
    labels: Tensor | None = None,
    clip_denoised: bool = True,
    first: First = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps of the probability-flow ODE from sigmas[0] to sigmas[-1]: first order, n - 1 network calls.

    Args: x [B, C, H, W] = sigmas[0] noise; sigmas: n levels that fall, in data units; the rest as in
        `sample_multistep`.

    >>> sample_euler(lambda x, sigma: 0.1 * x, 80.0 * torch.randn(2, 1, 8, 8), [80.0, 1.0, 0.0]).shape
    torch.Size([2, 1, 8, 8])
    """
    evaluate = evaluator(model, labels, clip_denoised)
    levels = read_levels(sigmas, least=2)
    sigma = on_device(levels, x)
    model_input, c_noise = first or evaluate.scale_input(x, sigma[0])
    for i in _steps(len(levels) - 1, progress):
        model_output = evaluate(model_input, c_noise)
        _report(callback, evaluate, model_output, x, i, sigma[i], sigma[i])
        x, model_input, c_noise = ops.euler_step(model_output, x, sigma[i], sigma[i + 1], **evaluate.step_options)
    return x


def sample_progdist(model: Model, x: Tensor, sigmas: Sigmas, **options: Any) -> Tensor:
    """Euler steps that stop at the last positive level: how progressively distilled models are sampled.

    Args: x [B, C, H, W] = sigmas[0] noise; sigmas: the levels, in data units; options: as in `sample_euler`.
    """
    levels = read_levels(sigmas, least=2)
    return sample_euler(model, x, levels[:-1] if levels[-1] == 0 else levels, **options)


def _churned(levels: list[float], s_churn: float, s_tmin: float, s_tmax: float) -> tuple[list[float], list[bool]]:
    """The raised levels sigma_hat = (1 + gamma) sigma, and where they are raised: Karras et al. 2022, algorithm 2."""
    if not s_churn >= 0:
        raise ValueError(f"s_churn must be 0, which is none, or more, got {s_churn}")
    steps = len(levels) - 1
    gamma = min(s_churn / steps, 2**0.5 - 1)
    # Compared in float32, as levels held in a float32 tensor are.
    low, high = np.float32(s_tmin), np.float32(s_tmax)
    raised = [gamma > 0 and bool(low <= np.float32(sigma) <= high) for sigma in levels[:-1]]
    return [s * (1 + gamma) if up else s for s, up in zip(levels[:-1], raised, strict=True)], raised


def overwritten(first: Tensor, second: Tensor) -> bool:
    """Whether a model's second output is in the memory of its first, which is lost: CUDA graphs and TensorRT have one
    place for all."""
    return _check.has_memory(first) and _check.has_memory(second) and 0 != first.data_ptr() == second.data_ptr()


def _second_order(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    *,
    midpoint: bool,
    labels: Tensor | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    clip_denoised: bool = True,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    draw_unused: bool = False,
    first: First = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """The loop that Heun's method and the midpoint method share: churn, predict, correct."""
    evaluate = evaluator(model, labels, clip_denoised)
    levels = read_levels(sigmas, least=2)
    hats, raised = _churned(levels, s_churn, s_tmin, s_tmax)
    # The midpoint of a rho = 3 Karras schedule, or for Heun's method the end of the step.
    mids = (
        [((hat ** (1 / 3) + to ** (1 / 3)) / 2) ** 3 for hat, to in zip(hats, levels[1:], strict=True)]
        if midpoint
        else levels[1:]
    )
    added = [s_noise * max(hat**2 - level**2, 0.0) ** 0.5 for hat, level in zip(hats, levels[:-1], strict=True)]
    sigma, hat, mid, churn = (on_device(values, x) for values in (levels, hats, mids, added))
    options = evaluate.step_options
    one_memory = False  # of all outputs
    model_input, c_noise = first or evaluate.scale_input(x, sigma[0])
    for i in _steps(len(levels) - 1, progress):
        noise = take(noise_fn, x) if raised[i] or draw_unused else None
        if raised[i] and noise is not None:
            x, model_input, c_noise = ops.add_noise(x, noise, churn[i], input_sigma=hat[i], **evaluate.input_options)
        model_output = evaluate(model_input, c_noise)
        _report(callback, evaluate, model_output, x, i, sigma[i], hat[i])
        if mids[i] == 0:
            x, model_input, c_noise = ops.euler_step(model_output, x, hat[i], sigma[i + 1], **options)
            continue
        mid_input, mid_noise = ops.heun_predictor(model_output, x, hat[i], mid[i], **options)
        model_output = model_output.clone() if one_memory else model_output
        mid_output = evaluate(mid_input, mid_noise)
        if overwritten(model_output, mid_output):
            one_memory = True
            mid_output, model_output = mid_output.clone(), evaluate(model_input, c_noise)
        if midpoint:
            x, model_input, c_noise = ops.midpoint_corrector(
                model_output, mid_output, x, hat[i], mid[i], sigma[i + 1], **options
            )
        else:
            x, model_input, c_noise = ops.heun_corrector(model_output, mid_output, x, hat[i], sigma[i + 1], **options)
    return x


@torch.no_grad()
def sample_heun(model: Model, x: Tensor, sigmas: Sigmas, **options: Any) -> Tensor:
    """Karras et al. 2022, algorithm 2: Heun's method with churn; 2 n - 3 network calls for n levels ending in 0.

    Args: x [B, C, H, W] = sigmas[0] noise; sigmas: levels that fall, in data units; labels int64 [B]; options:
        noise_fn, clip_denoised, progress, callback: as in `sample_multistep`;
        s_churn, s_tmin, s_tmax, s_noise: noise raised at each step by min(s_churn / steps, sqrt(2) - 1) between
        the levels s_tmin and s_tmax, with noise scaled by s_noise;
        draw_unused: draw noise at every step, also where none is added, as the original does (generators stay in
        step with it).
    Raises: ValueError: a negative s_churn.

    >>> sample_heun(lambda x, sigma: 0.1 * x, 80.0 * torch.randn(2, 1, 8, 8), [80.0, 1.0, 0.0]).shape
    torch.Size([2, 1, 8, 8])
    """
    return _second_order(model, x, sigmas, midpoint=False, **options)


@torch.no_grad()
def sample_dpm(model: Model, x: Tensor, sigmas: Sigmas, **options: Any) -> Tensor:
    """DPM-Solver-2 with churn: the slope at the midpoint of a rho = 3 schedule. Arguments as in `sample_heun`."""
    return _second_order(model, x, sigmas, midpoint=True, **options)


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    *,
    labels: Tensor | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    clip_denoised: bool = True,
    draw_unused: bool = False,
    first: First = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling: an Euler step down to sigma_down, then noise of sigma_up, which lands at the next level.

    Args: x [B, C, H, W] = sigmas[0] noise; sigmas: levels that fall, in data units; draw_unused: as in `sample_heun`;
        the rest as in `sample_multistep`.
    """
    evaluate = evaluator(model, labels, clip_denoised)
    levels = read_levels(sigmas, least=2)
    pairs = [schedules.ancestral_levels(a, b) for a, b in zip(levels, levels[1:], strict=False)]
    downs, ups = zip(*pairs, strict=True)
    sigma, down, up = on_device(levels, x), on_device(downs, x), on_device(ups, x)
    model_input, c_noise = first or evaluate.scale_input(x, sigma[0])
    for i in _steps(len(levels) - 1, progress):
        model_output = evaluate(model_input, c_noise)
        _report(callback, evaluate, model_output, x, i, sigma[i], sigma[i])
        x, model_input, c_noise = ops.euler_step(model_output, x, sigma[i], down[i], **evaluate.step_options)
        noise = take(noise_fn, x) if ups[i] > 0 or draw_unused else None
        if ups[i] > 0 and noise is not None:
            x, model_input, c_noise = ops.add_noise(x, noise, up[i], input_sigma=sigma[i + 1], **evaluate.input_options)
    return x


@torch.no_grad()
def sample_midpoint_ancestral(
    slope: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    ts: Sigmas,
    *,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Midpoint steps of size h = 1 / len(ts) along dx/dt = slope(x, t): x + h slope(x + h/2 slope(x, t), t + h/2).

    As in the original, `slope` gives a derivative, not a denoised batch, and the steps are equal whatever ts holds.
    x [B, C, H, W]; progress and callback as in `sample_multistep`. Raises: ValueError: no ts.
    """
    levels = ts.tolist() if isinstance(ts, Tensor) else [float(t) for t in ts]
    if not levels:
        raise ValueError("ts must hold one time or more, got none: as many as there are steps")
    h = 1 / len(levels)
    batch = x.new_ones(x.shape[0])
    times = on_device(levels, x)
    for i in _steps(len(levels), progress):
        dn = slope(x, times[i] * batch)
        dn_2 = slope(x + (h / 2) * dn, (times[i] + h / 2) * batch)
        x = x + h * dn_2
        if callback is not None:
            callback({"x": x, "tn": times[i], "dn": dn, "dn_2": dn_2})
    return x


#: Samplers by the original's names.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "onestep": sample_onestep,
    "multistep": sample_multistep,
    "heun": sample_heun,
    "euler": sample_euler,
    "dpm": sample_dpm,
    "ancestral": sample_euler_ancestral,
    "progdist": sample_progdist,
}


#: Those whose arguments are another's.
_AS: dict[str, Callable[..., Tensor]] = {
    "onestep": sample_multistep,
    "progdist": sample_euler,
    "heun": _second_order,
    "dpm": _second_order,
}
#: What `sample` gives a sampler by itself.
_OWN = {"model", "x", "sigmas", "labels", "first", "pixels", "midpoint"}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


#: What an option must be, by its annotation: in words, and whether a value is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    "float": ("a number", _is_number),
    "float | None": ("a number or None", lambda value: value is None or _is_number(value)),
    "NoiseFn": ("a function of x", callable),
    "Callback | None": ("a function or None", lambda value: value is None or callable(value)),
}


@functools.cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def check_options(sampler: str, options: Mapping[str, Any]) -> None:
    """Raises: TypeError: an option that the sampler does not have, or a value that is none for it."""
    parameters = _parameters(_AS.get(sampler, SAMPLERS[sampler]))
    known = [name for name in parameters if name not in _OWN]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)} of the {sampler} sampler; known: {', '.join(known)}")
    for name, value in options.items():
        what, fits = _KINDS[parameters[name].annotation]
        if not fits(value):
            raise TypeError(f"option {name} of the {sampler} sampler must be {what}, got {value!r}")


ONE_OF_THREE = "give one of steps, sigmas and ts, not more"


def sampler_sigmas(
    sampler: str,
    *,
    steps: int | None = None,
    sigmas: Sigmas | None = None,
    ts: Sequence[int] | None = None,
    num_scales: int = 40,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
) -> list[float]:
    """The noise levels of a sampler from exactly one of `steps`, `sigmas`, `ts` (default: steps=1, 18 for solvers).

    For `multistep`: the levels of the model's evaluations: `steps=2` is [80, 1.382], which is `ts=(0, 22, 39)` of
    `num_scales=40`. For ODE solvers: `steps` Karras levels and 0 (`progdist`: one level more); `sigmas` that do not end
    in 0 leave noise of the last level in the images. sigma_min, sigma_max, rho: of the grid.

    Raises: ValueError: an unknown sampler, more than one of the three, or levels that make no schedule.

    >>> [round(s, 3) for s in sampler_sigmas("multistep", steps=2)]
    [80.0, 1.382]
    >>> [round(s, 3) for s in sampler_sigmas("multistep", ts=(0, 22, 39))]
    [80.0, 1.382]
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if sum(given is not None for given in (steps, sigmas, ts)) > 1:
        raise ValueError(ONE_OF_THREE)
    if steps is not None:
        steps = _check.whole("steps", steps, least=1)
    few = sampler in ("onestep", "multistep")
    options: dict[str, Any] = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    if sigmas is not None:
        levels = read_levels(sigmas, least=1 if few else 2)
        if any(b >= a for a, b in zip(levels, levels[1:], strict=False)):
            raise ValueError(f"sigmas must decrease, got {levels}")
        # As the original's function, which is given a whole grid.
        return levels[:1] if sampler == "onestep" else levels
    if ts is not None:
        levels = schedules.multistep_sigmas(ts, num_scales, **options)
        if ts[-1] != num_scales - 1:
            raise ValueError(f"ts must end at {num_scales - 1}, where sigma is sigma_min; got {list(ts)}")
        # The last index is where sampling ends; noise of sigma_min adds nothing.
        if sampler == "onestep" and len(ts) > 2:
            raise ValueError(f"the onestep sampler takes one step, got ts={tuple(ts)}; use sampler='multistep'")
        return levels[:-1] if few else [*levels, 0.0]
    if sampler == "onestep" and steps not in (None, 1):
        raise ValueError(f"the onestep sampler takes one step, got steps={steps}; use sampler='multistep'")
    if few:
        return schedules.step_sigmas(1 if steps is None else steps, **options)
    count = 18 if steps is None else steps
    count += sampler == "progdist"
    return schedules.karras_sigmas(count, dtype=torch.float64, device="cpu", **options).tolist()


def least_sigma(model: object) -> float:
    """The model's own sigma_min, or the original's."""
    return float(noise_range(model).get("sigma_min", schedules.SIGMA_MIN))


def check_pixels(pixels: str, bounded: bool) -> None:
    """Raises: ValueError: `pixels` is an unknown rounding, or is one and the data are not `bounded`."""
    _check.choice("pixels", pixels, ROUNDINGS)
    if not bounded:
        raise ValueError(f"pixels={pixels!r} are made of data in [-1, 1], and bounded=False says that these are not")


def sample(
    model: Model,
    noise: Tensor | ops.Draw,
    *,
    sampler: str = "multistep",
    steps: int | None = None,
    sigmas: Sigmas | None = None,
    ts: Sequence[int] | None = None,
    labels: Tensor | None = None,
    image_shape: tuple[int, ...] | None = None,
    clip_denoised: bool = True,
    bounded: bool | None = None,
    pixels: str | None = None,
    **options: Any,
) -> Tensor:
    """Images in [-1, 1], [B, C, H, W], from unit noise of that shape; or pixels; or data of any shape and range.

    The model runs in the mode it is in, and a new `Denoiser` is in training mode: call `model.eval()` where it has
    dropout. A `Sampler` sees to that by itself.

    Args: model: a `Denoiser`, or D(x, sigma[, labels]); noise: a tensor, or an `ops.Draw` for images of `image_shape`
        (C, H, W), or (C, ...), in float32; sampler: one of `SAMPLERS`; steps, sigmas or ts: its noise levels, as in
        `sampler_sigmas`; labels int64 [B] if class-conditional; clip_denoised: clamp D to [-1, 1] at every step (what
        comes out is clamped in any case); bounded: False, of data without a range such as latents: clamp nothing
        (default: what the model says, else True); pixels: return uint8 [B, H, W, C] with this rounding, `"trunc"` or
        `"nearest"`; options: the sampler's.
    Raises: ValueError: an unknown sampler, levels that do not fit it, a draw without an image_shape, or pixels of data
        without a range. TypeError: an option that the sampler does not have, or noise or an option that is none.

    >>> images = sample(lambda x, sigma: 0.1 * x, torch.randn(2, 1, 8, 8), sampler="euler")
    >>> images.shape
    torch.Size([2, 1, 8, 8])
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if options and not torch.compiler.is_compiling():
        check_options(sampler, options)
    if not isinstance(noise, ops.Draw):
        _check.float_tensor("noise", noise)
    bounded = is_bounded(model) if bounded is None else _check.flag("bounded", bounded)
    if pixels is not None:
        check_pixels(pixels, bounded)
    known = noise_range(model)
    if sigmas is None:
        levels = sampler_sigmas(sampler, steps=steps, ts=ts, **known)
    elif steps is None and ts is None:
        levels = read_levels(sigmas, least=1)
    else:
        raise ValueError(ONE_OF_THREE)
    few = sampler in ("onestep", "multistep")
    if few and options.get("sigma_min") is None:
        options["sigma_min"] = least_sigma(model)
    evaluate = evaluator(model, labels, clip_denoised, bounded=bounded)
    drawn = isinstance(noise, ops.Draw)
    like = noise.index.new_empty(0, dtype=torch.float32) if isinstance(noise, ops.Draw) else noise
    level = on_device(levels[:1], like)[0]
    with torch.no_grad():
        first_options = evaluate.settle(like.dtype).input_options
        x, model_input, c_noise = ops.init_noise(noise, level, shape=image_shape if drawn else None, **first_options)
    options["first"] = model_input, c_noise
    ends = few and options.get("end_sigma") is None
    if ends and pixels is not None:
        return SAMPLERS[sampler](evaluate, x, levels, pixels=pixels, **options)
    x = SAMPLERS[sampler](evaluate, x, levels, **options)
    if pixels is not None:
        return ops.to_uint8(x, rounding=pixels)
    # What a clipping model ends with is clamped already.
    return x if ends and evaluate.clip or not bounded else x.clamp(-1, 1)
