"""What the original, openai/consistency_models, trains with: its loss, its mixed precision, its averages, its LPIPS."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from cmfast.benchmarks.original import importing, original_unet
from cmfast.benchmarks.training_start import (
    GATE_RATE,
    LOG2_LOSS_SCALE,
    NUM_SCALES,
    TARGET_RATE,
    Drawn,
    Start,
    State,
    state_of,
)
from cmfast.perceptual import IMAGENET_MEAN, IMAGENET_STD, LPIPS

#: The layers of torchvision's VGG-16 that LPIPS compares, and their channels.
LAYERS = {"3": 64, "8": 128, "15": 256, "22": 512, "29": 512}


class Original(NamedTuple):
    """Its modules, and a note on what stands in for what."""

    karras_diffusion: Any
    fp16_util: Any
    update_ema: Any
    note: str


class ContentLoss(nn.Module):
    """In the place of piq's, operation by operation, in the one way that the original uses it.

    model: VGG-16's `features`, with average pooling; layers: those that are compared; weights: [1, C, 1, 1] for each.
    """

    def __init__(self, model: nn.Module, layers: list[str], weights: list[Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.layers, self.weights = model, layers, weights
        self.distance = nn.MSELoss(reduction="none")
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.to(x)
        distances = [self.distance(a, b) for a, b in zip(self._features(x), self._features(y))]
        return torch.cat([(d * w.to(d)).mean(dim=[2, 3]) for d, w in zip(distances, self.weights)], dim=1).sum(dim=1)

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.mean.to(x)) / self.std.to(x)
        features = []
        for name, module in self.model.named_children():
            x = module(x)
            if name in self.layers:
                features.append(x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10))
        return features


def original_training(path: Path | None, device: torch.device) -> Original:
    """The original's code, from a checkout or as it is installed.

    Raises: Missing: there is none, or it cannot be imported.
    """
    # Of no use to one process: it sends and reads files.
    modules: dict[str, Any] = {name: MagicMock() for name in ("mpi4py", "blobfile")}
    for name in ("torchvision", "piq"):
        # Imported before, since modules are forgotten at the end of the block, and these bear no second import.
        if find_spec(name):
            importlib.import_module(name)
        else:
            modules[name] = ModuleType(name)
    if "torchvision" in modules:
        modules["torchvision.transforms"] = MagicMock()
    if "piq" in modules:
        modules["piq"].LPIPS = ContentLoss
    with patch.dict(sys.modules, modules), importing(path, device) as stand_ins:
        karras_diffusion = importlib.import_module("cm.karras_diffusion")
        fp16_util, nn_util, logger = (importlib.import_module(f"cm.{name}") for name in ("fp16_util", "nn", "logger"))
    # Else it opens files in a new folder at the first step.
    logger.Logger.CURRENT = logger.Logger(dir=None, output_formats=[])
    note = f"stand-ins for {', '.join(sorted({name.partition('.')[0] for name in (*modules, *stand_ins)}))}"
    return Original(karras_diffusion, fp16_util, nn_util.update_ema, note)


def original_lpips(lpips: LPIPS) -> nn.Module:
    """The original's LPIPS, piq's or what stands in for it, with the weights of ours (VGG-16 with average pooling)."""
    import torchvision.models

    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    weights = dict(lpips.trunk.named_buffers())
    device = lpips.heads.device
    features = features.to_empty(device=device)
    features.load_state_dict({name: weights[name].float() for name in features.state_dict()})
    for name, module in features.named_children():
        if isinstance(module, nn.MaxPool2d):
            setattr(features, name, nn.AvgPool2d(kernel_size=2, stride=2, padding=0))
    heads = [head.view(1, -1, 1, 1) for head in lpips.heads.split(list(LAYERS.values()))]
    options: dict[str, Any] = {"reduction": "none", "normalize_features": True}
    kind: Any = ContentLoss
    if find_spec("piq"):
        import piq

        kind = piq.ContentLoss
    return kind(features.requires_grad_(False), list(LAYERS), weights=heads, **options)


class OpenAI:
    """The original's step: its losses, RAdam, and its averages parameter by parameter. On a GPU its float16 mode.

    In float32 its own training loop does not run, since it updates the target as flat vectors: here they are averaged
    as they are. Left out are its logging, which reads every loss on the host, and in float32 the norms that it logs.
    """

    def __init__(self, start: Start, *, fp16: bool | None = None) -> None:
        device = start.device
        self._fp16 = device.type == "cuda" if fp16 is None else fp16
        self.dtype = torch.float16 if self._fp16 else torch.float32
        self._original = original_training(start.openai, device)
        make = functools.partial(self._diffusion, loss_norm=start.trial.loss_norm)
        self._student_diffusion, self._teacher_diffusion = make(distillation=True), make(distillation=False)
        lpips = start.perceptual(torch.float32)
        if lpips is not None:
            self._student_diffusion.lpips_loss = original_lpips(lpips)
        networks: dict[str, Any] = {}
        for role in start.weights:
            ours: Any = start.denoiser(role)
            networks[role], _ = original_unet(ours.network, start.openai, fp16=self._fp16, training=True)
        self.note: str | None = f"{self._original.note}; attention is PyTorch's where flash_attn's is"
        self._student, self._target = networks["student"], networks["target"].requires_grad_(False)
        self._teacher = networks.get("teacher")
        if self._teacher is not None:
            self._teacher.requires_grad_(False).eval()
        self._start = start
        self._images, self._labels = start.batch()
        util = self._original.fp16_util
        self._trainer = util.MixedPrecisionTrainer(
            model=self._student, use_fp16=self._fp16, initial_lg_loss_scale=LOG2_LOSS_SCALE
        )
        self._target_groups: Any = None
        self._target_weights = list(self._target.parameters())
        if self._fp16:
            self._target_groups = util.get_param_groups_and_shapes(self._target.named_parameters())
            self._target_weights = util.make_master_params(self._target_groups)
            for network in (self._target, self._teacher):
                if network is not None:
                    network.convert_to_fp16()
        self._optimizer = torch.optim.RAdam(self._trainer.master_params, lr=GATE_RATE)
        self._averages = [copy.deepcopy(self._trainer.master_params) for _ in start.rates]
        self._loss = torch.zeros(())

    def _diffusion(self, loss_norm: str, distillation: bool) -> Any:
        # Made for l2: else it downloads the weights of a trunk.
        options: dict[str, Any] = {"weight_schedule": "uniform", "loss_norm": "l2"}
        diffusion = self._original.karras_diffusion.KarrasDenoiser(distillation=distillation, **options)
        diffusion.loss_norm = loss_norm
        return diffusion

    def step(self, number: int, drawn: Drawn | None = None) -> None:
        """As `Provider.step`."""
        noise, indices = drawn or (None, None)
        self._trainer.zero_grad()
        given = nullcontext() if indices is None else patch.object(torch, "randint", lambda *a, **k: indices)
        with given:
            terms = self._student_diffusion.consistency_losses(
                self._student,
                self._images,
                NUM_SCALES,
                model_kwargs={} if self._labels is None else {"y": self._labels},
                target_model=self._target,
                teacher_model=self._teacher,
                teacher_diffusion=self._teacher_diffusion,
                noise=noise,
            )
        loss = terms["loss"].mean()
        self._trainer.backward(loss)
        self._loss = loss.detach()
        if not self._fp16:
            self._optimizer.step()
        elif not self._trainer.optimize(self._optimizer):
            return
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        masters, update_ema = self._trainer.master_params, self._original.update_ema
        for rate, average in zip(self._start.rates, self._averages):
            update_ema(average, masters, rate=rate)
        update_ema(self._target_weights, masters, rate=TARGET_RATE)
        if self._fp16:
            self._original.fp16_util.master_params_to_model_params(self._target_groups, self._target_weights)

    def learn(self, rate: float) -> None:
        """As `Provider.learn`."""
        self._optimizer.param_groups[0]["lr"] = rate

    def loss(self) -> float:
        """As `Provider.loss`."""
        return self._loss.item()

    def state(self) -> State:
        """As `Provider.state`."""
        others = {f"average {k}": self._unflattened(average) for k, average in enumerate(self._averages)}
        masters = self._trainer.master_params
        return state_of(self._unflattened(masters), self._unflattened(self._target_weights), others)

    def _unflattened(self, masters: list[Tensor]) -> list[Tensor]:
        """Flat float32 weights, as parameters in the order of the network."""
        if not self._fp16:
            return masters
        util, groups = self._original.fp16_util, self._trainer.param_groups_and_shapes
        named = util.master_params_to_state_dict(self._student, groups, masters, True)
        return [named[name] for name, _ in self._student.named_parameters()]
