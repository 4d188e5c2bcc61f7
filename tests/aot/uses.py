"""How operations are used: a listed set of calls, chosen so that each kernel is launched in every way that matters.

The state is float32 and the network's side bfloat16 unless a name says otherwise; noise levels are one per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmfast import ops
from tests.ops.cases import CASES, OUTPUTS, flat

ImageNet64, Odd, Tiny, Long = (4, 3, 64, 64), (3, 3, 35, 33), (4, 1, 8, 8), (2, 3, 256, 256)
#: So many that programs are cut for the GPU to be busy, and not for it to have some at all.
Many = (256, 3, 64, 64)

#: The element types whose accesses need not be wide. Here states and network tensors, or pixels, lie in different
#: orders: a program walks along the states, and through the others with a stride.
MIXED = ("bf16", "i8")
#: Here tensors or samples do not start at multiples of 16 bytes.
UNALIGNED = ("f32", "bf16")


@dataclass(frozen=True)
class Use:
    """A call that launches kernels. exempt: element types whose accesses need not be wide; exponential: it has one."""

    call: Callable[[], Any]
    exempt: tuple[str, ...] = ()
    exponential: bool = False


def batch(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False, shift: int = 0) -> Tensor:
    """A batch of any values. last: channels_last; shift: elements that it lies off from aligned memory."""
    room = torch.empty(torch.Size(shape).numel() + shift, dtype=dtype)[shift:]
    if not last:
        return room.view(shape)
    return room.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def of_case(
    name: str,
    *,
    state: torch.dtype = torch.float32,
    model: torch.dtype = torch.bfloat16,
    shape: tuple[int, ...] = ImageNet64,
    state_last: bool = False,
    model_last: bool = False,
    shift: int = 0,
    per_row: bool = True,
    grads: str = "",
    results: int | None = None,
    **options: Any,
) -> Callable[[], Any]:
    """A call of tests/ops/cases.py; then gradients of the states in `grads`, from the first `results` results."""

    def call() -> None:
        case = CASES[name]
        states = {
            key: batch(shape, model, model_last, shift) if key in OUTPUTS else batch(shape, state, state_last, shift)
            for key in case.states
        }
        sigmas = {key: torch.ones(shape[0] if per_row else ()) for key in case.sigmas}
        leaves = [states[key].requires_grad_() for key in grads.split()]
        made = flat(case.call(states, sigmas, dtype=model, **options))
        if leaves:
            made = [result for result in made if result.requires_grad][:results]
            torch.autograd.grad(made, leaves, [torch.empty_like(result) for result in made], allow_unused=True)

    return call


def drawn(op: Callable, *names: str, seed: Any = 7, draw: Any = 0, model_last: bool = False, **options: Any) -> Any:
    """A call that draws its noise; f and x stand for a network's output and a state, other names for a level."""

    def call() -> None:
        tensors = {"f": batch(ImageNet64, torch.bfloat16, model_last), "x": batch(ImageNet64, torch.float32)}
        arguments = [tensors.get(name, torch.tensor(1.0)) for name in names]
        noise = ops.Draw(seed, torch.arange(ImageNet64[0]), draw)
        arguments = [noise if name == "noise" else argument for name, argument in zip(names, arguments)]
        op(*arguments, **options)

    return call


def _pixels(last: bool = False, shape: tuple[int, ...] = ImageNet64, **options: Any) -> Callable[[], Any]:
    return lambda: ops.denoise_to_uint8(
        batch(shape, torch.bfloat16, last), batch(shape, torch.float32, last), torch.tensor(1.0), **options
    )


def _levels(levels: Any = None, seed: Any = 7, draw: Any = 0, **options: Any) -> dict[str, Any]:
    """What a training batch is drawn from; of a grid of nine intervals where no levels are named."""
    if levels is None:
        levels = ops.Grid(torch.ones(9 * options.get("stride", 1) + 1), **options)
    return {"draw": ops.Draw(seed, torch.arange(ImageNet64[0]), draw), "levels": levels}


