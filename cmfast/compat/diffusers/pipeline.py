"""`accelerate`: a ConsistencyModelPipeline of diffusers that samples through cmfast; same calls, same results."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from cmfast import dropout
from cmfast.compat.diffusers.network import UNet2DNetwork
from cmfast.compat.diffusers.scheduler import CMStochasticIterativeScheduler, like, replaced
from cmfast.denoiser import Denoiser
from cmfast.engine import Sampler
from cmfast.fast import Refused, optimize, refusal
from cmfast.precondition import Preconditioner

# diffusers resolves its names when they are asked for, which type checkers do not follow.
ConsistencyModelPipeline: Any = diffusers.ConsistencyModelPipeline
ImagePipelineOutput: Any = diffusers.ImagePipelineOutput
DiffusersScheduler: Any = diffusers.CMStochasticIterativeScheduler

logger = logging.getLogger("cmfast.compat.diffusers")

#: Schedules whose samplers are kept ready; what was not used for longest goes.
SCHEDULES = 4


def accelerate(
    pipe: Any,
    *,
    dtype: torch.dtype | None = None,
    compile: str | bool = "auto",
    cuda_graph: str | bool = "auto",
) -> Any:
    """The pipeline with the same interface, made fast: it shares the network with `pipe`, which stays as it is.

    A call runs as a whole, from noise to pixels: on a GPU as one CUDA graph. Noise and labels are drawn as diffusers
    draws them, so a seed gives the same images. With a callback the steps run one by one, without a graph; where
    offloading, `torch.autocast`, dropout that is on, another scheduler, a method of it that was replaced, labels that
    are no classes or a sigma_min of 0 are in the way, diffusers' own loop runs. `explain()` says which. A write of
    weights through `.data`, as PEFT merges them and diffusers' `EMAModel.copy_to` and `restore` do, or to a setting of
    torch's own layers, such as `padding_mode`, needs a call of `refresh()`.

    Args:
        pipe: its scheduler must be a CMStochasticIterativeScheduler.
        dtype: what the network computes in, such as torch.bfloat16, where that is not the dtype of its parameters.
        compile, cuda_graph: as of `cmfast.Sampler`. With cuda_graph=True the pipeline must be on the GPU already.

    Raises:
        TypeError: another pipeline, or one with a `__call__` of its own.
        ValueError, RuntimeError: what was asked for cannot be had; the message says why.
    """
    base: Any = getattr(type(pipe), "_accelerated_from", type(pipe))
    if not isinstance(pipe, ConsistencyModelPipeline):
        raise TypeError(f"expected a ConsistencyModelPipeline, got a {type(pipe).__name__}")
    if base.__call__ is not ConsistencyModelPipeline.__call__:
        raise TypeError(f"{base.__name__} has its own __call__, which would be passed over: expected the pipeline's")
    cls = _accelerated(base)
    fast = cls.__new__(cls)
    fast.__dict__.update(pipe.__dict__)
    if type(pipe.scheduler) is DiffusersScheduler and not replaced(pipe.scheduler):
        fast.scheduler = like(pipe.scheduler)
    fast._options = {"dtype": dtype, "compile": compile, "cuda_graph": cuda_graph}
    fast._engine = None
    if fast._obstacle() is None:
        # What cannot be had is an error now, not at the first call.
        fast._ready().sampler((float(fast.scheduler.config.sigma_max),))
    return fast


@functools.cache
def _accelerated(base: type) -> Any:
    """The fast class of a pipeline class. It keeps the name and the module, under which pipelines are saved."""
    names = {"__module__": base.__module__, "__doc__": base.__doc__, "_accelerated_from": base}
    return type(base.__name__, (_Accelerated, base), names)


class _Engine:
    """A network made fast, and samplers with it, one for each schedule."""

    def __init__(self, unet: Any, config: Any, options: dict[str, Any]) -> None:
        self.unet, self.seen, self.config = unet, _seen(unet), config
        self.network, self.reason = fast_network(unet, options["dtype"])
        shape = unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
        self.model = _denoiser(UNet2DNetwork(self.network), config, shape)
        self._options = {"compile": options["compile"], "cuda_graph": options["cuda_graph"], "optimize": False}
        self._samplers: OrderedDict[tuple[float, ...], Sampler] = OrderedDict()

    def sampler(self, sigmas: tuple[float, ...]) -> Sampler:
        """The sampler of these levels. It keeps a program for each batch size."""
        sampler = self._samplers.pop(sigmas, None)
        if sampler is None:
            sampler = Sampler(self.model, sigmas=sigmas, clip_denoised=self.config.clip_denoised, **self._options)
        self._samplers[sigmas] = sampler
        while len(self._samplers) > SCHEDULES:
            self._samplers.popitem(last=False)
        return sampler

    def refresh(self) -> None:
        """As `Sampler.refresh`, of all samplers and of the network that a loop with a callback runs."""
        network: Any = self.network
        if self.reason is None and network.refresh(force=True):
            self._samplers.clear()  # one alone would hear of it if it asked again
        for sampler in self._samplers.values():
            sampler.refresh()

    def explain(self) -> dict[str, tuple[str, str]]:
        """As `Sampler.explain`, of the sampler used last."""
        last = next(reversed(self._samplers), (self.model.sigma_max,))
        # Of now: hooks and parts of another kind come and go.
        reason = self.reason or refusal(self.network)
        network = ("as given", reason) if reason else ("optimised", "the same weights in fewer passes")
        return {**self.sampler(last).explain(), "network": network}


def _denoiser(network: nn.Module, config: Any, image_shape: tuple[int, int, int] | None = None) -> Denoiser:
    """A network with the levels of a scheduler's configuration."""
    return Denoiser(
        network,
        Preconditioner.consistency(config.sigma_data, config.sigma_min),
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        image_shape=image_shape,
    )


