"""UNet2DModel <-> UNetModel: the same bits under other names, the same outputs, and refusals by name."""

import inspect

import pytest
import torch

from cmfast.checkpoint import CheckpointError, load, meta_network, save
from cmfast.compat.diffusers import (
    config,
    config_from_diffusers,
    config_to_diffusers,
    state_dict_from_diffusers,
    state_dict_to_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from cmfast.fast import optimize
from cmfast.tolerances import DIFFUSERS_VALUE
from cmfast.unet import UNetModel
from cmfast.unet_config import PUBLISHED
from tests.checkpoint_utils import same_bits
from tests.compat.diffusers_utils import IMAGENET_64, LSUN_256, SMALL, diffusers, small_pipeline, small_unet
from tests.golden_utils import relative_error

PLAIN = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "conv",
    "upsample_type": "conv",
}
LAYOUTS = {
    "imagenet-like": {
        "block_out_channels": (32, 64, 96, 128),
        "down_block_types": IMAGENET_64["down_block_types"],
        "up_block_types": IMAGENET_64["up_block_types"],
        "layers_per_block": 3,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 10,
    },
    "lsun-like": {
        "sample_size": 32,
        "block_out_channels": (32, 32, 64, 64, 96, 96),
        "down_block_types": LSUN_256["down_block_types"],
        "up_block_types": LSUN_256["up_block_types"],
        "layers_per_block": 2,
        "attn_norm_num_groups": None,
    },
    "convolutions": {**PLAIN, "num_class_embeds": 10},
    "convolutions-scale-shift": {**PLAIN, "resnet_time_scale_shift": "scale_shift", "in_channels": 1},
    "one-head": {"attention_head_dim": None},
    "one-level": {
        "block_out_channels": (64,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
    },
    "no-attention-but-the-middle": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "last-level-of-another-type": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
    },
    "swish": {"act_fn": "swish", "out_channels": 6},
    "odd-widths": {"block_out_channels": (96, 224)},
}


