"""The losses: denoising, consistency training and distillation and their successors, progressive distillation.

Models are `Denoiser`s (or any D(x, sigma, labels)); each brings its own preconditioning, so that a consistency student
can learn from an EDM teacher. Every loss returns per-sample terms [B], float32 or wider; take `["loss"].mean()`.

With a `draw`, all that is random follows from it: levels, noise and dropout of a sample from (draw.seed,
draw.index[b], draw.draw) alone, whatever batch and rank the sample is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmfast import curricula, ops, schedules
from cmfast.denoiser import Evaluator, Model, evaluator, noise_range
from cmfast.distances import LOSS_NORMS, Measure, Perceptual, Weighting, distance
from cmfast.dropout import Pairing, counts
from cmfast.ops import _check
from cmfast.reference import level_gap
from cmfast.samplers import overwritten

__all__ = [
    "LOSS_NORMS",
    "SOLVERS",
    "Perceptual",
    "Weighting",
    "consistency_loss",
    "denoising_loss",
    "distance",
    "easy_consistency_loss",
    "improved_consistency_loss",
    "progressive_distillation_loss",
]

SOLVERS = ("heun", "euler")

#: A state, the network's input made of it, and c_noise.
Point = tuple[Tensor, Tensor, Tensor]


def denoising_loss(
    model: Model,
    x_start: Tensor,
    sigma: Tensor | ops.LogNormal,
    *,
    noise: Tensor | None = None,
    draw: ops.Draw | None = None,
    labels: Tensor | None = None,
    weighting: Weighting = "karras",
    sigma_data: float | None = None,
) -> dict[str, Tensor]:
    """||D(x_start + sigma noise, sigma) - x_start||^2: the EDM objective, Karras et al. 2022, eq. 2.

    Args:
        model: D(x, sigma[, labels]), a `Denoiser` or a function.
        x_start: [B, C, H, W] in [-1, 1]. sigma: [B] in data units, or with a draw what it is drawn from.
        noise: like x_start; drawn from torch's generator if not given.
        draw: what noise and dropout follow from, instead.
        labels: int64 [B], of a class-conditional model.
        weighting: of snr(sigma), see `ops.loss_weight`; sigma_data: of the `karras` weighting (default: the
            model's, else 0.5).

    Returns per-sample `xs_mse` (mean square error), `mse` (weighted) and `loss` (= mse), float32 [B].
    Raises: ValueError, TypeError: levels or noise that do not fit x_start, an unknown weighting.

    >>> terms = denoising_loss(lambda x, sigma: 0.5 * x, torch.zeros(2, 1, 4, 4), torch.ones(2))
    >>> terms["loss"].shape
    torch.Size([2])
    """
    _check.float_tensor("x_start", x_start)
    evaluate = evaluator(model, labels, clip=False).settle(x_start.dtype)
    pairing = Pairing(draw, x_start.device, model)
    if isinstance(sigma, ops.LogNormal):
        drawn = ops.draw_pair(x_start, _drawing(draw, x_start, noise), sigma, pair=False, **evaluate.input_options)
        (x_t, *model_input), sigma = drawn.first, drawn.sigma
    else:
        given = _given_noise(noise, draw, x_start)
        x_t, *model_input = ops.add_noise(x_start, given, sigma, **evaluate.input_options)
    with pairing:
        model_output = evaluate(*model_input)
    xs_mse = ops.consistency_loss(model_output, x_t, sigma, x_start, **evaluate.scaling)
    mse = xs_mse * Measure(weighting=weighting, sigma_data=_sigma_data(evaluate, sigma_data)).weight(sigma, x_start)
    return {"xs_mse": xs_mse, "mse": mse, "loss": mse}


def _grid_range(model: Model, sigma_min: float | None, sigma_max: float | None, rho: float | None) -> dict[str, float]:
    """The range of a grid: as given, else as the model says, else the original's."""
    levels = {"sigma_min": schedules.SIGMA_MIN, "sigma_max": schedules.SIGMA_MAX, "rho": schedules.RHO}
    levels |= {name: float(value) for name, value in noise_range(model).items()}
    given = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    return levels | {name: value for name, value in given.items() if value is not None}


def _sigma_data(evaluate: Evaluator, given: float | None) -> float:
    """Of the data: as given, else as the model's scalings say, else the original's."""
    own: float | None = evaluate.scaling["sigma_data"] if given is None else given
    return 0.5 if own is None else own


def _drawing(draw: ops.Draw | None, x_start: Tensor, *instead: Tensor | None) -> ops.Draw:
    """The draw, or one of torch's generator; ValueError where something else is given that it would draw."""
    if any(given is not None for given in instead):
        raise ValueError("noise or indices were given and would be drawn too: leave them out, or leave out the draw")
    if draw is not None:
        return draw
    batch, device = x_start.shape[0], x_start.device
    return ops.Draw(torch.randint(2**63 - 1, (), device=device), torch.arange(batch, device=device))


def _given_noise(noise: Tensor | None, draw: ops.Draw | None, x_start: Tensor) -> Tensor | ops.Draw:
    """The given noise, that of the draw, or that of torch's generator."""
    if noise is not None and draw is not None:
        raise ValueError("noise and draw were both given: leave out one of them")
    return noise if noise is not None else draw if draw is not None else torch.randn_like(x_start)


def _grid_sigma(index: Tensor, num_scales: int, x: Tensor, levels: dict[str, float]) -> Tensor:
    """Karras levels of (fractional) indices [B], in the dtype of noise levels for x."""
    sigma = schedules.karras_sigma(index.to(_check.sigma_dtype(x)), num_scales, **levels)
    assert isinstance(sigma, Tensor)  # as the index is
    return sigma


def _draw_indices(indices: Tensor | None, high: int, x_start: Tensor) -> Tensor:
    if indices is None:
        return torch.randint(0, high, (x_start.shape[0],), device=x_start.device)
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a torch.Tensor [B], got {type(indices).__name__}")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices must be whole numbers, got {indices.dtype}")
    if indices.shape != (x_start.shape[0],):
        raise ValueError(f"indices must be [B] with B = {x_start.shape[0]}, got {list(indices.shape)}")
    if indices.device.type == "cpu" and indices.numel() and _check.has_values(indices):
        low, top = (each.item() for each in indices.aminmax())
        if not 0 <= low <= top < high:  # the formula of levels goes on outside of the grid
            raise ValueError(f"indices must be from 0 to {high - 1}, got {low} to {top}")
    return indices


