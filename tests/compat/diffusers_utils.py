"""UNet2DModels and pipelines of diffusers with random weights, for its tests."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

IMAGENET_64 = {
    "sample_size": 64,
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "block_out_channels": (192, 384, 576, 768),
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
LSUN_256 = {
    "sample_size": 256,
    "layers_per_block": 2,
    "num_class_embeds": None,
    "block_out_channels": (256, 256, 512, 512, 1024, 1024),
    "attention_head_dim": 64,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
    "resnet_time_scale_shift": "default",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "attention_head_dim": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attn_norm_num_groups": 32,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def small_unet(seed=0, **overrides):
    """A UNet2DModel of diffusers' own initialisation, with noise on every parameter: none is zero or one."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(**{**SMALL, **overrides}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def small_pipeline(*, scheduler=None, **overrides):
    """A ConsistencyModelPipeline without a progress bar."""
    pipeline = diffusers.ConsistencyModelPipeline(
        small_unet(**overrides), scheduler or diffusers.CMStochasticIterativeScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
