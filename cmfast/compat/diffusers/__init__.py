"""diffusers: its networks as ours and back, its scheduler with a fused step, its pipeline made fast.

    pipe = cmfast.compat.diffusers.accelerate(pipe)                        # a ConsistencyModelPipeline, same calls
    from cmfast.compat.diffusers import CMStochasticIterativeScheduler     # was: from diffusers import ...
    network = cmfast.compat.diffusers.unet_from_diffusers(pipe.unet)       # UNet2DModel -> UNetModel

Names are imported on first use, and diffusers with those that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfast.compat.diffusers.config import config_from_diffusers, config_to_diffusers
    from cmfast.compat.diffusers.convert import (
        state_dict_from_diffusers,
        state_dict_to_diffusers,
        unet_from_diffusers,
        unet_to_diffusers,
    )
    from cmfast.compat.diffusers.network import UNet2DNetwork, read_network
    from cmfast.compat.diffusers.pipeline import accelerate
    from cmfast.compat.diffusers.scheduler import CMStochasticIterativeScheduler
    from cmfast.compat.diffusers.steps import (
        default_timesteps,
        sigmas_from_timesteps,
        timesteps_from_sigmas,
        timesteps_from_ts,
        ts_from_timesteps,
    )

# Where a name lives.
_HOME = {
    "CMStochasticIterativeScheduler": "scheduler",
    "UNet2DNetwork": "network",
    "accelerate": "pipeline",
    "config_from_diffusers": "config",
    "config_to_diffusers": "config",
    "default_timesteps": "steps",
    "read_network": "network",
    "sigmas_from_timesteps": "steps",
    "state_dict_from_diffusers": "convert",
    "state_dict_to_diffusers": "convert",
    "timesteps_from_sigmas": "steps",
    "timesteps_from_ts": "steps",
    "ts_from_timesteps": "steps",
    "unet_from_diffusers": "convert",
    "unet_to_diffusers": "convert",
}

__all__ = [
    "CMStochasticIterativeScheduler",
    "UNet2DNetwork",
    "accelerate",
    "config_from_diffusers",
    "config_to_diffusers",
    "default_timesteps",
    "read_network",
    "sigmas_from_timesteps",
    "state_dict_from_diffusers",
    "state_dict_to_diffusers",
    "timesteps_from_sigmas",
    "timesteps_from_ts",
    "ts_from_timesteps",
    "unet_from_diffusers",
    "unet_to_diffusers",
]


if not TYPE_CHECKING:  # a checker reads the imports above

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOME)}")
        try:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        except ImportError as error:
            raise ImportError(f'{name} needs diffusers: pip install "cmfast[diffusers]"') from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *(name for name in globals() if name.startswith("__"))})
