"""Stand-ins for other projects' interfaces: `openai` (the package `cm`), `diffusers`. Imported on first use."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("diffusers", "openai"):
        return importlib.import_module(f"cmfast.compat.{name}")
    raise AttributeError(f"module 'cmfast.compat' has no attribute {name!r}; it has diffusers and openai")
