"""The losses: denoising, consistency training and distillation, progressive distillation.

Models are `Denoiser`s (or any D(x, sigma, labels)); each brings its own preconditioning, so that a consistency student
can learn from an EDM teacher. Every loss returns per-sample terms [B], float32 or wider; take `["loss"].mean()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import ops, schedules
from cmfast.denoiser import Evaluator
from cmfast.ops import _check
from cmfast.samplers import Model, _evaluator

#: Those that `ops.consistency_loss` takes from network outputs.
_FUSED_NORMS = ("l1", "l2", "huber")
#: Distances between two denoised batches, by name.
LOSS_NORMS = ("l1", "l2", "l2-32", "huber", "lpips")
SOLVERS = ("heun", "euler")
#: (x, y) -> distance per sample [B], such as `cmfast.perceptual.LPIPS()`.
Perceptual = Callable[[Tensor, Tensor], Tensor]
#: The name of a weighting (`ops.WEIGHTINGS`), or sigma [B] -> weight [B].
Weighting = str | Callable[[Tensor], Tensor]


def distance(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
) -> Tensor:
    """Per sample [B]: weight times the distance of x and target [B, C, H, W].

    `l1`, `l2`: means over the sample. `l2-32`: l2 of both resized to 32 x 32, bilinear. `huber`: pseudo-Huber of the
    sample vector, c = 0.00054 sqrt(D) unless given (Song & Dhariwal 2023). `lpips`: that of the `lpips` module given.

    Raises: ValueError: unknown norm (the message lists the known ones), or `lpips` without a module.
    """
    _check.choice("loss_norm", loss_norm, LOSS_NORMS)
    if loss_norm == "lpips":
        if lpips is None:
            raise ValueError("loss_norm='lpips' needs lpips=, for example lpips=cmfast.perceptual.LPIPS()")
        return lpips(x, target) * weight
    if loss_norm == "l2-32":
        x, target = (F.interpolate(image, size=32, mode="bilinear") for image in (x, target))
    if loss_norm == "huber":
        return ops.weighted_loss(x, target, weight, norm="huber", huber_c=_huber_c(x, huber_c))
    return ops.weighted_loss(x, target, weight, norm="l1" if loss_norm == "l1" else "l2")


def _huber_c(x: Tensor, huber_c: float | None) -> float:
    """The given c, or 0.00054 sqrt(D) for samples of D elements: Song & Dhariwal 2023."""
    return 0.00054 * (x[0].numel() if len(x) else 1) ** 0.5 if huber_c is None else huber_c


def _weight(sigma: Tensor, weighting: Weighting, sigma_data: float) -> Tensor:
    if callable(weighting):
        return weighting(sigma)
    return ops.loss_weight(sigma, weighting, sigma_data=sigma_data)


def _compare(
    student: Evaluator,
    point: tuple[Tensor, Tensor, Tensor],
    target: Tensor | tuple[Evaluator, tuple[Tensor, Tensor, Tensor]],
    *,
    loss_norm: str,
    lpips: Perceptual | None,
    huber_c: float | None,
    weighting: Weighting,
    sigma_data: float,
) -> Tensor:
    """The weighted distance [B] of the student's D from a target, or from another model's D.

    A point is (model_output, x_t, sigma). Where the norm and the scalings allow, no D is stored.
    """
    model_output, x_t, sigma = point
    if loss_norm not in _FUSED_NORMS or (isinstance(target, tuple) and target[0].scaling != student.scaling):
        denoised = student.denoised(model_output, x_t, sigma)
        if isinstance(target, tuple):
            with torch.no_grad():
                target = target[0].denoised(*target[1])
        weight = _weight(sigma, weighting, sigma_data)
        return distance(denoised, target, weight, loss_norm=loss_norm, lpips=lpips, huber_c=huber_c)
    x_t2 = next_sigma = None
    if isinstance(target, tuple):
        target, x_t2, next_sigma = (x.detach() for x in target[1])
    return ops.consistency_loss(
        model_output,
        x_t,
        sigma,
        target,
        weighting(sigma) if callable(weighting) else weighting,
        x_t2,
        next_sigma,
        norm=loss_norm,
        huber_c=_huber_c(x_t, huber_c) if loss_norm == "huber" else 0.0,
        weight_sigma_data=sigma_data,
        **student.scaling,
    )


def denoising_loss(
    model: Model,
    x_start: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
    weighting: Weighting = "karras",
    sigma_data: float = 0.5,
) -> dict[str, Tensor]:
    """||D(x_start + sigma noise, sigma) - x_start||^2: the EDM objective, Karras et al. 2022, eq. 2.

    Args: x_start [B, C, H, W] in [-1, 1]; sigma [B]; noise like x_start; labels int64 [B].
    Returns per-sample `xs_mse` (mean square error), `mse` (weighted) and `loss` (= mse).
    """
    noise = torch.randn_like(x_start) if noise is None else noise
    evaluate = _evaluator(model, labels, clip=False).settle(x_start.dtype)
    x_t, model_input, c_noise = ops.add_noise(x_start, noise, sigma, **evaluate.input_options)
    xs_mse = ops.consistency_loss(evaluate(model_input, c_noise), x_t, sigma, x_start, **evaluate.scaling)
    mse = xs_mse * _weight(sigma, weighting, sigma_data)
    return {"xs_mse": xs_mse, "mse": mse, "loss": mse}


@contextmanager
def _saved_random_state(x: Tensor) -> Iterator[Callable[[], None]]:
    """A function that puts torch's generators back as they are now, so that two models draw the same dropout.

    The original restores the CPU's alone, so that its masks differ on a GPU.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def restore() -> None:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, x.device)

    yield restore


