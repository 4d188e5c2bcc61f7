"""UNet2DModel of diffusers <-> `UNetModel`: the same network under other names, so weights convert without rounding.

Both have residual blocks with GroupNorm, SiLU and attention. Apart from names, diffusers keeps q, k and v in three
linear layers where ours has one 1-convolution (q k v, heads, d), and numbers blocks within levels where ours counts
through. Options of one that the other lacks are refused by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cmfast import unet_config
from cmfast.checkpoint import CheckpointError, meta_network
from cmfast.compat.diffusers.network import unet_class
from cmfast.unet import UNetModel

# UNet2DModel's arguments that must have one of these values, the first of which is its default.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# The others, with their defaults: older versions wrote configurations without some of them.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Block type without its direction -> how it resamples; None: as downsample_type and upsample_type say.
_DOWN_BLOCKS = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "AttnDownBlock2D": None}
_UP_BLOCKS = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet", "AttnUpBlock2D": None}

_RESBLOCK = {
    "in_layers.0": ("norm1",),
    "in_layers.2": ("conv1",),
    "emb_layers.1": ("time_emb_proj",),
    "out_layers.0": ("norm2",),
    "out_layers.3": ("conv2",),
    "skip_connection": ("conv_shortcut",),
}
_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}


def _refuse(key: str, came: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{key}={came!r} has no counterpart in the other network: expected {expected}")


def config_from_diffusers(config: Mapping[str, Any], *, image_size: int | None = None) -> dict[str, Any]:
    """The arguments of `UNetModel` for a configuration of UNet2DModel.

    Args: config: `unet.config`, or what its config.json holds; image_size: where `sample_size` does not say it.
    Raises: CheckpointError (a ValueError): it asks for what our U-Net cannot do; the message names key and value.

    >>> config = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16,
    ...     down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
    ...     up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet")
    >>> ours = config_from_diffusers(config)
    >>> ours["channel_mult"], ours["attention_resolutions"], ours["num_head_channels"]
    ([1, 2], [2], 16)
    """
    for key, value in config.items():
        if key not in _REQUIRED and key not in _DEFAULTS and not key.startswith("_") and value:
            raise _refuse(key, value, "it to be left out: the option is not known here")
    for key, accepted in _REQUIRED.items():
        value = config.get(key, accepted[0])
        if value not in accepted:
            raise _refuse(key, value, " or ".join(map(repr, accepted)))
    arguments = {**_DEFAULTS, **config}
    widths = list(arguments["block_out_channels"])
    attention, resampling = _blocks(arguments, len(widths))

    scale_shift = arguments.get("resnet_time_scale_shift") == "scale_shift"
    # Without a number of groups, scale_shift leaves out the normalisation of the middle attention.
    if arguments["attn_norm_num_groups"] not in ((32,) if scale_shift else (None, 32)):
        with_it = " with resnet_time_scale_shift='scale_shift'" if scale_shift else ""
        raise _refuse("attn_norm_num_groups", arguments["attn_norm_num_groups"], f"32{with_it}")
    if arguments["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise _refuse("time_embedding_dim", arguments["time_embedding_dim"], f"None or {4 * widths[0]}")
    if resampling == "conv" and len(widths) > 1 and arguments["downsample_padding"] != 1:
        raise _refuse("downsample_padding", arguments["downsample_padding"], "1")
    head = arguments["attention_head_dim"]
    for width in [width for width, attends in zip(widths, attention) if attends] + widths[-1:]:
        if head is not None and width % head:
            raise _refuse("attention_head_dim", head, f"None or a divisor of the {width} channels it is applied to")
    return {
        "image_size": _image_size(arguments["sample_size"], image_size),
        "in_channels": arguments["in_channels"],
        "model_channels": widths[0],
        "out_channels": arguments["out_channels"],
        "num_res_blocks": arguments["layers_per_block"],
        "attention_resolutions": [2**level for level, attends in enumerate(attention) if attends],
        "dropout": arguments["dropout"],
        "channel_mult": [_multiple(width, widths[0]) for width in widths],
        "num_classes": arguments["num_class_embeds"],
        "num_heads": 1,
        "num_head_channels": -1 if head is None else head,
        "use_scale_shift_norm": scale_shift,
        "resblock_updown": resampling == "resnet",
    }


def _blocks(arguments: Mapping[str, Any], levels: int) -> tuple[list[bool], str]:
    """Which levels have attention, and how all levels are resampled: "conv" or "resnet"."""
    down, up = ([name.removeprefix("UNetRes") for name in arguments[f"{way}_block_types"]] for way in ("down", "up"))
    resamplers: list[tuple[str, str]] = []  # how, and the key that says so
    for way, names, known in (("down", down, _DOWN_BLOCKS), ("up", up, _UP_BLOCKS)):
        key, type_key = f"{way}_block_types", f"{way}sample_type"
        if len(names) != levels:
            raise _refuse(key, tuple(arguments[key]), f"{levels} blocks, as many as block_out_channels")
        for i, name in enumerate(names):
            if name not in known:
                raise _refuse(key, name, " or ".join(known))
            # The last block of each way is not resampled; where it is the only one, its type tells what to call it.
            if i + 1 < levels or levels == 1:
                resamplers.append((known[name] or arguments[type_key], key if known[name] else type_key))
    kind, first_key = resamplers[0]
    for other, key in resamplers:
        if other not in ("conv", "resnet"):
            raise _refuse(key, other, "'conv' or 'resnet'")
        if other != kind:
            raise _refuse(key, arguments[key], f"resampling by {kind!r} everywhere, as {first_key} has it")
    attention = [_DOWN_BLOCKS[name] is None for name in down]
    if attention != [_UP_BLOCKS[name] is None for name in up[::-1]]:
        mirrored = f"attention at the levels of down_block_types {tuple(down)}, in reverse"
        raise _refuse("up_block_types", tuple(arguments["up_block_types"]), mirrored)
    return attention, kind


def _image_size(sample_size: Any, image_size: int | None) -> int:
    if image_size is not None:
        return image_size
    sizes = {*sample_size} if isinstance(sample_size, list | tuple) else {sample_size}
    if len(sizes) > 1 or None in sizes:
        raise _refuse("sample_size", sample_size, "the size of a square, or image_size= to be given")
    return sizes.pop()


def _multiple(width: int, base: int) -> float:
    """m with int(m * base) == width, an integer where there is one."""
    if width % base == 0:
        return width // base
    multiple = width / base
    return multiple if int(multiple * base) == width else math.nextafter(multiple, math.inf)


def config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of UNet2DModel for those of a `UNetModel`, such as its `config`.

    Raises: CheckpointError (a ValueError): it asks for what UNet2DModel cannot do; the message names key and value.
    """
    defaults = {p.name: p.default for p in inspect.signature(UNetModel).parameters.values()}
    arguments = {**defaults, **config}
    base, mults = arguments["model_channels"], list(arguments["channel_mult"])
    widths = [int(mult * base) for mult in mults]
    attention = [2**level in arguments["attention_resolutions"] for level in range(len(widths))]
    if arguments["dims"] != 2:
        raise _refuse("dims", arguments["dims"], "2")
    if widths[0] != base:
        raise _refuse("channel_mult", mults, "1 as the first of them")
    in_resblocks = arguments["resblock_updown"]
    if not in_resblocks and not arguments["conv_resample"] and len(widths) > 1:
        raise _refuse("conv_resample", False, "True, or resblock_updown=True")

    kind = "resnet" if in_resblocks else "conv"
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if in_resblocks else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "sample_size": arguments["image_size"],
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "down_block_types": tuple("AttnDownBlock2D" if attends else plain_down for attends in attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else plain_up for attends in attention[::-1]),
        "block_out_channels": tuple(widths),
        "layers_per_block": arguments["num_res_blocks"],
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": arguments["dropout"],
        "attention_head_dim": _head_dim(arguments, widths, attention),
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if arguments["use_scale_shift_norm"] else "default",
        "num_class_embeds": arguments["num_classes"],
    }


