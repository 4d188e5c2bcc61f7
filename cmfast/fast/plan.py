"""What a U-Net is made of, as the fast forward pass walks through it: whose weights, in which order.

A plan holds modules, not tensors: a parameter that is replaced or loaded anew is the one that the next pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from cmfast import unet_blocks
from cmfast.dropout import Dropout
from cmfast.unet import UNetModel
from cmfast.watch import is_plain


class Refused(TypeError):
    """A network that the fast pass does not know; the message says which part."""


@dataclass(frozen=True)
class ResBlock:
    """GroupNorm, SiLU, (resampling,) convolution, the embedding, GroupNorm, SiLU, dropout, convolution; plus x."""

    in_norm: nn.GroupNorm
    in_conv: nn.Conv2d
    embed: nn.Linear
    scale_shift: bool
    out_norm: nn.GroupNorm
    dropout: nn.Dropout
    out_conv: nn.Conv2d
    skip: nn.Conv2d | None
    resample: str | None
    checkpoint: Callable[[], bool]


@dataclass(frozen=True)
class Attention:
    """q, k, v from one projection or from three, of [out, in] or [out, in, 1] or [out, in, 1, 1]."""

    norm: nn.GroupNorm | None
    qkv: tuple[nn.Module, ...]
    heads: int
    proj: nn.Module
    checkpoint: Callable[[], bool]


@dataclass(frozen=True)
class Resample:
    """`up` or `down` by two, and a convolution: after going up, or on the way down."""

    kind: str
    conv: nn.Conv2d | None


Layer = ResBlock | Attention | Resample
Layers = tuple[Layer, ...]


@dataclass(frozen=True)
class Plan:
    """The first convolution, blocks whose outputs are kept, the middle, blocks that take them back, the end."""

    first: nn.Conv2d
    encoder: tuple[Layers, ...]
    middle: Layers
    decoder: tuple[Layers, ...]
    out_norm: nn.GroupNorm
    out_conv: nn.Conv2d

    def layers(self) -> Iterator[Layer]:
        """All layers, in the order in which they run."""
        for block in (*self.encoder, self.middle, *self.decoder):
            yield from block

    def convolutions(self) -> Iterator[nn.Conv2d]:
        """Those of the residual blocks, which are most of the work."""
        for layer in self.layers():
            if isinstance(layer, ResBlock):
                yield from (layer.in_conv, layer.out_conv)


#: What the fast pass does in place of a part's class, or of what an attention of diffusers calls.
_METHODS = ("forward", "_forward", "__call__", "get_attention_scores")
#: Whose classes it knows.
_PACKAGES = ("torch", "cmfast", "diffusers")


def methods(model: nn.Module) -> dict[tuple[type, str], object]:
    """What the classes of a network's parts do, where the fast pass does it."""
    parts = {type(part) for module in model.modules() for part in (module, vars(module).get("processor"))}
    kinds = {kind for part in parts for kind in part.__mro__ if _package(kind.__module__) in _PACKAGES}
    return {(kind, name): vars(kind)[name] for kind in kinds for name in _METHODS if name in vars(kind)}


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_patch(function: Any) -> bool:
    """Whether it, or what it wraps, was written elsewhere than in these packages. `functools.wraps` copies a module's
    name, but not its globals."""
    while function is not None:
        if _package(getattr(function, "__globals__", {}).get("__name__", "")) not in _PACKAGES:
            return True
        function = vars(function).get("__wrapped__")
    return False


def check_parts(model: nn.Module) -> None:
    """Refused, if a part or its class was given a forward pass of its own, or a weight computes by rules of its own
    (quantised, sharded); hooks are looked for elsewhere."""
    for (kind, name), function in methods(model).items():
        if _is_patch(function):
            raise Refused(f"the class {kind.__name__} has a forward pass of its own: {name} was replaced")
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise Refused(f"{name or 'the network'} has a forward pass of its own")
    for name, parameter in model.named_parameters():
        if not is_plain(parameter):
            raise Refused(f"{name} is a {type(parameter).__name__}, expected a plain tensor")


