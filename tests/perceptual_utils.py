"""LPIPS with random weights, and pairs of images to measure."""

import functools
from pathlib import Path

import pytest
import torch

from cmfast.perceptual import LPIPS

EXTRA = 'pip install "cmfast[lpips]"'
MODELS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
NETS = list(MODELS)


@functools.cache
def random_weights(net):
    """A state dict of the whole `features` of torchvision's model."""
    torchvision = pytest.importorskip("torchvision", reason=EXTRA)
    with torch.device("meta"):
        features = getattr(torchvision.models, MODELS[net])().features
    generator = torch.Generator().manual_seed(2303)
    weights = {}
    for name, parameter in features.named_parameters():
        std = (2 / parameter[0].numel()) ** 0.5 if name.endswith("weight") else 0.1
        weights[name] = std * torch.randn(parameter.shape, generator=generator)
    return weights


@functools.cache
def package_heads(net):
    lpips = pytest.importorskip("lpips", reason=EXTRA)
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


@functools.cache
def make(net, pooling=None):
    """Ours. Shared between tests: change a deep copy."""
    pytest.importorskip("lpips", reason=EXTRA)
    return LPIPS(net, pooling=pooling, trunk_weights=random_weights(net))


def images(*shape, dtype=torch.float32, seed=0):
    """A pair in [-1, 1], the second near the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    y = (x + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    return x.to(dtype), y.to(dtype)
