"""What a training step minimises, and how it changes as training goes on.

An objective is a frozen dataclass of plain numbers and names, which a configuration file can hold. Its `stage` follows
from the step alone and its `loss` from a draw, so that a run is the same on any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from cmfast import curricula, losses, ops, schedules
from cmfast.denoiser import Model
from cmfast.distances import LOSS_NORMS, Perceptual
from cmfast.ops import WEIGHTINGS, _check


class Stage(NamedTuple):
    """The numbers of one step, on the host.

    number: grows by one where a new stage starts. first_step, steps: the stage's first, and how many it has; None: it
    has no end. num_scales: levels of the grid (`ProgressiveDistillation`: intervals). target_rate: the rate of the
    average that is the target; None: there is none.
    """

    number: int = 0
    first_step: int = 0
    steps: int | None = None
    num_scales: int | None = None
    target_rate: float | None = None

    @property
    def levels(self) -> int:
        """`num_scales`, of a stage on a grid."""
        assert self.num_scales is not None
        return self.num_scales


@dataclass(frozen=True)
class Objective:
    """Base of all objectives.

    preconditioning: `edm` or `consistency`, of the model that is trained. needs_teacher, needs_target: `loss` needs
    these models. teacher_follows: at a new stage, the student becomes the teacher.
    """

    preconditioning: ClassVar[str] = "consistency"
    needs_teacher: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    teacher_follows: ClassVar[bool] = False

    def stage(self, step: int) -> Stage:
        """That of a step, from 0."""
        return Stage()

    def sampling(self, stage: Stage) -> dict[str, Any]:
        """How a model that has come to a stage is sampled: arguments of `cmfast.Sampler`. A consistency model in one
        step, a diffusion model in 18 Heun steps."""
        return {"steps": 1} if self.preconditioning == "consistency" else {"sampler": "heun"}

    @property
    def consistency(self) -> bool:
        """Whether it makes a consistency model, by whatever scalings."""
        return self.sampling(self.stage(0)) == {"steps": 1}

    def loss(
        self,
        model: Model,
        x_start: Tensor,
        *,
        stage: Stage,
        draw: ops.Draw,
        labels: Tensor | None = None,
        target_model: Model | None = None,
        teacher_model: Model | None = None,
        lpips: Perceptual | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample terms [B], float32; `loss` is what is minimised.

        x_start [B, C, H, W] in [-1, 1]; stage: of this step; labels int64 [B], if class-conditional; target_model,
        teacher_model, lpips: where they are needed. Levels, noise and dropout of sample b follow from (draw.seed,
        draw.index[b], draw.draw). No value of a tensor is read on the host: labels beyond the model's classes are not
        found here.

        Raises: ValueError: a model that is needed is missing.
        """
        if self.needs_teacher and teacher_model is None:
            raise ValueError(f"{type(self).__name__} needs a teacher_model")
        if self.needs_target and target_model is None:
            raise ValueError(f"{type(self).__name__} needs a target_model: give an average of the model, or itself")
        with _check.unread():
            return self._loss(
                model, x_start, stage, draw, labels, target_model=target_model, teacher_model=teacher_model, lpips=lpips
            )

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None, **others: Any
    ) -> dict[str, Tensor]:
        """The terms; others: target_model, teacher_model and lpips, None where they are not needed."""
        raise NotImplementedError


@dataclass(frozen=True)
class EDM(Objective):
    """A diffusion model: Karras et al. 2022.

    mean, std: of ln sigma. weighting, sigma_data: as of `losses.denoising_loss`.

    Raises: ValueError: an unknown weighting, or a number out of range.
    """

    preconditioning: ClassVar[str] = "edm"

    mean: float = -1.2
    std: float = 1.2
    weighting: str = "karras"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check.choice("weighting", self.weighting, WEIGHTINGS)
        _check.finite("mean", self.mean)
        _positive(std=self.std, sigma_data=self.sigma_data)

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None, **others: Any
    ) -> dict[str, Tensor]:
        levels = ops.LogNormal(self.mean, self.std)
        options: dict[str, Any] = {"weighting": self.weighting, "sigma_data": self.sigma_data}
        return losses.denoising_loss(model, x_start, levels, draw=draw, labels=labels, **options)


