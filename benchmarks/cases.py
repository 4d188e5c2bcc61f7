"""What is measured: each operation with its inputs, and the fewest bytes it can move.

A case calls one operation of `library`, which is `cmfast.ops` or `cmfast.reference`: the two have the same signatures,
so one line serves the fused operation, its plain form, torch.compile of that, and the float64 yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import ops, reference, schedules
from cmfast.tolerances import RESIZED

SEED = 2**40 + 7
DRAW = 3
#: The names of tensors that are a network's outputs, and so in its dtype and layout. Of the others, "shape" is a batch
#: without memory, for operations that read none, "table" is noise levels [40], "bias" is [B, C, 1, 1], and "film" is
#: [B, 2 C], also a network's.
MODEL_TENSORS = ("f", "f2", "bias", "film")
#: The names of those that are parameters [C], in float32.
PARAMETERS = ("gain", "offset", "heads", "mean", "std")
#: Those of them that are positive.
POSITIVE = ("heads", "std")


class Floor(NamedTuple):
    """Bytes per element when every input is read once and every output is written once.

    s, m: how many tensors of the state's and of the model's dtype move; pixels: bytes as uint8.
    """

    s: int
    m: int = 0
    pixels: int = 0

    def bytes_per_element(self, state: torch.dtype, model: torch.dtype) -> int:
        return self.s * state.itemsize + self.m * model.itemsize + self.pixels

    def __str__(self) -> str:
        """
        >>> str(Floor(s=1, m=2)), str(Floor(s=1, pixels=1))
        ('s + 2m', 's + 1')
        """
        terms = [(self.s, "s"), (self.m, "m"), (self.pixels, "")]
        return " + ".join(f"{n if n > 1 or not unit else ''}{unit}" for n, unit in terms if n)


Inputs = dict[str, Tensor]


class Dtypes(NamedTuple):
    """The dtype of states, and of what goes into and comes out of the network."""

    state: torch.dtype = torch.float32
    model: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """`call(library, tensors, dtypes)` returns the operation's results, nested as the operation nests them.

    tensors: batches [B, C, H, W], those of `MODEL_TENSORS` in the model's dtype; sigmas: [B]; grad_to: the tensor whose
    gradient is taken as well, for the input `upstream`; drawn: noise is drawn inside; compiled: the operation stands
    inside a region under torch.compile, and the question is what it costs there; sizes: where not images but a
    network's maps are its batches, those maps and how many of them; plain_error: what plain PyTorch may be off by in
    float32, beyond twice the floor.
    """

    call: Callable[[Any, Inputs, Dtypes], Any]
    floor: Floor
    tensors: tuple[str, ...] = ()
    sigmas: tuple[str, ...] = ("sigma",)
    grad_to: str | None = None
    drawn: bool = False
    compiled: bool = False
    sizes: tuple[tuple[tuple[int, int, int], int], ...] = ()
    plain_error: float = 0.0


def draw(t: Inputs) -> reference.Draw | Tensor:
    """Noise by counter; or given noise, where a provider draws with torch's generator."""
    return t["noise"] if "noise" in t else reference.Draw(SEED, t["index"], DRAW)


def _init_noise(library: Any, t: Inputs, dtypes: Dtypes) -> Any:
    noise = draw(t)
    if isinstance(noise, Tensor):
        return library.init_noise(noise, t["sigma"], dtype=dtypes.model)
    shape = tuple(t["shape"].shape[1:])
    return library.init_noise(noise, t["sigma"], shape=shape, state_dtype=dtypes.state, dtype=dtypes.model)


