"""The networks that are measured: the published architectures and a small one, with weights that show every error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cmfast import Denoiser, UNetModel, recipes
from cmfast.checkpoint import meta_network
from cmfast.unet_config import PUBLISHED

#: Arguments of `UNetModel` by the name that `--network` takes. `tiny` has every kind of block of the published ones;
#: `unet32` is for small images, 6.9 million parameters.
NETWORKS: dict[str, dict[str, Any]] = {
    "imagenet64": {**PUBLISHED["ImageNet-64"][0], **PUBLISHED["ImageNet-64"][1]},
    "lsun256": {**PUBLISHED["LSUN-256"][0], **PUBLISHED["LSUN-256"][1]},
    "unet32": {
        **recipes.NETWORKS["small"],
        "image_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "num_classes": None,
    },
    "tiny": {
        "image_size": 16,
        "in_channels": 3,
        "model_channels": 64,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_classes": 10,
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
}


def fill_(network: nn.Module, seed: int) -> nn.Module:
    """Random weights; returns the network.

    A new U-Net ends every residual branch, and itself, in zeros: half of its layers could be wrong, and nothing would
    show. So matrices and filters have standard deviation 1 / sqrt(inputs), the scales of norms lie around 1.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.ndim > 1:
                values *= (parameter.numel() / parameter.shape[0]) ** -0.5
            else:
                values = 0.1 * values + name.endswith("weight")
            parameter.copy_(values)
    return network


def denoiser(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Denoiser:
    """A consistency model of the architecture, in one dtype, for evaluation."""
    # Not as it comes: 300 million random numbers that are overwritten take a CPU seconds, and these are the device's.
    network = meta_network(NETWORKS[name]).to_empty(device=device)
    fill_(network, seed)
    return around(network.to(dtype))


def around(network: UNetModel) -> Denoiser:
    """The consistency model with this network; no gradients."""
    shape = network.in_channels, network.image_size, network.image_size
    return Denoiser(network, image_shape=shape).eval().requires_grad_(False)


def without_memory(name: str, dtype: torch.dtype) -> UNetModel:
    """The architecture on the meta device: shapes alone."""
    return meta_network(NETWORKS[name]).to(dtype).eval().requires_grad_(False)