@dataclass(frozen=True)
class _OnGrid(Objective):
    """Those that learn along the Karras grid.

    loss_norm, huber_c, weighting, sigma_data: as of `losses.consistency_loss`. sigma_min, sigma_max, rho: of the grid.

    Raises: ValueError: an unknown name, or a number out of range.
    """

    loss_norm: str = "lpips"
    weighting: str = "uniform"
    sigma_data: float = 0.5
    sigma_min: float = schedules.SIGMA_MIN
    sigma_max: float = schedules.SIGMA_MAX
    rho: float = schedules.RHO
    huber_c: float | None = None

    def __post_init__(self) -> None:
        _check.choice("loss_norm", self.loss_norm, LOSS_NORMS)
        _check.choice("weighting", self.weighting, WEIGHTINGS)
        _noise_range(self.sigma_min, self.sigma_max)
        _positive(sigma_data=self.sigma_data, rho=self.rho)

    def _options(self) -> dict[str, Any]:
        names = ("loss_norm", "weighting", "sigma_data", "sigma_min", "sigma_max", "rho", "huber_c")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Consistency(_OnGrid):
    """Consistency training or distillation with the four schedules of the original, `schedules.ema_and_scales`.

    target_ema_mode, start_ema, scale_mode, start_scales, end_scales: as there. total_steps: of the whole run, for a
    number of levels that grows.
    """

    needs_target: ClassVar[bool] = True

    target_ema_mode: str = "fixed"
    start_ema: float = 0.95
    scale_mode: str = "fixed"
    start_scales: int = 40
    end_scales: int = 40
    total_steps: int = 600_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(2 if self.scale_mode == "fixed" else 1, start_scales=self.start_scales, end_scales=self.end_scales)
        _at_least(1, total_steps=self.total_steps)
        if not 0 <= self.start_ema <= 1:
            raise ValueError(f"start_ema must be from 0 to 1, got {self.start_ema}")
        if self.scale_mode == "progdist":
            raise ValueError("scale_mode 'progdist' is ProgressiveDistillation's")
        self._schedule(0)

    def _schedule(self, step: int) -> tuple[float, int]:
        modes = self.target_ema_mode, self.start_ema, self.scale_mode
        return schedules.ema_and_scales(*modes, self.start_scales, self.end_scales, self.total_steps, 1)(step)

    def stage(self, step: int) -> Stage:
        """One stage, in which the number of levels and the target's rate may change from step to step."""
        rate, num_scales = self._schedule(min(step, self.total_steps))
        return Stage(num_scales=num_scales, target_rate=rate)


@dataclass(frozen=True)
class ConsistencyDistillation(_Consistency):
    """A consistency model from a teacher, a diffusion model: Song et al. 2023, algorithm 2.

    solver: `heun` or `euler`, the teacher's step. The others: as of `losses.consistency_loss` and
    `schedules.ema_and_scales`.
    """

    needs_teacher: ClassVar[bool] = True

    solver: str = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.choice("solver", self.solver, losses.SOLVERS)

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None,
        *, target_model: Any = None, **others: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        options = {"solver": self.solver, **others, **self._options()}
        return losses.consistency_loss(model, target_model, x_start, stage.levels, draw=draw, labels=labels, **options)


@dataclass(frozen=True)
class ConsistencyTraining(_Consistency):
    """A consistency model from data alone: Song et al. 2023, algorithm 3. Arguments as of `ConsistencyDistillation`."""

    target_ema_mode: str = "adaptive"
    scale_mode: str = "progressive"
    start_scales: int = 2
    end_scales: int = 200
    total_steps: int = 800_000

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None,
        *, target_model: Any = None, lpips: Perceptual | None = None, **others: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        options = {"lpips": lpips, **self._options()}
        return losses.consistency_loss(model, target_model, x_start, stage.levels, draw=draw, labels=labels, **options)


