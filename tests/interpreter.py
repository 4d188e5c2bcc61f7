"""Triton's interpreter with a GPU's bfloat16 and a GPU's order of additions, and in half the time."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np


def patch() -> None:
    """All of it, where this version of Triton does what it does in the place that is known."""
    from triton.runtime import interpreter

    _patch_once(interpreter)
    _round_bfloat16(interpreter)
    _sum_by_trees(interpreter)
    _index_by_one_element(interpreter)


def _patch_once(interpreter: Any) -> None:
    """It puts its functions in the place of Triton's in every function that a kernel calls, a third of the time of a
    test: once for each launch is enough."""
    import triton.language as tl

    whole = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if whole is None or scope is None:
        return
    seen: dict[Any, list[Any]] = {}

    def patch_lang(fn: Any) -> Any:
        if fn not in seen:
            seen[fn] = [v for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)]
        if any(tl.core.is_builtin(module.load) for module in seen[fn]):
            return whole(fn)
        return scope()

    interpreter._patch_lang = patch_lang


def _round_bfloat16(interpreter: Any) -> None:
    """To the nearest, ties to even, as PyTorch and a GPU do (`cvt.rn.bf16.f32`). It cuts off instead, and makes other
    numbers of subnormal ones."""
    import triton.language as tl

    convert = getattr(interpreter, "_convert_float", None)
    if convert is None:
        return

    def convert_float(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return bits_of(data, np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) == (tl.float32, tl.bfloat16) and mode in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            return rounded_bits(bits_of(data, np.uint32))
        return convert(data, source, target, mode)

    interpreter._convert_float = convert_float


def _sum_by_trees(interpreter: Any) -> None:
    """As `tl.sum` does: numpy adds one row after the other along any axis but the last."""
    operations = getattr(interpreter, "ReduceOps", None)
    if operations is None or not hasattr(operations, "sum"):
        return

    def total(self: Any, input: Any) -> Any:
        data = input.handle.data
        if self.axis is not None:
            # Along the last axis, and there of memory that lies so, numpy adds in pairs of blocks.
            data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1)).sum(-1)
            data = np.expand_dims(data, self.axis) if self.keep_dims else data
        else:
            data = data.sum(keepdims=self.keep_dims)
        return self.to_tensor(data, input.dtype)

    operations.sum = total


def _index_by_one_element(interpreter: Any) -> None:
    """The end of a loop, where the launch gives it: Triton 3.6 makes a number of an array, which NumPy 2.5 refuses."""
    whole = getattr(interpreter, "_patch_lang_tensor", None)
    if whole is None or len(inspect.signature(whole).parameters) != 2:
        return

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        whole(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def bits_of(data: np.ndarray, dtype: type) -> np.ndarray:
    return np.frombuffer(np.asarray(data).tobytes(), dtype).reshape(np.shape(data))


def rounded_bits(bits: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each float32, both as integers. NaN stays NaN, and quiet."""
    up = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return (np.where(nan, bits | np.uint32(0x400000), bits + up) >> np.uint32(16)).astype(np.uint16)
