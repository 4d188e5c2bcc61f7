"""LPIPS in C against float64, for every CPU that this one can be."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import cmfast
from cmfast import reference
from cmfast.native import lpips, steps
from tests.native.common import CPUS, Looking
from tests.ops.matrix import upstream
from tests.ops.perceptual import check_path, images, layer

pytestmark = pytest.mark.skipif(steps.refusal() is not None, reason=f"LPIPS in C: {steps.refusal()}")

#: Fewer channels than a vector and more, fewer pixels than a part and more.
MAPS = [(2, 8, 5, 3), (1, 37, 2, 2), (3, 64, 8, 8), (1, 5, 1, 1), (2, 3, 9, 15), (1, 700, 3, 3)]
#: Larger, smaller, one way each, as large, many times as large and as small.
RESIZED = [((2, 3, 6, 5), (9, 9)), ((2, 3, 9, 8), (4, 3)), ((1, 3, 7, 9), (20, 2)), ((2, 3, 4, 4), (4, 4)),
           ((1, 1, 3, 5), (7, 11)), ((1, 2, 3, 2), (40, 35)), ((2, 5, 40, 33), (3, 2)), ((1, 3, 1, 1), (5, 5)),
           ((2, 3, 6, 5), None)]  # fmt: skip


@pytest.fixture
def no_reference(monkeypatch):
    for name in lpips.FORMS:

        def fails(*inputs, **options):
            raise AssertionError("the reference was called")

        fails.__name__ = name  # by which its form is found
        monkeypatch.setattr(reference, name, fails)


def only(cpu, monkeypatch):
    """Has C serve that is compiled for a CPU."""
    made = lpips.functions(cpu)
    monkeypatch.setattr(lpips, "functions", lambda cpu=None: made)


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_layers(shape, cpu, monkeypatch):
    only(cpu, monkeypatch)
    check_path(layer(shape, last=True), "auto", "features")


@pytest.mark.parametrize("shape, size", RESIZED, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("asked", [None, torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_images(shape, size, last, asked, cpu, monkeypatch):
    only(cpu, monkeypatch)
    call = images(shape, size, last=last, memory_format=asked)
    check_path(call, "auto", "image")
    check_path(call, "auto")
    if asked is not None:
        assert call.run("auto").is_contiguous(memory_format=asked)


def test_both_are_served(no_reference):
    for call, name in ((layer((2, 8, 5, 3), last=True), "features"), (images((2, 3, 6, 5), (9, 9)), "image")):
        value, grads = call.run_with_grads("auto", name)
        assert torch.equal(value, call.run("auto")) and grads[name].stride() == call.tensors[name].stride()


def test_gray_counts_in_all_channels(no_reference):
    call = images((2, 1, 6, 5), 9)
    every = call.having(image=call.tensors["image"].expand(2, 3, 6, 5).contiguous())
    (value, grads), (expected, expected_grads) = (each.run_with_grads("auto", "image") for each in (call, every))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads["image"], expected_grads["image"].sum(1, keepdim=True))


def test_a_range_of_values():
    call = images((2, 3, 6, 5), 9, value_range=(-3, 5))
    check_path(call, "auto", "image")


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_pixels_that_are_no_numbers_stay_where_they_are(bad):
    call = images((1, 3, 4, 4), None)
    call.tensors["image"][0, 1, 2, 2] = bad
    made = call.run("auto")
    assert (~made.isfinite()).nonzero().tolist() == [[0, 1, 2, 2]]
    assert bool(made.isinf().any()) == (bad == torch.inf)


def test_equal_maps_and_zeros(no_reference):
    call = layer((1, 6, 2, 2), last=True)
    f = call.tensors["features"].clone(memory_format=torch.preserve_format)
    value, grads = call.having(target_features=f).run_with_grads("auto", "features")
    assert not value.any() and not grads["features"].any()
    call.tensors["features"][:, :, 0, 0] = 0
    call.tensors["features"][:, :, 0, 1], call.tensors["target_features"][:, :, 0, 1] = 0, 0
    _, grads = call.run_with_grads("auto", "features")
    assert grads["features"].isfinite().all()
    assert grads["features"][:, :, 0, 0].abs().max() > 1e8 and not grads["features"][:, :, 0, 1].any()


@pytest.mark.parametrize("name", ["features", "target_features"])
def test_a_pixel_where_one_map_is_zero(name):
    """By what it is multiplied with there, 1e10, nothing else is."""
    call = layer((2, 6, 3, 2), last=True)
    call.tensors[name][:, :, 1, 0] = 0
    made, expected = call.run("auto"), call.to(torch.float64).run("reference")
    torch.testing.assert_close(made, expected.float(), rtol=1e-6, atol=0)
    if name == "target_features":
        check_path(call, "auto", "features")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_what_is_not_served(last):
    check_path(layer((2, 8, 5, 3), last=last), "auto")
    call = layer((2, 8, 5, 3), last=last)
    grad = call.run_with_grads("auto", "features")[1]["features"]
    assert grad.stride() == call.tensors["features"].stride()
    check_path(call.having(target_features=call.tensors["target_features"].contiguous()), "auto", "features")
    for name in ("target_features", "weight"):
        check_path(call, "auto", "features", name)
    check_path(images((2, 3, 6, 5), 9).having(mean=torch.rand(6)[::2], std=torch.rand(6)[::2] + 0.1), "auto")
    check_path(images((2, 3, 6, 5), 9, last=last, dtype=torch.bfloat16), "auto", "image")
    empty = images((2, 3, 6, 5), 9).having(image=torch.zeros(0, 3, 6, 5)).run("auto")
    assert empty.shape == (0, 3, 9, 9)
    nothing = torch.zeros(0)
    assert images((2, 1, 6, 5), 9).having(mean=nothing, std=nothing).run("auto").shape == (2, 0, 9, 9)


CALLS = {"layer": (lambda: layer((3, 20, 13, 12), last=True), "features"),
         "input": (lambda: images((3, 3, 40, 33), (70, 50), memory_format=torch.channels_last), "image"),
         "input, contiguous": (lambda: images((3, 3, 40, 33), (70, 50)), "image")}  # fmt: skip
#: An operation of PyTorch in each.
PYTORCHS = {name: "linalg_vector_norm" if name == "layer" else "upsample_bilinear2d" for name in CALLS}
each = pytest.mark.parametrize("name", CALLS)


@each
def test_same_bits_for_any_batch_and_threads(name, monkeypatch):
    monkeypatch.setattr(lpips, "LEAST", 0)
    make, leaf = CALLS[name]
    call, before = make(), torch.get_num_threads()
    value, grads = call.run_with_grads("auto", leaf)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again, others = call.run_with_grads("auto", leaf)
            assert torch.equal(again, value) and torch.equal(others[leaf], grads[leaf])
    finally:
        torch.set_num_threads(before)
    one = {k: v[1:2] for k, v in call.tensors.items() if v.ndim > 1}
    leaves, alone = call.having(**one).graph("auto", leaf)
    assert torch.equal(alone, value[1:2])
    (grad,) = torch.autograd.grad(alone, [leaves[leaf]], upstream(value)[1:2])
    assert torch.equal(grad, grads[leaf][1:2])


@each
@pytest.mark.parametrize("cpu", CPUS)
def test_nothing_beyond_is_written(name, cpu, monkeypatch):
    only(cpu, monkeypatch)
    memory, like, empty = [], torch.empty_like, torch.empty

    def apart(x):
        """A tensor like x amid numbers that nobody may change."""
        flat = torch.full((x.numel() + 128,), 77, dtype=x.dtype)
        memory.append((flat, x.numel()))
        return flat[64 : 64 + x.numel()].as_strided(x.shape, x.stride(), 64)

    call, leaf = CALLS[name][0](), CALLS[name][1]
    leaves, result = call.graph("auto", leaf)
    monkeypatch.setattr(lpips.torch, "empty_like", lambda x: apart(like(x)))
    monkeypatch.setattr(lpips.torch, "empty", lambda *size, **options: apart(empty(*size, **options)))
    leaves, result = call.graph("auto", leaf)
    result.sum().backward()
    monkeypatch.undo()
    assert len(memory) >= 3 and leaves
    for flat, numel in memory:
        assert (flat[:64] == 77).all() and (flat[64 + numel :] == 77).all()


@each
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_before_who_looks_on(name, which, checkpointed):
    """In one pass or in both: torch.utils.checkpoint finds in the other what it kept."""
    make, first = CALLS[name]
    call, found = make(), []
    for backend in ("auto", "reference"):
        leaf = call.tensors[first].clone(memory_format=torch.preserve_format).requires_grad_()

        def loss(leaf):
            return call.function(**{**call.tensors, first: leaf}, **call.options)

        with cmfast.backend(backend):
            with (looking := Looking()) if which != "backward" else nullcontext():
                value = checkpoint(loss, leaf, use_reentrant=False) if checkpointed else loss(leaf)
            seen = looking.seen if which != "backward" else {PYTORCHS[name]}
            assert PYTORCHS[name] in seen
            with Looking() if which != "forward" else nullcontext():
                found.append((value, *torch.autograd.grad((value * upstream(value)).sum(), leaf)))
    for made, expected in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@each
def test_who_looks_on_sees_pytorchs(name):
    with Looking() as looking:
        CALLS[name][0]().run("auto")
    assert PYTORCHS[name] in looking.seen


@each
@pytest.mark.parametrize("pack, unpack", [
    (lambda x: torch.stack([x, -x], -1), lambda x: x[..., 0]),
    (lambda x: x.double(), lambda x: x),
    (lambda x: x.double() if x.ndim == 4 else x, lambda x: x),
    (lambda x: -x, lambda x: torch._neg_view(x)),
], ids=["strides", "dtype", "dtype of images", "negated"])  # fmt: skip
def test_what_is_saved_comes_back_another(name, pack, unpack):
    """By a caller's hooks."""
    make, first = CALLS[name]
    call, found = make(), []
    for hooks in (torch.autograd.graph.saved_tensors_hooks(pack, unpack), nullcontext()):
        with hooks:
            leaves, result = call.graph("auto", first)
        found.append(torch.autograd.grad(result.sum(), leaves[first])[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@each
@pytest.mark.parametrize("kind", ["expanded", "negated", "zero"])
def test_upstream_gradients_of_any_kind(name, kind):
    make, first = CALLS[name]
    call, found = make(), []
    for backend in ("auto", "reference"):
        leaves, result = call.graph(backend, first)
        grad = {
            "expanded": torch.tensor(2.0).expand(result.shape),
            "negated": torch._neg_view(torch.ones(result.shape)),
            "zero": torch._efficientzerotensor(result.shape),
        }[kind]
        found.append(torch.autograd.grad(result, leaves[first], grad)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_many_gradients_at_once():
    call = images((2, 3, 6, 5), 9)
    leaves, result = call.graph("auto", "image")
    many = torch.randn(3, *result.shape)
    (batched,) = torch.autograd.grad(result, leaves["image"], many, is_grads_batched=True, retain_graph=True)
    for grad, expected in zip(batched, many, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(result, leaves["image"], expected, retain_graph=True)[0])


def test_gradients_of_gradients():
    call = layer((2, 8, 5, 3), last=True)
    leaves, result = call.graph("auto", "features")
    (grad,) = torch.autograd.grad(result.sum(), leaves["features"], create_graph=True)
    again = torch.autograd.grad(grad.square().sum(), leaves["features"])[0]
    leaves, result = call.graph("reference", "features")
    (grad,) = torch.autograd.grad(result.sum(), leaves["features"], create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(grad.square().sum(), leaves["features"])[0])


def test_gradients_again():
    """The same graph twice."""
    call = layer((2, 6, 2, 2), last=True)
    leaves, result = call.graph("auto", "features")
    first, second = (torch.autograd.grad(result.sum(), leaves["features"], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@each
def test_a_gradient_is_nobody_elses(name):
    """Though the one that is saved is the one of ones."""
    make, first = CALLS[name]
    leaves, result = make().graph("auto", first)
    found = [torch.autograd.grad(result.sum(), leaves[first], retain_graph=keep)[0] for keep in (True, True, False)]
    expected = found[0].clone()
    for grad in found[:2]:
        grad.mul_(3)
    torch.testing.assert_close(found[2], expected)


@each
def test_gradients_within_transforms(name):
    make, first = CALLS[name]
    leaves, result = make().graph("auto", first)

    def gradient(v):
        return torch.autograd.grad(result, leaves[first], v, retain_graph=True)[0]

    ones = torch.ones_like(result)
    torch.testing.assert_close(torch.func.functionalize(gradient)(ones), gradient(ones))
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(gradient(forward_ad.make_dual(ones, 2 * ones)))
    torch.testing.assert_close(tangent, 2 * primal)


def test_more_pixels_than_float32_counts():
    image = torch.zeros(1, 1, 1, 2**24 + 5)
    image[..., -3:] = torch.tensor([1.0, 2.0, 3.0])
    made = cmfast.ops.lpips_input(image, torch.zeros(1), torch.ones(1), value_range=(0, 1))
    assert torch.equal(made, image)


def test_resizing_is_pytorchs():
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    unit = torch.ones(3)
    made = cmfast.ops.lpips_input(x, unit - 1, unit, size=(224, 224), value_range=(0, 1))
    expected = F.interpolate(x, size=(224, 224), mode="bilinear")
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
