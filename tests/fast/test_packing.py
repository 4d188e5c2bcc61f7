"""Weights as oneDNN wants them: made once, for few shapes, again when they change; Winograd's where it gains."""

import copy

import pytest
import torch
from torch import nn

from cmfast.fast import optimize, weights
from cmfast.native import winograd
from cmfast.tolerances import FAST_VALUE
from tests.fast.networks import inputs
from tests.golden_utils import relative_error, small_unet

pytestmark = pytest.mark.usefixtures("small_networks_count")


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


def test_what_is_refused_is_compiled():
    model = small_unet(model_channels=64).eval()
    fast = optimize(model)
    model.out.append(nn.Identity())
    assert fast.faster_uncompiled is False and fast.refusal == "out has 4 parts, expected 3"


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
    assert not fast.faster_uncompiled


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
    assert not fast.faster_uncompiled


@pytest.mark.skipif(winograd.refusal() is not None, reason=f"Winograd: {winograd.refusal()}")
def test_winograd_is_used(monkeypatch):
    """Where there are channels enough, of doubled images as well. A compiler would take its convolutions away."""
    model, doubled, convolve = small_unet(model_channels=64).eval(), set(), winograd.convolve

    def noted(*args, **options):
        doubled.add(options["doubled"])
        return convolve(*args, **options)

    monkeypatch.setattr(winograd, "convolve", noted)
    for channels, used in ((64, True), (1000, False)):
        monkeypatch.setattr(winograd, "LEAST_CHANNELS", channels)
        fast = optimize(model)
        with torch.no_grad():
            fast(*inputs(model))
        assert ("winograd" in fast._fast._weights.kinds()) == used == fast.faster_uncompiled
        assert doubled == ({True, False} if used else set())
        doubled.clear()


def test_without_a_compiler(monkeypatch):
    """oneDNN's convolutions serve, with and without gradients."""
    monkeypatch.setattr(winograd, "refusal", lambda: "there is no C compiler")
    monkeypatch.delattr(winograd, "functions")
    model = small_unet(model_channels=64).eval()
    fast, args = optimize(model), inputs(model)
    with torch.no_grad():
        assert relative_error(fast(*args), model(*args)) < FAST_VALUE
    assert relative_error(fast(*args), model(*args)) < FAST_VALUE and not fast.faster_uncompiled
    assert {"packed"} <= fast._fast._weights.kinds() and "winograd" not in fast._fast._weights.kinds()