def _drop(x: Tensor, seed: Any = 7, draw: Any = 0) -> None:
    """Both passes of dropout."""
    x.requires_grad_()
    y = ops.dropout(x, 0.1, ops.Draw(seed, torch.arange(len(x)), draw))
    torch.autograd.grad(y, x, torch.empty_like(y))


def _normal(shape: tuple[int, ...] = ImageNet64, **options: Any) -> Callable[[], Any]:
    return lambda: ops.normal(7, torch.arange(shape[0]), shape[1:], **options)


def group_norm(
    channels: int,
    size: int,
    *,
    samples: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    last: bool = True,
    film: bool = False,
    sums: bool = False,
    training: bool = False,
    groups: int = 32,
    **options: Any,
) -> Callable[[], Any]:
    """A normalisation with float32 parameters, the halves of one projection for scale and shift, and a bias.

    sums: with a residual too; training: both passes.
    """

    def call() -> None:
        x = batch((samples, channels, size, size), dtype, last).requires_grad_(training)
        weight = torch.empty(channels).requires_grad_(training)
        scale, shift = torch.empty(samples, 2 * channels, dtype=dtype).chunk(2, 1) if film else (None, None)
        residual = batch(x.shape, dtype, last) if sums else None
        made = ops.group_norm_silu(
            x, groups, weight, weight, scale=scale, shift=shift, x_bias=weight, residual=residual, **options
        )
        made = flat(made)
        if training:
            torch.autograd.grad(made, [x, weight], [torch.empty_like(result) for result in made])

    return call


def _normalised() -> dict[str, Use]:
    """Group normalisation: the U-Net of ImageNet-64 in bfloat16, channels_last, and what else there is."""
    f32, index = torch.float32, torch.arange(4)
    drop = {"dropout": 0.1, "draw": ops.Draw(7, index)}
    counted = {"dropout": 0.1, "draw": ops.Draw(torch.tensor(7), index, torch.tensor(1))}
    calls = {
        "192 of 64x64": group_norm(192, 64, samples=256, film=True, training=True),
        "192 of 64x64, float32, many": group_norm(192, 64, samples=64, dtype=f32, last=False, training=True),
        "384 of 64x64, sum, many": group_norm(384, 64, samples=64, film=True, sums=True, training=True),
        "384 of 16x16, many": group_norm(384, 16, samples=256, film=True, training=True),
        # Of channels that fill a slab: AMD's program leaves out what is read for those that are none.
        "256 of 16x16, float32, many": group_norm(256, 16, samples=256, dtype=f32, last=False, training=True),
        "768 of 8x8, sum, many": group_norm(768, 8, samples=256, film=True, sums=True, training=True),
        "384 of 64x64, sum, dropout": group_norm(384, 64, film=True, sums=True, training=True, **drop),
        "384 of 16x16, sum": group_norm(384, 16, film=True, sums=True, training=True),
        "768 of 8x8, dropout": group_norm(768, 8, film=True, training=True, **counted),
        "768 of 8x8, float16": group_norm(768, 8, dtype=torch.float16, film=True),
        "192 of 64x64, float32": group_norm(192, 64, dtype=f32, last=False, film=True, training=True),
        "192 of 8x8, float32": group_norm(192, 8, dtype=f32, last=False, training=True, **drop),
        "one element": group_norm(1, 1, dtype=f32, groups=1, training=True),
    }
    return {
        **{f"group_norm_silu, {name}": Use(call, exponential=True) for name, call in calls.items()},
        # Slabs of 36 channels, 72 bytes of a pixel.
        "group_norm_silu, 576 of 16x16": Use(group_norm(576, 16, film=True), ("bf16",), exponential=True),
        "group_norm_silu, no SiLU": Use(group_norm(768, 8, silu=False)),
    }


def parameters(
    count: int = 1, dtype: torch.dtype = torch.float32, shift: int = 0, sizes: tuple[int, ...] = (64, 8192)
) -> list[list[Tensor]]:
    """So many lists of tensors of any values, of sizes that are multiples of 16; shift: elements off aligned memory."""
    return [[torch.empty(size + shift, dtype=dtype)[shift:] for size in sizes] for _ in range(count)]


