"""`cm.unet`: the network of the published checkpoints, its blocks, and what the original has in this module too."""

from cmfast.compat.openai.fp16_util import convert_module_to_f16, convert_module_to_f32
from cmfast.compat.openai.nn import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)
from cmfast.unet import UNetModel
from cmfast.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)

__all__ = [
    "AttentionBlock",
    "Downsample",
    "ResBlock",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "convert_module_to_f16",
    "convert_module_to_f32",
    "linear",
    "normalization",
    "timestep_embedding",
    "zero_module",
]
