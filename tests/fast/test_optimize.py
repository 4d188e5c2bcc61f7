"""Optimised networks: the numbers of the network they are made of, and its weights as they are now."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.fast import FastUNet, Refused, optimize, refusal, weights, winograd
from cmfast.tolerances import FAST_VALUE, FLOOR, GOLDEN_FULL_SIZE_FAST
from cmfast.unet import UNetModel
from tests.golden_utils import imagenet64_input, load, relative_error, small_unet, unet_arguments, unet_weights

CONFIGS = {
    "published": {"num_classes": 5},
    "added": {"use_scale_shift_norm": False},
    "resampling": {"resblock_updown": False},
    "pooling": {"resblock_updown": False, "conv_resample": False, "use_scale_shift_norm": False},
    "checkpointed": {"use_checkpoint": True},
    "wide": {"model_channels": 64, "num_classes": 5, "channel_mult": [1, 1.5]},
    "heads": {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
}


@pytest.fixture(autouse=True)
def winograd_for_small_networks(monkeypatch):
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 64)
    monkeypatch.setattr(winograd, "LEAST_WORK", 0)


def inputs(model, batch: int = 3, size: int = 8, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    y = () if model.num_classes is None else (torch.arange(batch) % model.num_classes,)
    return x, torch.linspace(-1500, 1090, batch), *y


def run(model, args, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of every parameter and of x."""
    x = args[0].detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, *args[1:])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def last(args) -> tuple[torch.Tensor, ...]:
    """The same inputs, x in channels_last: the ordinary network computes in its layout, and rounds otherwise."""
    return args[0].to(memory_format=torch.channels_last), *args[1:]


def check(value, eager, exact, floor, scale, what="") -> None:
    """`eager`: what eager PyTorch makes in the same dtype, in one layout or in several."""
    every = eager if isinstance(eager, tuple) else (eager,)
    error = (value.double() - exact).abs().max().item()
    allowed = max((v.double() - exact).abs().max().item() for v in every)
    assert error <= 2 * allowed + floor * scale, f"{what}: {error:.3g}, eager {allowed:.3g}, of {scale:.3g}"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return small_unet(**CONFIGS[request.param]).eval()


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 12], ids=str)
def test_outputs(model, dtype, size):
    args = inputs(model, size=size)
    exact = copy.deepcopy(model).double()(args[0].double(), *args[1:])
    cast = copy.deepcopy(model).to(dtype)
    fast = optimize(model, None if dtype == torch.float32 else dtype)
    with torch.no_grad():
        eager, out = (cast(*args), cast(*last(args))), fast(*args)
        assert out.dtype == torch.float32 and fast(args[0].to(dtype), *args[1:]).dtype == dtype
    check(out, eager, exact, FLOOR[dtype], exact.abs().max())
    # Weights in that dtype themselves are the same thing.
    with torch.no_grad():
        check(optimize(cast)(*args), eager, exact, FLOOR[dtype], exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(model, dtype):
    args = inputs(model)
    exact_out, exact = run(copy.deepcopy(model).double(), (args[0].double(), *args[1:]))
    cast = copy.deepcopy(model).to(dtype)
    (eager_out, eager), (eager_last, eager_grads) = run(cast, args), run(cast, last(args))
    fast_out, grads = run(optimize(copy.deepcopy(model), dtype), args)
    check(fast_out, (eager_out, eager_last), exact_out, FLOOR[dtype], exact_out.abs().max())
    assert grads.keys() == exact.keys()
    # A bias before a normalisation has no gradient but rounding: errors are measured by the largest gradient.
    scale = max(grad.abs().max().item() for grad in exact.values())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        check(grad, (eager[name], eager_grads[name]), exact[name], FLOOR[dtype], scale, name)


def test_float64():
    model = small_unet().double()
    args = inputs(model, dtype=torch.float64)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert relative_error(optimize(model)(*args), model(*args)) < FLOOR[torch.float64] * 10


def test_autocast_is_the_dtype(model):
    args = inputs(model)
    # Under autocast nothing is kept packed, and packed convolutions add a residual before they round.
    fast, cast = optimize(model), optimize(model, torch.bfloat16, pack=False)
    with torch.no_grad():
        expected = cast(*args)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(*args), expected)
    _, grads = run(fast, args, autocast=True)
    _, expected_grads = run(cast, args)
    assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())