def _seen(unet: Any) -> tuple[type, Any, Any]:
    """What runs when the network is called: its class, a forward pass of its own if it was given one, its settings."""
    return type(unet), vars(unet).get("forward"), unet.config


def fast_network(unet: Any, dtype: torch.dtype | None) -> tuple[nn.Module, str | None]:
    """The UNet2DModel made fast, sharing its parameters; or as it is, and why.

    Raises: ValueError: it cannot be made fast, and should compute in another dtype than its own.
    """
    try:
        return optimize(unet, dtype=dtype), None
    except Refused as refused:
        reason = str(refused)
    if dtype not in (None, unet.dtype):
        raise ValueError(f"dtype={dtype} needs a network that can be made fast: {reason}. Or cast it: pipe.to({dtype})")
    return unet, reason


class _Accelerated(ConsistencyModelPipeline):
    """What an accelerated pipeline does otherwise than the one it was made from."""

    # Of one that is made of components: by its class, by `from_pipe` or `from_pretrained`.
    _options: dict[str, Any] = {"dtype": None, "compile": "auto", "cuda_graph": "auto"}
    _engine: _Engine | None = None

    def __reduce__(self) -> Any:
        # By name pickle would find diffusers' class.
        plain = self._accelerated_from.__new__(self._accelerated_from)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_engine", "_options")})
        return functools.partial(accelerate, **self._options), (plain,)

    def explain(self) -> dict[str, tuple[str, str]]:
        """What the next call runs if it has no callback, and why: `loop`, `network` and `compile`, as (path, why)."""
        obstacle = self._obstacle()
        if obstacle:
            return {"loop": ("diffusers", obstacle), "network": ("as given", obstacle), "compile": ("off", obstacle)}
        return self._ready().explain()

    def refresh(self) -> None:
        """Take the network as it is now, after a write through `.data` or to a setting of torch's own layers, which
        nothing else shows."""
        if self._engine is not None:
            self._engine.refresh()

    def _obstacle(self) -> str | None:
        """Why diffusers' own loop must run; None if cmfast's can."""
        kind = type(self.scheduler)
        method = replaced(self.scheduler) if kind in (CMStochasticIterativeScheduler, DiffusersScheduler) else None
        if method:
            return f"the scheduler's {method} was replaced"
        if kind is not CMStochasticIterativeScheduler:
            return f"the scheduler is a {kind.__module__}.{kind.__name__}, not cmfast's"
        parts = list(self.unet.modules())  # once: finding them takes longer than looking at them
        if any("_hf_hook" in vars(m) or "_diffusers_hook" in vars(m) for m in parts):
            return "the network has hooks of accelerate or diffusers, such as those of offloading"
        if torch.is_autocast_enabled(self._execution_device.type):
            return "torch.autocast is on: call accelerate(pipe, dtype=...) instead"
        if dropout.drops(parts):
            return "the network has a dropout layer in training mode"
        if self.unet.config.class_embed_type is not None:
            return f"labels of class_embed_type={self.unet.config.class_embed_type!r} are no classes"
        try:
            _denoiser(nn.Identity(), self.scheduler.config)
        except ValueError as error:
            return f"cmfast has no such levels as the scheduler's: {error}"
        return None

    def _ready(self) -> _Engine:
        """The engine for the network and scheduler that the pipeline has now."""
        engine, unet, config = self._engine, self.unet, self.scheduler.config
        if engine is None or engine.unet is not unet or engine.seen != _seen(unet) or engine.config != config:
            engine = self._engine = _Engine(unet, config, self._options)
        elif engine.reason and engine.reason != fast_network(unet, self._options["dtype"])[1]:
            engine = self._engine = _Engine(unet, config, self._options)
        return engine

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | int | None = None,
        num_inference_steps: int | None = 1,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
    ) -> Any:
        obstacle = self._obstacle()
        if obstacle:
            logger.info("diffusers' own loop runs: %s", obstacle)
            drawn = batch_size, class_labels, num_inference_steps, timesteps, generator, latents
            return super().__call__(*drawn, output_type, return_dict, callback, callback_steps)

        # In diffusers' order: what is drawn from one generator, or from torch's own, comes out the same.
        size, device, dtype = self.unet.config.sample_size, self._execution_device, self.unet.dtype
        self.check_inputs(num_inference_steps, timesteps, latents, batch_size, size, callback_steps)
        sample = self.prepare_latents(
            batch_size=batch_size,
            num_channels=self.unet.config.in_channels,
            height=size,
            width=size,
            dtype=dtype,
            device=device,
            generator=generator,
            latents=latents,
        )
        labels = self.prepare_class_labels(batch_size, device, class_labels)
        if timesteps is not None:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps)

        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            if callback is None:
                images = self._whole(sample, labels, generator, output_type)
                bar.update(len(self.scheduler.timesteps))
            else:
                logger.info("step by step, without a CUDA graph: there is a callback")
                images = self._step_by_step(sample, labels, generator, callback, callback_steps, bar)
        if images.dtype == torch.uint8:
            result = _pil_images(images)
        else:
            # numpy has no bfloat16.
            wide = images.dtype == torch.bfloat16 and output_type != "pt"
            result = self.postprocess_image(images.float() if wide else images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _whole(self, sample: Tensor, labels: Tensor | None, generator: Any, output_type: str | None) -> Tensor:
        """All steps at once, from the first sample: [B, C, H, W] in [-1, 1], or for PIL images uint8 [B, H, W, C]."""
        levels: list[float] = self.scheduler.sigmas[:-1].tolist()
        draws = []
        if len(levels) > 1:
            s_noise = self.scheduler.config.s_noise
            options = {"dtype": sample.dtype, "device": sample.device, "generator": generator}
            noise = [randn_tensor(sample.shape, **options) for _ in levels]
            # The last draw is of noise that adds nothing, and keeps generators in step with diffusers.
            draws = [z if s_noise == 1 else s_noise * z for z in noise[:-1]]
        if labels is not None and not labels.is_floating_point():
            # However they come, they are of one kind: a graph serves all.
            labels = labels.to(torch.int64)
            labels = labels.reshape(1).repeat(sample.shape[0]) if labels.numel() == 1 else labels
        wide = torch.promote_types(sample.dtype, torch.float32)
        pixels = "nearest" if output_type == "pil" and not self._makes_images else None
        sampler = self._ready().sampler(tuple(levels))
        images = sampler.generate(sample.to(wide) / levels[0], labels, noise_fn=draws, pixels=pixels)
        self.scheduler._step_index, self.scheduler.is_scale_input_called = len(levels), True  # where its steps end
        return images if pixels else images.to(sample.dtype)

    @property
    def _makes_images(self) -> bool:
        """Whether a subclass, or the pipeline itself, makes PIL images in a way of its own."""
        parts = "postprocess_image", "numpy_to_pil"
        return any(
            part in vars(self) or getattr(type(self), part) is not getattr(ConsistencyModelPipeline, part)
            for part in parts
        )

    def _step_by_step(
        self,
        sample: Tensor,
        labels: Tensor | None,
        generator: Any,
        callback: Callable[[int, Tensor, Tensor], None],
        callback_steps: int,
        bar: Any,
    ) -> Tensor:
        """diffusers' loop, with the fast network and the fused step."""
        unet, network = self.unet, self._ready().network
        for i, t in enumerate(self.scheduler.timesteps):
            if self.unet is not unet:  # a callback has put another in
                unet, network = self.unet, self._ready().network
            model_input = self.scheduler.scale_model_input(sample, t)
            model_output = network(model_input, t, class_labels=labels, return_dict=False)[0]
            sample = self.scheduler.step(model_output, t, sample, generator=generator)[0]
            bar.update()
            if i % callback_steps == 0:
                callback(i, t, sample)
        return sample


def _pil_images(images: Tensor) -> list[Image.Image]:
    """uint8 [B, H, W, C] as PIL images, one channel as greyscale."""
    arrays = images.cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