def _normal(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    noise = draw(t)
    if isinstance(noise, Tensor):
        return noise
    return library.normal(SEED, noise.index, tuple(t["shape"].shape[1:]), draw=DRAW, dtype=dtypes.state)


def _add_noise(library: Any, t: Inputs, dtypes: Dtypes) -> Any:
    return library.add_noise(t["x"], draw(t), t["sigma"], dtype=dtypes.model)


def _add_noise_pair(library: Any, t: Inputs, dtypes: Dtypes) -> Any:
    return library.add_noise_pair(t["x"], draw(t), t["sigma"], t["next"], dtype=dtypes.model)


def _draw_pair(library: Any, t: Inputs, dtypes: Dtypes) -> list[Tensor]:
    """Both points, with levels and noise drawn together; or levels of torch's generator."""
    noise, table = draw(t), t["table"]
    if isinstance(noise, Tensor):
        index = torch.randint(len(table) - 1, (len(noise),), device=noise.device)
        return flat(library.add_noise_pair(t["x"], noise, table[index], table[index + 1], dtype=dtypes.model))
    drawn = library.draw_pair(t["x"], noise, reference.Grid(table), dtype=dtypes.model)
    return flat([part for part in drawn if part is not None])[:6]


def _dropout(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    counter = draw(t)
    return F.dropout(t["f"], 0.1) if isinstance(counter, Tensor) else library.dropout(t["f"], 0.1, counter)


def _renoise(library: Any, t: Inputs, dtypes: Dtypes) -> Any:
    return library.renoise(t["f"], t["x"], t["sigma"], t["next"], draw(t), clip=True, dtype=dtypes.model)


def _solver(name: str, *arguments: str) -> Callable[[Any, Inputs, Dtypes], Any]:
    def call(library: Any, t: Inputs, dtypes: Dtypes) -> Any:
        return getattr(library, name)(*(t[k] for k in arguments), dtype=dtypes.model)

    return call


def _weighted_loss(norm: str) -> Callable[[Any, Inputs, Dtypes], Tensor]:
    return lambda library, t, dtypes: library.weighted_loss(t["x"], t["y"], t["weight"], norm=norm, huber_c=0.03)


def _consistency_loss(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    return library.consistency_loss(t["f"], t["x"], t["sigma"], t["f2"], "karras", t["x2"], t["next"])


def _group_norm_silu(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    scale, shift = t["film"].chunk(2, dim=1)
    return library.group_norm_silu(t["f"], 32, t["gain"], t["offset"], scale=scale, shift=shift)


def _lpips_layer(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    return library.lpips_layer(t["f"], t["f2"], t["heads"])


def _lpips_input(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    """Images made 3.5 times as high and wide, as 64x64 to 224x224."""
    height, width = (7 * side // 2 for side in t["x"].shape[2:])
    return library.lpips_input(
        t["x"], t["mean"], t["std"], size=(height, width), dtype=dtypes.model, memory_format=torch.channels_last
    )


def _region(call: Callable[[Any, Inputs, Dtypes], Any]) -> Callable[[Any, Inputs, Dtypes], Any]:
    """What stands around an operation in a network: a bias before it, a cast of the state after it."""

    def region(library: Any, t: Inputs, dtypes: Dtypes) -> tuple[Tensor, ...]:
        result = call(library, {**t, "f": t["f"] + t["bias"]}, dtypes)
        state, *others = (result,) if isinstance(result, Tensor) else result
        return (state.to(dtypes.model), *others)

    return region


def _denoise(library: Any, t: Inputs, dtypes: Dtypes) -> Tensor:
    return library.denoise(t["f"], t["x"], t["sigma"], clip=True)


_euler_step = _solver("euler_step", "f", "x", "sigma", "next")
_TWO = ("sigma", "next")
_PAIR = ("f", "x", "f2", "x2")
_NORM: dict[str, Any] = {"tensors": ("f", "gain", "offset", "film"), "sigmas": ()}
#: Maps of the ImageNet-64 U-Net that do not fit on chip, and are read twice; and those that do.
_LARGE_MAPS = (((192, 64, 64), 256), ((192, 64, 64), 64), ((384, 32, 32), 256), ((192, 64, 64), 1))
_SMALL_MAPS = (((384, 16, 16), 256), ((768, 8, 8), 256), ((384, 16, 16), 1), ((768, 8, 8), 1))
#: The five layers of VGG-16 that LPIPS compares.
_VGG_MAPS = tuple(
    (shape, batch)
    for batch in (64, 8)
    for shape in ((256, 56, 56), (64, 224, 224), (128, 112, 112), (512, 28, 28), (512, 14, 14))
)
_LAYER: dict[str, Any] = {"tensors": ("f", "f2", "heads"), "sigmas": (), "sizes": _VGG_MAPS}
_TO_TRUNK: dict[str, Any] = {
    "tensors": ("x", "mean", "std"), "sigmas": (), "sizes": (((3, 64, 64), 64), ((3, 32, 32), 64))
}

CASES = {
    "denoise": Case(_denoise, Floor(2, 1), ("f", "x")),
    "euler_step": Case(_euler_step, Floor(2, 2), ("f", "x"), _TWO),
    "weighted_loss l2": Case(_weighted_loss("l2"), Floor(2), ("x", "y"), ("weight",)),
    "renoise drawn": Case(_renoise, Floor(2, 2), ("f", "x"), _TWO, drawn=True),
    "heun_predictor": Case(
        _solver("heun_predictor", "f", "x", "sigma", "next"), Floor(1, 2), ("f", "x"), _TWO
    ),
    "heun_corrector": Case(
        _solver("heun_corrector", "f", "f2", "x", "sigma", "next"), Floor(2, 3), ("f", "f2", "x"), _TWO
    ),
    "midpoint_corrector": Case(
        _solver("midpoint_corrector", "f", "f2", "x", "sigma", "middle", "next"), Floor(2, 3), ("f", "f2", "x"),
        ("sigma", "middle", "next"),
    ),
    "denoise_to_uint8": Case(
        lambda library, t, dtypes: library.denoise_to_uint8(t["f"], t["x"], t["sigma"]), Floor(1, 1, 1), ("f", "x")
    ),
    "init_noise drawn": Case(_init_noise, Floor(1, 1), ("shape",), drawn=True),
    "add_noise drawn": Case(_add_noise, Floor(2, 1), ("x",), drawn=True),
    "add_noise_pair drawn": Case(_add_noise_pair, Floor(3, 2), ("x",), _TWO, drawn=True),
    "draw_pair drawn": Case(_draw_pair, Floor(3, 2), ("x", "table"), (), drawn=True),
    # Both passes: each reads x and y, the second writes a gradient.
    "weighted_loss l2 + backward": Case(_weighted_loss("l2"), Floor(5), ("x", "y"), ("weight",), grad_to="x"),
    "weighted_loss huber": Case(_weighted_loss("huber"), Floor(2), ("x", "y"), ("weight",)),
    "weighted_loss huber + backward": Case(_weighted_loss("huber"), Floor(5), ("x", "y"), ("weight",), grad_to="x"),
    "consistency_loss": Case(_consistency_loss, Floor(2, 2), _PAIR, _TWO),
    "consistency_loss + backward": Case(_consistency_loss, Floor(4, 5), _PAIR, _TWO, grad_to="f"),
    "renoise given": Case(_renoise, Floor(3, 2), ("f", "x", "noise"), _TWO),
    "add_noise given": Case(_add_noise, Floor(3, 1), ("x", "noise")),
    "scale_input": Case(_solver("scale_input", "x", "sigma"), Floor(1, 1), ("x",)),
    "normal": Case(_normal, Floor(1), ("shape",), (), drawn=True),
    "to_uint8": Case(lambda library, t, dtypes: library.to_uint8(t["x"]), Floor(1, 0, 1), ("x",)),
    # The backward pass reads the batch and a gradient, twice where they do not fit on chip, and writes a gradient.
    "group_norm_silu": Case(_group_norm_silu, Floor(0, 3), **_NORM, sizes=_LARGE_MAPS),
    "group_norm_silu + backward": Case(_group_norm_silu, Floor(0, 8), **_NORM, sizes=_LARGE_MAPS, grad_to="f"),
    "group_norm_silu on chip": Case(_group_norm_silu, Floor(0, 2), **_NORM, sizes=_SMALL_MAPS),
    "group_norm_silu on chip + backward": Case(_group_norm_silu, Floor(0, 5), **_NORM, sizes=_SMALL_MAPS, grad_to="f"),
    "dropout drawn": Case(_dropout, Floor(0, 2), ("f",), (), sizes=_LARGE_MAPS[:2], drawn=True),
    "lpips_layer": Case(_lpips_layer, Floor(0, 2), **_LAYER),
    "lpips_layer + backward": Case(_lpips_layer, Floor(0, 5), **_LAYER, grad_to="f"),
    # 12.25 elements of the result for each of the image.
    "lpips_input": Case(_lpips_input, Floor(1, 12), **_TO_TRUNK, plain_error=RESIZED),
    "lpips_input + backward": Case(_lpips_input, Floor(2, 24), **_TO_TRUNK, grad_to="x", plain_error=RESIZED),
    # The bias is one number per sample and channel, which a floor does not count.
    "region: bias, denoise, cast": Case(_region(_denoise), Floor(1, 2), ("f", "x", "bias"), compiled=True),
    "region: bias, euler_step, cast": Case(_region(_euler_step), Floor(1, 3), ("f", "x", "bias"), _TWO, compiled=True),
    "region: bias, renoise drawn, cast": Case(
        _region(_renoise), Floor(1, 3), ("f", "x", "bias"), _TWO, drawn=True, compiled=True
    ),
}

#: Measured first, and what the bars of `kernels_summary.py` are about.
FIRST = ("denoise", "euler_step", "weighted_loss l2", "renoise drawn")
#: At one size each, these are the first on a GPU: there may be no time for more.
OVERVIEW = (
    "denoise", "renoise drawn", "consistency_loss + backward", "group_norm_silu", "group_norm_silu + backward",
    "lpips_layer", "lpips_layer + backward", "euler_step", "weighted_loss l2", "group_norm_silu on chip",
    "draw_pair drawn", "dropout drawn",
)  # fmt: skip
#: What a quick run has.
QUICK = (*FIRST, "consistency_loss + backward")


@dataclass(frozen=True)
class Config:
    """A case at a size, in dtypes and a layout."""

    case: str
    shape: tuple[int, int, int]
    batch: int
    dtypes: Dtypes = Dtypes()
    channels_last: bool = False

    @property
    def elements(self) -> int:
        channels, height, width = self.shape
        return self.batch * channels * height * width

    @property
    def floor_bytes(self) -> int:
        return self.elements * CASES[self.case].floor.bytes_per_element(*self.dtypes)

    def __str__(self) -> str:
        """
        >>> str(Config("denoise", (3, 64, 64), 256))
        'denoise 256x3x64x64 float32/bfloat16'
        """
        size = "x".join(str(n) for n in (self.batch, *self.shape))
        dtypes = "/".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{self.case} {size} {dtypes}{' channels_last' if self.channels_last else ''}"


#: 3x64x64 is what the bars name; 256 of 3x256x256 is 201 MB for one float32 tensor.
MAIN_SIZES = [((3, 64, 64), 64), ((3, 64, 64), 256), ((3, 64, 64), 1), ((3, 256, 256), 256)]
OTHER_SIZES = [((3, 256, 256), 1), ((3, 256, 256), 64), ((3, 32, 32), 1), ((3, 32, 32), 64), ((3, 32, 32), 256)]
CPU_SIZES = [((3, 64, 64), 1), ((3, 64, 64), 16), ((3, 32, 32), 1), ((3, 32, 32), 64)]
#: Of a quick run there: larger tensors leave the core's own cache, and what comes from the one that a shared machine's
#: other users fill moves a ratio by a quarter.
CPU_QUICK = ((3, 64, 64), 4)
CPU_QUICK_MAP = (192, 16, 16)


def _of_maps(dtype: torch.dtype, sizes: int | None = None, largest: int | None = None) -> list[Config]:
    """Cases on maps, channels_last and in one dtype: each at its first sizes, of `largest` samples at most."""
    return [
        Config(name, shape, min(batch, largest or batch), Dtypes(dtype, dtype), channels_last=True)
        for name, case in CASES.items()
        for shape, batch in case.sizes[:sizes]
    ]


def smallest() -> list[Config]:
    """Every case once, at a size that takes no time."""
    images = [Config(name, (3, 32, 32), 2) for name, case in CASES.items() if not case.sizes]
    return [*images, *_of_maps(torch.bfloat16, 1, 1)]


def configs(device_type: str, quick: bool = False) -> list[Config]:
    """What is run, the important first."""
    images = [name for name, case in CASES.items() if not case.sizes]
    all_float32 = Dtypes(torch.float32, torch.float32)
    if quick:
        cuda = device_type == "cuda"
        size, dtypes = (MAIN_SIZES[0], Dtypes()) if cuda else (CPU_QUICK, all_float32)
        (norm,) = (c for c in _of_maps(dtypes.model, 1, None if cuda else 1) if c.case == "group_norm_silu")
        norm = norm if cuda else replace(norm, shape=CPU_QUICK_MAP)
        return [*(Config(case, *size, dtypes=dtypes) for case in QUICK), norm]
    if device_type != "cuda":
        # What networks run in on a CPU.
        maps = _of_maps(torch.float32, 1, 1) + _of_maps(torch.float32, 1, 4)
        return [*(Config(case, *size, dtypes=all_float32) for size in CPU_SIZES for case in images), *maps]
    plain = [name for name in images if not CASES[name].compiled]
    regions = [name for name, case in CASES.items() if case.compiled]
    rest = [name for name in plain if name not in FIRST]
    large = ((3, 64, 64), 256)
    maps = _of_maps(torch.bfloat16)
    overview = {c.case: c for c in reversed([*(Config(name, *MAIN_SIZES[-1]) for name in images), *maps])}
    found = [
        *(overview[name] for name in OVERVIEW),
        *(Config(case, *size) for size in MAIN_SIZES for case in FIRST),
        *maps,
        *(Config(case, *MAIN_SIZES[-1]) for case in ("heun_predictor", "heun_corrector")),
        *(Config(case, *large) for case in [*rest, *regions]),
        *(Config(case, *size) for size in MAIN_SIZES if size != large for case in rest
          if not (size == MAIN_SIZES[-1] and case.startswith("heun"))),
        *(Config(case, *large, channels_last=True) for case in ("denoise", "euler_step", "renoise drawn")),
        *(Config(case, *large, dtypes=all_float32) for case in FIRST),
        *(Config(case, *size) for size in OTHER_SIZES for case in plain),
        *(Config(case, *MAIN_SIZES[-1], dtypes=all_float32) for case in FIRST),
        *(Config(case, *size) for size in MAIN_SIZES if size != large for case in regions),
    ]
    return list(dict.fromkeys(found))


def make_inputs(config: Config, sets: int, device: torch.device, seed: int) -> list[Inputs]:
    """So many sets of fresh inputs: states ~ N(0, 1), noise levels that fall from one to the next.

    Each tensor is an allocation of its own, aligned as a user's is: for a slice of a larger one inductor makes a copy.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return [_input_set(config, i, device, generator) for i in range(sets)]


def _input_set(config: Config, number: int, device: torch.device, generator: torch.Generator) -> Inputs:
    case = CASES[config.case]
    t: Inputs = {}
    for name in case.tensors:
        if name == "shape":
            t[name] = torch.zeros((), device=device).expand(config.batch, *config.shape)
            continue
        if name == "table":
            t[name] = schedules.karras_sigmas(40, append_zero=False, device=device)
            continue
        channels = config.shape[0]
        shapes = {"bias": (config.batch, channels, 1, 1), "film": (config.batch, 2 * channels)}
        shapes |= dict.fromkeys(PARAMETERS, (channels,))
        dtype = config.dtypes.model if name in MODEL_TENSORS else config.dtypes.state
        dtype = torch.float32 if name in PARAMETERS else dtype
        shape = shapes.get(name, (config.batch, *config.shape))
        t[name] = torch.randn(shape, generator=generator, device=device).to(dtype)
        if name in POSITIVE:
            t[name].abs_().add_(0.1)
        if config.channels_last and name in MODEL_TENSORS and t[name].ndim == 4:
            t[name] = t[name].contiguous(memory_format=torch.channels_last)
    level = torch.rand(config.batch, generator=generator, device=device) * 3 + 0.5
    t |= {name: level * 0.6**i for i, name in enumerate(case.sigmas)}
    if case.drawn:
        t["index"] = torch.arange(config.batch, device=device) + 2**33 + number * config.batch
    if case.grad_to:
        with torch.no_grad():
            result = case.call(reference, t, config.dtypes)
        layout = torch.channels_last if config.channels_last and result.ndim == 4 else torch.contiguous_format
        t["upstream"] = torch.ones_like(result, memory_format=layout)
        t[case.grad_to].requires_grad_()
    return t


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, however nested."""
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def run(case: Case, function: Callable[[Inputs], Any], t: Inputs) -> list[Tensor]:
    """The results of `function(t)`; with `grad_to`, the gradient after them."""
    if case.grad_to is None:
        return flat(function(t))
    loss = function(t)
    (grad,) = torch.autograd.grad(loss, t[case.grad_to], t["upstream"])
    return [loss.detach(), grad]


def exact(config: Config, t: Inputs, start: int, stop: int) -> list[Tensor]:
    """The float64 yardstick for the samples start to stop."""
    case = CASES[config.case]
    whole = (*PARAMETERS, "table")
    part = {name: x.detach() if name in whole else x.detach()[start:stop] for name, x in t.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
    if case.grad_to:
        wide[case.grad_to].requires_grad_()
    dtypes = Dtypes(torch.float64, torch.float64)
    return run(case, lambda inputs: case.call(reference, inputs, dtypes), wide)


def operation(config: Config, library: Any = ops) -> Callable[[Inputs], Any]:
    """The case's call as a function of its inputs alone."""
    case, dtypes = CASES[config.case], config.dtypes
    return lambda t: case.call(library, t, dtypes)
