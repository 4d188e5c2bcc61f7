"""diffusers' UNet2DModel with the fast pass, against diffusers' own."""

import copy
import functools
import operator

import pytest
import torch

import cmfast
from cmfast.fast import Refused, optimize, refusal
from cmfast.tolerances import FAST_VALUE, FLOOR
from tests.fast.networks import check
from tests.fast.test_changes import Lora, changed_in_place
from tests.golden_utils import relative_error

diffusers = pytest.importorskip("diffusers")

BASE = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
}
CONFIGS = {
    # As in the published consistency models.
    "published": {
        "num_class_embeds": 10,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
    "added": {},
    "plain": {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "no norm in the middle": {"resnet_time_scale_shift": "scale_shift"},
    "no attention in the middle": {"add_attention": False},
    "timestep classes": {"class_embed_type": "timestep"},
    "other groups": {"norm_num_groups": 8, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False},
}


def make(name: str, **changes):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**BASE, **CONFIGS[name], **changes}).eval()


def inputs(model, dtype=torch.float32):
    torch.manual_seed(1)
    labels = () if model.class_embedding is None else (torch.tensor([1, 2, 9]),)
    return torch.randn(3, 3, 8, 8, dtype=dtype), torch.tensor([40.0, -1500.0, 900.0]), *labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs(name, dtype):
    model = make(name)
    args = inputs(model)
    fast = optimize(model, dtype)
    if name == "timestep classes":
        # diffusers has these in float32 alone.
        with torch.no_grad():
            expected = model(*args).sample
            check(fast(*args).sample, expected, expected.double(), FLOOR[dtype], 2 * expected.abs().max().item())
        return
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(args[0].double(), *args[1:]).sample
        eager = copy.deepcopy(model).to(dtype)(args[0].to(dtype), *args[1:]).sample
        result = fast(*args)
        check(result.sample, eager, exact, FLOOR[dtype], exact.abs().max().item())
        assert torch.equal(fast(*args, return_dict=False)[0], result.sample)
    assert type(result) is type(model(*args)) and result.sample.dtype == torch.float32


def test_gradients():
    model = make("published")
    args = inputs(model)
    grads = []
    for network in (copy.deepcopy(model).double(), model, optimize(model)):
        network.zero_grad()
        network(args[0].to(network.dtype), *args[1:]).sample.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters()})
    exact, eager, fast = grads
    scale = max(grad.abs().max().item() for grad in exact.values())
    for name in exact:
        check(fast[name], eager[name], exact[name], FLOOR[torch.float32], scale, name)


@pytest.mark.parametrize(
    "timestep", [7, 7.0, 5.5, -5.5, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0])], ids=str
)
def test_forms_of_a_timestep(timestep):
    model = make("added")
    x = inputs(model)[0]
    with torch.no_grad():
        expected = model(x, timestep).sample
        check(optimize(model)(x, timestep).sample, expected, expected.double(), FLOOR[torch.float32], 10)


def test_is_that_model(tmp_path):
    model = make("published")
    fast = optimize(model)
    assert isinstance(fast, diffusers.UNet2DModel) and fast.config == model.config
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert type(again) is diffusers.UNet2DModel
    args = inputs(model)
    with torch.no_grad():
        assert torch.equal(again(*args).sample, model(*args).sample)
        changed_in_place(model)
        assert torch.equal(fast(*args).sample, optimize(copy.deepcopy(model))(*args).sample)
        other = copy.deepcopy(fast)
        assert torch.equal(other(*args).sample, fast(*args).sample)


def test_another_of_its_class():
    """As diffusers' EMAModel makes them: an ordinary network."""
    fast = optimize(make("added"))
    other = type(fast).from_config(fast.config).eval()
    other.load_state_dict(fast.state_dict())
    args = inputs(fast)
    with torch.no_grad():
        assert torch.equal(other(*args).sample, make("added")(*args).sample)
    assert type(optimize(other)) is type(fast)


def test_another_attention_is_called():
    """The plain one, as for the gradient of a gradient."""
    model = make("added")
    fast, (x, timesteps) = optimize(model), inputs(model)
    for module in model.modules():
        if isinstance(module, diffusers.models.attention_processor.Attention):
            module.set_processor(diffusers.models.attention_processor.AttnProcessor())
    penalties = []
    for network in (model, fast):
        sample = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(sample, timesteps).sample.square().sum(), sample, create_graph=True)
        penalties += torch.autograd.grad(grad.square().sum(), sample)
    assert torch.equal(*penalties) and "processor is a AttnProcessor, expected AttnProcessor2_0" in fast.refusal


