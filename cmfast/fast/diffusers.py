"""The plan of a `diffusers.UNet2DModel`, and that network with the fast forward pass. diffusers is not imported here:
whoever has such a model has imported it."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from cmfast.fast.network import fast_form, without_parts
from cmfast.fast.plan import (
    Attention,
    Layer,
    Layers,
    Plan,
    Refused,
    Resample,
    ResBlock,
    average_pool,
    convolution,
    exact,
    group_norm,
)

#: Block classes whose parts are residual blocks, attention and resampling, as ours are.
_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def unet2d_class() -> Any:
    """diffusers' class, if anybody has imported it."""
    diffusers = sys.modules.get("diffusers")
    return None if diffusers is None else diffusers.UNet2DModel


def is_unet2d(model: object) -> bool:
    """Whether it is a `UNet2DModel`, or of a subclass."""
    kind = unet2d_class()
    return kind is not None and isinstance(model, kind)


def _named(module: object, names: str | tuple[str, ...], where: str) -> Any:
    """The module, if it is one of diffusers' classes of these names."""
    names = (names,) if isinstance(names, str) else names
    kind = type(module)
    # The module's attribute, not the class's: Dynamo follows that of every class.
    if kind.__name__ not in names or not module.__module__.startswith("diffusers."):
        raise Refused(f"{where} is a {kind.__name__}, expected {' or '.join(names)}")
    return module


def of_unet2d(model: Any) -> Plan:
    """The plan of a UNet2DModel. Raises: Refused: it has blocks or options that the fast pass does not know."""
    if model.config.center_input_sample:
        raise Refused("center_input_sample is set")
    if model.config.time_embedding_type != "positional":
        raise Refused(f"time_embedding_type is {model.config.time_embedding_type!r}, expected 'positional'")
    exact(model.conv_act, nn.SiLU, "conv_act")
    embedding = _named(model.time_embedding, "TimestepEmbedding", "time_embedding")
    for name in ("linear_1", "linear_2"):
        exact(getattr(embedding, name), nn.Linear, f"time_embedding.{name}")
    encoder: list[Layers] = []
    for i, block in enumerate(model.down_blocks):
        where = f"down_blocks.{i}"
        encoder += _down(_named(block, _DOWN, where), where)
    middle: Layers = ()
    if model.mid_block is not None:
        middle = tuple(_middle(_named(model.mid_block, "UNetMidBlock2D", "mid_block")))
    decoder: list[Layers] = []
    for i, block in enumerate(model.up_blocks):
        where = f"up_blocks.{i}"
        decoder += _up(_named(block, _UP, where), where)
    return Plan(
        first=convolution(model.conv_in, "conv_in", size=3),
        encoder=tuple(encoder),
        middle=middle,
        decoder=tuple(decoder),
        out_norm=group_norm(model.conv_norm_out, "conv_norm_out"),
        out_conv=convolution(model.conv_out, "conv_out", size=3),
    )


def _down(block: Any, where: str) -> list[Layers]:
    layers = _residual(block, where)
    for sampler in block.downsamplers or ():
        layers.append((_sampler(sampler, block, f"{where}.downsamplers.0", "down"),))
    return layers


def _up(block: Any, where: str) -> list[Layers]:
    layers = _residual(block, where)
    for sampler in block.upsamplers or ():
        layers[-1] = (*layers[-1], _sampler(sampler, block, f"{where}.upsamplers.0", "up"))
    return layers


def _residual(block: Any, where: str) -> list[Layers]:
    """Each residual block with the attention that follows it, if any does."""
    layers: list[Layers] = []
    for i, resnet in enumerate(block.resnets):
        layer: Layers = (_res_block(resnet, block, f"{where}.resnets.{i}"),)
        if hasattr(block, "attentions"):
            layer = (*layer, _attention(block.attentions[i], block, f"{where}.attentions.{i}"))
        layers.append(layer)
    return layers