def _grid_sigma(index: Tensor, num_scales: int, x: Tensor, levels: dict[str, float]) -> Tensor:
    """Karras levels of (fractional) indices [B], in the dtype of noise levels for x."""
    sigma = schedules.karras_sigma(index.to(_check.sigma_dtype(x)), num_scales, **levels)
    return torch.as_tensor(sigma)


def _draw_indices(indices: Tensor | None, high: int, x_start: Tensor) -> Tensor:
    if indices is None:
        return torch.randint(0, high, (x_start.shape[0],), device=x_start.device)
    if indices.shape != (x_start.shape[0],):
        raise ValueError(f"indices must be [B] with B = {x_start.shape[0]}, got {list(indices.shape)}")
    return indices


#: A state, the network's input made of it, and c_noise.
Point = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def _solve(
    teacher: Evaluator, x_t: Tensor, first: tuple[Tensor, Tensor], sigma: Tensor, next_sigma: Tensor, solver: str
) -> Point:
    """One step of the teacher's probability-flow ODE from its input `first`."""
    options = teacher.step_options
    model_output = teacher(*first)
    if solver == "euler":
        return ops.euler_step(model_output, x_t, sigma, next_sigma, **options)
    next_input = ops.heun_predictor(model_output, x_t, sigma, next_sigma, **options)
    return ops.heun_corrector(model_output, teacher(*next_input), x_t, sigma, next_sigma, **options)