def _head_dim(arguments: Mapping[str, Any], widths: list[int], attention: list[bool]) -> int | None:
    """The one width of all attention heads; None: one head per layer, however wide."""
    if arguments["num_head_channels"] != -1:
        return arguments["num_head_channels"]
    heads, heads_up = arguments["num_heads"], arguments["num_heads_upsample"]
    heads_up = heads if heads_up == -1 else heads_up
    attended = [width for width, attends in zip(widths, attention) if attends]
    if {heads, *([heads_up] if attended else [])} == {1}:
        return None
    dims = {width // heads for width in [*attended, widths[-1]]} | {width // heads_up for width in attended}
    if len(dims) == 1:
        return dims.pop()
    raise _refuse("num_heads", heads, "heads of one width in all attention layers, as with num_head_channels")


def _counterparts(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our layer's name -> the name of diffusers' layer, or of three for q, k and v."""

    def block(ours: str, theirs: str, layers: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, others in layers.items():
            yield f"{ours}.{name}", tuple(f"{theirs}.{other}" for other in others)

    levels, layers = len(config["channel_mult"]), config["num_res_blocks"]
    in_resblocks = config.get("resblock_updown", False)
    yield "time_embed.0", ("time_embedding.linear_1",)
    yield "time_embed.2", ("time_embedding.linear_2",)
    yield "label_emb", ("class_embedding",)
    yield "input_blocks.0.0", ("conv_in",)
    index = 1
    for level in range(levels):
        for i in range(layers):
            yield from block(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{i}", _RESBLOCK)
            yield from block(f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{i}", _ATTENTION)
            index += 1
        if level + 1 < levels:
            resampler = _RESBLOCK if in_resblocks else {"op": ("conv",)}
            yield from block(f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0", resampler)
            index += 1
    yield from block("middle_block.0", "mid_block.resnets.0", _RESBLOCK)
    yield from block("middle_block.1", "mid_block.attentions.0", _ATTENTION)
    yield from block("middle_block.2", "mid_block.resnets.1", _RESBLOCK)
    index = 0
    for up in range(levels):
        level = levels - 1 - up
        attends = 2**level in config["attention_resolutions"]
        for i in range(layers + 1):
            yield from block(f"output_blocks.{index}.0", f"up_blocks.{up}.resnets.{i}", _RESBLOCK)
            if attends:
                yield from block(f"output_blocks.{index}.1", f"up_blocks.{up}.attentions.{i}", _ATTENTION)
            if level > 0 and i == layers:
                resampler = _RESBLOCK if in_resblocks else {"conv": ("conv",)}
                ours = f"output_blocks.{index}.{1 + attends}"
                yield from block(ours, f"up_blocks.{up}.upsamplers.0", resampler)
            index += 1
    yield "out.0", ("conv_norm_out",)
    yield "out.2", ("conv_out",)


def _sources(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Each of our tensors' names -> the names of the tensors of diffusers that it is made of."""
    layers = dict(_counterparts(config))
    split = {name: name.rpartition(".") for name in names}
    return {name: tuple(f"{other}.{leaf}" for other in layers[layer]) for name, (layer, _, leaf) in split.items()}


def _is_linear(theirs: str) -> bool:
    """Whether a tensor of diffusers is of a linear layer in attention, which is a 1-convolution here."""
    return ".to_" in theirs


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def state_dict_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], *, image_size: int | None = None
) -> dict[str, Tensor]:
    """The state dict of a `UNetModel` from that of a UNet2DModel and its configuration.

    Tensors keep dtype, device and bits; all but the joined q, k and v share memory with `state`.

    Raises: CheckpointError (a ValueError): see `config_from_diffusers`; or a tensor is missing, left over, or of
        another shape.
    """
    ours = config_from_diffusers(config, image_size=image_size)
    expected = _shapes(meta_network(ours).state_dict())
    sources = _sources(ours, expected)
    wanted = {theirs for names in sources.values() for theirs in names}
    for kind, odd in (("missing", wanted - state.keys()), ("not expected", state.keys() - wanted)):
        if odd:
            some = ", ".join(sorted(odd)[:3]) + (", ..." if len(odd) > 3 else "")
            raise CheckpointError(f"these are not the weights of that UNet2DModel: {len(odd)} tensors {kind} ({some})")

    converted = {}
    for name, names in sources.items():
        tensor = state[names[0]] if len(names) == 1 else torch.cat([state[theirs] for theirs in names])
        converted[name] = tensor[:, :, None, None] if _is_linear(names[0]) and tensor.ndim == 2 else tensor
    difference = unet_config.disagreement(expected, _shapes(converted))
    if difference:
        raise CheckpointError(f"the weights do not fit the configuration: {difference}")
    return converted


