"""The kernels of LPIPS: a layer's distance, and the trunk's input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.kernels import launch, lpips, lpips_input
from cmfast.perceptual import LPIPS
from cmfast.tolerances import FLOOR
from tests.ops.matrix import upstream
from tests.ops.perceptual import Call, check_path, images, layer, layout, same

LAYERS = [(2, 64, 5, 3), (1, 5, 3, 4), (1, 1, 1, 1), (2, 37, 4, 4), (1, 192, 5, 5), (1, 512, 3, 5), (3, 3, 8, 8)]
#: Of the image, and what it becomes: up and down, not square, along one axis, to one pixel and from one; its own size.
SIZES = [
    ((2, 3, 3, 4), (6, 5)),
    ((1, 3, 2, 2), 7),
    ((1, 3, 5, 4), (2, 3)),
    ((1, 3, 4, 3), (6, 2)),
    ((1, 3, 1, 1), (3, 2)),
    ((1, 3, 4, 3), 1),
    ((1, 3, 1, 4), (2, 4)),
    ((2, 3, 3, 4), None),
    ((1, 3, 3, 4), (3, 4)),
]
layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(params=["large tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Those in use; or several for each sample, of which a program does several, and rows in several steps."""
    if request.param == "small tiles":
        for name, value in {"BLOCK": (256, 128), "STEPS": 2, "ENOUGH": 1, "SECTOR": 8}.items():
            monkeypatch.setattr(lpips, name, value)
        monkeypatch.setattr(lpips_input, "BLOCK", 16)


@pytest.fixture
def launches(monkeypatch):
    """The kernels that are launched, with their arguments."""
    seen, run = [], launch.launch

    def spy(kernel, programs, *arguments, **constants):
        seen.append((kernel.fn.__name__, arguments))
        run(kernel, programs, *arguments, **constants)

    for module in (lpips, lpips_input):
        monkeypatch.setattr(module, "launch", spy)
    return seen


@layouts
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_layer_agrees_with_float64(shape, last, tiles, device):
    check_path(layer(shape, last=last, device=device), "triton")


@layouts
@HALF
def test_layer_in_half_precision(dtype, last, device):
    call = layer((2, 24, 5, 4), dtype=dtype, last=last, device=device)
    check_path(call, "triton")
    check_path(call.having(target_features=call.tensors["target_features"].float()), "triton")
    check_path(call.having(weight=call.tensors["weight"].to(dtype)), "triton")


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_layer_of_maps_that_hardly_differ(distance, device):
    check_path(layer((2, 40, 4, 5), last=True, distance=distance, device=device), "triton")


@pytest.mark.parametrize("scales", [(1e-4, 1e4), (1e12, 1e-8)], ids=str)
def test_layer_of_maps_of_very_different_lengths(scales, device):
    call = layer((2, 40, 4, 5), last=True, device=device)
    names = "features", "target_features"
    check_path(call.having(**{k: v * call.tensors[k] for k, v in zip(names, scales)}), "triton")


@layouts
def test_layer_of_equal_maps_is_zero(last, tiles, device):
    """To the last bit, and its gradient too, whatever is contracted."""
    call = layer((2, 37, 4, 5), last=last, device=device)
    call = call.having(target_features=call.tensors["features"].clone())
    value, grads = call.run_with_grads("triton")
    assert not value.any() and not any(grad.any() for grad in grads.values())