def test_gradient_of_the_input_alone(model):
    """As in guidance: weights are frozen, and the way back to x is open."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    args = inputs(model)
    results = []
    for network in (frozen, optimize(frozen)):
        x = args[0].clone().requires_grad_()
        network(x, *args[1:]).square().sum().backward()
        results.append(x.grad)
    assert relative_error(results[1], results[0]) < FAST_VALUE


def test_golden_imagenet64_full_size():
    tensors, meta = load("unet_imagenet64_2303")
    with torch.device("meta"):
        model = UNetModel(**unet_arguments(meta["config"]))
    fast = optimize(unet_weights(model.to_empty(device="cpu")).eval())
    with torch.no_grad():
        out = fast(imagenet64_input(), tensors["timesteps"], tensors["y"])
    assert relative_error(out, tensors["out"]) < GOLDEN_FULL_SIZE_FAST


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_one_compiled_graph(mode):
    model = small_unet(num_classes=5)
    args = inputs(model)
    compiled = torch.compile(optimize(model), backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(mode == "grad"):
        assert relative_error(compiled(*args), model(*args)) < FAST_VALUE


def test_compiling_sees_what_changed_before():
    """A part of another kind, and a copy that nobody has called yet."""
    model = small_unet().eval()
    args = inputs(model)
    fast = optimize(model)
    layers = model.middle_block[0].in_layers
    layers[2] = Lora(layers[2])
    with torch.no_grad():
        assert relative_error(torch.compile(fast, backend="aot_eager")(*args), model(*args)) < FAST_VALUE
        other = copy.deepcopy(optimize(small_unet().eval()))
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(*args), small_unet().eval()(*args)) < FAST_VALUE


def test_layout_of_the_input_does_not_matter(model):
    args = inputs(model)
    fast = optimize(model)
    with torch.no_grad():
        last = args[0].to(memory_format=torch.channels_last)
        assert torch.equal(fast(last, *args[1:]), fast(*args))


def test_empty_batch(model):
    args = inputs(model, 0)
    with torch.no_grad():
        assert optimize(model)(*args).shape == (0, 3, 8, 8)


# --- what it saves --------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_idle_passes():
    """No copies between layouts or dtypes but for x, one multiplication for all embeddings, in place what can be."""
    model = small_unet(num_classes=5).eval()
    args = inputs(model, size=16)
    fast = optimize(model)
    with torch.no_grad():
        fast(*args)
        with Calls() as calls:
            fast(*args)
    counts = {name: calls.names.count(name) for name in set(calls.names)}
    blocks = sum(type(m).__name__ == "ResBlock" for m in model.modules())
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    # One of them twice: PyTorch's own loses digits in channels_last where means are large.
    assert norms <= counts["native_group_norm"] <= norms + 2 and not counts.get("silu", 0) > 2
    assert counts.get("addmm", 0) == 3  # two of the time embedding, and one for all the blocks
    assert counts.get("clone", 0) <= 2 and counts.get("contiguous", 0) == 0
    assert counts["_convolution_pointwise_"] + counts["_convolution_pointwise"] >= 2 * blocks
    assert "convolution" not in counts and "mkldnn_convolution" not in counts


def test_weights_are_made_once(model):
    fast = optimize(model, torch.bfloat16)
    args = inputs(model)
    with torch.no_grad():
        fast(*args)
        kept = {key: entry.value for key, entry in fast._fast._weights._kept.items()}
        fast(*args)
    assert kept and all(entry.value is kept[key] for key, entry in fast._fast._weights._kept.items())


def test_weights_of_the_right_kind_are_not_copied():
    model = small_unet().to(memory_format=torch.channels_last)
    weights = optimize(model)._fast._weights
    conv = model.input_blocks[1][0].in_layers[2]
    assert weights.filters(conv.weight, live=False) is conv.weight and weights.plain(conv.bias, live=False) is conv.bias


# --- the same network -----------------------------------------------------------------------------


def test_shares_everything(model):
    fast = optimize(model)
    assert isinstance(fast, FastUNet) and list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert fast.config == model.config and fast.dtype == model.dtype


def test_the_model_stays_as_it_is(model):
    args = inputs(model)
    with torch.no_grad():
        before = model(*args)
        strides = [p.stride() for p in model.parameters()]
        optimize(model, torch.bfloat16)(*args)
        assert torch.equal(model(*args), before) and type(model) is UNetModel
    assert strides == [p.stride() for p in model.parameters()]


def test_denoiser():
    model = cmfast.Denoiser(small_unet(num_classes=5), image_shape=(3, 8, 8)).eval()
    fast = optimize(model, torch.bfloat16)
    assert isinstance(fast, cmfast.Denoiser) and type(model.network) is UNetModel
    assert fast.image_shape == (3, 8, 8) and fast.num_classes == 5
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        assert relative_error(fast(x, 3.0, labels), model(x, 3.0, labels)) < 10 * FLOOR[torch.bfloat16]


def changed_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)


def loaded(model):
    model.load_state_dict({name: 1.25 * tensor for name, tensor in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({name: 1.25 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def other_storage(model):
    for p in model.parameters():
        p.data = 1.25 * p.data


def other_part(model):
    block = model.middle_block[0]
    block.in_layers[2] = copy.deepcopy(block.in_layers[2])
    with torch.no_grad():
        block.in_layers[2].weight.mul_(3)


def trained(model):
    args = inputs(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, foreach=False)
    model(*args).square().sum().backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize(
    "change", [changed_in_place, loaded, assigned, other_storage, other_part, trained], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["model", "fast"])
def test_changes_are_seen(change, dtype, side):
    model = small_unet(num_classes=5, model_channels=64).eval()
    fast = optimize(model, dtype)
    args = inputs(model)
    with torch.no_grad():
        before = fast(*args)
    change(model if side == "model" else fast)
    with torch.no_grad():
        expected = optimize(copy.deepcopy(model), dtype)(*args)
        assert torch.equal(fast(*args), expected) and not torch.equal(expected, before)


def test_refresh():
    """A write through `.data` shows no change; what is made again, not packed, is in the memory it was in."""
    model = small_unet(model_channels=64).eval()
    fast = optimize(model, torch.bfloat16, pack=False)
    args = inputs(model)
    with torch.no_grad():
        fast(*args)
        memory = {key: entry.value.data_ptr() for key, entry in fast._fast._weights._kept.items()}
        for p in model.parameters():
            p.data.mul_(1.25)
        expected = optimize(copy.deepcopy(model), torch.bfloat16, pack=False)(*args)
        assert not torch.equal(fast(*args), expected)
        assert fast.refresh(force=True) is False
        assert torch.equal(fast(*args), expected)
    assert memory == {key: entry.value.data_ptr() for key, entry in fast._fast._weights._kept.items()}
    assert fast.refresh() is False
    model.middle_block[0].in_layers[2] = copy.deepcopy(model.middle_block[0].in_layers[2])
    assert fast.refresh() is True


def test_a_hook_is_called():
    model = small_unet().eval()
    fast = optimize(model)
    args = inputs(model)
    seen = []
    handle = model.middle_block[0].register_forward_hook(lambda *_: seen.append("part"))
    with torch.no_grad():
        expected = model(*args)
        assert torch.equal(fast(*args), expected) and seen == ["part", "part"]
        assert "middle_block.0 (ResBlock) has a hook" in fast.refusal and fast.refusal == refusal(fast)
        handle.remove()
        assert fast.refusal is None
        # The network itself is called as ever, so its own hooks are.
        fast.register_forward_hook(lambda *_: seen.append("whole"))
        fast(*args)
    assert seen == ["part", "part", "whole"] and fast.refusal is None


class Lora(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.extra = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def test_a_lora_is_called():
    model = small_unet().eval()
    fast = optimize(model)
    args = inputs(model)
    layers = model.middle_block[0].in_layers
    original, layers[2] = layers[2], Lora(layers[2])
    with torch.no_grad():
        assert torch.equal(fast(*args), model(*args))
    assert fast.refusal == "middle_block.0.in_layers.2 is a Lora, expected Conv2d"
    with pytest.raises(Refused, match="is a Lora, expected Conv2d"):
        optimize(model)
    layers[2] = original
    assert fast.refusal is None


def test_a_parametrised_weight_is_used():
    model = small_unet().eval()
    fast = optimize(model)
    conv = model.middle_block[0].in_layers[2]
    nn.utils.parametrizations.weight_norm(conv)
    args = inputs(model)
    with torch.no_grad():
        assert torch.equal(fast(*args), model(*args)) and "expected Conv2d" in fast.refusal


def test_dropout():
    """Where the parts train, and masks as torch's generator has them: the same again from the same state."""
    model = small_unet(dropout=0.3, use_checkpoint=False)
    args = inputs(model)
    fast = optimize(model)
    grads = []
    for checkpointing in (False, True):
        for module in model.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = checkpointing
        for _ in range(2):
            torch.manual_seed(1)
            grads.append(run(fast, args))
    for out, grad in grads[1:]:
        assert torch.equal(out, grads[0][0])
        assert all(relative_error(g, grads[0][1][k]) < 1e-4 for k, g in grad.items() if g.abs().max() > 1e-3)
    torch.manual_seed(2)
    assert not torch.equal(fast(*args), grads[0][0])
    model.eval()
    with torch.no_grad():
        assert relative_error(fast(*args), model(*args)) < FAST_VALUE


