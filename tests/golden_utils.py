"""Golden numbers of the original code: loading, the weight formula, the error; and a small network for other tests."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cmfast.unet import UNetModel

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata (every header value parsed from JSON) of tests/golden/{name}.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        meta = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {key: file.get_tensor(key) for key in file.keys()}, meta


def golden_tensor(k: int, name: str, shape: torch.Size) -> Tensor:
    """The k-th tensor of a golden state dict, float64: sqrt(2) scale sin(12.9898 i + 78.233 k), norms + 1."""
    numel = shape.numel()
    scale = (numel // shape[0]) ** -0.5 if len(shape) > 1 else 0.1
    values = torch.arange(numel, dtype=torch.float64).mul_(12.9898).add_(78.233 * k).sin_().mul_(2**0.5 * scale)
    if len(shape) == 1 and name.endswith("weight"):
        values += 1
    return values.view(shape)


def unet_weights(model: nn.Module) -> nn.Module:
    """Fill every tensor of the model's state dict by the golden formula, in place; returns the model."""
    for k, (name, tensor) in enumerate(model.state_dict().items()):
        tensor.copy_(golden_tensor(k, name, tensor.shape))
    return model


def unet_arguments(config: dict) -> dict:
    """Arguments of `UNetModel` from the golden header's arguments of the original's `create_model`."""
    config = dict(config)
    image_size, mult = config["image_size"], config.pop("channel_mult")
    resolutions = config.pop("attention_resolutions").split(",")
    return dict(
        in_channels=3,
        model_channels=config.pop("num_channels"),
        out_channels=6 if config.pop("learn_sigma") else 3,
        channel_mult=tuple(map(int, mult.split(","))) if mult else (1, 2, 3, 4),
        attention_resolutions=tuple(image_size // int(resolution) for resolution in resolutions),
        num_classes=1000 if config.pop("class_cond") else None,
        **config,
    )


def imagenet64_input() -> Tensor:
    """The x of unet_imagenet64, which its file does not hold: [1, 3, 64, 64] float32."""
    values = 2**0.5 * torch.sin(0.7390851 * torch.arange(3 * 64 * 64, dtype=torch.float64))
    return values.view(1, 3, 64, 64).float()


SMALL_UNET = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def small_unet(**changes) -> UNetModel:
    """`UNetModel(**SMALL_UNET)` with changed arguments and the golden formula's weights."""
    return unet_weights(UNetModel(**{**SMALL_UNET, **changes}))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max |value − expected| / max |expected|, in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max())