def ema(k: int = 4, dtype: torch.dtype = torch.float32, copies: torch.dtype | None = None, shift: int = 0) -> Callable:
    """K averages of parameters of a dtype, and a copy."""
    return lambda: ops.ema_update_(
        *parameters(1, dtype, shift), parameters(k, shift=shift), torch.empty(k, dtype=torch.float64),
        copies=None if copies is None else parameters(1, copies, shift)[0],
    )  # fmt: skip


def step(op: Callable, k: int = 4, dtype: torch.dtype = torch.float32, shift: int = 0, **options: Any) -> Callable:
    """An optimizer's step with K averages. What is "on the device" becomes a scalar there, a dtype a copy."""

    def call() -> None:
        given = {name: torch.empty(()) if value == "on the device" else value
                 for name, value in options.items() if name != "copies"}  # fmt: skip
        copies = parameters(1, options["copies"], shift)[0] if "copies" in options else None
        rates = torch.empty(k, dtype=torch.float64)
        op(*parameters(4, dtype, shift), torch.empty(()), parameters(k, shift=shift), rates, copies=copies, **given)

    return call


def _of_parameters() -> dict[str, Use]:
    """Averages and optimizers."""
    f16, bf16 = torch.float16, torch.bfloat16
    everything = {"max_norm": 1.0, "copies": bf16, **dict.fromkeys(("lr", "grad_scale", "found_inf"), "on the device")}
    return {
        "ema_update_": Use(ema()),
        "ema_update_, copy": Use(ema(2, copies=bf16)),
        "ema_update_, bfloat16": Use(ema(1, bf16)),
        "ema_update_, misaligned": Use(ema(2, copies=bf16, shift=1), UNALIGNED),
        "radam_ema_": Use(step(ops.radam_ema_, lr=0.1)),
        "radam_ema_, everything": Use(step(ops.radam_ema_, weight_decay=0.1, **everything)),
        "radam_ema_, no averages": Use(step(ops.radam_ema_, 0, lr=0.1, maximize=True)),
        "radam_ema_, misaligned": Use(step(ops.radam_ema_, 1, shift=1, lr=0.1, max_norm=1.0), UNALIGNED),
        "adam_ema_": Use(step(ops.adam_ema_, lr=0.1)),
        "adam_ema_, everything": Use(
            step(ops.adam_ema_, decoupled_weight_decay=True, weight_decay=0.1, **{**everything, "copies": f16})
        ),
        "adam_ema_, bfloat16": Use(step(ops.adam_ema_, 1, bf16, lr=0.1)),
        "grad_norm": Use(lambda: ops.grad_norm(*parameters(sizes=(2**22, 2**20)))),
        "grad_norm, float16": Use(lambda: ops.grad_norm(*parameters(dtype=f16), grad_scale=torch.empty(()))),
    }


def _layer(
    channels: int,
    size: int,
    *,
    samples: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    last: bool = True,
    grads: tuple[bool, bool] = (True, False),
) -> Callable[[], Any]:
    """A layer of LPIPS, and the gradients of its maps that are asked for."""

    def call() -> None:
        maps = [batch((samples, channels, size, size), dtype, last).requires_grad_(need) for need in grads]
        distance = ops.lpips_layer(*maps, torch.empty(channels))
        leaves = [x for x in maps if x.requires_grad]
        if leaves:
            torch.autograd.grad(distance, leaves, torch.empty_like(distance))

    return call


def _trunk_input(
    shape: tuple[int, ...] = ImageNet64,
    size: int | None = 224,
    *,
    dtype: torch.dtype = torch.bfloat16,
    last: bool = True,
    image_last: bool = False,
    grad: bool = True,
) -> Callable[[], Any]:
    """What the trunk of LPIPS gets of float32 images, and their gradient."""

    def call() -> None:
        x = batch(shape, torch.float32, image_last).requires_grad_(grad)
        memory_format = torch.channels_last if last else torch.contiguous_format
        y = ops.lpips_input(
            x, torch.empty(3), torch.empty(3), size=size, dtype=dtype, memory_format=memory_format
        )
        if grad:
            torch.autograd.grad(y, x, torch.empty_like(y))

    return call


