"""The U-Net against golden numbers of the original code; dtypes, layouts, errors, one compiled graph."""

import copy
import json
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.tolerances import GOLDEN_FULL_SIZE, GOLDEN_LOOP, GOLDEN_VALUE
from cmfast.unet import UNetModel
from cmfast.unet_blocks import normalization, timestep_embedding
from tests.golden_utils import (
    SMALL_UNET,
    imagenet64_input,
    load,
    relative_error,
    small_unet,
    unet_arguments,
    unet_weights,
)


def inputs(batch: int = 2, shape=(3, 8, 8), num_classes: int | None = None, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    timesteps = torch.linspace(-1500, 1090, batch)
    if num_classes is None:
        return x, timesteps
    return x, timesteps, torch.arange(batch) % num_classes


def loss_and_gradients(model, args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(*args).float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["plain", "imagenet64_like", "lsun256_like"])
def test_golden_output_and_gradients(name, dtype):
    tensors, meta = load(f"unet_{name}_2303")
    model = unet_weights(UNetModel(**unet_arguments(meta["config"]))).eval().to(dtype)
    x = tensors["x"].to(dtype).detach().requires_grad_()

    out = model(x, tensors["timesteps"], tensors.get("y"))
    out.square().mean().backward()

    assert out.dtype == dtype
    assert relative_error(out, tensors["out"]) < GOLDEN_VALUE
    assert relative_error(x.grad, tensors["grad_x"]) < GOLDEN_LOOP
    first, time = model.input_blocks[0][0].weight, model.time_embed[0].weight
    assert relative_error(first.grad, tensors["grad_first"]) < GOLDEN_LOOP
    assert relative_error(time.grad, tensors["grad_time"]) < GOLDEN_LOOP


@pytest.mark.parametrize("name", ["plain", "imagenet64_like", "lsun256_like", "imagenet64"])
def test_state_dict_layout(name):
    _, meta = load(f"unet_{name}_2303")
    with torch.device("meta"):
        model = UNetModel(**unet_arguments(meta["config"]))
    layout = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
    assert layout == list(meta["state_dict"].items())


def test_golden_imagenet64_full_size():
    tensors, meta = load("unet_imagenet64_2303")
    with torch.device("meta"):  # no time spent on an initialisation that the formula overwrites
        model = UNetModel(**unet_arguments(meta["config"]))
    model = unet_weights(model.to_empty(device="cpu")).eval()
    assert sum(p.numel() for p in model.parameters()) == 295_899_267
    with torch.no_grad():
        out = model(imagenet64_input(), tensors["timesteps"], tensors["y"])
    assert relative_error(out, tensors["out"]) < GOLDEN_FULL_SIZE


# --- construction ---------------------------------------------------------------------------------


def test_config_is_json_and_rebuilds_the_network():
    model = UNetModel(**SMALL_UNET, num_classes=7, dropout=0.1)
    config = json.loads(json.dumps(model.config))
    again = UNetModel(**config)
    assert again.config == model.config == config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_residual_branches_and_output_start_at_zero():
    model = UNetModel(**SMALL_UNET)
    zero = {name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()}
    expected = {name for name in model.state_dict() if name.endswith(("out_layers.3.weight", "proj_out.weight"))}
    assert zero == expected | {"out.2.weight"}
    assert not model(*inputs()).any()


def test_new_attention_order_changes_nothing():
    args = inputs()
    with torch.no_grad():
        assert torch.equal(small_unet()(*args), small_unet(use_new_attention_order=True)(*args))


@pytest.mark.parametrize("resblock_updown", [True, False], ids=["resblock", "plain"])
@pytest.mark.parametrize("conv_resample", [True, False], ids=["conv", "pool"])
@pytest.mark.parametrize("dims, shape", [(1, (3, 8)), (2, (3, 8, 16)), (3, (3, 5, 8, 4))], ids=["1d", "2d", "3d"])
def test_dims(dims, shape, conv_resample, resblock_updown):
    model = small_unet(dims=dims, conv_resample=conv_resample, resblock_updown=resblock_updown).double()
    args = inputs(2, shape, dtype=torch.float64)
    out = model(*args)
    assert out.shape == args[0].shape
    alone = model(args[0][1:], args[1][1:])
    assert relative_error(alone, out[1:]) < 1e-9
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_one_dimension_is_a_column_of_two():
    """A 1-d network is a 2-d one whose convolutions see one axis, on images that repeat along the other."""
    one, two = small_unet(dims=1, resblock_updown=True), small_unet(dims=2, resblock_updown=True)
    weights = dict(one.state_dict())
    for name, tensor in two.state_dict().items():
        source = weights[name]
        if source.ndim == 3:
            tensor.zero_()[..., tensor.shape[-1] // 2] = source
        else:
            tensor.copy_(source)
    one, two = one.double(), two.double()  # in float32 the two kinds of convolution round too differently to tell
    x, timesteps = inputs(2, (3, 8), dtype=torch.float64)
    wide = two(x[..., None].expand(2, 3, 8, 8), timesteps)
    assert relative_error(wide, one(x, timesteps)[..., None].expand_as(wide)) < 1e-9


def test_heads_of_the_decoder():
    changes = {
        "num_head_channels": -1,
        "num_heads": 2,
        "num_heads_upsample": 4,
        "use_scale_shift_norm": False,
    }
    model = small_unet(**changes)
    assert model.input_blocks[-1][1].num_heads == model.middle_block[1].num_heads == 2
    assert model.output_blocks[0][1].num_heads == 4


# --- dtypes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["torso", "whole"])
def test_16_bit(dtype, whole):
    model = small_unet(num_classes=5)
    args = inputs(3, num_classes=5)
    expected = model(*args)
    model = model.to(dtype) if whole else model.convert_torso(dtype)
    out = model(*args)
    assert model.dtype == dtype
    assert out.dtype == torch.float32  # the dtype of x, whatever the weights are
    assert relative_error(out, expected) < 40 * torch.finfo(dtype).eps
    assert model(args[0].to(dtype), *args[1:]).dtype == dtype
    out.square().mean().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_convert_to_fp16_casts_the_convolutions_of_the_torso_only():
    model = small_unet().convert_to_fp16()
    half = {name for name, p in model.named_parameters() if p.dtype == torch.float16}
    torso = ("input_blocks", "middle_block", "output_blocks")
    convolutions = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        for kind in ("weight", "bias")
        if isinstance(module, torch.nn.Conv2d) and name.startswith(torso)
    }
    assert half == convolutions
    model.convert_to_fp32()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float64_embedding_is_float64():
    timesteps = torch.tensor([1090.123456789], dtype=torch.float64)
    fine, coarse = timestep_embedding(timesteps, 32, torch.float64), timestep_embedding(timesteps, 32)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(16) / 16)
    expected = torch.cat([torch.cos(timesteps * frequencies), torch.sin(timesteps * frequencies)])
    assert relative_error(fine[0], expected) < 1e-12
    assert coarse.dtype == torch.float32
    assert relative_error(coarse[0], expected) < 1e-3
    assert timestep_embedding(timesteps, 33)[0, -1] == 0