def test_copies_are_networks_of_their_own():
    model = small_unet().eval()
    fast = optimize(model)
    args = inputs(model)
    with torch.no_grad():
        before = fast(*args)
        other = copy.deepcopy(fast)
        changed_in_place(other)
        assert torch.equal(fast(*args), before)
        assert torch.equal(other(*args), optimize(copy.deepcopy(other))(*args))
        assert not torch.equal(other(*args), before)


def test_twice_is_once():
    model = small_unet().eval()
    args = inputs(model)
    with torch.no_grad():
        assert torch.equal(optimize(optimize(model))(*args), optimize(model)(*args))


def test_inference_mode():
    model = small_unet(model_channels=64).eval()
    fast = optimize(model, torch.bfloat16)
    args = inputs(model)
    with torch.inference_mode():
        first = fast(*args)
    for _ in range(2):
        changed_in_place(model)
        with torch.no_grad():
            assert torch.equal(fast(*args), optimize(copy.deepcopy(model), torch.bfloat16)(*args))
        with torch.inference_mode():
            assert not torch.equal(fast(*args), first)


@pytest.fixture
def made(monkeypatch):
    """Counts what is made of weights."""
    count, make = [0], weights._Kept._made

    def counting(self):
        count[0] += 1
        return make(self)

    monkeypatch.setattr(weights._Kept, "_made", counting)
    return count


