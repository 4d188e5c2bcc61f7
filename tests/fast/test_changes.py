"""An optimised network is the network it is made of, with its weights, hooks and parts as they are now."""

import copy
import functools
import re
import threading

import pytest
import torch
from torch import nn

import cmfast
from cmfast import dropout, ops
from cmfast.fast import FastUNet, Refused, optimize, refusal
from cmfast.tolerances import FAST_VALUE, FLOOR
from cmfast.unet import UNetModel
from cmfast.unet_blocks import AttentionBlock, Downsample, GroupNorm32, ResBlock, Upsample
from tests.fast.networks import check, inputs, last, run
from tests.golden_utils import relative_error, small_unet

pytestmark = pytest.mark.usefixtures("small_networks_count")


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


@pytest.mark.parametrize("wraps", [False, True], ids=["replaced", "wrapped"])
@pytest.mark.parametrize(
    "kind, name",
    [(UNetModel, "forward"), (ResBlock, "_forward"), (AttentionBlock, "forward"), (GroupNorm32, "forward")]
    + [(nn.Conv2d, "forward")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_patch_of_a_class_is_called(kind, name, wraps, monkeypatch):
    """One of its own or of torch's; before it is optimised, and after."""
    model = small_unet().eval()
    fast, args, original = optimize(model), inputs(model), getattr(kind, name)

    def patch(*arguments):
        return 1.5 * original(*arguments)

    with torch.no_grad():
        before = fast(*args)
        monkeypatch.setattr(kind, name, functools.wraps(original)(patch) if wraps else patch)
        expected = model(*args)
        assert torch.equal(fast(*args), expected) and relative_error(before, expected) > FAST_VALUE
        message = f"the class {kind.__name__} has a forward pass of its own: {name} was replaced"
        assert refusal(fast) == refusal(model) == message
        monkeypatch.undo()
        assert fast.refusal is None and relative_error(fast(*args), before) < FAST_VALUE


def test_what_torch_wraps_is_no_patch(monkeypatch):
    """It computes the same; around a function of somebody else it does not."""
    model = small_unet().eval()
    fast = optimize(model)
    for wrap in (torch.no_grad(), torch.compile(backend="eager")):
        monkeypatch.setattr(ResBlock, "_forward", wrap(ResBlock._forward))
        assert refusal(fast) is refusal(model) is None
        monkeypatch.undo()
        monkeypatch.setattr(ResBlock, "_forward", wrap(lambda block, x, emb: x))
        assert "_forward was replaced" in refusal(fast)
        monkeypatch.undo()


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


def test_another_of_its_class():
    """An ordinary network, as no `optimize` made it."""
    fast = optimize(small_unet().eval())
    other = type(fast)(**fast.config).eval()
    other.load_state_dict(fast.state_dict())
    args = inputs(fast)
    with torch.no_grad():
        assert torch.equal(other(*args), small_unet().eval()(*args))
    assert type(optimize(other)) is type(fast)


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


def test_a_copy_with_other_parts_runs_them():
    """`nn.DataParallel` copies a module without its parts, and then puts in copies of those."""
    fast, other = optimize(small_unet().eval()), small_unet().eval()
    changed_in_place(other)
    args = inputs(other)
    with torch.no_grad():
        replica = fast._replicate_for_data_parallel()
        replica._modules.update(other._modules)
        assert torch.equal(replica(*args), other(*args)) and not torch.equal(fast(*args), other(*args))
        shallow = copy.copy(fast)
        assert torch.equal(shallow(*args), fast(*args)) and shallow.refusal is None


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


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "optimised"])
def test_activations_made_again_keep_the_backend(fast, monkeypatch):
    """The backward pass of a GPU has a thread of its own, to which the block around the forward pass means nothing."""
    network = small_unet(use_checkpoint=True, dropout=0.5).train()
    model, seen = optimize(network) if fast else network, []
    call = ops.group_norm_silu if fast else ops.dropout

    def spy(*arguments, **options):
        seen.append(ops.current_backend())
        return call(*arguments, **options)

    monkeypatch.setattr(ops, call.__name__, spy)
    errors = []

    def backward():
        try:
            loss.backward()
        except Exception as error:
            errors.append(error)

    with cmfast.backend("reference"), dropout.paired(ops.Draw(0, torch.arange(2))):
        loss = model(*inputs(network, 2)).square().mean()
        forward = len(seen)
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not errors and forward and len(seen) > forward and set(seen) == {"reference"}


def test_weights_of_inference_mode():
    """Nothing counts what is written to them."""
    args = inputs(small_unet(model_channels=64))
    with torch.inference_mode():
        model = small_unet(model_channels=64).eval()
        fast = optimize(model, torch.bfloat16)
        first = fast(*args)
        changed_in_place(model)
        expected = optimize(copy.deepcopy(model), torch.bfloat16)(*args)
        assert torch.equal(fast(*args), expected) and not torch.equal(expected, first)


def test_settings_of_torchs_modules():
    """They show no change, as they are many; after `refresh` they are used."""
    model = small_unet().eval()
    fast, args = optimize(model), inputs(model)
    with torch.no_grad():
        before = fast(*args)
        for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
            conv.padding_mode = "circular"
        assert fast.refresh(force=True) is True and "input_blocks.0.0 is Conv2d" in fast.refusal
        assert torch.equal(fast(*args), model(*args)) and not torch.equal(model(*args), before)


def test_another_class_is_called():
    class Negative(nn.Conv2d):
        def forward(self, x):
            return -super().forward(x)

    model = small_unet().eval()
    fast, args = optimize(model), inputs(model)
    with torch.no_grad():
        before = fast(*args)
        model.out[2].__class__ = Negative
        assert torch.equal(fast(*args), model(*args)) and not torch.equal(model(*args), before)
    assert "out.2 is a Negative" in fast.refusal