def test_activations_made_again_for_frozen_weights():
    """Where the gradient of the input alone is wanted."""
    model = make("added").requires_grad_(False)
    fast, (x, timesteps) = optimize(model), inputs(model)
    kept, grads = [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        kept.append(0)
        sample = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = fast(sample, timesteps).sample.square().sum()
        grads += torch.autograd.grad(loss, sample)
    assert kept[1] < 0.75 * kept[0] and torch.equal(*grads)


def test_a_copy_with_other_parts_runs_them():
    """As of `nn.DataParallel`."""
    fast, other = optimize(make("published")), make("published")
    changed_in_place(other)
    args = inputs(other)
    replica = fast._replicate_for_data_parallel()
    replica._modules.update(other._modules)
    with torch.no_grad():
        assert torch.equal(replica(*args).sample, other(*args).sample)


def test_parts_of_another_kind_are_called():
    model = make("published")
    fast = optimize(model)
    args = inputs(model)
    block = model.mid_block.resnets[0]
    block.conv1 = Lora(block.conv1)
    with torch.no_grad():
        assert torch.equal(fast(*args).sample, model(*args).sample)
    assert fast.refusal == "mid_block.resnets.0.conv1 is a Lora, expected Conv2d"


@pytest.mark.parametrize(
    "path, name",
    [
        ("UNet2DModel", "forward"),
        ("models.attention_processor.AttnProcessor2_0", "__call__"),
        ("models.attention_processor.Attention", "forward"),
        ("models.resnet.ResnetBlock2D", "forward"),
        ("models.upsampling.Upsample2D", "forward"),
    ],
)
def test_a_patch_of_a_class_is_called(path, name, monkeypatch):
    """Before it is optimised, and after."""
    model = make("published")
    fast, args = optimize(model), inputs(model)
    kind = operator.attrgetter(path)(diffusers)
    original = getattr(kind, name)

    @functools.wraps(original)
    def patch(part, x, *arguments, **options):
        # A processor is given its attention first.
        given = (x, 2 * arguments[0], *arguments[1:]) if name == "__call__" else (2 * x, *arguments)
        return original(part, *given, **options)

    with torch.no_grad():
        before = fast(*args).sample
        monkeypatch.setattr(kind, name, patch)
        expected = model(*args).sample
        assert torch.equal(fast(*args).sample, expected) and relative_error(before, expected) > FAST_VALUE
        message = f"the class {kind.__name__} has a forward pass of its own: {name} was replaced"
        assert refusal(fast) == refusal(model) == message
        monkeypatch.undo()
        assert fast.refusal is None and torch.equal(fast(*args).sample, before)


def test_another_part_is_compiled_anew():
    model = make("published")
    args = inputs(model)
    compiled = torch.compile(optimize(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(*args).sample
        model.mid_block.resnets[0] = copy.deepcopy(model.mid_block.resnets[0])
        changed_in_place(model.mid_block.resnets[0])
        expected = model(*args).sample
        assert relative_error(compiled(*args).sample, expected) < FAST_VALUE < relative_error(before, expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"center_input_sample": True}, "center_input_sample is set"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"act_fn": "gelu"}, "nonlinearity is a GELU, expected SiLU"),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "down_blocks.0 is a SkipDownBlock2D"),
        ({"mid_block_scale_factor": 2.0}, "mid_block.resnets.0 has output_scale_factor=2.0, expected 1"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "downsample_padding": 0}, "padding=0, expected 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes, message):
    model = make("added", **changes)
    assert message in refusal(model)
    with pytest.raises(Refused, match=message.replace(".", r"\.")):
        optimize(model)


def test_errors():
    model = make("published")
    x, timesteps, labels = inputs(model)
    with pytest.raises(ValueError, match="class_labels are missing"):
        optimize(model)(x, timesteps)
    with pytest.raises(ValueError, match="class_labels were given"):
        optimize(make("added"))(x, timesteps, labels)
    with pytest.raises(TypeError, match=r"sample has dtype torch\.int32"):
        optimize(make("added"))(x.int(), timesteps)


def test_in_a_denoiser():
    """Its inputs come in the dtype and layout that it computes in."""
    model = cmfast.load(make("published"), preconditioning="consistency")
    seen = []
    fast = optimize(model, torch.bfloat16)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        expected = model(x, 3.0, labels)
        fast.network.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        check(fast(x, 3.0, labels), expected, expected.double(), FLOOR[torch.bfloat16], 4 * expected.abs().max().item())
        cmfast.Sampler(fast, 2, steps=2).sample(2)
    assert {x.dtype for x in seen} == {torch.bfloat16} and len(seen) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen[:2])
    assert not hasattr(model.network, "refresh") and model.input_format is None


def part(path, name, value):
    """Another value of an attribute of a part."""
    return lambda model: setattr(model.get_submodule(path), name, value)


@pytest.mark.parametrize(
    "change, message",
    [
        (part("mid_block.resnets.0", "skip_time_act", True), "no projection of the time embedding after a SiLU"),
        (part("mid_block.resnets.0", "time_embedding_norm", "ada_group"), "time_embedding_norm='ada_group', expected"),
        (part("mid_block.resnets.0.norm1", "bias", None), "mid_block.resnets.0.norm1 has no weight and bias"),
        (part("up_blocks.0.upsamplers.0", "interpolate", False), "is not nearest-neighbour interpolation"),
        (part("down_blocks.0.downsamplers.0", "norm", torch.nn.Identity()), "down_blocks.0.downsamplers.0 has a norm"),
        (part("down_blocks.0.downsamplers.0", "use_conv", False), "conv is a Conv2d, expected AvgPool2d"),
        (part("mid_block.attentions.0", "rescale_output_factor", 2.0), "is not self-attention with one residual"),
        (part("mid_block.attentions.0", "scale", 1.0), "mid_block.attentions.0 has another scale than 1 / sqrt"),
        (part("mid_block.attentions.0.to_out", "1", torch.nn.Identity()), "to_out.1 is a Identity, expected Dropout"),
        (part("mid_block.attentions.0", "to_q", torch.nn.Sequential()), "to_q is a Sequential, expected Linear"),
        (part("", "time_embedding", torch.nn.Identity()), "time_embedding is a Identity, expected TimestepEmbedding"),
        (part("time_embedding", "linear_1", torch.nn.Identity()), "time_embedding.linear_1 is a Identity, expected"),
        (part("mid_block.attentions.0.to_k", "bias", None), "mid_block.attentions.0 has projections without a bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_are_refused(change, message):
    model = make("added", down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    assert refusal(model) is None
    change(model)
    assert message in refusal(model)
    with pytest.raises(Refused):
        optimize(model)