def test_float64_model_computes_in_float64():
    class Dtypes(TorchDispatchMode):
        seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.seen.add(out.dtype)
            return out

    x, timesteps = inputs(dtype=torch.float64)
    model = small_unet().double()
    with Dtypes() as dtypes, torch.no_grad():
        assert model(x, timesteps.double()).dtype == torch.float64
    assert dtypes.seen == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=["w16", "w32"])
def test_group_norm_statistics(dtype, weight_dtype, monkeypatch):
    seen, group_norm = [], torch.nn.functional.group_norm
    monkeypatch.setattr(
        torch.nn.functional, "group_norm", lambda x, *args: seen.append(x.dtype) or group_norm(x, *args)
    )
    norm = normalization(64).to(weight_dtype)
    x = (1000 + torch.randn(2, 64, 6, 6)).to(dtype)  # a mean that 16-bit sums would lose
    out, eps = norm(x), torch.finfo(dtype).eps
    expected = group_norm(x.double(), 32, eps=norm.eps)
    assert seen == [torch.promote_types(dtype, torch.float32)]
    assert out.dtype == dtype
    assert relative_error(out, expected) < {torch.float32: 1e-4, torch.float64: 1e-12}.get(dtype, eps)


@pytest.mark.parametrize("num_classes", [None, 4])
def test_autocast(num_classes):
    model = small_unet(num_classes=num_classes)
    args = inputs(2, num_classes=num_classes)
    expected, expected_gradients = loss_and_gradients(model, args)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*args).dtype == torch.float32
        loss, gradients = loss_and_gradients(model, args)
    assert relative_error(loss, expected) < 0.05
    name = "input_blocks.0.0.weight"
    assert relative_error(gradients[name], expected_gradients[name]) < 0.1


