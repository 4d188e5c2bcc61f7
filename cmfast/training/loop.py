"""The training loop: steps, readings, checkpoints and pictures, and an end that can be gone on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmfast.data import Dataset, ImageData
from cmfast.data.folder import LISTING
from cmfast.denoiser import Denoiser
from cmfast.objectives import Objective
from cmfast.ranks import Ranks
from cmfast.training import checkpoints, config, pictures
from cmfast.training.config import TrainOptions
from cmfast.training.lock import Locked, locked
from cmfast.training.state import State, fingerprint, read, save_weights
from cmfast.training.step import Pending, Reading, TrainStep, check_models
from cmfast.training.stop import Stop, Stopped
from cmfast.whole import write_text, written_whole

LOG, SETTINGS, RESULT = "log.jsonl", "config.yaml", "model.safetensors"


class NaNLoss(ValueError):
    """The loss, or a gradient, is not a finite number; the message says at which step, and what was kept."""


class Trainer:
    """Trains a model on data, and leaves in the folder `out`

        config.yaml          what it was trained with
        images.gz            of a folder of images, the files that it began with
        log.jsonl            loss, learning rate, speed at every `log_interval`
        checkpoints/step-…/  the state of the last `keep` steps that were saved (`cmfast.training.checkpoints`)
        samples/, loss.png   pictures, every `sample_interval`
        tensorboard/         the log, with `tensorboard`
        model.safetensors    the first average, once the last step is done
        .lock                held while it runs, so that no other process writes there (`cmfast.training.lock`)

    SIGTERM ends a run after the step at hand, with a checkpoint (`cmfast.training.stop`); so does `stop()`.

    resume: go on from the newest checkpoint in `out`. The result is that of a run that was not interrupted: on a CPU
    the same bits. "auto": where there is one.
    settings: what else `config.yaml` is to hold. tensorboard: write the log for it, too. data: what
    `cmfast.data.open_data` gives. model, objective, options, teacher_model, lpips, group: as of `TrainStep`.

    Raises: ValueError: there are checkpoints in `out`, and no `resume`; or none to resume from; or they are of another
        configuration (the message names what differs); or model and data do not go together; or the processes do not
        see the same folder. TypeError: model or data are something else, such as a network or a tensor.
        FileNotFoundError. RankError: one of these, on another process.

    >>> import tempfile
    >>> from cmfast.objectives import EDM
    >>> from cmfast.precondition import Preconditioner
    >>> from cmfast.unet import UNetModel
    >>> model = Denoiser(UNetModel(8, 1, 32, 1, 1, [], channel_mult=(1,)), Preconditioner.edm(), image_shape=(1, 8, 8))
    >>> options = TrainOptions(steps=2, batch_size=2, learning_rate=1e-4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     average = Trainer(model, EDM(), ImageData(torch.zeros(4, 1, 8, 8)), options, folder).run(progress=False)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['.lock', 'checkpoints', 'config.yaml', 'log.jsonl', 'model.safetensors']
    """

    def __init__(
        self,
        model: Denoiser,
        objective: Objective,
        data: Dataset | ImageData,
        options: TrainOptions,
        out: Path | str,
        *,
        teacher_model: Denoiser | None = None,
        lpips: nn.Module | None = None,
        group: Ranks | None = None,
        resume: bool | str = False,
        settings: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.group = group or Ranks()
        self.data, self.options, self.out = data, options, Path(out)
        if self.group.rank:
            # Else a network that drops by torch's generator would drop alike everywhere.
            torch.manual_seed(torch.initial_seed() + self.group.rank)
        if options.batch_size % self.group.size:
            raise ValueError(f"batch_size={options.batch_size} cannot be shared by {self.group.size} processes alike")

        def checked() -> dict[str, Any]:
            check_models(model, objective, teacher_model, lpips)
            check_data(model, data)
            return {
                **(settings or {}),
                "objective": {"name": type(objective).__name__, **config.plain(objective)},
                "data_fingerprint": data.fingerprint,
                # Not its path: the file may have moved.
                "teacher_fingerprint": fingerprint(teacher_model),
                "options": config.plain(options),
            }

        self.settings = self.group.together(checked)
        found = self.group.together(lambda: self._checkpoint(resume))
        start = 0 if found is None else checkpoints.number(found)
        if not self.group.same(start):
            raise ValueError(
                f"the processes of this run find different checkpoints, and this one would go on from step {start}: "
                f"{self.out} must be one folder that all of them see, on whatever machine they are"
            )
        self.state = State(model, self.group)
        self._stop_asked = Stop(self.group)
        self.step = TrainStep(
            model, objective, options, teacher_model=teacher_model, lpips=lpips, group=self.group
        )
        #: Steps that are done.
        self.done = self.state.read(self.step, found) if found is not None else 0
        self._pending: Pending | None = None
        self._since = (time.perf_counter(), self.done)
        self._writer = _board_writer() if tensorboard and not self.group.rank else None
        self._board: Any = None

    def run(self, *, progress: bool = True) -> Denoiser:
        """Train to the last step; the first average, on the CPU. progress: show a bar.

        Raises: NaNLoss: with `on_nan="stop"`; a checkpoint of the step before is there. Stopped: by SIGTERM or `stop`;
            a checkpoint of the last step that was done is there. Locked: another process trains in `out`. OSError: the
            folder cannot be written. RankError: of several processes one failed, or is gone.
        """
        with ExitStack() as held, self.group.connected(), self._stop_asked:
            self.group.together(lambda: self._begin(held))
            return self._run(progress)

    def stop(self) -> None:
        """Have `run` end after the step at hand, as SIGTERM does: for the handler of another signal, or a thread."""
        self._stop_asked.ask()

    def _run(self, progress: bool) -> Denoiser:
        from tqdm.auto import tqdm

        options, group, first = self.options, self.group, self.done + 1
        batches: Any = self.data.batches(
            options.batch_size // group.size,
            seed=options.seed,
            start_step=self.done,
            rank=group.rank,
            world_size=group.size,
            workers=options.workers,
            pin_memory=self.step.device.type == "cuda",
        )
        shown = progress and group.rank == 0
        with closing(batches), tqdm(total=options.steps, initial=self.done, disable=not shown) as bar:
            bar.set_description(self.out.name)
            while self.done < options.steps:
                if self.step.renews(self.done):
                    # A NaN of the last stage is to be stopped at while its teacher is there.
                    self._settle(bar)
                batch = self._next(batches, bar)
                self.step(batch, self.done)
                self.done += 1
                if self.done == first:
                    self.state.check(self.step)
                bar.update()
                # The numbers of some steps ago: by now they are there, and nobody waits for them.
                self._report(bar)
                if self.done % options.log_interval == 0:
                    self._pending = self.step.post(self.done)
                last = self.done == options.steps
                if last or self.done % options.save_interval == 0:
                    self._settle(bar)
                    self.save()
                if options.sample_interval and (last or self.done % options.sample_interval == 0):
                    self._report(bar)
                    self._draw()
                if self._stop_asked.now() and not last:
                    self._end(bar)
        return self._finish()

    def average(self, k: int = 0) -> Denoiser:
        """Average k (the target aside), on the CPU; the next call changes it."""
        return self.state.average(self.step, k + (self.step.target_model is not None))

    def save(self) -> Path:
        """A checkpoint of the state now, for all processes to call.

        Raises: OSError, or RankError of several processes: it could not be written; those before it are there still.
        """
        place, first = checkpoints.place(self.out, self.done), self.group.rank == 0
        # The first one looks, for all: what follows is work that they do together, or none of them.
        if self.group.any(first and place.is_dir())():  # whole, and a step has one state
            return place
        parts = self.state.parts(self.step, self.done, config.plain(self.settings))

        def write(folder: Path) -> None:
            for name, put in parts:
                put(folder / name)

        def work() -> Path:
            try:
                return checkpoints.save(self.out, self.done, write, keep=self.options.keep) if first else place
            finally:
                for _ in parts:  # the others wait for this process's part of them, also where it could not write
                    pass

        return self.group.together(work)

    def losses(self) -> tuple[list[int], list[float]]:
        """The steps of the log and the loss at each, NaN where there was none."""
        lines = pictures.read_log(self.out / LOG)
        return [line["step"] for line in lines], [math.nan if line["loss"] is None else line["loss"] for line in lines]

    def _checkpoint(self, resume: bool | str) -> Path | None:
        found = checkpoints.newest(self.out)
        if found is not None and not resume:
            raise ValueError(f"{self.out} holds a run ({found.name}): resume it, or choose another folder")
        if found is None:
            if resume is True:
                raise FileNotFoundError(f"there is nothing to resume from in {checkpoints.folder(self.out)}")
            return None
        checkpoints.check_links(self.out, found)
        saved, now = read(found)["settings"], config.plain(self.settings)
        if self.options.decay == "constant":  # then more steps are the same steps, and more
            saved["options"]["steps"] = now["options"]["steps"]
        different = config.differences(saved, now)
        if different:
            raise ValueError(
                f"{found} is of another configuration, so that it cannot be resumed:\n  " + "\n  ".join(different)
            )
        if self.options.steps < (done := checkpoints.number(found)):
            raise ValueError(f"steps must be {done} or more, as the run in {self.out} has, got {self.options.steps}")
        return found

    def _begin(self, held: ExitStack) -> None:
        """The folder and its lock, the settings, and logs without the steps that will be done again."""
        if self.group.rank:
            return
        held.enter_context(locked(self.out))
        newest = checkpoints.saved(self.out)[-1:]
        if newest and newest[0][0] > self.done:
            raise Locked(
                f"another process has written {newest[0][1]} since this one looked, and this one is at step "
                f"{self.done}: start again, with resume=True"
            )
        if (home := checkpoints.folder(self.out)).exists():
            checkpoints.check_links(self.out, home)
        write_text(self.out / SETTINGS, config.written(self.settings))
        if self.data.listing is not None:
            with written_whole(self.out / LISTING) as file:
                file.write_bytes(self.data.listing)
        kept = [line for line in pictures.read_log(self.out / LOG) if line["step"] <= self.done]
        write_text(self.out / LOG, "".join(map(pictures.log_line, kept)))
        if self._writer is not None:
            # Steps that will be done again are not shown twice.
            self._board = self._writer(str(self.out / "tensorboard"), purge_step=self.done + 1)
            held.callback(self._board.close)  # else the last lines may be lost with the process

    def _report(self, bar: Any) -> None:
        """Take up the numbers that were posted, if any."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        reading = pending.read()
        if reading.bad_step is not None and self.options.on_nan == "stop":
            self._stop(reading.bad_step)
        if self.group.rank:
            return
        line = self._line(pending.done, pending.sent, reading)
        with open(self.out / LOG, "a", encoding="utf-8") as file:
            file.write(pictures.log_line(line))
        bar.set_postfix({name: line[name] for name in ("loss", "images_per_s", "memory_gb", "skipped")})
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, pending.done)

    def _line(self, done: int, sent: float, reading: Reading) -> dict[str, Any]:
        then, before = self._since
        self._since = (sent, done)
        speed = (done - before) * self.options.batch_size / max(sent - then, 1e-9)
        return {
            "step": done,
            "loss": reading.loss,
            "learning_rate": self.step.learning_rate(done - 1),
            "grad_norm": reading.grad_norm,
            "skipped": reading.skipped,
            "num_scales": self.step.objective.stage(done - 1).num_scales,
            "images_per_s": round(speed, 2),
            "memory_gb": round(memory(self.step.device) / 1e9, 3),
        }

    def _next(self, batches: Any, bar: Any) -> Any:
        """A batch. Where it cannot be read, for one bad image among millions, the steps so far are kept; not of
        several processes, of which the others can read theirs."""
        try:
            return next(batches)
        except Exception:
            if self.group.size == 1 and self.done:
                self._settle(bar)
                self.save()
            raise

    def _settle(self, bar: Any) -> None:
        """Wait for the numbers of all steps so far: a NaN in one of them shows before a checkpoint is written, or a
        stage begins."""
        if self.step.unread:
            self._pending = self.step.post(self.done)
        self._report(bar)

    def _end(self, bar: Any) -> None:
        """What was asked for: a checkpoint, and no step more."""
        self._settle(bar)
        where = self.save()
        raise Stopped(f"stopped after step {self.done} of {self.options.steps}, which is in {where}")

    def _stop(self, step: int) -> None:
        """Keep the weights before a bad step, which no step since has changed, and say so."""
        self.step.forget(self.done - step)
        self.done = step
        where = self.save()
        raise NaNLoss(
            f"the loss of step {step} (of {self.options.steps}), or a gradient, is not finite. The state before it is "
            f"in {where}: resumed from there, on_nan='skip' leaves such steps out. Resumed from an earlier checkpoint "
            "(take that folder away), a lower learning_rate or max_norm may keep it finite"
        )

    def _draw(self) -> None:
        average = self.average()
        # The others wait here for as long as it takes: in the next step, a GPU's collective would give up before.
        self.group.together(lambda: None if self.group.rank else self._pictures(average))

    def _pictures(self, average: Denoiser) -> None:
        grid, curve = self.out / "samples" / f"step-{self.done:08d}.png", self.out / "loss.png"
        how = {**self.step.objective.sampling(self.step.stage), "image_shape": tuple(self.data.image_shape)}

        def samples() -> None:
            # On a CPU it would take minutes, while a GPU is idle.
            model = pictures.copy_on(average, self.step.device)
            pictures.sample_grid(model, grid, seed=self.options.seed, **how)

        def losses() -> None:
            pictures.plot_losses({self.out.name: self.losses()}, curve)

        for draw in (samples, losses) if self.data.bounded else (losses,):  # latents are no picture
            try:
                draw()
            except Exception as error:  # of whatever kind: a run is worth more than its pictures
                warnings.warn(f"a picture is missing at step {self.done}: {error}", stacklevel=2)

    def _finish(self) -> Denoiser:
        average, consistency = self.average(), self.step.objective.consistency
        # No process returns before the file is there.
        self.group.together(
            lambda: None if self.group.rank else save_weights(average, self.out / RESULT, consistency=consistency)
        )
        return average