def _perceptual() -> dict[str, Use]:
    """LPIPS: VGG-16 in bfloat16, channels_last, and what else there is. Its input gathers, and writes in wide accesses:
    what it reads is exempt, in the forward pass the image, in the backward pass gradients too."""
    f32, f16, both, none = torch.float32, torch.float16, (True, True), (False, False)
    calls = {
        "lpips_layer, 64 of 224x224": _layer(64, 224, samples=64),
        "lpips_layer, 128 of 112x112": _layer(128, 112, grads=both),
        "lpips_layer, 256 of 56x56": _layer(256, 56, samples=64),
        "lpips_layer, 512 of 28x28, float16": _layer(512, 28, dtype=f16),
        "lpips_layer, 512 of 14x14": _layer(512, 14),
        "lpips_layer, 512 of 14x14, float32": _layer(512, 14, dtype=f32, grads=both),
        "lpips_layer, 64 of 224x224, contiguous": _layer(64, 224, last=False),
        "lpips_layer, 512 of 28x28, contiguous, float32": _layer(512, 28, dtype=f32, last=False),
        "lpips_layer, 512 of 28x28, contiguous": _layer(512, 28, last=False, grads=none),
        "lpips_layer, one element": _layer(1, 1, samples=1),
    }
    return {
        **{name: Use(call) for name, call in calls.items()},
        "lpips_layer, odd": Use(_layer(37, 28), ("bf16",)),
        "lpips_input": Use(_trunk_input(), ("f32", "bf16")),
        "lpips_input, forward": Use(_trunk_input(grad=False), ("f32",)),
        "lpips_input, float32, forward": Use(_trunk_input(dtype=f32, last=False, grad=False), ("f32",)),
        "lpips_input, own size": Use(_trunk_input(size=None, image_last=True), ("f32", "bf16")),
        "lpips_input, gray": Use(_trunk_input((4, 1, 28, 28)), ("f32", "bf16")),
        "lpips_input, one pixel": Use(_trunk_input((1, 1, 1, 1), 1), ("f32", "bf16")),
        "lpips_input, of one pixel": Use(_trunk_input((1, 3, 1, 1), 2, last=False), ("f32", "bf16")),
    }