def test_channels_last():
    x, timesteps = inputs(2)
    model = small_unet()
    expected = model(x, timesteps)
    out = model(x.contiguous(memory_format=torch.channels_last), timesteps)
    assert relative_error(out, expected) < GOLDEN_VALUE
    model.to(memory_format=torch.channels_last)
    out = model(x.contiguous(memory_format=torch.channels_last), timesteps)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(out, expected) < GOLDEN_VALUE


def test_non_contiguous_and_integer_timesteps():
    x, _ = inputs(2)
    model = small_unet()
    expected = model(x, torch.tensor([3.0, 250.0]))
    strided = torch.empty(2, 3, 8, 16)[..., ::2].copy_(x)
    assert torch.equal(model(strided, torch.tensor([3, 250])), expected)


@pytest.mark.parametrize("num_classes", [None, 4])
def test_empty_batch(num_classes):
    model = small_unet(num_classes=num_classes, use_checkpoint=True)
    out = model(*inputs(0, num_classes=num_classes))
    assert out.shape == (0, 3, 8, 8)


# --- training -------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only():
    model = small_unet(dropout=0.3)
    args = inputs()
    assert not torch.equal(model(*args), model(*args))
    model.eval()
    assert torch.equal(model(*args), model(*args))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(dropout):
    plain = small_unet(dropout=dropout, num_classes=4)
    recomputed = small_unet(dropout=dropout, num_classes=4, use_checkpoint=True)
    args = inputs(2, num_classes=4)
    results = []
    for model in (plain, recomputed):
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, args))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_checkpointing_keeps_less():
    def bytes_kept(model) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*inputs(4)).sum()
        return sum(sizes.values())

    assert bytes_kept(small_unet(use_checkpoint=True)) < 0.7 * bytes_kept(small_unet())


# --- one graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes, use_checkpoint", [(None, False), (4, True)], ids=["plain", "recompute"])
def test_compiles_as_one_graph_with_gradient(num_classes, use_checkpoint):
    model = small_unet(num_classes=num_classes, use_checkpoint=use_checkpoint)
    args = inputs(2, num_classes=num_classes)
    expected, expected_gradients = loss_and_gradients(model, args)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    loss, gradients = loss_and_gradients(compiled, args)
    assert relative_error(loss, expected) < GOLDEN_VALUE
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[f"_orig_mod.{name}"], gradient) < GOLDEN_LOOP, name