def packs_of(fast):
    return fast._fast._weights._packs.values()


def test_another_batch_size(made):
    """A weight is laid out once for each shape of input, and kept once where their layouts are alike."""
    model = small_unet(model_channels=64).eval()
    fast = optimize(model)
    counts = []
    for batch in (1, 4, 1, 3, 4, 3, 1):
        args = inputs(model, batch)
        with torch.no_grad():
            assert relative_error(fast(*args), model(*args)) < FAST_VALUE
        counts.append(made[0])
    assert counts[0] < counts[1] == counts[2] < counts[3] == counts[-1]
    assert all(sorted(shape[0] for shape in shapes) == [1, 3, 4] for shapes in packs_of(fast))
    alike = [len(set(shapes.values())) == len({weights._layout(kept.value) for kept in shapes.values()})
             for shapes in packs_of(fast)]  # fmt: skip
    assert alike and all(alike)


def test_parts_of_what_is_refused_are_not_compiled():
    model = small_unet(model_channels=64).eval()
    fast = optimize(model)
    model.out.append(nn.Identity())
    assert fast.compile_parts() is False and fast.refusal == "out has 4 parts, expected 3"


def test_few_shapes_are_known(monkeypatch):
    monkeypatch.setattr(weights, "SHAPES", 2)
    fast = optimize(small_unet(model_channels=64).eval())
    for batch in (1, 2, 3):
        with torch.no_grad():
            fast(*inputs(fast, batch))
    assert all([shape[0] for shape in shapes] == [2, 3] for shapes in packs_of(fast))


def test_layouts_that_differ_are_kept_apart(monkeypatch):
    """Each serves its shapes; beyond the bounds the oldest is forgotten. Weights that change are seen in all."""
    model = small_unet(model_channels=64).eval()
    fast = optimize(model)
    monkeypatch.setattr(weights, "_layout", id)
    for batch, layouts in ((1, 1), (2, 2), (3, 2), (1, 2), (5, 2)):
        with torch.no_grad():
            fast(*inputs(model, batch))
        assert {len(set(shapes.values())) for shapes in packs_of(fast)} == {layouts}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        for batch in (1, 5, 1):
            args = inputs(model, batch)
            assert relative_error(fast(*args), model(*args)) < FAST_VALUE


