"""One training step: nothing in it waits for the device, and nothing goes back to the host."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmfast import fast, ops
from cmfast.data import Batch, to_unit
from cmfast.denoiser import Denoiser, check_model
from cmfast.ema import Averages, Place, held, places
from cmfast.objectives import Objective, Stage
from cmfast.optim import Adam, RAdam
from cmfast.ranks import Ranks
from cmfast.rates import Given, parse_rate
from cmfast.training import parallel
from cmfast.training.config import TrainOptions
from cmfast.training.frozen import frozen

#: What a model and an objective both say of noise levels.
LEVELS = ("sigma_min", "sigma_max", "rho")
#: Weightings that depend on the standard deviation of the data.
OF_DATA = ("karras",)
#: No step was bad.
NONE = 2**62
#: Gradients that are not finite at a loss scale below this, float16's least number, are no overflow.
LEAST_SCALE = 2.0**-24


class Reading(NamedTuple):
    """What a run says of itself, as numbers on the host.

    loss: mean over the steps since the last reading, bad ones aside; NaN if all were bad. bad_step: the first step with
    a loss or gradients that are not finite, or None. skipped: steps that changed nothing, so far. grad_norm: of the
    last one.
    """

    loss: float
    grad_norm: float
    skipped: int
    bad_step: int | None


class Pending:
    """A reading on its way to the host, sent after `done` steps: `read` waits for it, on all processes together.

    counts: steps that were skipped, the first bad one. values: the sum of losses, how many they are, norm. group: whose
    mean is taken.
    """

    def __init__(self, done: int, counts: Tensor, values: Tensor, group: Ranks) -> None:
        self.done, self.sent, self._group, self._event = done, time.perf_counter(), group, None
        self._counts, self._values = (self._sent(x) for x in (counts, values))
        if counts.is_cuda:
            self._event = torch.cuda.Event()
            # The current stream of its device, which need not be the current device.
            self._event.record(torch.cuda.current_stream(counts.device))

    def read(self) -> Reading:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        total, losses, norm = self._group.mean(self._values).tolist()
        bad = int(self._group.least(self._counts[1:]))
        return Reading(total / losses if losses else math.nan, norm, int(self._counts[0]), None if bad == NONE else bad)

    @staticmethod
    def _sent(x: Tensor) -> Tensor:
        if not x.is_cuda:
            return x
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


class Buffers:
    """What the forward passes of a step may write beside gradients: a network's buffers, as of BatchNorm. Those that
    are there at the start; nothing is done where there are none."""

    def __init__(self, model: nn.Module) -> None:
        self._places = list(places(model).values())
        #: Of each dtype: where they are, the tensors, and what these held, end to end.
        self._kept: list[tuple[list[Place], list[Tensor], Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy what they hold now."""
        kinds: dict[torch.dtype, tuple[list[Place], list[Tensor]]] = {}
        for place in self._places:
            tensor = held(place)
            if tensor is not None:
                where, tensors = kinds.setdefault(tensor.dtype, ([], []))
                where.append(place)
                tensors.append(tensor)
        self._kept = [(where, tensors, _end_to_end(tensors)) for where, tensors in kinds.values()]

    @torch.no_grad()
    def put_back(self, skipped: Tensor) -> None:
        """What was kept, if `skipped`, a flag on the device; else what is there now."""
        for where, before, kept in self._kept:
            now = [
                old if new is None or (new.shape, new.dtype) != (old.shape, old.dtype) else new
                for old, new in zip(before, map(held, where))
            ]
            parts = torch.where(skipped, kept, _end_to_end(now)).split([x.numel() for x in now])
            torch._foreach_copy_(now, [part.view(x.shape) for part, x in zip(parts, now)])
        self._kept = []