def call_both(unet, network, batch=3):
    """Outputs of the same inputs, timesteps of the size that consistency models see."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, network.in_channels, network.image_size, network.image_size, generator=generator)
    timesteps = torch.tensor([1095.5, -1553.6, 80.9])[:batch]
    labels = None if network.num_classes is None else torch.tensor([0, 9, 4])[:batch]
    with torch.no_grad():
        return network(x, timesteps, labels), unet(x, timesteps, class_labels=labels).sample


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_same_outputs_and_back(layout):
    unet = small_unet(**layout)
    network = unet_from_diffusers(unet)
    ours, theirs = call_both(unet, network)
    assert theirs.std() > 0.05
    assert relative_error(ours, theirs) < DIFFUSERS_VALUE

    back = unet_to_diffusers(network)
    assert type(back) is diffusers.UNet2DModel
    assert same_bits(back, unet)
    assert torch.equal(call_both(back, network)[1], theirs)
    again = unet_from_diffusers(back)
    assert again.config == network.config and same_bits(again, network)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True, "num_classes": 10},
        {"num_heads": 4, "num_heads_upsample": 4},
        {"attention_resolutions": [1, 2, 4], "channel_mult": (1, 1), "num_heads": 2},
        {"num_heads": 1, "num_heads_upsample": 1, "dropout": 0.25},
        {"channel_mult": (1, 1.5), "model_channels": 64, "num_head_channels": 32},
    ],
    ids=["resblocks", "heads", "equal-widths", "one-head", "fraction"],
)
def test_ours_to_theirs_and_back(arguments):
    torch.manual_seed(0)
    network = UNetModel(
        **{
            **{"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1},
            **{"attention_resolutions": [2], "channel_mult": (1, 2)},
            **arguments,
        }
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    unet = unet_to_diffusers(network)
    ours, theirs = call_both(unet, network)
    assert relative_error(theirs, ours) < DIFFUSERS_VALUE
    assert unet.config.dropout == network.config["dropout"]
    assert same_bits(unet_from_diffusers(unet), network)


@pytest.mark.parametrize("name, published", [("ImageNet-64", IMAGENET_64), ("LSUN-256", LSUN_256)])
def test_published_layouts(name, published):
    """Names and shapes at full size, without memory."""
    shown, asked = PUBLISHED[name]
    unet = meta_network(published, diffusers.UNet2DModel)
    arguments = config_from_diffusers(unet.config)
    network = meta_network(arguments)
    assert {key: network.config[key] for key in shown} == shown
    assert {key: arguments[key] for key in asked} == asked
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in unet.parameters())
    if name == "ImageNet-64":
        assert sum(p.numel() for p in network.parameters()) == 295_899_267

    state = state_dict_from_diffusers(unet.state_dict(), published)
    network.load_state_dict(state, assign=True)
    back = state_dict_to_diffusers(network.state_dict(), network.config)
    assert {key: value.shape for key, value in back.items()} == {k: v.shape for k, v in unet.state_dict().items()}
    # AttnDownBlock2D and the like are written as they came.
    theirs = config_to_diffusers(network.config)
    assert {key: theirs[key] for key in published if key != "attn_norm_num_groups"} == {
        key: value for key, value in published.items() if key != "attn_norm_num_groups"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_dtypes_and_modes(dtype):
    unet = small_unet().to(dtype).train()
    network = unet_from_diffusers(unet)
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert same_bits(unet_to_diffusers(network), unet)
    network.eval()
    assert not unet_to_diffusers(network).training


def test_converted_weights_are_copies():
    unet = small_unet()
    network = unet_from_diffusers(unet)
    back = unet_to_diffusers(network)
    storages = [{p.untyped_storage().data_ptr() for p in model.parameters()} for model in (unet, network, back)]
    assert not (storages[0] & storages[1] or storages[1] & storages[2])
    assert len(storages[2]) == len(list(back.parameters()))


def test_16_bit_torso():
    network = unet_from_diffusers(small_unet()).convert_to_fp16()
    with pytest.raises(CheckpointError, match="in torch.float16 and torch.float32: say dtype="):
        unet_to_diffusers(network)
    assert unet_to_diffusers(network, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_num_groups": 16}, r"norm_num_groups=16 has no counterpart .*: expected 32"),
        ({"act_fn": "gelu"}, "act_fn='gelu' .*: expected 'silu' or 'swish'"),
        ({"center_input_sample": True}, "center_input_sample=True .*: expected False"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' .*: expected 'positional'"),
        ({"freq_shift": 1}, "freq_shift=1 .*: expected 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False .*: expected True"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 .*: expected 1e-05"),
        ({"mid_block_type": None}, "mid_block_type=None .*: expected 'UNetMidBlock2D'"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2 .*: expected 1"),
        ({"add_attention": False}, "add_attention=False .*: expected True"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' .*: expected None"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial' .*: expected 'default' or"),
        ({"time_embedding_dim": 64}, "time_embedding_dim=64 .*: expected None or 128"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups=16 .*: expected 32"),
        (
            {"attn_norm_num_groups": None, "resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups=None .*: expected 32 with resnet_time_scale_shift='scale_shift'",
        ),
        ({"attention_head_dim": 24}, "attention_head_dim=24 .*: expected None or a divisor of the 64 channels"),
        ({"sample_size": None}, "sample_size=None .*: expected the size of a square, or image_size="),
        ({"sample_size": (8, 16)}, r"sample_size=\(8, 16\) .*: expected the size of a square"),
        (
            {"upsample_type": "conv"},
            "upsample_type='conv' .*: expected resampling by 'resnet' everywhere, as down_block",
        ),
        (
            {
                "block_out_channels": (32, 32, 64),
                "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 2,
            },
            "down_block_types=.*: expected resampling by 'resnet' everywhere",
        ),
        (
            {"downsample_type": "pool", "down_block_types": ("AttnDownBlock2D",) * 2},
            "downsample_type='pool' .*: expected",
        ),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "down_block_types='SkipDownBlock2D' .*: expect"),
        ({"down_block_types": ("DownBlock2D",)}, r"down_block_types=\('DownBlock2D',\) .*: expected 2 blocks"),
        ({"up_block_types": ("ResnetUpsampleBlock2D",) * 2}, "up_block_types=.*: expected attention at the levels of"),
        ({**PLAIN, "downsample_padding": 0}, "downsample_padding=0 .*: expected 1"),
        ({"learned_skip": True}, "learned_skip=True .*: expected it to be left out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_converted_from(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_diffusers({**SMALL, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dims": 1}, "dims=1 .*: expected 2"),
        ({"channel_mult": (2, 2)}, r"channel_mult=\[2, 2\] .*: expected 1 as the first"),
        (
            {"conv_resample": False, "resblock_updown": False},
            "conv_resample=False .*: expected True, or resblock_updown",
        ),
        (
            {"num_head_channels": -1, "num_heads": 2, "attention_resolutions": [1]},
            "num_heads=2 .*: expected heads of one",
        ),
        (
            {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 1},
            "num_heads=2 .*: expected heads of one width",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_converted_to(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_to_diffusers({**config_from_diffusers(SMALL), **change})


def test_weights_that_do_not_fit():
    unet = small_unet()
    state = unet.state_dict()
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(mid_block.attentions.0.to_q.weight\)"):
        state_dict_from_diffusers(
            {k: v for k, v in state.items() if k != "mid_block.attentions.0.to_q.weight"}, unet.config
        )
    with pytest.raises(CheckpointError, match=r"1 tensors not expected \(class_embedding.weight\)"):
        state_dict_from_diffusers({**state, "class_embedding.weight": torch.zeros(10, 128)}, unet.config)
    with pytest.raises(CheckpointError, match="input_blocks.0.0.weight"):
        state_dict_from_diffusers({**state, "conv_in.weight": torch.zeros(32, 1, 3, 3)}, unet.config)
    network = unet_from_diffusers(unet)
    with pytest.raises(CheckpointError, match="do not fit the configuration: 1 tensor missing"):
        state_dict_to_diffusers({k: v for k, v in network.state_dict().items() if k != "out.0.bias"}, network.config)
    with pytest.raises(TypeError, match="expected a UNet2DModel of diffusers, got a UNetModel"):
        unet_from_diffusers(network)
    with pytest.raises(TypeError, match="expected a UNetModel, got a UNet2DModel"):
        unet_to_diffusers(unet)


class Halved(diffusers.models.attention_processor.AttnProcessor2_0):
    """As of a method that edits attention."""

    def __call__(self, *args, **options):
        return 0.5 * super().__call__(*args, **options)


def part(path, name, value):
    """Another value of an attribute of a part."""
    return lambda unet: setattr(unet.get_submodule(path), name, value)


LOST = {
    "processor": (part("mid_block.attentions.0", "processor", Halved()), "has the processor Halved, expected AttnPr"),
    "heads": (part("mid_block.attentions.0", "heads", 1), r"mid_block\.attentions\.0 has heads=1, expected 4"),
    "scale": (part("mid_block.resnets.0", "output_scale_factor", 2.0), "has output_scale_factor=2.0, expected 1"),
    "activation": (part("mid_block.resnets.0", "nonlinearity", torch.nn.GELU()), "nonlinearity is a GELU, expected Si"),
    "eps": (part("mid_block.resnets.0.norm1", "eps", 0.1), r"resnets\.0\.norm1 has eps=0\.1, expected 1e-05"),
    "padding": (part("conv_in", "padding_mode", "circular"), "conv_in has padding_mode='circular', expected 'zeros'"),
    "forward": (part("conv_in", "forward", torch.nn.functional.silu), "conv_in has a forward pass of its own"),
    "class": (part("", "__class__", type("Own", (diffusers.UNet2DModel,), {"forward": None})), "the Own has a forward"),
    "hook": (lambda unet: unet.mid_block.register_forward_hook(lambda *_: None), r"mid_block \(UNetM.*\) has a hook"),
}


@pytest.mark.parametrize("change, message", LOST.values(), ids=LOST)
def test_what_a_configuration_does_not_say_would_be_lost(change, message):
    unet = small_unet()
    change(unet)
    with pytest.raises(CheckpointError, match=f"not what its configuration says, which is what converts: .*{message}"):
        unet_from_diffusers(unet)


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
def test_networks_that_compute_the_same_convert(name):
    """Optimised, with gradient checkpointing, with attention in another way."""
    unet = optimize(small_unet())
    unet.enable_gradient_checkpointing()
    for module in unet.modules():
        if isinstance(module, diffusers.models.attention_processor.Attention):
            module.set_processor(getattr(diffusers.models.attention_processor, name)(*[1][: name[0] == "S"]))
    assert same_bits(unet_from_diffusers(unet), unet_from_diffusers(small_unet()))


def test_defaults_are_those_of_diffusers():
    """A configuration without a key means the default of the class."""
    parameters = list(inspect.signature(diffusers.UNet2DModel.__init__).parameters.values())[1:]
    ours = {**{key: values[0] for key, values in config._REQUIRED.items()}, **config._DEFAULTS}
    assert ours == {parameter.name: parameter.default for parameter in parameters}


def test_every_width_is_met():
    """channel_mult is a quotient, of which the product with the base may be a little less than the width."""
    for base in range(32, 2048, 32):
        for width in range(32, 2048, 32):
            (_, mult) = config_from_diffusers({**SMALL, "block_out_channels": (base, width)})["channel_mult"]
            assert int(mult * base) == width


def test_a_network_for_any_size():
    assert config_from_diffusers(small_unet(sample_size=None).config, image_size=16)["image_size"] == 16
    assert config_from_diffusers(small_unet(sample_size=(8, 8)).config)["image_size"] == 8


def test_load_converts(tmp_path):
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=40.0)
    pipeline = small_pipeline(num_class_embeds=10, scheduler=scheduler)
    wrapped, model = load(pipeline), load(pipeline, convert=True)
    assert isinstance(model.network, UNetModel)
    assert (model.sigma_max, model.num_classes, model.image_shape) == (40.0, 10, (3, 8, 8))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 9])
    assert relative_error(model(x, 3.0, labels), wrapped(x, 3.0, labels)) < DIFFUSERS_VALUE

    pipeline.save_pretrained(tmp_path / "pipeline")
    from_folder = load(tmp_path / "pipeline", convert=True, dtype=torch.bfloat16)
    assert from_folder.network.dtype == torch.bfloat16 and from_folder.sigma_max == 40.0
    save(model, tmp_path / "model.safetensors")
    assert same_bits(load(tmp_path / "model.safetensors").network, model.network)
    with pytest.raises(TypeError, match="convert=True is for diffusers models"):
        load(tmp_path / "model.safetensors", convert=True)
    pipeline.unet = small_unet(norm_eps=1e-6)
    with pytest.raises(CheckpointError, match="norm_eps=1e-06"):
        load(pipeline, convert=True)
