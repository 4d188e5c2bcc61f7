"""What a training run is made of, as a YAML file says it and a checkpoint keeps it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cmfast.ops import _check
from cmfast.rates import parse_rate

OPTIMIZERS = ("radam", "adam", "adamw")
DECAYS = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
ON_NAN = ("stop", "skip")
PARALLEL = ("ddp", "fsdp")

#: What a resumed run may have otherwise. With the first three it goes on from a NaN, on the same data and with the same
#: network and objective; the others change nothing of what is learnt, but for rounding.
FREE = (
    "learning_rate", "max_norm", "on_nan",
    "log_interval", "save_interval", "sample_interval", "keep", "workers", "microbatch", "graphs", "paths",
    "skip_unreadable",
)  # fmt: skip

#: Bytes of a file of settings, and values in it. A run's has 2,000 of them.
LARGEST = 100_000


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained: everything but the objective, the model and the data.

    steps            optimizer steps
    batch_size       images per step, of all processes together
    microbatch       images per forward pass of a process; None: its share of the batch
    optimizer        radam, adam or adamw
    betas            how much of the moments of gradients and of their squares each step keeps
    eps              what the optimizer adds to the root of the second one
    weight_decay     of the optimizer: L2, or with adamw what each step takes off weights, times learning_rate
    learning_rate    of the optimizer, at its highest
    warmup           steps in which it rises from near 0
    decay            what becomes of it: constant, or linear or cosine to 0 at the last step (pd: of each stage)
    max_norm         to which the norm of all gradients is clipped; None: not
    averages         rates of averaged weights, as `cmfast.ema.Averages` takes them: one or more, the first sampled from
    dtype            what networks compute in; weights, loss and averages are float32. float16 scales its gradients
    checkpointing    make activations again in the backward pass: less memory, a third more time
    parallel         several processes: "ddp", or "fsdp" to share out weights, averages and optimizer state too
    optimize         use `cmfast.optimize` networks where they can be had
    graphs           on a GPU, teacher and target as CUDA graphs
    seed             of everything random
    log_interval     steps between readings of the loss; what was lost when it became NaN is no more than these
    save_interval    steps between checkpoints
    keep             how many of the last checkpoints stay; None: all
    sample_interval  steps between pictures of samples and of the loss (0: none)
    workers          processes that decode images
    on_nan           stop: a NaN loss ends the run with the weights before it. skip: its step does nothing

    Raises: ValueError: an unknown name, a rate that is none, or a number out of range; the message says which.
    """

    steps: int
    batch_size: int
    learning_rate: float
    microbatch: int | None = None
    optimizer: str = "radam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"
    max_norm: float | None = None
    averages: tuple[str | float, ...] = ("0.9999",)
    dtype: str = "float32"
    checkpointing: bool = False
    parallel: str = "ddp"
    optimize: bool = True
    graphs: bool = True
    seed: int = 0
    log_interval: int = 10
    save_interval: int = 1000
    sample_interval: int = 0
    keep: int | None = 3
    workers: int = 0
    on_nan: str = "stop"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("microbatch", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, or None, got {getattr(self, name)}")
        for name in ("warmup", "sample_interval", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if isinstance(self.averages, (str, float, int)):
            rate = self.averages
            raise ValueError(f"averages must be several rates, or a tuple of one, got {rate!r}: averages=({rate!r},)")
        if not self.averages:
            raise ValueError("averages must have one rate or more: the first average is the result of a run")
        for rate in self.averages:
            parse_rate(rate)
        if not self.learning_rate > 0 or math.isinf(self.learning_rate):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be above 0, or None, got {self.max_norm}")
        known = {
            "optimizer": OPTIMIZERS, "decay": DECAYS, "dtype": DTYPES, "on_nan": ON_NAN, "parallel": PARALLEL
        }  # fmt: skip
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def rate_at(self, step: int, first: int = 0, length: int | None = None) -> float:
        """The learning rate of a step; first, length: of the stage that it is in, where a run has several."""
        done, steps = step - first, length or self.steps
        warm = min(1.0, (done + 1) / self.warmup) if self.warmup else 1.0
        fraction = min(done / steps, 1.0)
        left = {"constant": 1.0, "linear": 1 - fraction, "cosine": 0.5 * (1 + math.cos(math.pi * fraction))}
        return float(self.learning_rate * warm * left[self.decay])


def plain(value: Any) -> Any:
    """A dataclass, or anything within one, as YAML has it: lists for tuples, texts for paths, Python's numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else _check.without_numpy(value)


def make(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """A dataclass from plain values. Raises: ValueError: a name it does not know, or one that is missing, or a value of
    another kind than its field's."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise ValueError(f"{what} knows no {', '.join(unknown)}; known: {', '.join(fields)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hints = get_type_hints(kind)
    for name, value in given.items():
        hint = hints[name]
        if isinstance(value, str) and float in (hint, *get_args(hint)):  # YAML takes 1e-4 for a text
            with suppress(ValueError):
                given[name] = float(value)
        if not _is(given[name], hint):
            raise ValueError(f"{what}: {name} must be {_named(hint)}, got {given[name]!r:.80}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, or of a union of some, as fields of options and objectives have them."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        right = isinstance(value, tuple) and (... in arguments or len(value) == len(arguments))
        return right and all(_is(each, arguments[0]) for each in value)
    if arguments:
        return any(_is(value, each) for each in arguments)
    if hint is float:
        hint = float | int
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _named(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return f"a list{'' if ... in arguments else f' of {len(arguments)}'}, each {_named(arguments[0])}"
    if arguments:
        return " or ".join(map(_named, arguments))
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names[hint]


def read(path: Path | str) -> dict[str, Any]:
    """A YAML file of settings. Raises: ValueError: not YAML, or not `name: value` lines, or too large; OSError."""
    import yaml

    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is no file of settings: it has more than {LARGEST:,} bytes")
    loader = None
    try:
        loader = yaml.SafeLoader(content.decode("utf-8"))
        node = loader.get_single_node()
        if _values(node) > LARGEST:
            raise ValueError(f"its aliases stand for more than {LARGEST:,} values")
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    return values


def _values(node: Any) -> int:
    """How many values a YAML document stands for, up to `LARGEST` or so: a few aliases of aliases are more than memory
    holds."""
    left, seen = [node], 0
    while left and seen <= LARGEST:
        inner = left.pop()
        children = inner.value if inner is not None and not isinstance(inner.value, str) else []
        # Of a mapping, pairs.
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        left += flat
        seen += len(flat)
    return seen


def written(values: Mapping[str, Any]) -> str:
    """Settings as YAML."""
    import yaml

    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What two settings have otherwise, as `name: saved, given` lines; names within names are joined by dots.

    >>> differences({"options": {"seed": 0, "keep": 3}}, {"options": {"seed": 1, "keep": 5}})
    ['options.seed: 0, now 1']
    """
    found: list[str] = []
    for name in [*saved, *(name for name in given if name not in saved)]:
        if name in FREE:
            continue
        old, new = plain(saved.get(name)), plain(given.get(name))
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {old}, now {new}")
    return found
