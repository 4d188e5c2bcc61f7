"""Triton's interpreter in half the time: it puts its functions in the place of Triton's once for each launch."""

from __future__ import annotations

import inspect
from typing import Any


def patch_once() -> None:
    """Do so again in no function that a kernel calls: all of it has been done, and is a third of the time of a test.

    Versions that do it in another way are left alone.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    whole = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if whole is None or scope is None:
        return
    seen: dict[Any, list[Any]] = {}

    def patch(fn: Any) -> Any:
        if fn not in seen:
            seen[fn] = [v for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)]
        if any(tl.core.is_builtin(module.load) for module in seen[fn]):
            return whole(fn)
        return scope()

    interpreter._patch_lang = patch
