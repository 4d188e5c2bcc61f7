"""What a trial of training is about, what every provider of it starts from, and what a provider is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cmfast import Denoiser, curricula, ops, reference
from cmfast.benchmarks import networks
from cmfast.benchmarks.original import Missing
from cmfast.data import to_unit
from cmfast.perceptual import LPIPS
from cmfast.precondition import Preconditioner

#: Images, labels and weights follow from it, and in the gate noise and levels.
SEED = 2303
NUM_SCALES, TARGET_RATE = 40, 0.95
#: So large that what three steps change is not lost in float32's rounding of weights; and for hundreds of steps.
GATE_RATE, LEARNING_RATE = 0.03, 1e-5
#: Rates of the averages: as many as the published runs have, and forgetting so fast that three steps show a wrong one.
AVERAGES = {"imagenet64": (0.5, 0.6, 0.7)}
ONE_AVERAGE = (0.5,)
#: That float16 losses are multiplied by at first: no gradient overflows, so that every provider takes every step.
LOG2_LOSS_SCALE = 14

#: Noise and indices [B] of one step.
Drawn = tuple[Tensor, Tensor]
#: Parameters in the order of our network: `student`, `target` and `average 0` and so on.
State = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Trial:
    """Providers that are timed in turn, on one network and one recipe.

    recipe: cd (from a teacher, Heun's method) or ct. dtype: what cmfast and plain PyTorch compute in.
    """

    network: str
    batch: int
    providers: tuple[str, ...]
    recipe: str = "cd"
    loss_norm: str = "l2"
    dtype: str = "float32"

    @property
    def setting(self) -> str:
        """What it is about, dtype and providers aside.

        >>> Trial("tiny", 4, ("reference",), loss_norm="lpips").setting
        'tiny, batch 4, cd lpips'
        """
        return f"{self.network}, batch {self.batch}, {self.recipe} {self.loss_norm}"

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.providers)}"


class Start:
    """What every provider of a trial starts from: random weights, images and labels.

    Raises: Missing: the loss needs a package that is not installed.
    """

    def __init__(self, trial: Trial, device: torch.device, openai: Path | None = None) -> None:
        self.trial, self.device, self.openai = trial, device, openai
        if trial.loss_norm == "lpips" and not find_spec("torchvision"):
            raise Missing("torchvision, which has the trunk of LPIPS, is not installed for this Python")
        #: Each has weights of its own, so that one in the place of another shows.
        roles = ("student", "target", *(["teacher"] if trial.recipe == "cd" else []))
        self.weights = {role: _weights(trial.network, device, seed) for seed, role in enumerate(roles)}
        self.rates = AVERAGES.get(trial.network, ONE_AVERAGE)
        generator = torch.Generator().manual_seed(SEED)
        shape = self.weights["student"].image_shape
        assert shape is not None
        self.pixels = torch.randint(256, (trial.batch, *shape), dtype=torch.uint8, generator=generator)
        self.labels = None
        if self.weights["student"].num_classes is not None:
            self.labels = torch.randint(self.weights["student"].num_classes, (trial.batch,), generator=generator)
        self.lpips = _lpips() if trial.loss_norm == "lpips" else None

    def denoiser(self, role: str, dtype: torch.dtype = torch.float32) -> Denoiser | None:
        """A model with the weights of student, target or teacher; None: the recipe has none. A teacher is a diffusion
        model."""
        if role not in self.weights:
            return None
        network: Any = self.weights[role].network
        model = networks.around(copy.deepcopy(network).to(self.device, dtype))
        if role == "teacher":
            model.preconditioner = Preconditioner.by_name("edm")
        return model if role == "teacher" else model.train()

    def perceptual(self, dtype: torch.dtype | None = None) -> LPIPS | None:
        """LPIPS with a random trunk, if the loss is that; dtype: of all of it, by default as a user gets it."""
        if self.lpips is None:
            return None
        lpips = copy.deepcopy(self.lpips)
        if dtype is not None:
            lpips.dtype = dtype  # else a GPU's default of the trunk, bfloat16, comes after every cast to float32
            lpips.to(dtype)
        return lpips.to(self.device)

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] and labels, on the device."""
        return to_unit(self.pixels).to(self.device), None if self.labels is None else self.labels.to(self.device)

    def index(self, number: int) -> Tensor:
        """Positions [B] in the data of the images of a step, on the CPU."""
        return torch.arange(self.trial.batch) + number * self.trial.batch

    def drawn(self, number: int) -> Drawn:
        """The noise and the indices that a TrainStep draws at a step."""
        draw = ops.Draw(SEED, self.index(number).to(self.device), 0)
        grid = curricula.karras_grid(NUM_SCALES, device=self.device)
        noise = ops.normal(SEED, draw.index, tuple(self.pixels.shape[1:]), draw=0, dtype=torch.float32)
        return noise, reference.draw_index(draw, grid)


# Random weights take seconds to draw, and two or three trials in a row want the same.
@functools.lru_cache(maxsize=3)
def _weights(network: str, device: torch.device, seed: int) -> Denoiser:
    return networks.denoiser(network, device, torch.float32, seed)


@functools.cache
def _lpips() -> LPIPS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LPIPS(pretrained=False)


class Provider(Protocol):
    """What is timed."""

    dtype: torch.dtype
    note: str | None

    def step(self, number: int, drawn: Drawn | None = None) -> None:
        """Step `number`, from 0, with the given noise and indices, or its own."""

    def learn(self, rate: float) -> None:
        """Set the learning rate, which is `GATE_RATE` at first."""

    def loss(self) -> float:
        """The mean loss of the last step; NaN if a step since the last call had none that is finite."""

    def state(self) -> State:
        """The memory itself, or copies."""


def state_of(student: Iterable[Tensor], target: Iterable[Tensor], averages: dict[str, list[Tensor]]) -> State:
    every = {"student": student, "target": target, **averages}
    return {name: [p.detach() for p in parameters] for name, parameters in every.items()}
