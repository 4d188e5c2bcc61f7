"""Who makes images: cmfast's Sampler and its rivals, all from the same weights, and all through the same gate."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast import Denoiser, Sampler, ops, reference
from cmfast.benchmarks import networks
from cmfast.benchmarks.convolutions import Convolutions
from cmfast.benchmarks.original import Missing, original_unet
from cmfast.fast.network import has_onednn

#: What diffusers' documentation recommends for the most speed; it includes CUDA graphs on a GPU.
MAX_AUTOTUNE = {"mode": "max-autotune", "dynamic": False}
#: Noise of the first step and labels of the images that the gate looks at follow from it.
SEED = 2**40 + 7
#: Of the noise that is added between two steps.
SIGMA_MIN = 0.002
#: In the place of a sampler's name: one D, with neither noise drawn nor pixels made.
FORWARD = "forward"


@dataclass(frozen=True)
class Trial:
    """Providers that are timed in turn, on one batch size and one way of sampling.

    dtype: of the network; none: float32 on a CPU, bfloat16 on a GPU.
    """

    batch: int
    providers: tuple[str, ...]
    sampler: str = "multistep"
    steps: int = 1
    dtype: str = ""

    def __str__(self) -> str:
        """
        >>> str(Trial(16, ("reference", "cmfast"), steps=2))
        'batch 16, multistep, 2 steps: reference, cmfast'
        """
        return f"{self.name}: {', '.join(self.providers)}"

    @property
    def loop(self) -> str:
        """The sampler that is built: of a forward pass, the loop around one."""
        return "multistep" if self.sampler == FORWARD else self.sampler

    @property
    def name(self) -> str:
        """
        >>> Trial(1, (), sampler="forward").name, Trial(1, (), dtype="bfloat16").name
        ('batch 1, forward', 'batch 1, multistep, 1 step, bfloat16')
        """
        plural = "" if self.steps == 1 else "s"
        steps = "" if self.sampler == FORWARD else f", {self.steps} step{plural}"
        return f"batch {self.batch}, {self.sampler}{steps}{self.dtype and ', ' + self.dtype}"


class Models:
    """One network with its weights, as it comes and in channels_last, in the dtype that is measured."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, openai: Path | None = None) -> None:
        self.name, self.device, self.dtype, self.openai = name, device, dtype, openai
        self.contiguous = networks.denoiser(name, device, dtype)
        self.channels_last = self.cast(dtype, memory_format=torch.channels_last)

    @property
    def network(self) -> Any:
        """The U-Net itself."""
        return self.contiguous.network

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images."""
        shape = self.contiguous.image_shape
        assert shape is not None
        return shape

    def cast(self, dtype: torch.dtype, **options: Any) -> Denoiser:
        """A copy in another dtype."""
        return networks.around(copy.deepcopy(self.network).to(dtype=dtype, **options))

    def labels(self, batch: int) -> Tensor | None:
        """The labels that `Sampler.sample` draws for the first images of SEED."""
        labels = Sampler(self.contiguous, **PLAIN).labels(batch, seed=SEED)
        return None if labels is None else labels.to(self.device)

    def noise(self, batch: int) -> Tensor:
        """The unit noise that it begins with, [B, C, H, W] float32."""
        index = torch.arange(batch, device=self.device)
        return ops.normal(SEED, index, self.image_shape, draw=0, dtype=torch.float32)


#: A `Sampler` that calls the network as it is, step by step.
PLAIN: dict[str, Any] = {"optimize": False, "cuda_graph": False, "compile": False}


class Engine:
    """A `Sampler` of a trial; options are the Sampler's."""

    def __init__(self, models: Models, trial: Trial, model: Denoiser, **options: Any) -> None:
        self.dtype, self.shares_weights, self.note = models.dtype, True, None
        self.sampler = Sampler(model, trial.batch, sampler=trial.loop, steps=trial.steps, **options)

    def sample(self, n: int) -> Tensor:
        """n images, uint8 [n, H, W, C] on the CPU."""
        return self.sampler.sample(n, seed=SEED)

    def denoised(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """D, not clipped, of the noise at the largest level, float32."""
        sigma_max = self.sampler.sigmas[0]
        return self.sampler.denoise(sigma_max * noise, sigma_max, labels)

    def pixels(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The images of that noise, uint8 on the CPU: it is the Sampler's own for SEED, which it draws itself."""
        return self.sample(len(noise))


class Multistep:
    """Another network, F(c_in x, c_noise, labels), in one function from x to D, and that under torch.compile.

    Drawing noise before it, adding noise between two steps and turning D into pixels after the last are a launch or two
    each; n images wait for the host once. Raises: Missing: of a trial whose sampler is another.
    """

    shares_weights = False

    def __init__(
        self,
        models: Models,
        trial: Trial,
        network: Callable[..., Tensor],
        *,
        dtype: torch.dtype | None = None,
        input_dtype: torch.dtype | None = None,
        compile: dict[str, Any] | None = None,
        channels_last: bool = False,
        note: str | None = None,
    ) -> None:
        if trial.loop != "multistep":
            raise Missing(f"its {trial.sampler} is not measured")
        self.dtype, self.note = dtype or models.dtype, note
        self._batch, self._shape, self._device = trial.batch, models.image_shape, models.device
        self._num_classes = models.contiguous.num_classes
        self._levels = Sampler(models.contiguous, trial.batch, steps=trial.steps, **PLAIN).sigmas
        self._sigmas = [torch.tensor(sigma, device=models.device) for sigma in self._levels]
        options: dict[str, Any] = {"dtype": input_dtype or self.dtype}
        if channels_last:
            options["memory_format"] = torch.channels_last

        def step(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            return reference.denoise(network(*reference.scale_input(x, sigma, **options), labels), x, sigma)

        self._step = step if compile is None else torch.compile(step, **compile)

    def sample(self, n: int) -> Tensor:
        """As `Engine.sample`, n a multiple of the batch size."""
        batches = []
        for _ in range(n // self._batch):
            labels = None
            if self._num_classes is not None:
                labels = torch.randint(self._num_classes, (self._batch,), device=self._device)
            batches.append(self._run(lambda draw: torch.randn(self._batch, *self._shape, device=self._device), labels))
        return torch.cat(batches).cpu()

    def denoised(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """As `Engine.denoised`."""
        with torch.no_grad():
            return self._step(self._sigmas[0] * noise, self._sigmas[0], labels).clone()

    def pixels(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """As `Engine.pixels`."""
        index = torch.arange(len(noise), device=self._device)

        def drawn(draw: int) -> Tensor:
            return ops.normal(SEED, index, self._shape, draw=draw, dtype=torch.float32) if draw else noise

        return self._run(drawn, labels).cpu()

    @torch.no_grad()
    def _run(self, noise: Callable[[int], Tensor], labels: Tensor | None) -> Tensor:
        """Pixels. noise: unit noise of the k-th draw."""
        x = self._sigmas[0] * noise(0)
        for k in range(1, len(self._sigmas)):
            scale = (self._levels[k] ** 2 - SIGMA_MIN**2) ** 0.5
            x = self._step(x, self._sigmas[k - 1], labels).clamp(-1, 1) + scale * noise(k)
        return ops.to_uint8(self._step(x, self._sigmas[-1], labels))


class ConvolutionsAlone:
    """Not images, but what of the time for them is convolutions."""

    shares_weights, note = True, None

    def __init__(self, models: Models, trial: Trial, *, packed: bool) -> None:
        if models.device.type != "cpu" or models.dtype != torch.float32:
            raise Missing("measured in float32 on a CPU only")
        self.dtype = models.dtype
        self._run = Convolutions(models.name, models.network, trial.batch, packed=packed)

    @torch.no_grad()
    def sample(self, n: int) -> None:
        """The convolutions of one batch."""
        self._run()

    @torch.no_grad()
    def wrong(self) -> str | None:
        """As `Convolutions.wrong`."""
        return self._run.wrong()


Provider = Engine | Multistep | ConvolutionsAlone


def _cmfast(models: Models, trial: Trial, **options: Any) -> Engine:
    # On a GPU from filters in channels_last, of which the optimised network then needs no second copy.
    model = models.channels_last if models.device.type == "cuda" else models.contiguous
    return Engine(models, trial, model, **options)


def _diffusers(models: Models, trial: Trial, compile: dict[str, Any] | None = None) -> Multistep:
    if not find_spec("diffusers"):
        raise Missing("diffusers is not installed for this Python")
    from cmfast.compat.diffusers import unet_to_diffusers

    unet = unet_to_diffusers(models.network).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def network(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return unet(x, timesteps, class_labels=labels, return_dict=False)[0]

    return Multistep(models, trial, network, compile=compile, channels_last=True)


def _openai(models: Models, trial: Trial, compiled: bool = False) -> Multistep:
    fp16 = models.device.type == "cuda"
    network, note = original_unet(models.network, models.openai, fp16=fp16)
    # The network alone is compiled, as is: whatever its code does to the compiler is part of what is measured.
    model = torch.compile(network) if compiled else network
    dtype = torch.float16 if fp16 else None
    # Its first and last layers stay in float32, and it casts between them itself.
    return Multistep(models, trial, model, dtype=dtype, input_dtype=torch.float32, note=note)


def _inductor(models: Models, trial: Trial) -> Multistep:
    step = Multistep(models, trial, torch.compile(models.network))
    step.shares_weights = True
    return step


def _inductor_max(models: Models, trial: Trial) -> Multistep:
    step = Multistep(models, trial, models.channels_last.network, compile=MAX_AUTOTUNE, channels_last=True)
    step.shares_weights = True
    return step


#: By name, what makes it. Raises: Missing.
PROVIDERS: dict[str, Callable[[Models, Trial], Provider]] = {
    "convolutions": functools.partial(ConvolutionsAlone, packed=True),
    "convolutions_unpacked": functools.partial(ConvolutionsAlone, packed=False),
    "reference": lambda models, trial: Engine(models, trial, models.contiguous, **PLAIN),
    "reference_channels_last": lambda models, trial: Engine(models, trial, models.channels_last, **PLAIN),
    "openai": _openai,
    "diffusers": _diffusers,
    "cmfast": _cmfast,
    "cmfast_compile": functools.partial(_cmfast, compile=True),
    "diffusers_compile": functools.partial(_diffusers, compile=MAX_AUTOTUNE),
    "inductor": _inductor,
    "inductor_max": _inductor_max,
    "openai_compile": functools.partial(_openai, compiled=True),
}
#: Those that take minutes to start.
COMPILED = tuple(name for name in PROVIDERS if name.endswith("_compile") or name.startswith("inductor"))


def trials(device_type: str, batches: list[int], compile: bool, quick: bool = False) -> list[Trial]:
    """What is run, the important first."""
    if quick:
        some = ("reference", "openai", "diffusers", "cmfast")
        ends = sorted({batches[0], batches[-1]})
        return [*(Trial(b, some) for b in ends), Trial(batches[0], some, sampler=FORWARD)]
    if device_type == "cuda":
        # Where time is short, the last are left out.
        fast: tuple[str, ...] = ("reference", "cmfast", "openai", "diffusers", "reference_channels_last")
        # Batches of one and the largest have bars.
        ordered = sorted(batches, key=lambda batch: (batch not in (batches[0], batches[-1]), batch))
        ends = ordered[:2]
        rivals = ("diffusers_compile", "cmfast_compile", "inductor_max") if compile else ()
        return [
            *(Trial(b, fast) for b in ends),
            # One at a time: one that takes too long to compile does not take the other's numbers with it.
            *(Trial(b, ("cmfast", rival)) for rival in rivals for b in ends),
            *(Trial(b, fast) for b in ordered[len(ends) :]),
            *(Trial(b, fast, steps=2) for b in ends),
            *(Trial(b, fast, sampler=FORWARD) for b in ends),
            Trial(ends[0], ("cmfast",), sampler="heun", steps=18),
            *(Trial(b, ("cmfast", rival)) for rival in rivals for b in ordered[len(ends) :]),
            *(Trial(b, ("openai", "cmfast"), steps=2) for b in ordered[len(ends) :]),
            *(Trial(b, fast, sampler=FORWARD) for b in ordered[len(ends) :]),
        ]
    alone, plain = ("convolutions", "convolutions_unpacked"), ("reference", "reference_channels_last")
    fast = (*alone, *plain, "openai", "diffusers", "cmfast")
    slow = ("convolutions", "inductor", "openai_compile", "cmfast", "cmfast_compile")
    return [
        *(Trial(b, fast) for b in batches),
        *(Trial(b, slow) for b in batches if compile),
        # The original computes in float32 or float16, which CPUs seldom have.
        *(Trial(b, (*plain, "diffusers", "cmfast"), dtype="bfloat16") for b in batches if has_onednn(torch.bfloat16)),
        *(Trial(b, ("reference", "openai", "diffusers", "cmfast"), steps=2) for b in batches[:1]),
        *(Trial(b, ("reference", "openai", "cmfast"), sampler=FORWARD) for b in batches[:1]),
    ]


