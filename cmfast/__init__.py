"""Consistency models in PyTorch: fast sampling and training, each fast path proved against a plain reference.

Names are imported on first use, so `import cmfast` costs nothing and loads neither torch nor Triton.

>>> import cmfast
>>> cmfast.sampels
Traceback (most recent call last):
AttributeError: module 'cmfast' has no attribute 'sampels'. Did you mean: samplers, sample?
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfast import (
        checkpoint,
        compat,
        curricula,
        data,
        digits,
        dropout,
        editing,
        ema,
        exact,
        fast,
        images,
        losses,
        noise,
        objectives,
        ops,
        optim,
        perceptual,
        rates,
        recipes,
        reference,
        samplers,
        schedules,
        training,
        unet,
    )
    from cmfast.checkpoint import load, save
    from cmfast.denoiser import Denoiser
    from cmfast.engine import Sampler
    from cmfast.fast import optimize
    from cmfast.ops import backend
    from cmfast.precondition import Preconditioner
    from cmfast.samplers import sample
    from cmfast.unet import UNetModel

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Preconditioner",
    "Sampler",
    "UNetModel",
    "backend",
    "checkpoint",
    "compat",
    "curricula",
    "data",
    "digits",
    "dropout",
    "editing",
    "ema",
    "exact",
    "fast",
    "images",
    "load",
    "losses",
    "noise",
    "objectives",
    "ops",
    "optim",
    "optimize",
    "perceptual",
    "rates",
    "recipes",
    "reference",
    "sample",
    "samplers",
    "save",
    "schedules",
    "training",
    "unet",
]

# Where a public name lives. The public names that are not here are submodules.
_HOME = {
    "Denoiser": "denoiser",
    "Preconditioner": "precondition",
    "Sampler": "engine",
    "UNetModel": "unet",
    "backend": "ops",
    "load": "checkpoint",
    "optimize": "fast",
    "sample": "samplers",
    "save": "checkpoint",
}


if not TYPE_CHECKING:  # a checker reads the imports above, and so sees a name that is not there

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            import difflib

            close = [] if name.startswith("__") else difflib.get_close_matches(name, __all__)
            hint = f". Did you mean: {', '.join(close)}?" if close else ""
            # With a name of its own it gets no second suggestion, which Python from 3.12 on would make.
            raise AttributeError(f"module 'cmfast' has no attribute {name!r}{hint}", name=name)
        module = importlib.import_module(f"cmfast.{_HOME.get(name, name)}")
        value = getattr(module, name) if name in _HOME else module
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