def test_weights_that_are_not_kept_packed():
    """`pack=False`, also of a copy: the same numbers, and nothing packed."""
    model = small_unet(model_channels=64).eval()
    fast, args = optimize(model, pack=False), inputs(model)
    for each in (fast, copy.deepcopy(fast), optimize(fast, pack=False)):
        with torch.no_grad():
            assert relative_error(each(*args), model(*args)) < FAST_VALUE
        assert not {"packed", "winograd"} & each._fast._weights.kinds()
    assert not fast.compile_parts()


# Asked of PyTorch: a fault in our own answer must not skip the test.
@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no convolutions in bfloat16 from oneDNN",
)
@pytest.mark.parametrize("of_weights", [False, True])
def test_weights_are_packed_in_bfloat16(of_weights):
    """Whether the weights are in it or not; Winograd's transforms are not for it. `test_outputs` has the numbers."""
    model = small_unet(model_channels=64).eval()
    model = model.bfloat16() if of_weights else model
    fast, args = optimize(model, None if of_weights else torch.bfloat16), inputs(model)
    with torch.no_grad():
        first = fast(*args)
        assert fast._fast._weights.kinds() >= {"packed"} and "winograd" not in fast._fast._weights.kinds()
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(fast(*args), first)
        assert torch.equal(fast(*args), optimize(model, fast._fast.dtype)(*args))
    assert not fast.compile_parts()


def test_winograd_is_used():
    model = small_unet(model_channels=64).eval()
    fast = optimize(model)
    with torch.no_grad():
        fast(*inputs(model))
    kinds = fast._fast._weights.kinds()
    assert ("winograd" in kinds) == winograd.fits(nn.Conv2d(64, 64, 3, padding=1), torch.empty(1, 64, 4, 4))


def test_parts_are_compiled(monkeypatch):
    """On a CPU, where convolutions are wide: the transforms, and with the same numbers."""
    compiled = []
    monkeypatch.setattr(winograd, "_compiled_transforms", lambda: compiled.append(1) or transforms)
    transforms = winograd._tiles_in_one, winograd._untile_in_one
    model = small_unet(model_channels=64).eval()
    fast, plain = optimize(model), optimize(model)
    args = inputs(model)
    assert fast.compile_parts() == winograd.wide(nn.Conv2d(64, 64, 3, padding=1))
    with torch.no_grad():
        assert torch.equal(fast(*args), plain(*args))
        assert bool(compiled) == fast.compile_parts()
    assert (
        not optimize(small_unet(channel_mult=[1, 1])).compile_parts()
        and not optimize(model, torch.bfloat16).compile_parts()
    )


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
@pytest.mark.slow
def test_parts_compiled_by_inductor():
    model = small_unet(model_channels=64).eval()
    fast, args = optimize(model), inputs(model)
    fast.compile_parts()
    with torch.no_grad():
        assert relative_error(fast(*args), optimize(model)(*args)) < FLOOR[torch.float32]


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match="cannot optimize a Linear: expected a UNetModel"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="dims=1: the fast pass is for two dimensions"):
        optimize(small_unet(dims=1))
    with pytest.raises(TypeError, match="dtype must be float32"):
        optimize(small_unet(), torch.int64)

    class Other(UNetModel):
        def forward(self, x, timesteps, y=None):
            return x

    assert "the Other has a forward pass of its own" in refusal(unet_weights(Other(**small_unet().config)))
    model = small_unet()
    model.middle_block[0].forward = lambda x, emb: x
    assert "middle_block.0 has a forward pass of its own" in refusal(model)
    model = small_unet()
    model.out[2] = nn.Conv2d(32, 3, 3, padding=2, dilation=2)
    assert "expected a 3x3 convolution of stride 1 with a bias" in refusal(model)
    assert refusal(small_unet()) is None
    assert refusal(cmfast.Denoiser(small_unet())) is None
    assert "cannot optimize a function" in refusal(lambda x: x)


def test_bad_input_is_refused_as_ever(model):
    x, timesteps, *y = inputs(model)
    with pytest.raises(ValueError, match="x has shape"):
        optimize(model)(x[:, :2], timesteps, *y)
