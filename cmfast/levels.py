"""Noise levels of a sampler's loop: read on the host once, before it, and beside the images as one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cmfast.ops import _check

Sigmas = Sequence[float] | Tensor


def read_levels(sigmas: Sigmas, *, least: int) -> list[float]:
    """The levels as floats, `least` or more: the one host read, before the loop.

    Raises: TypeError: no sequence of numbers; ValueError: too few, or one that is negative, NaN or infinite, or a 0
        that is not the last of several.
    """
    try:
        if isinstance(sigmas, str):
            raise TypeError
        levels = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    except (TypeError, ValueError):
        raise TypeError(f"sigmas must be noise levels, a sequence or a tensor [n], got {sigmas!r}") from None
    if len(levels) < least:
        raise ValueError(f"sigmas needs {least} or more noise levels, got {len(levels)}")
    if not all(0 <= level < math.inf for level in levels) or not all(level > 0 for level in levels[:-1] or levels):
        raise ValueError(f"sigmas must be positive, only the last may be 0, none NaN or infinite; got {levels}")
    return levels


_kept_levels: ContextVar[dict[Any, Tensor] | None] = ContextVar("cmfast_levels", default=None)


@contextmanager
def keep_levels(pool: dict[Any, Tensor]) -> Iterator[None]:
    """Inside the `with` block, noise levels on a device come from `pool`, and are put there when first asked for.

    A loop that ran once copies nothing from the host when it runs again: a CUDA graph needs that.
    """
    token = _kept_levels.set(pool)
    try:
        yield
    finally:
        _kept_levels.reset(token)


def on_device(levels: Sequence[float], x: Tensor) -> Tensor:
    """The levels as one tensor beside x: a step takes its scalars from here, with no copy of its own."""
    pool = _kept_levels.get()
    key = (*levels, _check.sigma_dtype(x), x.device)
    kept = None if pool is None else pool.get(key)
    if kept is None:
        kept = torch.tensor(levels, dtype=_check.sigma_dtype(x), device=x.device)
        if pool is not None:
            pool[key] = kept
    return kept