def _middle(block: Any) -> list[Layer]:
    first, *rest = (_res_block(r, block, f"mid_block.resnets.{i}") for i, r in enumerate(block.resnets))
    layers: list[Layer] = [first]
    for i, (resnet, attention) in enumerate(zip(rest, block.attentions, strict=True)):
        if attention is not None:
            layers.append(_attention(attention, block, f"mid_block.attentions.{i}"))
        layers.append(resnet)
    return layers


def _sampler(module: Any, block: Any, where: str, kind: str) -> Layer:
    if type(module).__name__ == "ResnetBlock2D":
        return _res_block(module, block, where)
    return _resample(module, where, kind)


def _resample(module: Any, where: str, kind: str) -> Resample:
    if module is None:
        raise Refused(f"{where} is missing")
    if kind == "up":
        _named(module, "Upsample2D", where)
        if module.use_conv_transpose or not module.interpolate or module.norm is not None:
            raise Refused(f"{where} is not nearest-neighbour interpolation")
        conv = module.conv if module.name == "conv" else module.Conv2d_0
        return Resample("up", convolution(conv, f"{where}.conv", size=3) if module.use_conv else None)
    _named(module, "Downsample2D", where)
    if module.norm is not None:
        raise Refused(f"{where} has a norm")
    if not module.use_conv:
        average_pool(module.conv, f"{where}.conv")
        return Resample("down", None)
    if module.padding != 1:
        raise Refused(f"{where} has padding={module.padding}, expected 1")
    return Resample("down", convolution(module.conv, f"{where}.conv", size=3, stride=2))