def state_dict_to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a UNet2DModel from that of a `UNetModel` and its configuration.

    Tensors keep dtype, device and bits, and share memory with `state`.

    Raises: CheckpointError (a ValueError): see `config_to_diffusers`; or weights that do not fit the configuration.
    """
    config_to_diffusers(config)
    expected = _shapes(meta_network(config).state_dict())
    difference = unet_config.disagreement(expected, _shapes(state))
    if difference:
        raise CheckpointError(f"the weights do not fit the configuration: {difference}")
    converted = {}
    for name, names in _sources(config, expected).items():
        tensor = state[name].flatten(1) if _is_linear(names[0]) and state[name].ndim > 1 else state[name]
        converted.update(zip(names, tensor.chunk(len(names))))
    return converted


def unet_from_diffusers(unet: Any, *, image_size: int | None = None) -> UNetModel:
    """A `UNetModel` with the architecture and a copy of the weights of a UNet2DModel, on its device.

    Raises: TypeError: `unet` is no UNet2DModel. CheckpointError (a ValueError): see `state_dict_from_diffusers`.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps
    if not isinstance(unet, unet_class()):
        raise TypeError(f"expected a UNet2DModel of diffusers, got a {type(unet).__name__}")
    state = state_dict_from_diffusers(unet.state_dict(), unet.config, image_size=image_size)
    network = meta_network(config_from_diffusers(unet.config, image_size=image_size))
    network.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return network.train(unet.training)


def unet_to_diffusers(network: UNetModel, *, dtype: torch.dtype | None = None) -> Any:
    """A UNet2DModel with the architecture and a copy of the weights of a `UNetModel`, on its device.

    Args: dtype: of its parameters. A network whose torso is 16-bit has two dtypes, a UNet2DModel one: say which.
    Raises: TypeError: `network` is no UNetModel. CheckpointError (a ValueError): see `state_dict_to_diffusers`; or
        parameters of several dtypes and no `dtype`.
    """
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, UNetModel):
        raise TypeError(f"expected a UNetModel, got a {type(network).__name__}")
    state = state_dict_to_diffusers(network.state_dict(), network.config)
    dtypes = {tensor.dtype for tensor in state.values()}
    if dtype is None and len(dtypes) > 1:
        several = " and ".join(sorted(map(str, dtypes)))
        raise CheckpointError(f"the parameters are in {several}: say dtype=, one for all")
    unet = meta_network(config_to_diffusers(network.config), unet_class())
    copies = {name: tensor.to(dtype or tensor.dtype, copy=True).contiguous() for name, tensor in state.items()}
    unet.load_state_dict(copies, assign=True)
    return unet.train(network.training)
