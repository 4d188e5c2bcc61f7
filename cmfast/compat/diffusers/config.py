"""Configurations of diffusers' UNet2DModel <-> arguments of `UNetModel`; what the other lacks is refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from cmfast.checkpoint import CheckpointError
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
# Block type -> how it resamples; None: as downsample_type and upsample_type say.
_DOWN_BLOCKS = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "AttnDownBlock2D": None}
_UP_BLOCKS = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet", "AttnUpBlock2D": None}


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
    return int(sizes.pop())


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
        return int(arguments["num_head_channels"])
    heads, heads_up = arguments["num_heads"], arguments["num_heads_upsample"]
    heads_up = heads if heads_up == -1 else heads_up
    attended = [width for width, attends in zip(widths, attention) if attends]
    if {heads, *([heads_up] if attended else [])} == {1}:
        return None
    dims = {width // heads for width in [*attended, widths[-1]]} | {width // heads_up for width in attended}
    if len(dims) == 1:
        return int(dims.pop())
    raise _refuse("num_heads", heads, "heads of one width in all attention layers, as with num_head_channels")