@dataclass(frozen=True)
class ProgressiveDistillation(_OnGrid):
    """A diffusion model of half the steps, and half again: Salimans & Ho 2022.

    A stage has `steps_per_stage` steps; those of two intervals and of one have twice as many, and the last has no end.
    start_scales: intervals of the first. The others: as of `losses.progressive_distillation_loss`.
    """

    preconditioning: ClassVar[str] = "edm"
    needs_teacher: ClassVar[bool] = True
    teacher_follows: ClassVar[bool] = True

    start_scales: int = 64
    steps_per_stage: int = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(2, start_scales=self.start_scales)
        _at_least(1, steps_per_stage=self.steps_per_stage)

    @property
    def stages(self) -> float:
        """A whole run in units of `steps_per_stage`: to one interval, of which the stage is as long as that of two."""
        return math.log2(self.start_scales) + 3

    def stage(self, step: int) -> Stage:
        """The stage of a step, as `schedules.ema_and_scales(..., "progdist")` has it."""
        start, steps = self.start_scales, self.steps_per_stage
        at_step = schedules.ema_and_scales("fixed", 0.0, "progdist", start, start, 1, steps)
        num_scales = at_step(step)[1]
        # So many halvings, rounded down, lead to two intervals or less.
        halvings = (start // 3).bit_length()
        one = math.ceil(steps * (math.log2(start) - 1) + 2 * steps)
        if num_scales == 1:
            return Stage(halvings + 1, one, None, 1)
        if num_scales == 2:
            return Stage(halvings, halvings * steps, one - halvings * steps, 2)
        number = step // steps
        return Stage(number, number * steps, steps, num_scales)

    def sampling(self, stage: Stage) -> dict[str, Any]:
        """In the intervals of the stage, each one Euler step."""
        return {"sampler": "progdist", "steps": stage.levels}

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None,
        *, teacher_model: Any = None, lpips: Perceptual | None = None, **others: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        options = {"lpips": lpips, **self._options()}
        return losses.progressive_distillation_loss(
            model, teacher_model, x_start, stage.levels, draw=draw, labels=labels, **options
        )


@dataclass(frozen=True)
class ImprovedConsistencyTraining(Objective):
    """iCT, Song & Dhariwal 2023: consistency training without a target network, with levels that double in number.

    start_scales, end_scales, total_steps: as of `curricula.doubling_stage`. mean, std: of ln sigma. huber_c: as of
    `losses.improved_consistency_loss`.

    Raises: ValueError: a number out of range.
    """

    start_scales: int = 10
    end_scales: int = 1280
    total_steps: int = 400_000
    mean: float = curricula.MEAN
    std: float = curricula.STD
    sigma_min: float = schedules.SIGMA_MIN
    sigma_max: float = schedules.SIGMA_MAX
    rho: float = schedules.RHO
    huber_c: float | None = None

    def __post_init__(self) -> None:
        _at_least(1, start_scales=self.start_scales, total_steps=self.total_steps)
        _at_least(self.start_scales, end_scales=self.end_scales)
        _noise_range(self.sigma_min, self.sigma_max)
        _check.finite("mean", self.mean)
        _positive(std=self.std, rho=self.rho)

    def stage(self, step: int) -> Stage:
        """That of a step, from 0: one for each number of levels."""
        scales = self.total_steps, self.start_scales, self.end_scales
        number, num_scales = curricula.doubling_stage(step, *scales)
        steps = curricula.doubling_steps(*scales)
        return Stage(number, number * steps, None if num_scales > self.end_scales else steps, num_scales)

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None, **others: Any
    ) -> dict[str, Tensor]:
        names = ("mean", "std", "sigma_min", "sigma_max", "rho", "huber_c")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return losses.improved_consistency_loss(model, x_start, stage.levels, draw=draw, labels=labels, **options)


@dataclass(frozen=True)
class EasyConsistencyTuning(Objective):
    """ECT, Geng et al. 2024: a diffusion model tuned, without a teacher, as the levels of a pair draw closer.

    A stage has `steps_per_stage` steps; the last of the `stages` has no end. q, k, b: as of `curricula.stage_below`.
    mean, std: of ln t. huber_c: c.

    Raises: ValueError: a number out of range.
    """

    preconditioning: ClassVar[str] = "edm"
    #: A whole run in units of `steps_per_stage`.
    stages: ClassVar[int] = 8

    steps_per_stage: int = 25_000
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    mean: float = curricula.MEAN
    std: float = curricula.STD
    huber_c: float | None = 0.0

    def __post_init__(self) -> None:
        _at_least(1, steps_per_stage=self.steps_per_stage)
        _check.finite("mean", self.mean)
        _positive(std=self.std)
        curricula.stage_below(0, q=self.q, k=self.k, b=self.b)

    def stage(self, step: int) -> Stage:
        """floor(step / steps_per_stage); no stage follows the last: its pairs would soon be closer than float32 is."""
        number = min(step // self.steps_per_stage, self.stages - 1)
        steps = self.steps_per_stage if number < self.stages - 1 else None
        return Stage(number, number * self.steps_per_stage, steps)

    def sampling(self, stage: Stage) -> dict[str, Any]:
        """In one step: it is a consistency model, with the scalings of a diffusion model."""
        return {"steps": 1}

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None, **others: Any
    ) -> dict[str, Tensor]:
        options: dict[str, Any] = {name: getattr(self, name) for name in ("q", "k", "b", "mean", "std", "huber_c")}
        return losses.easy_consistency_loss(model, x_start, stage.number, draw=draw, labels=labels, **options)


def _positive(**values: float) -> None:
    for name, value in values.items():
        _check.positive(name, value)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        _check.whole(name, value, least=least)


def _noise_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


OBJECTIVES: dict[str, type[Objective]] = {
    "edm": EDM,
    "cd": ConsistencyDistillation,
    "ct": ConsistencyTraining,
    "pd": ProgressiveDistillation,
    "ict": ImprovedConsistencyTraining,
    "ect": EasyConsistencyTuning,
}
