"""The arguments of a U-Net, found from the names and shapes of its weights."""

import pytest
import torch

from cmfast import checkpoint, unet_config
from cmfast.unet import UNetModel
from tests.golden_utils import SMALL_UNET, unet_arguments
from tests.golden_utils import load as load_golden


def shapes_of(network: UNetModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 10},
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"channel_mult": [1, 1, 2], "num_res_blocks": 2, "attention_resolutions": [1, 4]},
        {"channel_mult": [0.5, 1], "model_channels": 64, "attention_resolutions": []},
        {"channel_mult": [2], "attention_resolutions": [], "resblock_updown": False},
        {"channel_mult": [1, 2, 3], "num_res_blocks": 0, "attention_resolutions": [2]},
        {"dims": 1},
        {"dims": 3, "in_channels": 1, "out_channels": 1},
        {"out_channels": 6},
    ],
    ids=str,
)
def test_config_from_shapes(changes):
    with torch.device("meta"):
        network = UNetModel(**{**SMALL_UNET, **changes})
    config = unet_config.from_shapes(shapes_of(network))
    assert config.items() <= network.config.items()
    invisible = {"image_size", "num_head_channels", "num_heads", "num_heads_upsample", "dropout"}
    invisible |= {"use_checkpoint", "use_fp16", "use_new_attention_order"}
    assert config.keys() == network.config.keys() - invisible


@pytest.mark.parametrize("name", ["imagenet64_like", "lsun256_like", "plain"])
def test_config_of_golden_networks(name):
    _, meta = load_golden(f"unet_{name}_2303")
    with torch.device("meta"):
        expected = UNetModel(**unet_arguments(meta["config"])).config
    config = unet_config.from_shapes({key: tuple(shape) for key, shape in meta["state_dict"].items()})
    assert {key: expected[key] for key in config} == config


def test_published_imagenet64():
    _, meta = load_golden("unet_imagenet64_2303")
    config = unet_config.from_shapes({key: tuple(shape) for key, shape in meta["state_dict"].items()})
    network = checkpoint._build_network(config)
    assert (config["image_size"], config["num_head_channels"], config["num_classes"]) == (64, 64, 1000)
    assert list(shapes_of(network).items()) == [(key, tuple(shape)) for key, shape in meta["state_dict"].items()]
    assert len(network.state_dict()) == 541
    assert sum(p.numel() for p in network.parameters()) == 295_899_267
    assert network.middle_block[1].num_heads == 12


def test_published_lsun256():
    with torch.device("meta"):
        published = UNetModel(
            256, 3, 256, 3, 2, (8, 16, 32), 0.1, (1, 1, 2, 2, 4, 4), num_head_channels=64, resblock_updown=True
        )
    assert len(published.state_dict()) == 566
    assert sum(p.numel() for p in published.parameters()) == 526_304_771
    network = checkpoint._build_network(unet_config.from_shapes(shapes_of(published)))
    assert network.config == published.config | {"dropout": 0}