def _end_to_end(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


class TrainStep:
    """A student with all that a step of it needs: `step(batch, number)` does one.

    model           the student: its weights are trained in place, those that require a gradient
    objective       what is minimised
    teacher_model   of a distillation; it changes at a new stage of a progressive one
    lpips           the perceptual distance, where the objective asks for it
    group           the processes that share a batch

    In float16 gradients that overflow are left out and halve the scale of the loss; once that is below 2^-24, they are
    no overflow, and the step is a bad one. A loss that is not finite leaves the scale as it is.

    Everything random follows from (options.seed, position of an image in the data), so that the number of processes and
    the size of microbatches change nothing. A step with a loss or gradients that are not finite changes no weight and
    no buffer; with `on_nan="stop"` neither does any step after it, until the host reads of it: they are those before
    (torch's generator, by which a network of your own may drop, has drawn on). Read before a step that `renews`:
    teacher, averages and optimizer are replaced in it.

    Raises: ValueError: the objective needs a teacher, or LPIPS, and there is none; or other scalings, or other
        noise levels; or a teacher is of other classes, or one that its students are to become of another kind; or the
        weights to be trained have fewer bits than float32, so that rounding would take most steps, or are none, or lie
        outside the network; or an average has the name of the target. TypeError: a model is no Denoiser.

    >>> from cmfast.objectives import EDM
    >>> from cmfast.precondition import Preconditioner
    >>> from cmfast.unet import UNetModel
    >>> model = Denoiser(UNetModel(8, 1, 32, 1, 1, [], channel_mult=(1,)), Preconditioner.edm())
    >>> step = TrainStep(model, EDM(), TrainOptions(steps=1, batch_size=2, learning_rate=1e-4))
    >>> step(Batch(torch.zeros(2, 1, 8, 8), None, torch.arange(2)), 0)
    >>> step.post(1).read().skipped
    0
    """

    def __init__(
        self,
        model: Denoiser,
        objective: Objective,
        options: TrainOptions,
        *,
        teacher_model: Denoiser | None = None,
        lpips: nn.Module | None = None,
        group: Ranks | None = None,
    ) -> None:
        check_models(model, objective, teacher_model, lpips)
        self.objective, self.options, self.group = objective, options, group or Ranks()
        self.device, self.lpips = model.device, lpips
        self.model = model.train()
        if options.checkpointing:
            _recompute(model)
        if self.group.size > 1:
            for each in (model, teacher_model):
                if each is not None:
                    parallel.spread(each)
        self.target_model = copy.deepcopy(model).requires_grad_(False) if objective.needs_target else None
        # A copy, since a progressive distillation writes its students into it.
        self.teacher_model = copy.deepcopy(teacher_model).requires_grad_(False).eval() if teacher_model else None
        self._sharded = options.parallel == "fsdp" and self.group.size > 1
        if self._sharded:
            for each in (self.model, self.target_model, self.teacher_model):
                if each is not None:
                    parallel.shard(each, self.group)
        self.student = self._fast(self.model)
        if self.group.size > 1 and not self._sharded:
            self.student = parallel.averaging(self.student)
        self._target, self._teacher = self._frozen(self.target_model), self._frozen(self.teacher_model)

        self.stage: Stage = objective.stage(0)
        self._target_rate = Given(self.stage.target_rate or 0.0)
        self.averages = self._averages()
        self.optimizer = self._optimizer()
        self._buffers = Buffers(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type) if options.dtype == "float16" else None
        self._kept_scale: Any = None
        # Of losses, and how many they are.
        self._sum, self._losses = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self._steps = 0
        self._bad = torch.full((), NONE, dtype=torch.int64, device=self.device)
        # 1, or NaN once a step was bad: every later gradient is then NaN as well, and the optimizer passes over it.
        self._alive = torch.ones((), device=self.device)

    def __call__(self, batch: Batch, number: int) -> None:
        """Step `number`, counted from 0, on this process's part of the batch."""
        self.enter(self.objective.stage(number))
        images, labels, index = (None if x is None else x.to(self.device, non_blocking=True) for x in batch)
        assert images is not None and index is not None
        images = to_unit(images)
        size = len(images)
        micro = min(self.options.microbatch or size, size)
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.keep()
        for start in range(0, size, micro):
            part = slice(start, start + micro)
            with parallel.synchronising(self.student, start + micro >= size):
                loss = self._loss(images[part], None if labels is None else labels[part], index[part]).sum() / size
                total += loss.detach()
                # A loss that is not finite may have gradients that are: they become NaN, on every process.
                loss = loss * torch.where(loss.detach().isfinite(), self._alive, torch.nan)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.group.size > 1 and not self._sharded:
            parallel.check_used(self.student)
        lost = ~(total * self._alive).isfinite()
        if self.scaler is not None and self.group.size > 1:
            lost = parallel.anywhere(lost)
        self._update(number, lost)
        self._note(total, lost, number)

    def enter(self, stage: Stage) -> None:
        """Go on in a stage; where it is a new one of a progressive distillation, the student becomes the teacher."""
        renewed = self._renews(stage)
        self.stage = stage
        if stage.target_rate is not None:
            self._target_rate.set_(stage.target_rate)
        if not renewed:
            return
        with torch.no_grad():
            assert self.teacher_model is not None
            pairs = (itertools.chain(m.parameters(), m.buffers()) for m in (self.teacher_model, self.model))
            for ours, students in zip(*pairs, strict=True):
                ours.copy_(students)
        skipped = self.optimizer.skipped
        self.averages = self._averages()
        self.optimizer = self._optimizer()
        self.optimizer.skipped.copy_(skipped)

    def renews(self, number: int) -> bool:
        """Whether step `number` begins a new stage of a progressive distillation."""
        return self._renews(self.objective.stage(number))

    def learning_rate(self, number: int) -> float:
        """That of step `number`. A student of a progressive distillation starts over."""
        if not self.objective.teacher_follows:
            return self.options.rate_at(number)
        stage = self.objective.stage(number)
        return self.options.rate_at(number, stage.first_step, stage.steps or self.options.steps - stage.first_step)

    @property
    def unread(self) -> int:
        """Steps since the last reading was sent."""
        return self._steps

    def post(self, done: int) -> Pending:
        """Send the state of the run after `done` steps to the host, and start the next mean."""
        counts = torch.stack([self.optimizer.skipped.to(torch.int64).reshape(()), self._bad])
        norm = self.optimizer.grad_norm.reshape(()).to(torch.float64)
        values = torch.stack([self._sum.to(torch.float64), self._losses.to(torch.float64), norm])
        self._sum.zero_()
        self._losses.zero_()
        self._steps = 0
        return Pending(done, counts, values, self.group)

    def forget(self, steps: int) -> None:
        """Take back what the last steps, which a stop has made do nothing, changed all the same: each counted as
        skipped."""
        self.optimizer.skipped.sub_(steps)

    def _loss(self, images: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        dtype = getattr(torch, self.options.dtype)
        # Optimised networks have a dtype of their own.
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            terms = self.objective.loss(
                self.student,
                images,
                stage=self.stage,
                draw=ops.Draw(self.options.seed, index, 0),
                labels=labels,
                target_model=self._target,
                teacher_model=self._teacher,
                lpips=self.lpips,
            )
        return terms["loss"].float()

    def _renews(self, stage: Stage) -> bool:
        return self.objective.teacher_follows and stage.number != self.stage.number

    def _update(self, number: int, lost: Tensor) -> None:
        """A step of the optimizer; lost: the loss is not finite, or that of a step before was not."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number)
        if self.scaler is None:
            self.optimizer.step()
        else:
            if self._kept_scale is None:
                self._kept_scale = self._scale().clone()
            self.scaler.step(self.optimizer)
            scaling = self.scaler._check_scale_growth_tracker("update")
            before = [x.clone() for x in scaling]
            self.scaler.update()
            # A loss that is not finite is no overflow: at no scale would it be.
            for now, then in zip(scaling, before):
                now.copy_(torch.where(lost, then, now))
        if self._buffers:
            # As of the weights: the norm is that of all processes, and says what the optimizer has passed over.
            self._buffers.put_back(~self.optimizer.grad_norm.isfinite().reshape(()))
            self.averages.follow()

    def _note(self, total: Tensor, lost: Tensor, number: int) -> None:
        """Count a step and its loss, and whether it was bad."""
        bad = ~self.optimizer.grad_norm.isfinite().reshape(())
        if self.scaler is not None:
            # An overflow is none, which a smaller scale cures; for this one it was halved already.
            scale = self._scale()
            self._kept_scale = torch.where(bad, self._kept_scale, scale)
            bad = bad & (scale < LEAST_SCALE)
            scale.copy_(torch.where(bad, self._kept_scale, scale))
        bad = bad | lost
        self._sum += torch.where(bad, 0.0, total)
        self._losses += ~bad
        self._steps += 1
        self._bad = torch.where(bad & (self._bad == NONE), number, self._bad)
        if self.options.on_nan == "stop":
            self._alive = torch.where(self._bad == NONE, 1.0, torch.nan).to(self._alive)

    def _scale(self) -> Tensor:
        """The scale of the loss in float16, as a scalar on the device, not a copy."""
        scale = None if self.scaler is None else self.scaler._get_scale_async()
        assert scale is not None
        return scale

    def _fast(self, model: Denoiser, pack: bool = False) -> Denoiser:
        """The model in the form that is called: optimised, if it may be and can be. pack: as in `fast.optimize`."""
        if not self.options.optimize or self._sharded or fast.refusal(model) is not None:
            return model
        dtype = getattr(torch, self.options.dtype)
        # None would be the weights' own: of a teacher from a file in half precision, not what was asked for.
        own = dtype == torch.float32 and not any(map(_low_precision, model.parameters()))
        return fast.optimize(model, dtype=None if own else dtype, pack=pack)

    def _frozen(self, model: Denoiser | None) -> Denoiser | None:
        if model is None:
            return None
        # A teacher stays as it is for a whole stage.
        optimised = self._fast(model, pack=model is self.teacher_model)
        return frozen(optimised) if self.options.graphs and not self._sharded else optimised

    def _averages(self) -> Averages:
        rates: list[Any] = list(self.options.averages)
        if self.target_model is None:
            return Averages(self.model, rates)
        name = str(self._target_rate)
        if any(str(parse_rate(rate)) == name for rate in rates):
            raise ValueError(f"averages have {name}, which the target's file is called: leave out 'given:'")
        return Averages(self.model, [self._target_rate, *rates], targets={0: self.target_model})

    def _optimizer(self) -> Any:
        options = self.options
        kind = RAdam if options.optimizer == "radam" else Adam
        decoupled: dict[str, Any] = {"decoupled_weight_decay": True} if options.optimizer == "adamw" else {}
        return kind(
            self.model.parameters(),
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            # Infinity clips nothing, and has steps without finite gradients left out.
            max_norm=options.max_norm or math.inf,
            averages=self.averages,
            **decoupled,
        )


def check_models(model: Denoiser, objective: Objective, teacher_model: Any, lpips: Any) -> None:
    """ValueError where these do not go together; the message says what is missing."""
    check_denoiser("model", model)
    if teacher_model is not None:
        check_denoiser("teacher_model", teacher_model)
    name = model.preconditioner.name
    if name != objective.preconditioning:
        raise ValueError(
            f"{type(objective).__name__} trains a model with {objective.preconditioning} preconditioning, and this "
            f"one's is {name}: cmfast.digits.as_consistency_model makes the one from the other"
        )
    own = {level: (level, getattr(model, level)) for level in LEVELS}
    if name == "consistency":
        own["boundary"] = "sigma_min", model.preconditioner.boundary
    if getattr(objective, "weighting", None) in OF_DATA:
        own["sigma_data"] = "sigma_data", model.preconditioner.sigma_data
    wanted = {level: (getattr(objective, of, value), value) for level, (of, value) in own.items()}
    different = [f"{level}={new:g}, not {value:g}" for level, (new, value) in wanted.items() if new != value]
    if different:
        raise ValueError(
            f"{type(objective).__name__} trains for other noise levels or data than the model says it is for: it needs "
            f"a model with {'; '.join(different)}. Give them to Denoiser and Preconditioner, or the model's to the "
            "objective"
        )
    if objective.needs_teacher != (teacher_model is not None):
        needs = "needs a teacher_model" if objective.needs_teacher else "takes no teacher_model"
        raise ValueError(f"{type(objective).__name__} {needs}")
    if getattr(objective, "loss_norm", None) == "lpips" and lpips is None:
        raise ValueError("loss_norm='lpips' needs lpips=, for example lpips=cmfast.perceptual.LPIPS()")
    _check_weights(model)
    if objective.teacher_follows:
        _check_followed(model, teacher_model)
    elif teacher_model is not None:
        ours, theirs = model.num_classes, teacher_model.num_classes
        if (ours is None) != (theirs is None) or (ours or 0) > (theirs or 0):
            raise ValueError(
                f"model has num_classes={ours} and teacher_model num_classes={theirs}: both are given the labels of "
                "the data, or none. Give a teacher of the model's classes, or begin with another model (--teacher, "
                "--init)"
            )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Of a progressive distillation, students become the teacher.
    changed = {"model": model, **({"teacher_model": teacher_model} if objective.teacher_follows else {})}
    for what, each in changed.items():
        dtypes = {p.dtype for name, p in each.named_parameters() if name in trained and _low_precision(p)}
        if dtypes:
            raise ValueError(
                f"the weights of {what} are {', '.join(sorted(map(str, dtypes)))}, and float32 is what is trained: "
                f"call {what}.float() first, or requires_grad_(False) on what stays as it is; options.dtype says what "
                "networks compute in"
            )


def check_denoiser(what: str, model: object) -> None:
    """TypeError unless it is a Denoiser; the message says how it becomes one."""
    check_model(model)
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"{what} must be a cmfast.Denoiser, got a {type(model).__name__}: wrap a network F(x, timesteps) in "
            "cmfast.Denoiser(network), also one that torch.compile has made"
        )


def _check_weights(model: Denoiser) -> None:
    """ValueError unless all weights are the network's, and some of them are to be trained."""
    outside = [name for name, _ in model.named_parameters() if not name.startswith("network.")]
    if outside:
        raise ValueError(
            f"{', '.join(outside)} of the model is no part of its network, whose weights alone are saved and shared "
            "between processes: define it in the network"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no weight of the model is to be trained: call model.requires_grad_(True), or that of the part that is "
            "(averages and targets are made without)"
        )


def _check_followed(model: Denoiser, teacher_model: Any) -> None:
    """ValueError where a student cannot become the teacher of the next, tensor by tensor."""
    said = (
        [f"{each.preconditioner}", f"num_classes={each.num_classes}", *_described(each)]
        for each in (model, teacher_model)
    )
    for one, other in itertools.zip_longest(*said, fillvalue="nothing more"):
        if one != other:
            raise ValueError(
                "a student of a progressive distillation becomes the teacher of the next, and these two are not of one "
                f"kind: where model has {one}, teacher_model has {other}"
            )


def _described(model: nn.Module) -> list[str]:
    """Names and shapes of parameters and buffers."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [f"{name.replace('_orig_mod.', '')} {list(tensor.shape)}" for name, tensor in tensors]


def _low_precision(parameter: Tensor) -> bool:
    """Whether it has fewer bits than float32."""
    return parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32


def _recompute(model: Denoiser) -> None:
    """Have the blocks of a network make their activations again. Raises: ValueError: it has none that can."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "use_checkpoint")]
    network: Any = model.network
    if not hasattr(network, "enable_gradient_checkpointing"):
        network = getattr(network, "unet", network)  # of a UNet2DNetwork
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    elif not blocks:
        kind = type(model.network).__name__
        raise ValueError(f"checkpointing=True: a {kind} has no blocks that can make their activations again")
    for block in blocks:
        block.use_checkpoint = True