class Scaled(torch.Tensor):
    """As quantised weights are: a tensor in whose place another is used, and which knows few operations."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.detach:
            return cls(args[0].held)
        if func.overloadpacket not in (torch.ops.aten.addmm, torch.ops.aten.t):
            raise NotImplementedError(f"Scaled: {func}")
        out = func(*(a.held if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return cls(out) if func.overloadpacket is torch.ops.aten.t else out


def test_weights_with_rules_of_their_own():
    model = small_unet().eval().requires_grad_(False)
    fast, args = optimize(model), inputs(model)
    with torch.no_grad():
        before = fast(*args)
        linear = model.time_embed[0]
        linear.weight = nn.Parameter(Scaled(linear.weight.detach().clone()), requires_grad=False)
        assert relative_error(fast(*args), before) < 1e-5
    assert fast.refusal == "time_embed.0.weight is a Scaled, expected a plain tensor" == refusal(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", [False, True])
def test_a_torso_in_half_precision(dtype, pack):
    """As of a checkpoint in float16, and `load(dtype=...)`: the last convolution is in float32."""
    model = small_unet().eval()
    args = inputs(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(args[0].double(), *args[1:])
        model.convert_torso(dtype)
        out, eager = optimize(model, pack=pack)(*args), (model(*args), model(*last(args)))
    assert out.dtype == torch.float32
    check(out, eager, exact, FLOOR[dtype], exact.abs().max())


def test_what_torch_compile_made_is_left_alone():
    """Its attributes are those of the model inside, and so is what is written to them."""
    model = cmfast.Denoiser(small_unet(), image_shape=(3, 8, 8)).eval()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Refused, match="compiled by torch.compile: give the model itself"):
        optimize(compiled)
    assert list(model._modules) == ["network"] and "compiled" in refusal(compiled)
    network = small_unet().eval()
    network.compile(backend="eager")
    assert "compiled by its compile" in refusal(network)


@pytest.mark.parametrize("transform", ["jvp", "dual", "vmap", "grad"])
def test_transforms_take_the_ordinary_pass(transform):
    """oneDNN's convolutions know no tangents, and wrapped tensors have no memory to look at."""
    model = small_unet().eval().requires_grad_(False)
    fast, (x, t) = optimize(model), inputs(model)
    fast(x, t)
    direction = torch.linspace(-1, 1, x.numel()).view_as(x)

    def made(network):
        call = lambda x: network(x, t)  # noqa: E731
        if transform == "jvp":
            return torch.func.jvp(call, (x,), (direction,))[1]
        if transform == "vmap":
            return torch.func.vmap(call)(torch.stack([x, direction]))
        if transform == "grad":
            return torch.func.grad(lambda x: call(x).square().sum())(x)
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(call(torch.autograd.forward_ad.make_dual(x, direction)))[1]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.equal(made(fast), made(model))


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses import FakeTensorMode

    model = small_unet().eval().requires_grad_(False)
    fast, args = optimize(model, torch.bfloat16, pack=False), inputs(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert fast(*map(mode.from_tensor, args)).shape == args[0].shape
    assert type(fast(*args)) is torch.Tensor


def test_the_meta_device():
    """Shapes are asked for there."""
    model = small_unet().to("meta")
    args = [x.to("meta") for x in inputs(model)]
    assert optimize(model)(*args).shape == model(*args).shape


def test_a_part_that_occurs_twice_runs_twice():
    model = small_unet().eval()
    model.middle_block[2] = model.middle_block[0]
    fast, args = optimize(model), inputs(model)
    with torch.no_grad():
        wanted = model(*args)
        assert relative_error(fast(*args), wanted) < FAST_VALUE and fast.refusal is None
        model.middle_block.append(model.middle_block[0])
        assert relative_error(fast(*args), model(*args)) < FAST_VALUE < relative_error(model(*args), wanted)


def other_resampling(name, part, down=True):
    """Another `x_upd` or `h_upd`, or both, of a block that resamples."""

    def change(model):
        block = (model.input_blocks[2] if down else model.output_blocks[1])[-1]
        for each in name.split():
            setattr(block, each, part())

    return change


def pool(**settings):
    part = Downsample(32, False)
    part.op = nn.AvgPool2d(**{"kernel_size": 2, **settings})
    return part


def upsample(factor):
    part = Upsample(64, False)
    part.scale_factor = factor
    return part


@pytest.mark.parametrize(
    "change, message",
    [
        (other_resampling("x_upd", lambda: nn.MaxPool2d(2)), "x_upd is a MaxPool2d, expected Upsample or Downsample"),
        (other_resampling("h_upd x_upd", lambda: nn.MaxPool2d(2)), "h_upd is a MaxPool2d, expected Upsample or"),
        (other_resampling("h_upd", lambda: Downsample(32, True)), "h_upd and x_upd differ, or have a convolution"),
        (other_resampling("x_upd", lambda: Upsample(64, True), down=False), "differ, or have a convolution"),
        (other_resampling("x_upd", lambda: upsample((2.0, 2.0)), down=False), "x_upd has scale_factor=.*, expected 2"),
        (other_resampling("h_upd x_upd", lambda: pool(kernel_size=3, stride=2, padding=1)), "expected averages of 2x2"),
        (other_resampling("x_upd", lambda: pool(divisor_override=3)), "x_upd.op is AvgPool2d.*expected averages of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resampling_of_another_kind_is_called(change, message):
    model = small_unet().eval()
    fast, args = optimize(model), inputs(model)
    change(model)
    with pytest.raises(Refused, match=message):
        optimize(model)
    with torch.no_grad():
        assert torch.equal(fast(*args), model(*args))
    assert re.search(message, fast.refusal)