def _board_writer() -> Any:
    """The class that writes TensorBoard's files: missing now rather than after the data were read."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter


def check_data(model: Denoiser, data: Any) -> None:
    """ValueError where images or labels are not what the model takes, TypeError where they are no data set; the message
    says what to change."""
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data must be a cmfast.data.Dataset, as open_data gives it, got a {type(data).__name__}: "
            "cmfast.data.ImageData(images, labels) makes one of tensors"
        )
    if model.image_shape is not None and tuple(data.image_shape) != tuple(model.image_shape):
        raise ValueError(
            f"the model makes images {list(model.image_shape)} [C, H, W], the data has {list(data.image_shape)}: "
            "give image_size= and channels= to the data, or another model"
        )
    if model.bounded != data.bounded:
        kind = "lie in [-1, 1]" if data.bounded else "have no range"
        raise ValueError(
            f"the data {kind} (bounded={data.bounded}) and the model's do not: "
            f"make it a Denoiser(..., bounded={data.bounded}), or the data ImageData(..., bounded={model.bounded})"
        )
    if model.num_classes is not None and data.num_classes is None:
        raise ValueError(
            f"the model is for {model.num_classes} classes and the data has no labels: put the images of each class "
            "into a folder of its own, or add arr_1 to the .npz file"
        )
    if model.num_classes is None and data.num_classes is not None:
        raise ValueError("the data has labels and the model takes none: open the data with labelled=False")
    if data.num_classes is not None and data.num_classes > (model.num_classes or 0):
        raise ValueError(f"the data has labels of {data.num_classes} classes, the model knows {model.num_classes}")


def memory(device: torch.device) -> float:
    """Bytes at the most so far: of a GPU's memory, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    except ImportError:
        return math.nan