def _res_block(module: Any, block: Any, where: str) -> ResBlock:
    _named(module, "ResnetBlock2D", where)
    if module.output_scale_factor != 1:
        raise Refused(f"{where} has output_scale_factor={module.output_scale_factor}, expected 1")
    if module.skip_time_act or module.time_emb_proj is None:
        raise Refused(f"{where} has no projection of the time embedding after a SiLU")
    if module.time_embedding_norm not in ("default", "scale_shift"):
        norm = module.time_embedding_norm
        raise Refused(f"{where} has time_embedding_norm={norm!r}, expected 'default' or 'scale_shift'")
    exact(module.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    resample = None
    for kind in ("up", "down"):
        sampler = getattr(module, f"{kind}sample")
        if sampler is not None:
            if _resample(sampler, f"{where}.{kind}sample", kind).conv is not None:
                raise Refused(f"{where}.{kind}sample has a convolution")
            resample = kind
    skip = module.conv_shortcut
    return ResBlock(
        in_norm=group_norm(module.norm1, f"{where}.norm1"),
        in_conv=convolution(module.conv1, f"{where}.conv1", size=3),
        embed=exact(module.time_emb_proj, nn.Linear, f"{where}.time_emb_proj"),
        scale_shift=module.time_embedding_norm == "scale_shift",
        out_norm=group_norm(module.norm2, f"{where}.norm2"),
        dropout=exact(module.dropout, nn.Dropout, f"{where}.dropout"),
        out_conv=convolution(module.conv2, f"{where}.conv2", size=3),
        skip=None if skip is None else convolution(skip, f"{where}.conv_shortcut", size=1),
        resample=resample,
        checkpoint=lambda: getattr(block, "gradient_checkpointing", False),
    )


def _attention(module: Any, block: Any, where: str) -> Attention:
    _named(module, "Attention", where)
    # Not AttnProcessor, which whoever takes the gradient of a gradient chooses: this one's has none.
    _named(module.processor, "AttnProcessor2_0", f"{where}.processor")
    plain = module.spatial_norm is None and module.norm_q is None and module.norm_k is None
    if not plain or not module.residual_connection or module.rescale_output_factor != 1:
        raise Refused(f"{where} is not self-attention with one residual connection")
    projections = [exact(getattr(module, name), nn.Linear, f"{where}.{name}") for name in ("to_q", "to_k", "to_v")]
    head = projections[0].out_features // module.heads
    dropout = exact(module.to_out[1], nn.Dropout, f"{where}.to_out.1")
    if abs(module.scale * head**0.5 - 1) > 1e-6 or dropout.p > 0:
        raise Refused(f"{where} has another scale than 1 / sqrt(its heads' size), or dropout")
    proj = exact(module.to_out[0], nn.Linear, f"{where}.to_out.0")
    if any(p.bias is None for p in (*projections, proj)):
        raise Refused(f"{where} has projections without a bias")
    return Attention(
        norm=None if module.group_norm is None else group_norm(module.group_norm, f"{where}.group_norm"),
        qkv=tuple(projections),
        heads=module.heads,
        proj=proj,
        checkpoint=lambda: False,
    )


def fast_unet2d(model: Any, dtype: torch.dtype | None, pack: bool = True) -> Any:
    """The fast form of a UNet2DModel, sharing everything with it."""
    return fast_form(model, _fast_class, of_unet2d, dtype, pack)


@functools.cache
def _fast_class(base: Any) -> Any:
    """A subclass of UNet2DModel with the fast pass. It keeps the base's name and module: configurations are saved under
    the one, and pipelines under both."""

    class Fast(base):  # type: ignore[misc]  # known at run time
        def forward(
            self,
            sample: Tensor,
            timestep: Tensor | float | int,
            class_labels: Tensor | None = None,
            return_dict: bool = True,
        ) -> Any:
            fast = getattr(self, "_fast", None)  # one that `from_config` made of this class is without
            plan = None if fast is None else fast.plan(self, sample)
            if plan is None:
                return super().forward(sample, timestep, class_labels, return_dict)
            result = self._fast.run(plan, sample, lambda: _embed(self, sample, timestep, class_labels))
            if not return_dict:
                return (result,)
            from diffusers.models.unets.unet_2d import UNet2DOutput

            return UNet2DOutput(sample=result)

        forward.__doc__ = base.forward.__doc__

        def __reduce__(self) -> Any:
            # By name pickle would find diffusers' class.
            return without_parts, (_fast_class, base), self.__dict__

        derives_weights = True

        def refresh(self, force: bool = False) -> bool:
            """As `cmfast.fast.FastUNet.refresh`."""
            return bool(self._fast.refresh(force))

        @property
        def input_dtype(self) -> torch.dtype:
            """As `cmfast.fast.FastUNet.input_dtype`."""
            return self._fast.dtype or self.dtype

        input_format = torch.channels_last

        @property
        def faster_uncompiled(self) -> bool:
            """As `cmfast.fast.FastUNet.faster_uncompiled`."""
            return bool(self._fast.faster_uncompiled)

        @property
        def refusal(self) -> str | None:
            """As `cmfast.fast.FastUNet.refusal`."""
            return self._fast.refusal

    Fast.__name__ = Fast.__qualname__ = base.__name__
    Fast.__module__ = base.__module__
    return Fast


def _embed(model: Any, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None) -> Tensor:
    """The embedding of timesteps (a number, [1] or [B]) and labels, [B, E]."""
    if not sample.is_floating_point():
        raise TypeError(f"sample has dtype {sample.dtype}: expected a floating-point dtype")
    if not isinstance(timestep, Tensor):
        timestep = torch.full((1,), int(timestep), device=sample.device)  # cut off, as diffusers does
    timesteps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
    dtype = model.time_embedding.linear_1.weight.dtype
    emb: Tensor = model.time_embedding(model.time_proj(timesteps).to(dtype))
    if model.class_embedding is None:
        if class_labels is not None:
            raise ValueError("class_labels were given to a model without class embedding: leave them out")
        return emb
    if class_labels is None:
        raise ValueError("class_labels are missing and the model is class-conditional")
    if model.config.class_embed_type == "timestep":
        class_labels = model.time_proj(class_labels).to(dtype)
    emb = emb + model.class_embedding(class_labels).to(dtype)
    return emb
