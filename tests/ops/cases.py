"""Every operation with inputs to call it on: one table for all the tests that hold for any operation.

A case makes its tensors for a shape, in float64, and calls the operation with them converted to the dtypes under test.
Noise levels stay float32 (float64 for a float64 state), as in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmfast import ops

#: Layouts are those of the states; [B, C, H, W]. 63 elements, one, none, and a real training shape.
SHAPES = [(2, 3, 7, 3), (1, 1, 1, 1), (0, 3, 8, 8), (3, 4, 16, 16)]
#: The states that are a network's outputs, and so in its dtype and layout.
OUTPUTS = ("f", "f2")


@dataclass(frozen=True)
class Case:
    """`call(states, sigmas)` -> the tensors the operation returns; `states` and `sigmas` by name.

    `call` takes the dtype of network inputs as `dtype`, where the operation writes one.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    states: tuple[str, ...]
    sigmas: tuple[str, ...] = ("sigma",)
    no_grad_to: tuple[str, ...] = field(default=())


def inputs(case: Case, shape: tuple[int, ...], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """float64 states ~ N(0, 1) and noise levels that fall from one name to the next, per sample."""
    generator = torch.Generator().manual_seed(seed)
    states = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in case.states}
    start = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 3 + 0.5
    sigmas = {name: start * 0.6**i for i, name in enumerate(case.sigmas)}
    return states, sigmas


def flat(result: object) -> list[Tensor]:
    """The tensors of a result, however nested."""
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


#: By device and number of samples. A region that is compiled takes those that are there: in one that makes them, 2^33
#: is a number of 32 bits to inductor.
_indices: dict[str, Tensor] = {}


def draw(x: Tensor) -> ops.Draw:
    """A draw for the samples of x: large indices, a seed of more than 32 bits, not the first draw."""
    key = f"{x.shape[0]} on {x.device}"
    index = _indices.get(key)
    if index is None:
        index = torch.arange(x.shape[0], device=x.device) + 2**33
        if type(index) is Tensor and not (torch.compiler.is_compiling() or index.is_inference()):
            _indices[key] = index
    return ops.Draw(2**40 + 7, index, 3)


def _init(s, v, dtype=None, **options):
    return ops.init_noise(s["noise"], v["sigma"], dtype=dtype, **options)


def _steps(op: Callable, states: str, sigmas: str) -> Callable:
    """A call of a solver's operation on the named states and levels."""

    def call(s, v, dtype=None, **options):
        return op(*(s[k] for k in states.split()), *(v[k] for k in sigmas.split()), dtype=dtype, **options)

    return call


def _with(call: Callable, **fixed) -> Callable:
    return lambda s, v, **options: call(s, v, **fixed, **options)


def _no_input(call: Callable) -> Callable:
    """For operations that write no network input: `dtype` is not theirs."""
    return lambda s, v, dtype=None: call(s, v)


def _renoise(s, v, dtype=None, **options):
    noise = s["noise"] if "noise" in s else draw(s["x"])
    return ops.renoise(s["f"], s["x"], v["sigma"], v["next"], noise, dtype=dtype, **options)


def _add(s, v, dtype=None):
    noise = s["noise"] if "noise" in s else draw(s["x"])
    return ops.add_noise(s["x"], noise, v["sigma"], input_sigma=v.get("level"), dtype=dtype)


def _pair(s, v, dtype=None):
    noise = s["noise"] if "noise" in s else draw(s["x"])
    return ops.add_noise_pair(s["x"], noise, v["sigma"], v["next"], dtype=dtype)


#: By device and stride: one that exists is no copy from the host, which a graph could not capture.
_grids: dict[tuple[torch.device, int], ops.Grid] = {}


def grid(device, stride: int = 1) -> ops.Grid:
    """Five levels, of which a draw takes neighbours, some oftener than others; or ends and middles of two intervals."""
    made = None if torch.compiler.is_compiling() else _grids.get((device, stride))
    if made is None:
        thresholds = torch.tensor([2**29, 2**31, 2**32 - 2**28], device=device) if stride == 1 else None
        made = ops.Grid(torch.tensor([9.0, 4.0, 2.0, 0.5, 0.002], device=device), stride, thresholds)
        if type(made.table) is torch.Tensor and not torch.compiler.is_compiling():
            _grids[device, stride] = made
    return made


def _drawn(levels: ops.Levels | None = None, stride: int = 1) -> Callable:
    """Points and levels, all drawn: from the `grid` where no others are named."""

    def call(s, v, dtype=None, **options):
        x = s["x"]
        table = levels or grid(x.device, stride)
        made = ops.draw_pair(x, draw(x), table, pair=stride == 1, dtype=dtype, **options)
        return tuple(part for part in made if part is not None)

    return call


