"""diffusers' scheduler of consistency models, with the fused step and without reading a tensor on the host."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_consistency_models
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cmfast import ops
from cmfast.ops import _check

# diffusers resolves its names when they are asked for, which type checkers do not follow.
_Base: Any = diffusers.CMStochasticIterativeScheduler
Output: Any = scheduling_consistency_models.CMStochasticIterativeSchedulerOutput

logger = logging.getLogger("cmfast.compat.diffusers")


class CMStochasticIterativeScheduler(_Base):
    """`diffusers.CMStochasticIterativeScheduler`: the same arguments, calls, noise and numbers, up to rounding.

    A step is one fused operation, which also makes the input that `scale_model_input` is asked for next. Which step it
    is, is counted on the host; the first is found from where the timestep lies in `timesteps`. Only a timestep that is
    no part of `timesteps` is looked up by its value, once per run: on a GPU that stops the stream, which
    `set_begin_index` avoids.

    Half precision is rounded once per step, where diffusers rounds each product and sum. Where
    `get_scalings_for_boundary_condition` is overridden or replaced, the step is diffusers' own.

    >>> scheduler = CMStochasticIterativeScheduler()
    >>> scheduler.set_timesteps(timesteps=[22, 0])
    >>> x = scheduler.init_noise_sigma * torch.randn(2, 3, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     model_output = 0.1 * scheduler.scale_model_input(x, t)  # of a network
    ...     x = scheduler.step(model_output, t, x).prev_sample
    >>> x.shape
    torch.Size([2, 3, 8, 8])
    """

    timesteps: Tensor
    # The levels on the host, and on devices by (device, dtype), and what they were made from: sigmas, the version of
    # these, the configuration.
    _seen: tuple[Tensor, int, Any] | None = None
    _levels: list[float]
    _device_levels: dict[tuple[torch.device, torch.dtype], Tensor]
    # (prev_sample, its version, the index of its level, the network's input made with it) of the last step.
    _next_input: tuple[Tensor, int, int, Tensor] | None = None

    def __reduce__(self) -> Any:
        # By name pickle would find diffusers' class: see `__module__` below.
        made_anew = "_internal_dict", "_next_input", "_seen"  # the configuration, and what is kept for speed
        state = {name: value for name, value in self.__dict__.items() if name not in made_anew}
        kind = type(self)
        return _rebuild, (None if kind is CMStochasticIterativeScheduler else kind, dict(self.config), state)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As diffusers' own, of num_inference_steps or timesteps, one of them. Its levels go to the device and back:
        here they stay, and only timesteps go there."""
        super().set_timesteps(num_inference_steps, timesteps=timesteps)
        if device is not None:
            on_mps = torch.device(device).type == "mps"  # has no float64
            self.timesteps = self.timesteps.to(device, torch.float32 if on_mps else self.timesteps.dtype)
        self._next_input = None

    def _refresh(self) -> list[float]:
        """The levels as floats, read when `sigmas` was replaced or written, or the configuration is another."""
        sigmas, seen = self.sigmas, self._seen
        version = -1 if sigmas.is_inference() else sigmas._version
        if seen is None or sigmas is not seen[0] or version != seen[1] or self.config is not seen[2]:
            self._seen = sigmas, version, self.config
            self._levels, self._device_levels, self._next_input = sigmas.tolist(), {}, None
        return self._levels

    def _level(self, index: int, x: Tensor) -> Tensor:
        """sigmas[index] beside x, a scalar; past their end, the `_noise_level` of each."""
        self._refresh()
        key = x.device, _check.sigma_dtype(x)
        if key not in self._device_levels:
            levels = self._levels + [self._noise_level(sigma) for sigma in self._levels]
            self._device_levels[key] = torch.tensor(levels, device=key[0], dtype=key[1])
        return self._device_levels[key][index]

    def _noise_level(self, sigma: float) -> float:
        """What `renoise` takes: sqrt(l^2 - sigma_min^2) = s_noise sqrt(sigma^2 - sigma_min^2) for the result l."""
        low, high, scale = self.config.sigma_min, self.config.sigma_max, self.config.s_noise
        sigma = min(max(sigma, low), high)
        return sigma if scale == 1 else math.sqrt(scale**2 * (sigma - low) * (sigma + low) + low**2)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in schedule_timesteps (`timesteps` if None): from where it lies there, else from its
        value.

        Raises: IndexError: it is not there.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.dtype == schedule.dtype:
            # The storage, not the address: on the meta device, where tests run, all addresses are 0.
            if timestep.untyped_storage()._cdata == schedule.untyped_storage()._cdata:
                offset = int(timestep.storage_offset() - schedule.storage_offset())
                index, between = divmod(offset, int(schedule.stride(0)) or 1)
                if 0 <= index < len(schedule) and not between:  # a part of the tensor need not hold it
                    return index
        value = float(timestep)
        found = [i for i, t in enumerate(schedule.tolist()) if t == value]
        if not found:
            raise IndexError(f"timestep {value} is not one of scheduler.timesteps: {schedule.tolist()}")
        return found[min(1, len(found) - 1)]  # the second of several, as diffusers has it

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """c_in sample [B, C, H, W], in its dtype: the network's input at this timestep."""
        if self.step_index is None:
            self._init_step_index(timestep)
        assert self.step_index is not None
        self.is_scale_input_called = True
        self._refresh()
        ready, self._next_input = self._next_input, None
        if ready is not None and ready[0] is sample and ready[1:3] == (sample._version, self.step_index):
            return ready[3]
        return ops.scale_input(sample, self._level(self.step_index, sample), sigma_data=self.config.sigma_data)[0]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """D(sample) [B, C, H, W] from model_output, and unless there is one timestep only, noise of the next level: as
        `diffusers` has it. generator: of the noise. return_dict: an object with `prev_sample`; else a tuple.

        Raises: ValueError: an integer timestep. IndexError: one that is not in `timesteps`, or a step too many.
            TypeError: model_output or sample that are no tensors of floating numbers.
        """
        if replaced(self, "get_scalings_for_boundary_condition"):  # then those are called, and not the fused step's
            return super().step(model_output, timestep, sample, generator, return_dict)
        integers = torch.int64, torch.int32
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in integers):
            raise ValueError(
                f"{type(self).__name__}.step() takes one of `scheduler.timesteps`, not its index, got {timestep}"
            )
        _check.float_tensor("model_output", model_output)
        _check.float_tensor("sample", sample)
        if not self.is_scale_input_called:
            logger.warning("scale_model_input was not called before step: the network's input must be scaled by it")
        if self.step_index is None:
            self._init_step_index(timestep)
        assert self.step_index is not None
        index, count = self.step_index, len(self._refresh())
        following = index + 1 if index + 1 < self.config.num_train_timesteps else count - 1
        if max(index, following) >= count:
            raise IndexError(f"step {index} of a schedule of {len(self.timesteps)}: call set_timesteps for another run")

        sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        config = self.config
        options: dict[str, Any] = {
            "sigma_data": config.sigma_data,
            "boundary": config.sigma_min,
            "clip": config.clip_denoised,
        }
        sigma = self._level(index, sample)
        if len(self.timesteps) > 1:
            noise = randn_tensor(
                model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator
            )
            noise = noise.expand(torch.broadcast_shapes(noise.shape, sample.shape))
        model_output, sample = torch.broadcast_tensors(model_output, sample)
        if len(self.timesteps) == 1 or self._levels[following] <= np.float32(config.sigma_min):
            # Noise of sigma_min adds nothing; drawn, it keeps generators in step with diffusers.
            previous = ops.denoise(model_output, sample, sigma, **options)
        else:
            options |= {"sigma_min": config.sigma_min, "dtype": sample.dtype}
            next_level = self._level(count + following, sample)
            previous, model_input, _ = ops.renoise(model_output, sample, sigma, next_level, noise, **options)
            # With s_noise the level of the noise is not that of the sample, which scales the input.
            if config.s_noise == 1 and not previous.is_inference():
                self._next_input = previous, previous._version, following, model_input
        self._step_index += 1
        return Output(prev_sample=previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original_samples + sigma noise [B, C, H, W], with the sigma of each sample's timestep, timesteps [B]. One
        sample, noise or timestep serves all.

        A timestep that is not in the schedule is an IndexError, or on a GPU, where it is not read, gives NaN.
        """
        device, count = original_samples.device, timesteps.numel()
        shape = torch.broadcast_shapes(original_samples.shape, noise.shape, (count, *[1] * (original_samples.ndim - 1)))
        # Rounded as the samples are, like diffusers' own.
        sigmas = self.sigmas.to(device, original_samples.dtype)
        wide = torch.promote_types(original_samples.dtype, noise.dtype)
        original_samples, noise = (x.to(wide).expand(shape) for x in (original_samples, noise))
        sigmas = sigmas.to(_check.sigma_dtype(original_samples))
        if self.begin_index is not None:
            sigma = sigmas[self.begin_index if self.step_index is None else self.step_index]
        else:
            same = timesteps.to(device).reshape(-1, 1) == self.timesteps.to(device)
            if device.type == "cpu" and not same.any(1).all():
                raise IndexError(f"timesteps {timesteps.tolist()} are not all of scheduler.timesteps")
            sigma = torch.where(same.any(1), sigmas[same.to(torch.int8).argmax(1)], math.nan)
        sigma = sigma.expand(shape[0])
        return ops.add_noise(original_samples, noise, sigma, sigma_data=self.config.sigma_data)[0]


# Pipelines write the module of their scheduler's class into model_index.json. With diffusers' own, which has a class
# of this name, a saved pipeline needs nothing but diffusers.
CMStochasticIterativeScheduler.__module__ = _Base.__module__


#: What a run goes through.
METHODS = (
    "set_timesteps",
    "scale_model_input",
    "step",
    "get_scalings",
    "get_scalings_for_boundary_condition",
    "index_for_timestep",
    "_init_step_index",
    "sigma_to_t",
    "_convert_to_karras",
)


def replaced(scheduler: Any, *names: str) -> str | None:
    """The first of these methods, or of all, that is not as ours or diffusers' class was written; None if all are."""
    for name in names or METHODS:
        # Where the function was written: `functools.wraps` would copy its `__module__`.
        written = getattr(getattr(type(scheduler), name), "__globals__", {}).get("__name__")
        if name in vars(scheduler) or written not in (__name__, _Base.__module__):
            return name
    return None


def like(scheduler: Any) -> CMStochasticIterativeScheduler:
    """Our scheduler with the configuration and the state of diffusers' own. `from_config` would not do: it leaves out
    what `register_to_config` made of a default."""
    state = {name: copy.deepcopy(value) for name, value in vars(scheduler).items() if name != "_internal_dict"}
    return _rebuild(None, dict(scheduler.config), state)


def _rebuild(kind: Any, config: dict[str, Any], state: dict[str, Any]) -> CMStochasticIterativeScheduler:
    kind = kind or CMStochasticIterativeScheduler
    scheduler: CMStochasticIterativeScheduler = kind.__new__(kind)
    scheduler.__dict__.update(state)
    scheduler.register_to_config(**config)
    return scheduler
