"""Resolves `cm` to cmfast.compat.openai, and changes defaults, for scripts that run as they are."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from cmfast.compat.openai import MODULES

PACKAGE = "cmfast.compat.openai"
#: Its only module is `cm`. On sys.path in a script's processes alone, so that it hides no other package of that name.
WORKERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_workers")
#: The folder that `cmfast` is in.
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(WORKERS))))
#: An environment variable: what --set said, as JSON.
SETTINGS = "CMFAST_COMPAT_OPENAI_SET"


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


def install(settings: Sequence[str] = ()) -> None:
    """Make `import cm` and `import cm.x` give the modules here, whatever else of that name is installed.

    settings: of `set_defaults`, for KarrasDenoiser. Raises: ValueError: one of them is none.
    """
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES}
    set_defaults(modules["karras_diffusion"].KarrasDenoiser.__init__, settings)
    sys.modules["cm"] = importlib.import_module(PACKAGE)
    sys.modules.update({f"cm.{name}": module for name, module in modules.items()})
    sys.meta_path.append(_Missing)


def serve_spawned(settings: Sequence[str]) -> None:
    """Have processes that the script spawns find `cm`, and `inherited_settings`.

    multiprocessing starts them so on macOS and Windows, and from Python 3.14 on everywhere; they are given sys.path and
    the environment, and import the script anew.
    """
    # After the script's folder, which comes first for `python SCRIPT.py` too, unless that has a `cm` of its own.
    beside = not sys.path or PathFinder.find_spec("cm", sys.path[:1]) is not None
    sys.path.insert(0 if beside else 1, WORKERS)
    os.environ[SETTINGS] = json.dumps(list(settings))


def inherited_settings() -> list[str]:
    """The settings of the process that spawned this one."""
    settings: list[str] = json.loads(os.environ.get(SETTINGS, "[]"))
    return settings


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
