"""A plain training loop: a loss, Adam, an average of the weights, and checkpoints that resume exactly.

Every random number of a step follows from (seed, step), so that a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmfast.data import ImageData
from cmfast.denoiser import Denoiser

#: (model, images, labels, step) -> per-sample loss [B].
LossFn = Callable[[Denoiser, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast.

    steps            optimizer steps
    batch_size       images per step
    learning_rate    Adam's, after `warmup` steps; falls to 0 along a cosine
    ema_rate         of the averaged weights
    seed             of everything random
    save_every       steps between checkpoints
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    ema_rate: float = 0.999
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"ema_rate must be from 0 to below 1, got {self.ema_rate}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def ema_at(self, step: int) -> float:
        """The averaging rate of a step: a shorter memory while there is little to remember."""
        return min(self.ema_rate, (step + 1) / (step + 10))


class Trainer:
    """Trains `model` on `data`; `state_path` holds the newest checkpoint and is where a run goes on from.

    Raises: ValueError: the checkpoint there belongs to a run with other options.
    """

    def __init__(
        self,
        model: Denoiser,
        loss_fn: LossFn,
        data: ImageData,
        options: TrainOptions,
        state_path: Path | str,
    ) -> None:
        self.model, self.loss_fn, self.data, self.options = model, loss_fn, data, options
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        self.state_path = Path(state_path)
        self.step = 0
        self.losses: list[float] = []
        if self.state_path.exists():
            self._resume()

    def run(self, *, progress: bool = True) -> Denoiser:
        """Train to the last step and return the average."""
        from tqdm.auto import tqdm

        options = self.options
        batches = self.data.batches(options.batch_size, seed=options.seed, start_step=self.step)
        self.model.train()
        with tqdm(total=options.steps, initial=self.step, disable=not progress, desc=self.state_path.stem) as bar:
            while self.step < options.steps:
                images, labels = next(batches)
                self.losses.append(self._train_step(images, labels))
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
                bar.update()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
        return self.average

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        torch.manual_seed((self.options.seed << 32) + self.step)
        device = self.model.device
        images, labels = images.to(device), labels.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate_at(self.step)
        loss = self.loss_fn(self.model, images, labels, self.step).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - self.options.ema_at(self.step)
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Write the state beside the old one, then put it in its place: a crash leaves one or the other."""
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_path.with_suffix(".tmp")
        state = {
            "step": self.step,
            "losses": self.losses,
            "options": vars(self.options),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.state_path)
        finally:
            temporary.unlink(missing_ok=True)

    def _resume(self) -> None:
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        if state["options"] != vars(self.options):
            raise ValueError(
                f"{self.state_path} was trained with {state['options']}, not {vars(self.options)}; "
                "give the same options, another output folder, or delete the file"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]