def _listed() -> dict[str, Use]:
    """Every use by name."""
    f32, f16, last = torch.float32, torch.float16, torch.channels_last
    counter = {"seed": torch.tensor(7), "draw": torch.tensor(1)}
    init = {"shape": ImageNet64[1:], "dtype": torch.bfloat16}
    return {
        # What sampling launches.
        "init_noise": Use(of_case("init_noise")),
        "init_noise, drawn": Use(drawn(ops.init_noise, "noise", "sigma", **init)),
        "init_noise, drawn by tensors": Use(drawn(ops.init_noise, "noise", "sigma", **counter, **init)),
        "init_noise, drawn, channels_last": Use(
            drawn(ops.init_noise, "noise", "sigma", memory_format=last, **init), MIXED
        ),
        "scale_input": Use(of_case("scale_input", grads="x")),
        "scale_input, one level": Use(of_case("scale_input", per_row=False)),
        "scale_input, float32": Use(of_case("scale_input", model=f32)),
        "scale_input, channels_last": Use(of_case("scale_input", grads="x", memory_format=last), MIXED),
        "scale_input plain": Use(of_case("scale_input plain")),
        "denoise": Use(of_case("denoise", grads="f x")),
        "denoise, one level": Use(of_case("denoise", per_row=False)),
        "denoise, float32": Use(of_case("denoise", model=f32, grads="f")),
        "denoise, float16": Use(of_case("denoise", model=f16, grads="f")),
        "denoise, bfloat16 state": Use(of_case("denoise", state=torch.bfloat16)),
        "denoise clipped": Use(of_case("denoise clipped", grads="f x")),
        "denoise clipped, channels_last": Use(of_case("denoise clipped", model_last=True, grads="f x"), MIXED),
        "denoise, all channels_last": Use(of_case("denoise", state_last=True, model_last=True, grads="f")),
        "denoise plain": Use(of_case("denoise plain", grads="f")),
        "denoise_to_uint8, channels_last": Use(_pixels(last=True)),
        "denoise_to_uint8, one channel": Use(_pixels(shape=(4, 1, 64, 64))),
        "denoise_to_uint8": Use(_pixels(), MIXED),
        "denoise_to_uint8, nearest": Use(_pixels(rounding="nearest"), MIXED),
        "to_uint8": Use(lambda: ops.to_uint8(batch(ImageNet64, f32)), MIXED),
        "to_uint8, channels_last": Use(lambda: ops.to_uint8(batch(ImageNet64, f32, True), rounding="nearest")),
        "renoise": Use(of_case("renoise", grads="f x noise")),
        "renoise, float16": Use(of_case("renoise", model=f16)),
        "renoise clipped": Use(of_case("renoise clipped", grads="f x noise")),
        "renoise drawn": Use(of_case("renoise drawn", grads="f")),
        "renoise drawn, many": Use(of_case("renoise drawn", shape=Many)),
        "renoise drawn, float32": Use(of_case("renoise drawn", model=f32)),
        "renoise drawn, float32, many": Use(of_case("renoise drawn", model=f32, shape=Many)),
        "renoise drawn by tensors": Use(drawn(ops.renoise, "f", "x", "sigma", "next", "noise", clip=True, **counter)),
        "renoise drawn, channels_last": Use(
            drawn(ops.renoise, "f", "x", "sigma", "next", "noise", clip=True, model_last=True), MIXED
        ),
        "euler_step": Use(of_case("euler_step", grads="f x")),
        "euler_step, one level": Use(of_case("euler_step", per_row=False)),
        "euler_step clipped": Use(of_case("euler_step clipped", grads="f x")),
        "euler_step plain": Use(of_case("euler_step plain", grads="f")),
        "euler_step, channels_last": Use(of_case("euler_step", model_last=True, grads="f x"), MIXED),
        "heun_predictor": Use(of_case("heun_predictor", grads="f x")),
        "heun_corrector": Use(of_case("heun_corrector", grads="f f2 x")),
        "heun_corrector, float32": Use(of_case("heun_corrector", model=f32)),
        "heun_corrector, one level": Use(of_case("heun_corrector", per_row=False)),
        "heun_corrector clipped": Use(of_case("heun_corrector clipped", grads="f f2 x")),
        "heun_corrector clipped, channels_last": Use(
            of_case("heun_corrector clipped", model_last=True, grads="f f2 x"), MIXED
        ),
        "midpoint_corrector clipped": Use(of_case("midpoint_corrector clipped", grads="f f2 x")),
        "normal": Use(_normal()),
        "normal, bfloat16": Use(_normal(dtype=torch.bfloat16)),
        # What training launches.
        "add_noise": Use(of_case("add_noise", grads="x noise")),
        "add_noise, gradient of the state alone": Use(of_case("add_noise", grads="x", results=1)),
        "add_noise drawn": Use(of_case("add_noise drawn")),
        "add_noise_pair": Use(of_case("add_noise_pair", grads="x noise")),
        "add_noise_pair drawn": Use(of_case("add_noise_pair drawn")),
        "add_noise_pair drawn, float16": Use(of_case("add_noise_pair drawn", model=f16)),
        "draw_pair": Use(lambda: ops.draw_pair(batch(ImageNet64, f32), **_levels(), dtype=torch.bfloat16)),
        "draw_pair, float32": Use(lambda: ops.draw_pair(batch(ImageNet64, f32), **_levels())),
        "draw_pair by thresholds, channels_last": Use(
            lambda: ops.draw_pair(
                batch(ImageNet64, f32), **_levels(thresholds=torch.arange(8)), dtype=torch.bfloat16, memory_format=last
            ),
            MIXED,
        ),
        "draw_pair, one point": Use(lambda: ops.draw_pair(batch(ImageNet64, f32), **_levels(stride=2), pair=False)),
        "draw_pair lognormal, one point": Use(
            lambda: ops.draw_pair(batch(ImageNet64, f32), **_levels(ops.LogNormal()), pair=False), exponential=True
        ),
        "draw_pair lognormal, by tensors": Use(
            lambda: ops.draw_pair(
                batch(ImageNet64, f32), **_levels(ops.LogNormal(-1.1, 2.0, ops.Below(0.5)), **counter)
            ),
            exponential=True,
        ),
        "dropout": Use(lambda: _drop(batch((4, 384, 32, 32), torch.bfloat16))),
        "dropout, channels_last": Use(lambda: _drop(batch((4, 384, 32, 32), torch.bfloat16, True))),
        "dropout, float32, by tensors": Use(lambda: _drop(batch((4, 192, 64, 64), f32, True), **counter)),
        "weighted_loss l1": Use(of_case("weighted_loss l1", grads="x")),
        "weighted_loss l2": Use(of_case("weighted_loss l2", grads="x y")),
        "weighted_loss huber": Use(of_case("weighted_loss huber", grads="x")),
        "consistency_loss l2": Use(of_case("consistency_loss l2", grads="f")),
        "consistency_loss huber": Use(of_case("consistency_loss huber", grads="f")),
        "consistency_loss karras": Use(of_case("consistency_loss karras", grads="f")),
        "consistency_loss karras, float16": Use(of_case("consistency_loss karras", model=f16, grads="f")),
        "consistency_loss snr": Use(of_case("consistency_loss snr")),
        "consistency_loss snr+1": Use(of_case("consistency_loss snr+1")),
        "consistency_loss truncated-snr": Use(of_case("consistency_loss truncated-snr")),
        "consistency_loss uniform, all gradients": Use(of_case("consistency_loss uniform", grads="f x f2 x2")),
        "consistency_loss plain": Use(of_case("consistency_loss plain", grads="f f2")),
        "consistency_loss karras, channels_last": Use(
            of_case("consistency_loss karras", model_last=True, grads="f"), MIXED
        ),
        # Long samples: partial sums, folded by a second launch.
        "weighted_loss l2, long": Use(of_case("weighted_loss l2", shape=Long)),
        "consistency_loss huber, long": Use(of_case("consistency_loss huber", shape=Long, grads="f")),
        # Samples smaller than a program, and what does not lie well.
        "denoise, tiny": Use(of_case("denoise", shape=Tiny, grads="f")),
        "denoise, tiny and odd": Use(of_case("denoise", shape=(5, 3, 7, 3), grads="f")),
        "consistency_loss l2, tiny": Use(of_case("consistency_loss l2", shape=Tiny)),
        "denoise, odd": Use(of_case("denoise clipped", shape=Odd, grads="f x"), UNALIGNED),
        "renoise drawn, odd": Use(of_case("renoise drawn", shape=Odd, grads="f"), UNALIGNED),
        "heun_corrector, odd": Use(of_case("heun_corrector", shape=Odd), UNALIGNED),
        "consistency_loss karras, odd": Use(of_case("consistency_loss karras", shape=Odd, grads="f"), UNALIGNED),
        "normal, many": Use(_normal(Many)),
        "add_noise drawn, many": Use(of_case("add_noise drawn", shape=Many)),
        "add_noise_pair drawn, many": Use(of_case("add_noise_pair drawn", shape=Many)),
        "normal, odd": Use(_normal(Odd), UNALIGNED),
        "denoise, misaligned": Use(of_case("denoise", shift=1), UNALIGNED),
        **_normalised(),
        **_of_parameters(),
        **_perceptual(),
    }


USES = _listed()