def test_one_graph_for_every_batch_size():
    model = small_unet(num_classes=4, channel_mult=(1,), attention_resolutions=(1,)).requires_grad_(False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        args = inputs(batch, num_classes=4)
        assert relative_error(compiled(*args), model(*args)) < GOLDEN_VALUE
    assert counter.frame_count == 1


def test_compiles_with_16_bit_torso_and_autocast():
    args = inputs(2)
    one_level = {"channel_mult": (1,), "attention_resolutions": (1,)}
    model = small_unet(**one_level).convert_torso(torch.bfloat16).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), model(*args))
    model = small_unet(**one_level).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(compiled(*args), model(*args)) < 0.05


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor():
    model = small_unet(channel_mult=(1,), num_res_blocks=0).requires_grad_(False)
    args = inputs(2)
    torch._dynamo.reset()
    assert relative_error(torch.compile(model, fullgraph=True)(*args), model(*args)) < GOLDEN_VALUE


def test_works_on_meta_tensors():
    with torch.device("meta"):
        model = UNetModel(**SMALL_UNET, num_classes=4)
        out = model(torch.empty(2, 3, 8, 8), torch.empty(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, 3, 8, 8)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4, 8, 8)}, r"x has shape \[2, 4, 8, 8\].*in_channels=3"),
        ({"x": torch.zeros(2, 3, 8)}, r"x has shape \[2, 3, 8\].*dims=2"),
        ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, "x has dtype torch.int64.*floating"),
        ({"x": torch.zeros(2, 3, 8, 7)}, r"spatial size \[8, 7\]: expected multiples of 2, since 2 levels"),
        ({"timesteps": torch.zeros(1)}, r"timesteps has shape \[1\]: expected \[2\]"),
        ({"timesteps": torch.tensor(1.0)}, r"timesteps has shape \[\]: expected \[2\]"),
        ({"y": None}, "y is None: expected labels.*num_classes=4"),
        ({"y": torch.zeros(2, 1, dtype=torch.int64)}, r"y has shape \[2, 1\]: expected \[2\]"),
        ({"y": torch.zeros(2)}, "y has dtype torch.float32: expected torch.int64"),
        ({"y": torch.tensor([0, 4])}, "y has labels from 0 to 4: expected 0 to 3"),
        ({"y": torch.tensor([-1, 0])}, "y has labels from -1 to 0: expected 0 to 3"),
    ],
)
def test_wrong_input(change, message):
    model = small_unet(num_classes=4)
    args = dict(zip(("x", "timesteps", "y"), inputs(2, num_classes=4)))
    model(**args)
    with pytest.raises(ValueError, match=message):
        model(**{**args, **change})


@pytest.mark.parametrize("make", [lambda model: model, cmfast.optimize], ids=["plain", "optimized"])
def test_layers_that_users_replace_say_what_an_input_must_be(make):
    """A condition beside the image, and a class for "none": what the network was made with is past."""
    model = small_unet(num_classes=4)
    model.input_blocks[0][0] = torch.nn.Conv2d(7, 32, 3, padding=1)
    model.label_emb = torch.nn.Embedding(5, 128)
    model, x, times = make(model.eval()), torch.zeros(2, 7, 8, 8), torch.zeros(2)
    assert model(x, times, torch.tensor([0, 4])).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected \[B, 7, size, size\], in_channels=7"):
        model(x[:, :3], times, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="labels from 0 to 5: expected 0 to 4"):
        model(x, times, torch.tensor([0, 5]))


def test_labels_for_an_unconditional_network():
    with pytest.raises(ValueError, match="y was given: expected None"):
        small_unet()(*inputs(2, num_classes=4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dims": 4}, "dims=4: expected 1, 2 or 3"),
        ({"model_channels": 48}, "channels=48 cannot be split into 32 groups"),
        ({"num_head_channels": 24}, "num_head_channels=24 does not divide the 64 channels"),
        ({"num_head_channels": -1, "num_heads": 3}, "num_heads=3 does not divide the 64 channels"),
        ({"num_head_channels": 0}, "num_head_channels=0"),
    ],
)
def test_wrong_construction(change, message):
    with pytest.raises(ValueError, match=message):
        UNetModel(**{**SMALL_UNET, **change})