def _consistency(s, v, **options):
    """Against a target's D, or with "f2" against that of the target's output; weights given or by name."""
    weight = options.pop("weight", v.get("weight"))
    target = (s["f2"], weight, s["x2"], v["next"]) if "f2" in s else (s["y"], weight)
    return ops.consistency_loss(s["f"], s["x"], v["sigma"], *target, **options)


def _end(s, v, **options):
    """Heun's step where the first sample's ends at sigma' = 0, and has no second slope. Without c_noise: that of 0 is
    250 ln 1e-44, and 1e-44 has one digit in float32."""
    to = v["next"]
    first = torch.arange(to.numel(), device=to.device).view_as(to) == 0
    return _corrector(s, {**v, "next": to.masked_fill(first, 0.0)}, **options)[:2]


_euler = _steps(ops.euler_step, "f x", "sigma next")
_predictor = _steps(ops.heun_predictor, "f x", "sigma next")
_corrector = _steps(ops.heun_corrector, "f f2 x", "sigma next")
_midpoint = _steps(ops.midpoint_corrector, "f f2 x", "sigma mid next")
_scale = _steps(ops.scale_input, "x", "sigma")
_denoise = _steps(lambda f, x, sigma, dtype, **options: ops.denoise(f, x, sigma, **options), "f x", "sigma")
_BELOW = ops.LogNormal(-1.1, 2.0, ops.Below(0.25))
_TWO, _FX, _FFX = ("sigma", "next"), ("f", "x"), ("f", "f2", "x")

CASES = {
    "scale_input": Case(_scale, ("x",)),
    "scale_input plain": Case(_with(_scale, sigma_data=None), ("x",)),
    "denoise": Case(_denoise, _FX),
    "denoise clipped": Case(_with(_denoise, clip=True), _FX),
    "denoise edm": Case(_with(_denoise, boundary=0.0), _FX),
    "denoise plain": Case(_with(_denoise, sigma_data=None, clip=True), _FX, no_grad_to=("x", "sigma")),
    "init_noise": Case(_init, ("noise",)),
    "add_noise": Case(_add, ("x", "noise")),
    "add_noise churn": Case(_add, ("x", "noise"), ("sigma", "level")),
    "add_noise drawn": Case(_add, ("x",)),
    "add_noise_pair": Case(_pair, ("x", "noise"), _TWO),
    "add_noise_pair drawn": Case(_pair, ("x",), _TWO),
    "draw_pair drawn": Case(_drawn(), ("x",), ()),
    "draw_pair halves drawn": Case(_drawn(stride=2), ("x",), ()),
    "draw_pair below drawn": Case(_drawn(_BELOW), ("x",), ()),
    "renoise": Case(_renoise, ("f", "x", "noise"), _TWO),
    "renoise clipped": Case(_with(_renoise, clip=True, sigma_min=0.1), ("f", "x", "noise"), _TWO),
    "renoise drawn": Case(_with(_renoise, clip=True), _FX, _TWO),
    "euler_step": Case(_euler, _FX, _TWO),
    "euler_step clipped": Case(_with(_euler, clip=True), _FX, _TWO),
    "euler_step plain": Case(_with(_euler, sigma_data=None), _FX, _TWO),
    "heun_predictor": Case(_predictor, _FX, _TWO),
    "heun_corrector": Case(_corrector, _FFX, _TWO),
    "heun_corrector end": Case(_end, _FFX, _TWO),
    "heun_corrector clipped": Case(_with(_corrector, clip=True), _FFX, _TWO),
    "heun_corrector plain": Case(_with(_corrector, sigma_data=None), _FFX, _TWO),
    "midpoint_corrector": Case(_midpoint, _FFX, ("sigma", "mid", "next")),
    "midpoint_corrector clipped": Case(_with(_midpoint, clip=True), _FFX, ("sigma", "mid", "next")),
    **{
        f"weighted_loss {norm}": Case(
            _no_input(
                lambda s, v, norm=norm: ops.weighted_loss(s["x"], s["y"], v["weight"], norm=norm, huber_c=0.03),
            ),
            ("x", "y"),
            ("weight",),
        )
        for norm in ("l1", "l2", "huber")
    },
    **{
        f"consistency_loss {norm}": Case(
            _no_input(_with(_consistency, norm=norm, huber_c=0.03)), ("f", "x", "y"), ("sigma", "weight")
        )
        for norm in ("l1", "l2", "huber")
    },
    **{
        f"consistency_loss {weighting}": Case(
            _no_input(_with(_consistency, weight=weighting, weight_sigma_data=0.7)), ("f", "x", "f2", "x2"), _TWO
        )
        for weighting in ops.WEIGHTINGS
    },
    "consistency_loss plain": Case(
        _no_input(_with(_consistency, weight="snr", sigma_data=None)),
        ("f", "x", "f2", "x2"),
        _TWO,
        no_grad_to=("x", "x2", "next"),
    ),
}
