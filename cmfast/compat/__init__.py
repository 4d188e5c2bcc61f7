"""Stand-ins for other projects' interfaces: `openai` (the package `cm`), `diffusers`. Imported on first use."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmfast.compat import diffusers as diffusers
    from cmfast.compat import openai as openai
else:

    def __getattr__(name: str) -> ModuleType:
        if name in ("diffusers", "openai"):
            return importlib.import_module(f"cmfast.compat.{name}")
        raise AttributeError(f"module 'cmfast.compat' has no attribute {name!r}; it has diffusers and openai")
