"""UNet2DModel of diffusers <-> `UNetModel`: the same network under other names, so weights convert without rounding.

Both have residual blocks with GroupNorm, SiLU and attention. Apart from names, diffusers keeps q, k and v in three
linear layers where ours has one 1-convolution (q k v, heads, d), and numbers blocks within levels where ours counts
through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmfast import unet_config
from cmfast.checkpoint import CheckpointError, meta_network
from cmfast.compat.diffusers.config import config_from_diffusers, config_to_diffusers
from cmfast.compat.diffusers.network import unet_class
from cmfast.fast.network import is_fast
from cmfast.fast.plan import Refused, check_parts
from cmfast.unet import UNetModel
from cmfast.watch import Watch

_RESBLOCK = {
    "in_layers.0": ("norm1",),
    "in_layers.2": ("conv1",),
    "emb_layers.1": ("time_emb_proj",),
    "out_layers.0": ("norm2",),
    "out_layers.3": ("conv2",),
    "skip_connection": ("conv_shortcut",),
}
_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}

#: Of diffusers' processors those that compute the same attention.
_PROCESSORS = ("AttnProcessor2_0", "AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")
#: What the settings of a part are, and those that are no part of the function.
_SETTING, _MODES = bool | int | float | str | tuple | None, ("training", "gradient_checkpointing")


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

    Tensors keep dtype, device and bits; all but the joined q, k and v share memory with `state`. config, image_size: as
    of `config_from_diffusers`.

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

    Tensors keep dtype, device and bits, and share memory with `state`. config: as of `config_to_diffusers`.

    Raises: CheckpointError (a ValueError): see `config_to_diffusers`; or weights that do not fit the configuration.
    """
    config_to_diffusers(config)
    expected = _shapes(meta_network(config).state_dict())
    difference = unet_config.disagreement(expected, _shapes(state))
    if difference:
        raise CheckpointError(f"the weights do not fit the configuration: {difference}")
    converted: dict[str, Tensor] = {}
    for name, names in _sources(config, expected).items():
        tensor = state[name].flatten(1) if _is_linear(names[0]) and state[name].ndim > 1 else state[name]
        converted.update(zip(names, tensor.chunk(len(names))))
    return converted


def unet_from_diffusers(unet: Any, *, image_size: int | None = None) -> UNetModel:
    """A `UNetModel` with the architecture and a copy of the weights of a UNet2DModel, on its device.

    image_size: as of `config_from_diffusers`.

    Raises: TypeError: `unet` is no UNet2DModel. CheckpointError (a ValueError): see `state_dict_from_diffusers`; or it
        computes something else than its configuration says, as with a hook or a part that was put in.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps
    if not isinstance(unet, unet_class()):
        raise TypeError(f"expected a UNet2DModel of diffusers, got a {type(unet).__name__}")
    state = state_dict_from_diffusers(unet.state_dict(), unet.config, image_size=image_size)
    if change := _change(unet):
        raise CheckpointError(f"this UNet2DModel is not what its configuration says, which is what converts: {change}")
    network: UNetModel = meta_network(config_from_diffusers(unet.config, image_size=image_size))
    network.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    network.train(unet.training)
    return network


def _change(unet: Any) -> str | None:
    """What a UNet2DModel has that one of its configuration has not; None if nothing."""
    kind = unet_class()
    if type(unet).forward is not kind.forward and not is_fast(unet):
        return f"the {type(unet).__name__} has a forward pass of its own"
    try:
        check_parts(unet)
    except Refused as refused:
        return str(refused)
    if (hooked := Watch(unet).hooked()) is not None:
        return hooked
    parts = dict(unet.named_modules(remove_duplicate=False))
    made = meta_network({"config": unet.config}, kind.from_config)
    for name, plain in made.named_modules(remove_duplicate=False):
        if name and (change := _changed_part(parts.get(name), plain)):
            return f"{name} {change}"
    return None


def _changed_part(part: nn.Module | None, plain: nn.Module) -> str | None:
    """How a part differs from that of a network as it is made: in class or settings."""
    if type(part) is not type(plain):
        return f"is a {type(part).__name__}, expected {type(plain).__name__}"
    for name, value in vars(plain).items():
        now = vars(part).get(name)
        if name == "processor":
            processor = type(now)
            if processor.__name__ not in _PROCESSORS or not processor.__module__.startswith("diffusers."):
                return f"has the processor {processor.__name__}, expected {type(value).__name__}"
        elif isinstance(value, _SETTING) and not name.startswith("_") and name not in _MODES and now != value:
            return f"has {name}={now!r:.80}, expected {value!r}"
    return None


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