@layouts
def test_layer_where_all_channels_are_zero(last, device):
    """In the one map, in the other, in both: the gradient is that of f / 1e-10, and 0 where the other is zero too."""
    call = layer((1, 6, 2, 2), last=last, device=device)
    for name, pixels in (("features", [0, 2]), ("target_features", [1, 2])):
        for pixel in pixels:
            call.tensors[name][:, :, pixel // 2, pixel % 2] = 0
    (value, grads), (expected, expected_grads) = (call.run_with_grads(path) for path in ("triton", "reference"))
    torch.testing.assert_close(value, expected)
    for name in ("features", "target_features"):
        # The huge and the others, each by its own measure.
        for pixel in range(4):
            mine, other = (g[name][:, :, pixel // 2, pixel % 2] for g in (grads, expected_grads))
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
    assert grads["features"][:, :, 0, 0].abs().max() > 1e8 and not grads["features"][:, :, 1, 0].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@layouts
def test_layer_passes_nan_and_infinity(last, device):
    for bad in (float("nan"), float("inf")):
        call = layer((2, 6, 2, 2), last=last, device=device)
        call.tensors["features"][1, 3, 1, 0] = bad
        assert call.run("triton").isnan().tolist() == call.run("reference").isnan().tolist() == [False, True]


OTHER_LAYOUTS = {
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0],
    "channels_last": lambda x: layout(x, True),
}


@pytest.mark.parametrize("kinds", list(itertools.product(OTHER_LAYOUTS, repeat=2)), ids="-".join)
def test_layer_wherever_the_maps_lie(kinds, device):
    call = layer((3, 12, 4, 5), device=device)
    names = "features", "target_features"
    moved = {name: OTHER_LAYOUTS[kind](call.tensors[name]) for name, kind in zip(names, kinds)}
    same(call, call.having(**moved))
    expanded = call.having(**{name: call.tensors[name][:1].expand(3, -1, -1, -1) for name in names})
    same(expanded.having(**{name: expanded.tensors[name].contiguous() for name in names}), expanded)


@pytest.mark.parametrize("kind", OTHER_LAYOUTS)
def test_input_wherever_the_image_lies(kind, device):
    call = images((1, 3, 2, 3), (4, 2), device=device)
    same(call, call.having(image=OTHER_LAYOUTS[kind](call.tensors["image"])))


@layouts
@pytest.mark.parametrize("shape, size", SIZES, ids=str)
def test_input_agrees_with_float64(shape, size, last, device):
    check_path(images(shape, size, last=last, device=device, memory_format=torch.channels_last), "triton")


@layouts
@pytest.mark.parametrize("size", [(5, 6), None], ids=str)
def test_gray_input(size, last, tiles, device):
    call = images((1, 1, 3, 4), size, last=last, device=device, memory_format=torch.channels_last)
    check_path(call, "triton")
    assert call.run("triton").shape[1] == 3


def test_input_in_several_steps_of_a_row(tiles, device):
    check_path(images((1, 3, 2, 9), (3, 20), last=True, device=device), "triton")


@layouts
@pytest.mark.parametrize("shape", [(1, 5, 2, 3), (1, 1, 2, 3)], ids=str)
def test_contiguous_input(shape, last, device):
    """And of a number of channels that is not three; in the range of pixels."""
    call = images(shape, (3, 5), last=last, device=device, memory_format=torch.contiguous_format, value_range=(0, 255))
    check_path(call.having(image=call.tensors["image"] * 255), "triton")
    assert call.run("triton").is_contiguous()


@HALF
def test_input_in_half_precision(dtype, device):
    for options in ({"image_dtype": dtype}, {"dtype": dtype}):
        check_path(images((1, 3, 2, 2), (3, 4), last=True, device=device, **options), "triton")


@pytest.mark.parametrize("last", [False, True, None])
def test_layout_of_the_input(last, device):
    formats = {False: torch.contiguous_format, True: torch.channels_last, None: None}
    for own in (False, True):
        made = images((2, 3, 4, 5), 7, last=own, device=device, memory_format=formats[last]).run("triton")
        assert made.is_contiguous(memory_format=formats[own if last is None else last])


def test_places_between_pixels_are_exact(device):
    """Of a ramp, the values at the centers of the new pixels, as near as their own rounding."""
    ramp = torch.arange(255.0, device=device).view(1, 1, 1, 255)
    one = torch.ones(1, device=device)
    with cmfast.backend("triton"):
        made = ops.lpips_input(ramp, 0 * one, one, size=(1, 224), value_range=(0, 1))
    expected = ((torch.arange(224, dtype=torch.float64) + 0.5) * 255 / 224 - 0.5).clamp(0)
    assert ((made[0, 0, 0].cpu().double() - expected) / expected.clamp(1)).abs().max() <= 2**-22


def calls(device):
    return {"layer": layer((2, 12, 6, 5), device=device), "input": images((1, 3, 2, 3), 5, last=True, device=device)}


@pytest.mark.parametrize("name", ["layer", "input"])
def test_gradient_of_one_input(name, device, launches):
    call = calls(device)[name]
    _, together = call.run_with_grads("triton")
    for wanted, expected in together.items():
        launches.clear()
        _, alone = call.run_with_grads("triton", wanted)
        torch.testing.assert_close(alone[wanted], expected)
        # What is not wanted is not written: its place has another tensor.
        if name == "layer" and wanted != "weight":
            _, (grad_f, grad_g, *_) = launches[-1]
            spare = call.tensors["features"].data_ptr()
            assert [t.data_ptr() == spare for t in (grad_f, grad_g)] == [wanted != "features", wanted == "features"]


@pytest.mark.parametrize("name", ["layer", "input"])
def test_gradients_of_gradients(name, device):
    """From the reference: the kernels know first derivatives only."""
    call, second = calls(device)[name], []
    for backend in ("triton", "reference"):
        leaves, result = call.graph(backend)
        weights = upstream(result).requires_grad_()
        first = torch.autograd.grad(result, list(leaves.values()), weights, create_graph=True)
        total = sum((g.square() * upstream(g)).sum() for g in first)
        second.append(torch.autograd.grad(total, [*leaves.values(), weights], allow_unused=True))
    for value, expected in zip(*second, strict=True):
        assert (value is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["layer", "input"])
def test_layout_of_incoming_gradients(name, device):
    """A number for all, and channels_last, where other numbers follow in memory."""
    call = calls(device)[name]
    leaves, result = call.graph("triton")
    plain = torch.full_like(result, 0.5)
    given = torch.tensor([0.5, 7.0], device=device)[0].expand_as(result)
    others = [given, *([layout(plain, True)] if plain.ndim == 4 else [])]
    expected, *made = (
        torch.autograd.grad(result, list(leaves.values()), grad, retain_graph=True) for grad in (plain, *others)
    )
    for grads in made:
        torch.testing.assert_close(grads, expected)


@layouts
def test_same_bits_on_repetition(last, tiles, device):
    for call in (layer((2, 40, 5, 8), last=last, device=device), images((1, 3, 2, 3), 5, last=last, device=device)):
        (first, first_grads), (second, second_grads) = (call.run_with_grads("triton") for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(grad, second_grads[k]) for k, grad in first_grads.items())


@layouts
def test_one_launch_each_and_no_copies(last, launches, device):
    f, g = (torch.randn(2, 8, 4, 6, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x = layout(torch.rand(1, 3, 2, 3, device=device), last)
    layer_call = Call(ops.lpips_layer, {"features": layout(f, last), "target_features": layout(g, last)}, {})
    layer_call = layer_call.having(weight=torch.rand(8, device=device))
    for call in (layer_call, images(tuple(x.shape), 5, device=device).having(image=x)):
        launches.clear()
        call.run_with_grads("triton", next(iter(call.tensors)))
        assert [name.split("_")[-2] for name, _ in launches] == ["fwd", "bwd"]
        seen = {t.data_ptr() for _, arguments in launches for t in arguments if isinstance(t, torch.Tensor)}
        assert all(v.data_ptr() in seen for v in call.tensors.values())


def test_empty(launches, device):
    """No samples, no pixels, no channels: what the reference makes, and no launch."""
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)):
        values = [layer(shape, device=device).run(backend) for backend in ("triton", "reference")]
        torch.testing.assert_close(*values, equal_nan=True)
    for size in (7, None):
        assert images((0, 3, 4, 4), size, device=device).run("triton").shape == (0, 3, size or 4, size or 4)
    assert not launches


def test_float64_is_refused(device):
    for name, call in calls(device).items():
        with pytest.raises(RuntimeError, match=f"lpips_{name}: backend 'triton' was asked for, but kernels take"):
            call.to(torch.float64).run("triton")


@pytest.fixture(scope="module")
def alex():
    pytest.importorskip("torchvision")
    torch.manual_seed(2303)
    return LPIPS("alex", pretrained=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_whole(alex, dtype, device, launches):
    """Through both kernels, in the dtype of the trunk. The interpreter cuts bfloat16 off instead of rounding it."""
    model = copy.deepcopy(alex).to(device)
    model.trunk.to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 33, 40, generator=generator).to(device) * 2 - 1
    y = (x + 0.3 * torch.randn(1, 1, 33, 40, generator=generator).to(device)).clamp(-1, 1)

    def measure(network, backend, wide=torch.float32):
        call = Call(lambda x: network(x, y.to(wide), resize=False), {"x": x.to(wide)}, {})
        value, grads = call.run_with_grads(backend)
        return value, grads["x"]

    exact, exact_grad = measure(copy.deepcopy(model).double(), "reference", torch.float64)
    eager, eager_grad = measure(model, "reference")
    launches.clear()
    value, grad = measure(model, "triton")
    assert [name for name, _ in launches] == [
        *["_lpips_input_fwd_kernel"] * 2, *["_lpips_layer_fwd_kernel"] * 5,
        *["_lpips_layer_bwd_kernel"] * 5, "_lpips_input_bwd_kernel",
    ]  # fmt: skip
    for fast, plain, high in ((value, eager, exact), (grad, eager_grad, exact_grad)):
        error, plain_error = ((each.double() - high).abs().max() for each in (fast, plain))
        assert error <= 2 * plain_error + FLOOR[dtype] * high.abs().max()


def test_references_are_named():
    assert {"lpips_layer", "lpips_input"} <= set(ops.FUSED) & set(vars(reference))
