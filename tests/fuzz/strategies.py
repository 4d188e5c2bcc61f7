"""Calls of every operation, drawn by hypothesis: shapes, dtypes, memory, noise levels, weights and options.

A call is drawn by the operation's signature, the name of a parameter saying what it takes: a new operation is fuzzed by
itself where its parameters have names that PARAMETERS knows. Operations on lists, and those of which one size follows
from another, have a strategy of their own in SPECIAL.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cmfast import ops
from cmfast.ops._dispatch import FUSED, INTERPRETING, SMALL
from tests.fuzz.trial import Trial
from tests.ops.matrix import DTYPES

OPERATIONS = sorted((*FUSED, *SMALL))
SIZES = (1, 2, 3, 5, 7, 13, 0)
#: More elements than a program of a kernel takes, and not by a whole number.
LONG = 1031
LEVELS = (0.0, 1e-44, 1e-38, 0.002, 0.5, 1.0, 80.0, 1e4, math.inf)
#: Elements that states may hold beside ordinary ones.
EDGES = (0.0, 1.0, -1.0, 1e-44, 3e4, math.inf, -math.inf, math.nan)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("plain", "plain", "transposed", "sliced", "offset", "channels last", "expanded")


def lay(x: Tensor, kind: str, axis: int) -> Tensor:
    """x in another layout of memory; expanded: its first slice in the place of all."""
    if not x.ndim:
        return torch.stack([x, x])[1] if kind == "offset" else x
    axis %= x.ndim
    if kind == "transposed" and x.ndim > 1:
        other = (axis + 1) % x.ndim
        return x.transpose(axis, other).contiguous().transpose(axis, other)
    if kind == "sliced":
        return torch.stack([x, x.flip(axis)], dim=axis + 1).select(axis + 1, 0)
    if kind == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if kind == "channels last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if kind == "expanded" and x.shape[axis]:
        return x.narrow(axis, 0, 1).expand(x.shape)
    return x


@dataclass
class Setting:
    """What the arguments of one call have in common.

    mood: `plain` numbers, numbers at the `edge`, or a `bad` argument. finite: no infinite numbers, nor NaN.
    leaves: the names of states and network outputs. random: what needs not shrink.
    """

    draw: Any
    shape: tuple[int, ...]
    state: torch.dtype
    model: torch.dtype
    mood: str
    random: random.Random
    leaves: list[str] = field(default_factory=list)
    finite: bool = False

    @property
    def batch(self) -> int:
        return self.shape[0] if self.shape else 1

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """N(0, 1), in a dtype, contiguous; at the edge with some of EDGES. No 1: there torch.clamp has a corner."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        x = torch.where(x.abs() == 1, x / 2, x)
        if self.mood == "edge" and x.numel() and self.random.random() < 0.3:
            flat = x.flatten()
            for _ in range(1 + flat.numel() // 7):
                edge = self.random.choice(EDGES)
                flat[self.random.randrange(flat.numel())] = edge if math.isfinite(edge) or not self.finite else 0.0
            x = flat.view(shape)
        return x

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The same, lying in memory in any way."""
        return lay(self.normal(shape, dtype), self.draw(st.sampled_from(LAYOUTS)), self.random.randrange(5))

    def state_tensor(self, name: str) -> Tensor:
        self.leaves.append(name)
        return self.tensor(self.shape, self.state)

    def output_tensor(self, name: str) -> Tensor:
        self.leaves.append(name)
        return self.tensor(self.shape, self.model)

    def level(self, name: str) -> Tensor:
        """A scalar or [B]: within the range of a model, or at the edge any."""
        count = () if self.draw(st.booleans()) else (self.batch,)
        # 0 and infinity where they are asked for: what divides by a level refuses them.
        known = LEVELS if self.random.random() < 0.2 else LEVELS[1:-1]
        numbers = [self.random.choice(known) if self.mood == "edge" else 0.002 * 4e4 ** self.random.random()
                   for _ in range(math.prod(count))]  # fmt: skip
        wide = self.random.choice((torch.float32, torch.float64)) if self.state == torch.float64 else torch.float32
        dtype = self.random.choice((wide, wide, wide, torch.bfloat16, torch.float16))
        return torch.tensor(numbers, dtype=torch.float64).to(dtype).view(count)

    def counter(self, name: str) -> ops.Draw:
        """A draw for the samples of the batch: any seed, indices and draw number."""
        bits = self.random.getrandbits
        index = torch.tensor([bits(40) for _ in range(self.batch)], dtype=torch.int64)
        seed, number = bits(63), bits(8)
        if self.random.random() < 0.3:
            return ops.Draw(torch.tensor(seed), index, torch.tensor(number))
        return ops.Draw(seed, index, number)

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))


def _noise(s: Setting, name: str) -> Any:
    return s.state_tensor(name) if s.pick(True, False) else s.counter(name)


def _levels(s: Setting, name: str) -> Any:
    """A table of levels, any two or three of which belong together; or a distribution."""
    if s.pick(True, False):
        return ops.LogNormal(s.random.uniform(-2, 1), s.random.random(), s.pick(None, ops.Below(0.25)))
    stride, count = s.pick(1, 2), s.pick(1, 2, 5)
    table = torch.tensor(sorted((80 * s.random.random() + 0.002 for _ in range(stride * count + 1)), reverse=True))
    thresholds = torch.tensor(sorted(s.random.getrandbits(32) for _ in range(count - 1)), dtype=torch.int64)
    return ops.Grid(table, stride, s.pick(None, thresholds))


def _memory_format(s: Setting, name: str) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return s.pick(None, torch.contiguous_format, formats.get(len(s.shape)))


def _option(*choices: Any) -> Callable[[Setting, str], Any]:
    return lambda s, name: s.pick(*choices)


#: What a parameter of a name takes.
PARAMETERS: dict[str, Callable[[Setting, str], Any]] = {
    **dict.fromkeys(("x", "x_t", "x_t2", "x_start", "target"), Setting.state_tensor),
    **dict.fromkeys(("model_output", "model_output_next", "model_output_mid"), Setting.output_tensor),
    **dict.fromkeys(("sigma", "next_sigma", "mid_sigma", "input_sigma", "weight", "snr"), Setting.level),
    "noise": _noise,
    "draw": Setting.counter,
    "levels": _levels,
    "shape": lambda s, name: s.shape[1:],
    "state_dtype": lambda s, name: s.pick(None, s.state),
    "p": _option(0.0, 0.3, 0.999, 2**-33),
    "sigma_data": _option(0.5, None, 0.01, 13.0),
    "weight_sigma_data": _option(0.5, 0.1),
    "boundary": _option(0.002, 0.0, 0.5),
    "sigma_min": _option(0.002, 0.0, 0.5),
    "clip": _option(False, True),
    "pair": _option(True, False),
    "rounding": _option("trunc", "nearest"),
    "weighting": _option(*ops.WEIGHTINGS),
    "norm": _option("l1", "l2", "huber"),
    "huber_c": _option(0.0, 0.03, 5.0),
    "dtype": _option(None, *FLOATS[:3]),
    "memory_format": _memory_format,
}


def by_signature(s: Setting, name: str) -> dict[str, Any]:
    """Arguments by the names of the parameters; of those with a default, some."""
    arguments = {}
    for key, parameter in inspect.signature(getattr(ops, name)).parameters.items():
        if key not in PARAMETERS:
            raise KeyError(f"{name}: give {key!r} a line in PARAMETERS, or it one in SPECIAL (tests/fuzz)")
        if parameter.default is inspect.Parameter.empty or s.pick(True, False):
            arguments[key] = PARAMETERS[key](s, key)
    return arguments


def _consistency(s: Setting, name: str) -> dict[str, Any]:
    arguments = by_signature(s, name)
    if s.pick(True, False):
        arguments["weight"] = s.pick(*ops.WEIGHTINGS)
    both = {"x_t2": s.state_tensor, "next_sigma": s.level}
    arguments = {k: v for k, v in arguments.items() if k not in both}
    s.leaves[:] = [k for k in s.leaves if k in arguments]
    return arguments | ({k: make(k) for k, make in both.items()} if s.pick(True, False) else {})


def _weighting(s: Setting, name: str) -> dict[str, Any]:
    """sigma_data is no option of a network here: None is none of its values."""
    return by_signature(s, name) | {"sigma_data": s.pick(0.5, 0.1)}


def _init(s: Setting, name: str) -> dict[str, Any]:
    arguments = {k: v for k, v in by_signature(s, name).items() if k not in ("shape", "state_dtype")}
    if isinstance(arguments["noise"], ops.Draw):
        arguments |= {key: PARAMETERS[key](s, key) for key in ("shape", "state_dtype")}
    return arguments


def _normal(s: Setting, name: str) -> dict[str, Any]:
    seed, index, number = s.counter("draw")
    arguments = {"seed": seed, "index": index, "draw": number}
    if name == "uniform_int":
        return arguments | {"high": s.pick(1, 2, 7, 1000, 2**31)}
    return arguments | {"shape": s.shape[1:], "dtype": s.pick(*FLOATS[:3])}


def _group_norm(s: Setting, name: str) -> dict[str, Any]:
    # Few elements of a group may lie close to their mean, whose rounding then counts: tests/ops/test_group_norm.py.
    groups, size = s.pick(1, 2, 3, 5), s.pick(1, 2, 3, 7) if math.prod(s.shape[2:]) >= 8 else s.pick(8, 11)
    s.shape = shape = (*s.shape[:1], groups * size, *s.shape[2:])
    batch, channels = s.batch, groups * size
    dtype = s.pick(torch.float32, s.state)
    arguments = {"x": s.state_tensor("x"), "num_groups": groups, "silu": s.pick(True, False), "eps": s.pick(1e-5, 1e-3)}
    sizes = {"weight": (channels,), "bias": (channels,)}
    sizes |= {"x_bias": (channels,)} if s.pick(True, False) else {}
    sizes |= {"scale": (batch, channels), "shift": (batch, channels)} if s.pick(True, False) else {}
    sizes |= {"residual": shape} if s.pick(True, False) else {}
    arguments |= {k: s.tensor(size, s.state if k == "residual" else dtype) for k, size in sizes.items()}
    if s.pick(True, False):
        arguments |= {"dropout": s.pick(0.3, 0.9), "draw": s.counter("draw")}
    # Of a bias before the normalisation all but rounding cancels.
    s.leaves[:] = [*(k for k in sizes if k != "x_bias"), "x"]
    return arguments


def _image(s: Setting, name: str) -> dict[str, Any]:
    # Kernel and F.interpolate do not multiply the same pixels by 0, which shows where one is infinite.
    channels, s.finite = s.pick(1, 3, 7), True
    s.shape = (*s.shape[:1], s.pick(1, channels), *s.shape[2:])
    dtype = s.pick(torch.float32, s.state)
    mean, std = s.normal((channels,), dtype), 0.1 + s.normal((channels,), dtype).abs()
    size = s.pick(None, 1, 5, (3, 7), (16, 2))
    options = {"size": size, "value_range": s.pick((-1.0, 1.0), (0.0, 255.0)), "dtype": s.pick(None, *FLOATS[:3])}
    return {"image": s.state_tensor("image"), "mean": mean, "std": std, **options,
            "memory_format": _memory_format(s, "memory_format")}  # fmt: skip


def _layer(s: Setting, name: str) -> dict[str, Any]:
    channels = s.shape[1] if len(s.shape) > 1 else 1
    maps = {k: s.state_tensor(k) for k in ("features", "target_features")}
    if s.pick(True, False):
        # As a ReLU leaves them. Of a pixel of zeros the gradient is divided by 1e-10.
        maps, s.leaves[:] = {k: v.relu() for k, v in maps.items()}, []
    if channels == 1:
        s.leaves[:] = []  # normalised, one channel is 1 or -1 everywhere: gradients are rounding alone
    return {**maps, "weight": s.normal((channels,), s.pick(torch.float32, s.state)).abs()}


def _lists(s: Setting, name: str) -> dict[str, Any]:
    """Lists of tensors of any shapes; averages at several rates; a copy."""
    shapes = [tuple(s.random.choice(SIZES) for _ in range(s.random.randrange(5))) for _ in range(s.pick(1, 2, 3))]

    def tensors(dtype: torch.dtype, scale: float = 1.0, square: bool = False) -> list[Tensor]:
        made = []
        for shape in shapes:
            x = s.normal(shape, dtype) * scale
            # What is written has memory of its own for each element.
            made.append(lay(x.square() if square else x, s.random.choice(LAYOUTS[:-1]), s.random.randrange(5)))
        return made

    gradient_scale = s.pick(None, 2.0**16, 3.0)
    scalar = {} if gradient_scale is None else {"grad_scale": torch.tensor(gradient_scale)}
    gradients = tensors(s.model, gradient_scale or 1.0)
    # Of a parameter that is infinite a kernel takes 0 times the decay, and is NaN sooner than the reference.
    s.finite = name != "ema_update_"
    if name == "grad_norm":
        return {"gradients": gradients, **scalar}
    average = s.pick(torch.float32, s.state)
    rates = [s.random.choice((0.0, 0.5, 0.999, 0.9999, 1.0)) for _ in range(s.pick(0, 1, 2))]
    arguments: dict[str, Any] = {
        "parameters": tensors(s.state), "averages": [tensors(average) for _ in rates],
        "rates": torch.tensor(rates, dtype=torch.float64) if s.pick(True, False) else rates,
        "copies": tensors(s.model) if s.pick(True, False) else None,
    }  # fmt: skip
    if name == "ema_update_":
        return arguments
    moment = s.pick(torch.float32, s.state)
    lr = s.pick(0.1, 1e-4, 0.0)
    options = {"betas": s.pick((0.9, 0.999), (0.0, 0.5)), "eps": s.pick(1e-8, 1e-3), "maximize": s.pick(False, True),
               "weight_decay": s.pick(0.0, 0.1), "decoupled_weight_decay": s.pick(False, True),
               "max_norm": s.pick(None, 0.5, 1e6)}  # fmt: skip
    if s.pick(True, False):
        options["found_inf"] = torch.tensor(s.pick(0.0, 1.0))
    return {
        **arguments, "gradients": gradients, "exp_avgs": tensors(moment, 0.1),
        "exp_avg_sqs": tensors(moment, square=True), "step": torch.tensor(float(s.pick(0, 1, 4, 5, 6, 10000))),
        "lr": torch.tensor(lr) if s.pick(False, True) else lr, **options, **scalar,
    }  # fmt: skip


#: Operations with a strategy of their own.
SPECIAL: dict[str, Callable[[Setting, str], dict[str, Any]]] = {
    "consistency_loss": _consistency,
    "loss_weight": _weighting,
    "snr_weight": _weighting,
    "init_noise": _init,
    "normal": _normal,
    "uniform_int": _normal,
    "group_norm_silu": _group_norm,
    "lpips_input": _image,
    "lpips_layer": _layer,
    **dict.fromkeys(("ema_update_", "grad_norm", "radam_ema_", "adam_ema_"), _lists),
}
#: The fewest dimensions that an operation takes: fewer are drawn seldom.
DIMS = {"group_norm_silu": (2, 5), "lpips_input": (4, 4), "lpips_layer": (4, 4),
        **dict.fromkeys(("to_uint8", "denoise_to_uint8", "dropout"), (2, 5))}  # fmt: skip
NO_GRADIENTS = ("to_uint8", "denoise_to_uint8", *SMALL)


def _shape(draw: Any, least: int, most: int) -> tuple[int, ...]:
    ndim = draw(st.integers(least, most))
    sizes = [draw(st.sampled_from(SIZES)) for _ in range(ndim)]
    while math.prod(sizes) > 4096:
        sizes[sizes.index(max(sizes))] = 3
    # Planes of samples are programs, and the interpreter takes ten milliseconds for each.
    while INTERPRETING and math.prod(sizes[:2]) > 9:
        sizes[sizes.index(max(sizes[:2]))] = 2
    if len(sizes) > 2 * INTERPRETING and 0 < math.prod(sizes[:-1]) <= 3 and draw(st.integers(0, 9)) == 0:
        sizes[-1] = LONG
    return tuple(sizes)


def _spoil(s: Setting, arguments: dict[str, Any]) -> dict[str, Any]:
    """One argument that is not what it should be; or not there, or one too many."""
    name = s.pick(*arguments)
    value = arguments[name]
    if isinstance(value, list) and value:
        at = s.random.randrange(len(value))
        worse = [*value[:at], _worse(s, value[at]), *value[at + 1 :]]
        return {**arguments, name: s.pick(worse, value[:-1], value * 2)}
    if isinstance(value, ops.Draw):
        part = s.pick(*value._fields)
        return {**arguments, name: value._replace(**{part: _worse(s, getattr(value, part))})}
    return {**arguments, name: _worse(s, value)}


def _worse(s: Setting, value: Any) -> Any:
    if isinstance(value, Tensor):
        bad = [
            value.long(), value.bool(), value.to(torch.complex64), value.to("meta"), None, 1.0, value[None],
            # Each element may be a sample, and so a program: see _shape.
            value.flatten()[:20], value[..., None][:0], value.new_full((), -1), value.new_full(value.shape, 7) - 100,
            value.double().fill_(math.nan),
        ]  # fmt: skip
    elif isinstance(value, bool | str | torch.dtype | torch.memory_format | None):
        bad = [-1, "none of them", torch.int8, torch.preserve_format]
    else:
        bad = [-1, 0, math.nan, math.inf, None, "a word", 10**20 if isinstance(value, int) else 1e9]
    return bad[s.draw(st.integers(0, len(bad) - 1))]


@st.composite
def trials(draw: Any, name: str) -> Trial:
    """A call of an operation. Gradients are looked at where all its numbers are ordinary."""
    least, most = DIMS.get(name, (1, 5))
    least = 0 if draw(st.integers(0, 19)) == 0 else least
    state, model = draw(st.sampled_from([*DTYPES, *DTYPES[:1] * 3, (torch.float64, torch.float64)]))
    mood = draw(st.sampled_from(["plain", "plain", "edge", "edge", "bad"]))
    setting = Setting(draw, _shape(draw, least, most), state, model, mood, random.Random(draw(st.integers(0, 2**32))))
    arguments = SPECIAL.get(name, by_signature)(setting, name)
    if mood == "bad":
        arguments = _spoil(setting, arguments)
    leaves = tuple(k for k in setting.leaves if k in arguments)
    return Trial(name, arguments, leaves if mood == "plain" and name not in NO_GRADIENTS else ())
