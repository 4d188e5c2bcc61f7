"""Resolves `cm` to cmfast.compat.openai, and changes defaults, for scripts that run as they are."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from cmfast.compat.openai import MODULES

PACKAGE = "cmfast.compat.openai"


class _Missing:
    """Comes last on sys.meta_path: says what there is when a module of `cm` was not found."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package not in ("cm", PACKAGE):
            return None
        # No ModuleNotFoundError: `from cm import name` would swallow it.
        raise ImportError(
            f"cm.{name} is not part of {PACKAGE}, which has what sampling and training need: {', '.join(MODULES)}",
            name=fullname,
        )


def install() -> None:
    """Make `import cm` and `import cm.x` give the modules here, whatever else of that name is installed."""
    sys.modules["cm"] = importlib.import_module(PACKAGE)
    for name in MODULES:
        sys.modules[f"cm.{name}"] = importlib.import_module(f"{PACKAGE}.{name}")
    sys.meta_path.append(_Missing)


def set_defaults(function: Callable[..., Any], settings: Sequence[str]) -> None:
    """Change defaults of a function's parameters: `["rho=5", ...]`, values parsed as the default's type.

    Arguments that a caller gives go before defaults, as always.
    Raises: ValueError: no `name=value`, a name without default (the message lists those with one), or a bad value.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or name not in defaults:
            raise ValueError(f"--set takes name=value, got {setting!r}; known names: {', '.join(defaults)}")
        defaults[name] = _parse(name, text, type(defaults[name]))
    function.__defaults__ = tuple(defaults.values())


def _parse(name: str, text: str, kind: type) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"a {kind.__name__}"
        raise ValueError(f"--set {name}={text}: expected {expected}") from None