@torch.no_grad()
def _solve(
    teacher: Evaluator, x_t: Tensor, first: tuple[Tensor, Tensor], sigma: Tensor, next_sigma: Tensor, solver: str
) -> Point:
    """One step of the teacher's probability-flow ODE from its input `first`."""
    options = teacher.step_options
    model_output = teacher(*first)
    if solver == "euler":
        return ops.euler_step(model_output, x_t, sigma, next_sigma, **options)
    next_output = teacher(*ops.heun_predictor(model_output, x_t, sigma, next_sigma, **options))
    if overwritten(model_output, next_output):
        next_output, model_output = next_output.clone(), teacher(*first)
    return ops.heun_corrector(model_output, next_output, x_t, sigma, next_sigma, **options)


@torch.no_grad()
def _input_of(evaluate: Evaluator, maker: Evaluator, point: Point, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """A model's input at a point: what was made for another model there, if it is the same."""
    x, model_input, c_noise = point
    if evaluate.input_options == maker.input_options:
        return model_input.detach(), c_noise
    return evaluate.scale_input(x, sigma)


def _own(model: Model, model_input: Tensor) -> Tensor:
    """The input of a call, where another model gets it after: networks of others may write into it."""
    return model_input if counts(model) else model_input.clone()


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
    draw: ops.Draw | None = None,
    labels: Tensor | None = None,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
    weighting: Weighting = "uniform",
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> dict[str, Tensor]:
    """Consistency distillation with a teacher, consistency training without: Song et al. 2023, algorithms 2 and 3.

    Of two neighbouring points on one trajectory, D_student(x_t, t) should be D_target(x_t2, t2), t2 < t. x_t2 comes
    from x_t by a step of the teacher's ODE, or without a teacher from the same noise: x_start + t2 noise.

    Args:
        target_model: gives the target, without gradient: an average of the student, or the student itself.
        x_start: [B, C, H, W] in [-1, 1]; num_scales: levels of the Karras grid, 2 or more.
        teacher_model: the diffusion model that is distilled; None: consistency training.
        solver: `heun` or `euler`, the teacher's step. In a Heun step a teacher whose outputs share one memory, as those
            of a CUDA graph do, is called three times; one that returns copies, twice.
        noise: like x_start; indices: [B] from 0 to num_scales - 2; drawn from torch's generator if not given.
        draw: what noise, indices and dropout follow from, instead.
        labels: int64 [B], of a class-conditional model.
        loss_norm, huber_c: as in `distances.distance`; lpips: the module for `loss_norm="lpips"`.
        weighting: of snr(t), see `ops.loss_weight`; sigma_data: of the `karras` weighting (default: the
            model's, else 0.5).
        sigma_min, sigma_max, rho: of the grid, in data units (default: the model's, else 0.002, 80 and 7).

    Student and target (and a teacher that drops) see the same dropout mask. Returns per-sample `loss`, float32 [B].
    Raises: ValueError: unknown loss norm, weighting or solver, num_scales below 2, no target, indices of wrong shape or
        (on a CPU) outside of the grid. TypeError: indices that are no whole numbers, or num_scales.

    >>> terms = consistency_loss(lambda x, t: 0.5 * x, lambda x, t: 0.5 * x, torch.zeros(2, 1, 4, 4), num_scales=18)
    >>> terms["loss"].shape
    torch.Size([2])
    """
    _check.float_tensor("x_start", x_start)
    if target_model is None:
        raise ValueError("target_model is missing: give an average of the model, or the model itself")
    num_scales = _check.whole("num_scales", num_scales, least=2)
    _check.choice("solver", solver, SOLVERS)
    levels = _grid_range(model, sigma_min, sigma_max, rho)
    student, target = (evaluator(each, labels, clip=False).settle(x_start.dtype) for each in (model, target_model))
    measure = Measure(loss_norm, lpips, huber_c, weighting, _sigma_data(student, sigma_data))
    pairing = Pairing(draw, x_start.device, model, target_model)

    options, training = student.input_options, teacher_model is None
    second: Point | None = None
    if draw is not None:
        grid = curricula.karras_grid(num_scales, device=x_start.device, **levels)
        drawn = ops.draw_pair(x_start, _drawing(draw, x_start, noise, indices), grid, pair=training, **options)
        first, second, sigma, next_sigma, _ = drawn
        assert next_sigma is not None
    else:
        noise = torch.randn_like(x_start) if noise is None else noise
        indices = _draw_indices(indices, num_scales - 1, x_start)
        sigma = _grid_sigma(indices, num_scales, x_start, levels)
        next_sigma = _grid_sigma(indices + 1, num_scales, x_start, levels)
        if training:
            first, second = ops.add_noise_pair(x_start, noise, sigma, next_sigma, **options)
        else:
            first = ops.add_noise(x_start, noise, sigma, **options)

    with pairing:
        x_t, model_input, c_noise = first
        model_output = student(model_input if training else _own(model, model_input), c_noise)
    maker = student
    if second is None:
        assert teacher_model is not None  # else second is there
        maker = evaluator(teacher_model, labels, clip=False).settle(x_start.dtype)
        with pairing:
            second = _solve(maker, x_t, _input_of(maker, student, first, sigma), sigma, next_sigma, solver)
    with torch.no_grad(), pairing:
        target_output = target(*_input_of(target, maker, second, next_sigma))
    point, target_point = (model_output, x_t, sigma), (target_output, second[0], next_sigma)
    return {"loss": measure.between(student, point, (target, target_point))}


def improved_consistency_loss(
    model: Model,
    x_start: Tensor,
    num_scales: int,
    *,
    draw: ops.Draw | None = None,
    labels: Tensor | None = None,
    huber_c: float | None = None,
    mean: float = curricula.MEAN,
    std: float = curricula.STD,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> dict[str, Tensor]:
    """iCT: (sqrt(||D(x_t, t) - D(x_t2, t2)||^2 + c^2) - c) / (t - t2), Song & Dhariwal 2023.

    Consistency training where the student without gradient is its own target, neighbours on the grid of `num_scales`
    levels are drawn as often as ln t ~ N(mean, std^2) falls between them, and the distance is the pseudo-Huber distance
    of the sample vector, c = 0.00054 sqrt(D) unless `huber_c` is given. `num_scales`: see `curricula.doubling_stage`.

    Args: x_start [B, C, H, W] in [-1, 1]; draw: what levels, noise and dropout follow from, else torch's generator;
        labels int64 [B], of a class-conditional model; sigma_min, sigma_max, rho: of the grid, in data units (default:
        the model's, else 0.002, 80 and 7).
    Returns per-sample `loss`, float32 [B].
    """
    levels = _grid_range(model, sigma_min, sigma_max, rho)
    grid = curricula.lognormal_grid(num_scales, mean=mean, std=std, device=x_start.device, **levels)
    return {"loss": _own_target_loss(model, x_start, grid, draw, labels, huber_c)}


def easy_consistency_loss(
    model: Model,
    x_start: Tensor,
    stage: int,
    *,
    draw: ops.Draw | None = None,
    labels: Tensor | None = None,
    huber_c: float | None = 0.0,
    mean: float = curricula.MEAN,
    std: float = curricula.STD,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
) -> dict[str, Tensor]:
    """ECT: (sqrt(||D(x_t, t) - D(x_r, r)||^2 + c^2) - c) / (t - r), Geng et al. 2024.

    Consistency training where the student without gradient is its own target, ln t ~ N(mean, std^2), and r comes closer
    to t from stage to stage, see `curricula.stage_below`. Where r = 0, the target is x_start: at stage 0 everywhere
    below some t, so that tuning starts from the diffusion model that the weights come from. For EDM scalings.

    Args: x_start [B, C, H, W] in [-1, 1]; stage: 0 or more, with q, k, b as in `curricula.stage_below`; draw: what
        levels, noise and dropout follow from, else torch's generator; labels int64 [B], of a class-conditional model;
        huber_c: c, by default 0.
    Returns per-sample `loss`, float32 [B].
    Raises: ValueError: a stage in which D differs between t and r by little more than rounding.
    """
    below = curricula.stage_below(stage, q=q, k=k, b=b)
    # Closer, rounding of the two points is a large part of the gradient: docs/mathematics.md has numbers.
    dtype = _check.sigma_dtype(x_start)
    closest = 64 * torch.finfo(dtype).eps
    if below.factor < closest:
        raise ValueError(
            f"stage {stage} with q={q:g} has levels that differ by {below.factor:.1e} of themselves, and {dtype} tells "
            f"differences of {closest:.1e} or more: a smaller q or an earlier stage has wider pairs"
        )
    levels = ops.LogNormal(mean, std, below)
    return {"loss": _own_target_loss(model, x_start, levels, draw, labels, huber_c)}


def _own_target_loss(
    model: Model,
    x_start: Tensor,
    levels: ops.Levels,
    draw: ops.Draw | None,
    labels: Tensor | None,
    huber_c: float | None,
) -> Tensor:
    """The distance of D at both points of drawn pairs, divided by that of their levels [B]."""
    draw = _drawing(draw, x_start)
    student = evaluator(model, labels, clip=False).settle(x_start.dtype)
    pairing = Pairing(draw, x_start.device, model)
    first, second, sigma, next_sigma, _ = ops.draw_pair(x_start, draw, levels, **student.input_options)
    assert second is not None and next_sigma is not None
    with pairing:
        model_output = student(*first[1:])
    with torch.no_grad(), pairing:
        target_output = student(*second[1:])
    target_point = target_output, second[0], next_sigma
    target: Tensor | tuple[Evaluator, Point] = (student, target_point)
    # By EDM scalings, D(x_start, 0) = x_start exactly. Other models are told.
    exact = student.scaling["sigma_data"] is not None and student.scaling["boundary"] == 0
    if isinstance(levels, ops.LogNormal) and not exact:
        with torch.no_grad():
            at_zero = (next_sigma == 0).view(-1, *[1] * (x_start.ndim - 1))
            target = torch.where(at_zero, x_start, student.denoised(*target_point))
    below = levels.below if isinstance(levels, ops.LogNormal) else None
    gap = sigma - next_sigma if below is None else level_gap(sigma, below)
    measure = Measure("huber", huber_c=huber_c, weighting=1 / gap)
    return measure.between(student, (model_output, first[0], sigma), target)


def progressive_distillation_loss(
    model: Model,
    teacher_model: Model,
    x_start: Tensor,
    num_scales: int,
    *,
    noise: Tensor | None = None,
    indices: Tensor | None = None,
    draw: ops.Draw | None = None,
    labels: Tensor | None = None,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
    weighting: Weighting = "uniform",
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> dict[str, Tensor]:
    """One student Euler step should land where two half-steps of the teacher do: Salimans & Ho 2022.

    The teacher goes t -> t2 -> t3; the student's target is the D whose Euler step leads from x_t to x_t3:
    x_t - t (x_t3 - x_t) / (t3 - t). Arguments as in `consistency_loss`; num_scales counts intervals, and indices [B]
    are from 0 to num_scales - 1. States are float32 where x_start is 16-bit. Returns per-sample `loss`, float32 [B].

    Raises: ValueError: unknown loss norm or weighting, num_scales below 1, indices of wrong shape or (on a CPU) outside
        of the grid. TypeError: indices that are no whole numbers, or num_scales.
    """
    _check.float_tensor("x_start", x_start)
    num_scales = _check.whole("num_scales", num_scales, least=1)
    levels = _grid_range(model, sigma_min, sigma_max, rho)
    student, teacher = (evaluator(each, labels, clip=False).settle(x_start.dtype) for each in (model, teacher_model))
    measure = Measure(loss_norm, lpips, huber_c, weighting, _sigma_data(student, sigma_data))
    pairing = Pairing(draw, x_start.device, model)
    if noise is None and draw is None:
        noise = torch.randn_like(x_start)
    # The target takes a small difference of states times t / (t - t3): of 16-bit ones, their rounding.
    x_start = x_start.to(_check.sigma_dtype(x_start))
    if draw is not None:
        grid = curricula.halved_grid(num_scales, device=x_start.device, **levels)
        options = student.input_options
        drawn = ops.draw_pair(x_start, _drawing(draw, x_start, noise, indices), grid, pair=False, **options)
        first, _, sigma, next_sigma, mid_sigma = drawn
        assert next_sigma is not None and mid_sigma is not None
    else:
        assert noise is not None
        indices = _draw_indices(indices, num_scales, x_start)
        # num_scales intervals have num_scales + 1 ends.
        sigma, mid_sigma, next_sigma = (
            _grid_sigma(indices + part, num_scales + 1, x_start, levels) for part in (0, 0.5, 1)
        )
        first = ops.add_noise(x_start, noise, sigma, **student.input_options)
    x_t = first[0]
    model_input, c_noise = _input_of(teacher, student, first, sigma)
    model_input = _own(teacher_model, model_input)
    with pairing:
        x_mid, *middle = _solve(teacher, x_t, (model_input, c_noise), sigma, mid_sigma, "euler")
        x_next, *_ = _solve(teacher, x_mid, (middle[0], middle[1]), mid_sigma, next_sigma, "euler")
    with pairing:  # last: torch's generators go on from where the student leaves them
        model_output = student(*first[1:])
    with torch.no_grad():
        ratio = (sigma / (sigma - next_sigma)).to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
        target = torch.lerp(x_t, x_next, ratio)
    return {"loss": measure.between(student, (model_output, x_t, sigma), target)}
