"""The operations of LPIPS without kernels: what they are made of, refusals, torch.compile."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cmfast
from cmfast import ops, reference
from tests.ops.matrix import upstream
from tests.ops.perceptual import images, layer

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape, size", [((2, 3, 64, 48), 224), ((1, 3, 30, 40), (7, 50)), ((2, 3, 5, 6), None)])
def test_input_is_interpolate_then_standardise(shape, size, dtype):
    torchvision = pytest.importorskip("torchvision")
    x = torch.rand(shape, dtype=dtype) * 2 - 1
    unit = (x + 1) / 2 if size is None else (F.interpolate(x, size=size, mode="bilinear") + 1) / 2
    expected = torchvision.transforms.functional.normalize(unit, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(ops.lpips_input(x, MEAN.to(dtype), STD.to(dtype), size=size), expected)


def test_input_of_gray_and_of_pixels():
    x = torch.rand(2, 1, 6, 5)
    expected = ops.lpips_input(x.expand(2, 3, 6, 5), MEAN, STD, size=9, value_range=(0, 1))
    for size in ((9, 9), np.int64(9)):
        torch.testing.assert_close(ops.lpips_input(x, MEAN, STD, size=size, value_range=(0, 1)), expected)
    torch.testing.assert_close(ops.lpips_input(255 * x, MEAN, STD, size=9, value_range=(0, 255)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_input_rounds_once(dtype):
    call = images((2, 3, 6, 5), 9, image_dtype=dtype, memory_format=torch.channels_last)
    made = call.run("auto")
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, call.having(image=call.tensors["image"].float()).run("auto").to(dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in forward mode
@pytest.mark.parametrize("size", [None, (4, 2)], ids=str)
def test_input_gradcheck(size):
    call = images((1, 1, 3, 4), size).to(torch.float64)
    inputs = [v.requires_grad_() for v in call.tensors.values()]
    assert torch.autograd.gradcheck(lambda *given: reference.lpips_input(*given, size=size), inputs)


@pytest.mark.parametrize("call", [images((2, 3, 6, 5), 9), layer((2, 6, 4, 4))], ids=["input", "layer"])
def test_one_graph(call):
    """torch.compile(fullgraph=True) passes through, forward and backward, and changes nothing."""
    torch._dynamo.reset()
    leaves, expected = call.graph("auto")
    made = torch.compile(lambda t: call.function(**t, **call.options), fullgraph=True, backend="aot_eager")(leaves)
    torch.testing.assert_close(made, expected)
    for grads in zip(*(torch.autograd.grad(r, list(leaves.values()), upstream(r)) for r in (made, expected))):
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 3, 4, 4)
BAD = {
    r"image must have a floating dtype, got torch.uint8": {"image": X.byte()},
    r"image must be \[B, 3, H, W\] or \[B, 1, H, W\], got \[2, 4, 4, 4\]": {"image": torch.zeros(2, 4, 4, 4)},
    r"image must be \[B, 3, H, W\] or \[B, 1, H, W\], got \[3, 4, 4\]": {"image": X[0]},
    r"mean must be a torch.Tensor \[C\], got \[1, 3, 1, 1\]": {"mean": MEAN.view(1, 3, 1, 1)},
    r"mean must be a torch.Tensor \[C\], got 0.5": {"mean": 0.5},
    r"mean is on meta, x on cpu": {"mean": MEAN.to("meta")},
    r"std must be \[C\] = \[3\], got \[1\]": {"std": STD[:1]},
    r"size must be \(H, W\) of 1 or more, of an image that has pixels, got \(4, 0\)": {"size": (4, 0)},
    r"size must be a shape of integers of 0 or more, got 224.0": {"size": 224.0},
    r"size must be a shape of integers of 0 or more, got \(3.5, 4\)": {"size": (3.5, 4)},
    r"size must be a shape of integers of 0 or more, got \(True, True\)": {"size": True},
    r"size must be .* got \(4, 4, 4\)": {"size": (4, 4, 4)},
    r"size must be .* got 7 for \[0, 4\]": {"image": X[:, :, :0], "size": 7},
    r"value_range must be \(low, high\) with low < high, got \(1, 1\)": {"value_range": (1, 1)},
    r"dtype must be float32.* got torch.int8": {"dtype": torch.int8},
    r"memory_format must be": {"memory_format": torch.preserve_format},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.lpips_input(**{"image": X, "mean": MEAN, "std": STD, **BAD[message]})


def test_a_weight_elsewhere_is_refused():
    with pytest.raises(ValueError, match="weight is on meta, features on cpu"):
        ops.lpips_layer(X, X, torch.zeros(3, device="meta"))


def test_meta_tensors_and_transforms_take_the_reference():
    assert ops.lpips_input(X.to("meta"), MEAN.to("meta"), STD.to("meta"), size=7).shape == (2, 3, 7, 7)
    assert ops.lpips_layer(X.to("meta"), X.to("meta"), MEAN.to("meta")).shape == (2,)
    call = layer((2, 6, 4, 4))
    vmapped = torch.func.vmap(lambda f: ops.lpips_layer(f[None], f[None] + 1, call.tensors["weight"])[0])
    f = call.tensors["features"]
    torch.testing.assert_close(vmapped(f), ops.lpips_layer(f, f + 1, call.tensors["weight"]))


def test_info_names_them():
    with cmfast.backend("auto"):
        for name in ("lpips_input", "lpips_layer"):
            assert name in ops.FUSED and "GPU" in ops.explain(name)[1]
        assert ops.explain("lpips_layer")[0] == "C"


def layer_inputs(*shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    f, g = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return f.to(dtype), g.to(dtype), torch.rand(shape[1], generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-10], ids=["unit", "as small as epsilon"])
def test_layer_is_the_formula(scale):
    f, g, weight = layer_inputs(2, 5, 3, 4, scale=scale)
    expected = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                u, v = f[b, :, i, j], g[b, :, i, j]
                delta = u / (u.dot(u) ** 0.5 + 1e-10) - v / (v.dot(v) ** 0.5 + 1e-10)
                expected[b] += weight.dot(delta**2) / 12
    torch.testing.assert_close(ops.lpips_layer(f, g, weight), expected, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in forward mode
def test_layer_gradcheck():
    inputs = [tensor.requires_grad_() for tensor in layer_inputs(2, 3, 2, 2)]
    torch.autograd.gradcheck(reference.lpips_layer, inputs, check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_accumulates_in_float32(dtype):
    f, g, weight = layer_inputs(2, 512, 3, 3, dtype=dtype, scale=300)  # squares overflow float16
    assert torch.equal(ops.lpips_layer(f, g, weight), ops.lpips_layer(f.float(), g.float(), weight.float()))


def test_layer_compiles_in_one_graph():
    inputs = layer_inputs(2, 3, 4, 4)
    compiled = torch.compile(ops.lpips_layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), ops.lpips_layer(*inputs))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": torch.zeros(3, 4)}, ValueError, r"features must be \[B, C, H, W\], got \[3, 4\]"),
        ({"features": torch.zeros(2, 3, 4, 4).int()}, TypeError, "features must have a floating dtype"),
        ({"target_features": torch.zeros(2, 3, 4, 5)}, ValueError, "target_features must have the shape of"),
        ({"target_features": None}, TypeError, "target_features must be a torch.Tensor, got NoneType"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[C\] with C = 3, got \[4\]"),
        ({"weight": torch.zeros(1, 3, 1, 1)}, ValueError, r"weight must be \[C\]"),
        ({"weight": torch.zeros(3).long()}, TypeError, "weight must have a floating dtype, got torch.int64"),
    ],
)
def test_layer_errors(change, error, message):
    arguments = {
        "features": torch.zeros(2, 3, 4, 4),
        "target_features": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(3),
    }
    with pytest.raises(error, match=message):
        ops.lpips_layer(**(arguments | change))
