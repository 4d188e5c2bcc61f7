"""An optimised network is the network it is made of, with its weights, hooks and parts as they are now."""

import copy
import threading

import pytest
import torch
from torch import nn

import cmfast
from cmfast import dropout, ops
from cmfast.fast import FastUNet, Refused, optimize, refusal
from cmfast.tolerances import FAST_VALUE, FLOOR
from cmfast.unet import UNetModel
from tests.fast.networks import inputs, run
from tests.golden_utils import relative_error, small_unet

pytestmark = pytest.mark.usefixtures("winograd_for_small_networks")


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