@torch.no_grad()
def _input_of(evaluate: Evaluator, maker: Evaluator, point: Point, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """A model's input at a point: what was made for another model there, if it is the same."""
    x, model_input, c_noise = point
    if evaluate.input_options == maker.input_options:
        return model_input.detach(), c_noise
    return evaluate.scale_input(x, sigma)


def consistency_loss(
    model: Model,
    target_model: Model,
    x_start: Tensor,
    num_scales: int,
    *,
    teacher_model: Model | None = None,
    solver: str = "heun",
    noise: Tensor | None = None,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
    weighting: Weighting = "uniform",
    sigma_data: float = 0.5,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
) -> dict[str, Tensor]:
    """Consistency distillation with a teacher, consistency training without: Song et al. 2023, algorithms 2 and 3.

    Of two neighbouring points on one trajectory, D_student(x_t, t) should be D_target(x_t2, t2), t2 < t. x_t2 comes
    from x_t by a step of the teacher's ODE, or without a teacher from the same noise: x_start + t2 noise.

    Args:
        target_model: gives the target, without gradient: an average of the student, or the student itself.
        x_start: [B, C, H, W] in [-1, 1]; num_scales: levels of the Karras grid, 2 or more.
        solver: `heun` or `euler`, the teacher's step.
        noise: like x_start; indices: [B] from 0 to num_scales - 2; both drawn from torch's generator if not given.
        lpips: the module for `loss_norm="lpips"`; weighting: of snr(t), see `ops.loss_weight`.

    Student and target see the same dropout mask. Returns per-sample `loss` [B].
    Raises: ValueError: unknown loss norm, weighting or solver, num_scales below 2, no target, indices of wrong shape.
    """
    if target_model is None:
        raise ValueError("target_model is missing: give an average of the model, or the model itself")
    if num_scales < 2:
        raise ValueError(f"num_scales must be 2 or more, got {num_scales}")
    _check.choice("solver", solver, SOLVERS)
    _check.choice("loss_norm", loss_norm, LOSS_NORMS)
    noise = torch.randn_like(x_start) if noise is None else noise
    indices = _draw_indices(indices, num_scales - 1, x_start)
    levels = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    sigma = _grid_sigma(indices, num_scales, x_start, levels)
    next_sigma = _grid_sigma(indices + 1, num_scales, x_start, levels)

    student, target = (_evaluator(each, labels, clip=False).settle(x_start.dtype) for each in (model, target_model))
    options = student.input_options
    if teacher_model is None:
        first, second = ops.add_noise_pair(x_start, noise, sigma, next_sigma, **options)
        maker = student
    else:
        first = ops.add_noise(x_start, noise, sigma, **options)
        maker = _evaluator(teacher_model, labels, clip=False).settle(x_start.dtype)
    with _saved_random_state(x_start) as restore:
        x_t, model_output = first[0], student(*first[1:])
        if teacher_model is not None:
            second = _solve(maker, x_t, _input_of(maker, student, first, sigma), sigma, next_sigma, solver)
        x_t2 = second[0]
        with torch.no_grad():
            restore()
            target_output = target(*_input_of(target, maker, second, next_sigma))
    loss = _compare(
        student,
        (model_output, x_t, sigma),
        (target, (target_output, x_t2, next_sigma)),
        loss_norm=loss_norm,
        lpips=lpips,
        huber_c=huber_c,
        weighting=weighting,
        sigma_data=sigma_data,
    )
    return {"loss": loss}


def progressive_distillation_loss(
    model: Model,
    teacher_model: Model,
    x_start: Tensor,
    num_scales: int,
    *,
    noise: Tensor | None = None,
    indices: Tensor | None = None,
    labels: Tensor | None = None,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
    weighting: Weighting = "uniform",
    sigma_data: float = 0.5,
    sigma_min: float = schedules.SIGMA_MIN,
    sigma_max: float = schedules.SIGMA_MAX,
    rho: float = schedules.RHO,
) -> dict[str, Tensor]:
    """One student Euler step should land where two half-steps of the teacher do: Salimans & Ho 2022.

    The teacher goes t -> t2 -> t3; the student's target is the D whose Euler step leads from x_t to x_t3:
    x_t - t (x_t3 - x_t) / (t3 - t). Arguments as `consistency_loss`; indices are from 0 to num_scales - 1.
    """
    if num_scales < 1:
        raise ValueError(f"num_scales must be 1 or more, got {num_scales}")
    _check.choice("loss_norm", loss_norm, LOSS_NORMS)
    noise = torch.randn_like(x_start) if noise is None else noise
    indices = _draw_indices(indices, num_scales, x_start)
    levels = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    # num_scales intervals have num_scales + 1 ends.
    sigma, mid_sigma, next_sigma = (
        _grid_sigma(indices + part, num_scales + 1, x_start, levels) for part in (0, 0.5, 1)
    )
    student, teacher = (_evaluator(each, labels, clip=False).settle(x_start.dtype) for each in (model, teacher_model))
    first = ops.add_noise(x_start, noise, sigma, **student.input_options)
    x_t, model_output = first[0], student(*first[1:])
    x_mid, *middle = _solve(teacher, x_t, _input_of(teacher, student, first, sigma), sigma, mid_sigma, "euler")
    x_next, *_ = _solve(teacher, x_mid, (middle[0], middle[1]), mid_sigma, next_sigma, "euler")
    with torch.no_grad():
        ratio = (sigma / (sigma - next_sigma)).to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
        target = torch.lerp(x_t, x_next, ratio)
    loss = _compare(
        student,
        (model_output, x_t, sigma),
        target,
        loss_norm=loss_norm,
        lpips=lpips,
        huber_c=huber_c,
        weighting=weighting,
        sigma_data=sigma_data,
    )
    return {"loss": loss}
