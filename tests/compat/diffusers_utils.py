"""UNet2DModels and pipelines of diffusers with random weights, for its tests."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from cmfast.compat.diffusers import accelerate  # noqa: E402

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


STEPS = {
    "one": {},
    "two": {"num_inference_steps": 2},
    "[22, 0]": {"num_inference_steps": None, "timesteps": [22, 0]},
    "[30, 12, 5]": {"num_inference_steps": None, "timesteps": [30, 12, 5]},
}


@pytest.fixture(autouse=True)
def errors_at_most():
    """diffusers warns of what is in order here, such as timesteps beside its default number of steps."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)


def call(pipeline, *args, seed=0, **options):
    """The images, and the states of both generators after: noise of the given one, labels of torch's own."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    images = pipeline(*args, generator=generator, **options).images
    return images, generator.get_state(), torch.get_rng_state()


def both(plain, *args, **options):
    """Images of diffusers' pipeline and of the accelerated one; what was drawn is the same."""
    expected, *states = call(plain, *args, **options)
    found, *our_states = call(accelerate(plain), *args, **options)
    assert all(torch.equal(a, b) for a, b in zip(states, our_states, strict=True))
    return expected, found