def exact(module: object, kind: type | tuple[type, ...], where: str) -> Any:
    """The module, if its class is one of `kind` and no other: a subclass may compute something else."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(module) not in kinds:
        expected = " or ".join(k.__name__ for k in kinds)
        raise Refused(f"{where} is a {type(module).__name__}, expected {expected}")
    return module


def convolution(module: object, where: str, *, size: int, stride: int = 1) -> nn.Conv2d:
    """A plain 2-d convolution that keeps the resolution, or divides it by `stride`."""
    conv: nn.Conv2d = exact(module, nn.Conv2d, where)
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    expected = ((size, size), (stride, stride), (size // 2, size // 2), (1, 1), 1, "zeros")
    if settings != expected or conv.bias is None:
        raise Refused(f"{where} is {conv}, expected a {size}x{size} convolution of stride {stride} with a bias")
    return conv


def average_pool(module: object, where: str) -> None:
    """Refused, if it is not the mean of each 2x2 pixels."""
    pool: nn.AvgPool2d = exact(module, nn.AvgPool2d, where)
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override)
    if settings not in ((2, 2, 0, False, None), ((2, 2), (2, 2), 0, False, None)):
        raise Refused(f"{where} is {pool}, expected averages of 2x2 pixels")


def group_norm(module: object, where: str, kind: type = nn.GroupNorm) -> nn.GroupNorm:
    """A GroupNorm with weight and bias."""
    norm: nn.GroupNorm = exact(module, kind, where)
    if norm.weight is None or norm.bias is None:
        raise Refused(f"{where} has no weight and bias")
    return norm


def of_unet(model: UNetModel) -> Plan:
    """The plan of our U-Net. Raises: Refused: three or one dimensions, or a part that is not the original one."""
    if model.dims != 2:
        raise Refused(f"dims={model.dims}: the fast pass is for two dimensions")
    norm, act, last = _parts(model.out, "out", 3)
    exact(act, nn.SiLU, "out.1")
    first = _parts(model.input_blocks[0], "input_blocks.0", 1, unet_blocks.TimestepEmbedSequential)[0]
    return Plan(
        first=convolution(first, "input_blocks.0.0", size=3),
        encoder=tuple(_layers(block, f"input_blocks.{i}") for i, block in enumerate(model.input_blocks) if i),
        middle=_layers(model.middle_block, "middle_block"),
        decoder=tuple(_layers(block, f"output_blocks.{i}") for i, block in enumerate(model.output_blocks)),
        out_norm=group_norm(norm, "out.0", unet_blocks.GroupNorm32),
        out_conv=convolution(last, "out.2", size=3),
    )


def _parts(module: object, where: str, count: int | None, kind: type = nn.Sequential) -> list[nn.Module]:
    # Not `children()`, which leaves out a part that occurs again: it runs again, too.
    parts = list(exact(module, kind, where))
    if count is not None and len(parts) != count:
        raise Refused(f"{where} has {len(parts)} parts, expected {count}")
    return parts


_RESAMPLING = (unet_blocks.Upsample, unet_blocks.Downsample)


def _layers(block: object, where: str) -> Layers:
    parts = _parts(block, where, None, unet_blocks.TimestepEmbedSequential)
    return tuple(_layer(module, f"{where}.{i}") for i, module in enumerate(parts))


def _layer(module: nn.Module, where: str) -> Layer:
    kinds = (unet_blocks.ResBlock, unet_blocks.AttentionBlock, *_RESAMPLING)
    exact(module, kinds, where)
    if isinstance(module, unet_blocks.ResBlock):
        return _res_block(module, where)
    if isinstance(module, unet_blocks.AttentionBlock):
        return Attention(
            norm=group_norm(module.norm, f"{where}.norm", unet_blocks.GroupNorm32),
            qkv=(convolution(module.qkv, f"{where}.qkv", size=1),),
            heads=module.num_heads,
            proj=convolution(module.proj_out, f"{where}.proj_out", size=1),
            checkpoint=lambda: module.use_checkpoint,
        )
    return _resample(module, where)


def _resample(module: nn.Module, where: str) -> Resample:
    exact(module, _RESAMPLING, where)
    if isinstance(module, unet_blocks.Upsample):
        if module.scale_factor != 2:
            raise Refused(f"{where} has scale_factor={module.scale_factor}, expected 2")
        conv = convolution(module.conv, f"{where}.conv", size=3) if module.use_conv else None
        return Resample("up", conv)
    if isinstance(module.op, nn.AvgPool2d):
        average_pool(module.op, f"{where}.op")
        return Resample("down", None)
    return Resample("down", convolution(module.op, f"{where}.op", size=3, stride=2))


def _resampled(block: unet_blocks.ResBlock, where: str) -> str | None:
    """How a block resamples h and x, which is the same for both."""
    if not block.updown:
        return None
    h, x = (_resample(getattr(block, name), f"{where}.{name}") for name in ("h_upd", "x_upd"))
    if h != x or h.conv is not None:
        raise Refused(f"{where}.h_upd and x_upd differ, or have a convolution")
    return h.kind


def _res_block(module: unet_blocks.ResBlock, where: str) -> ResBlock:
    in_norm, in_act, in_conv = _parts(module.in_layers, f"{where}.in_layers", 3)
    embed_act, embed = _parts(module.emb_layers, f"{where}.emb_layers", 2)
    out_norm, out_act, dropout, out_conv = _parts(module.out_layers, f"{where}.out_layers", 4)
    for act in (in_act, embed_act, out_act):
        exact(act, nn.SiLU, f"an activation of {where}")
    skip = module.skip_connection
    return ResBlock(
        in_norm=group_norm(in_norm, f"{where}.in_layers.0", unet_blocks.GroupNorm32),
        in_conv=convolution(in_conv, f"{where}.in_layers.2", size=3),
        embed=exact(embed, nn.Linear, f"{where}.emb_layers.1"),
        scale_shift=module.use_scale_shift_norm,
        out_norm=group_norm(out_norm, f"{where}.out_layers.0", unet_blocks.GroupNorm32),
        dropout=exact(dropout, (nn.Dropout, Dropout), f"{where}.out_layers.2"),
        out_conv=convolution(out_conv, f"{where}.out_layers.3", size=3),
        skip=None if type(skip) is nn.Identity else convolution(skip, f"{where}.skip_connection", size=1),
        resample=_resampled(module, where),
        checkpoint=lambda: module.use_checkpoint,
    )
