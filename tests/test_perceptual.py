"""LPIPS against the lpips package and piq, on trunks with random weights: nothing is downloaded."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cmfast import perceptual
from cmfast.perceptual import LPIPS
from cmfast.reference import lpips as reference
from cmfast.tolerances import FLOOR
from tests.perceptual_utils import EXTRA, MODELS, NETS, images, make, package_heads, random_weights

MIN_SIZE = {"vgg": 16, "alex": 31, "squeeze": 17}


def random_features(net):
    torchvision = pytest.importorskip("torchvision", reason=EXTRA)
    with torch.device("meta"):
        features = getattr(torchvision.models, MODELS[net])().features
    features.to_empty(device="cpu").load_state_dict(random_weights(net))
    return features


def make_lpips_package(net):
    lpips = pytest.importorskip("lpips", reason=EXTRA)
    model = SimpleNamespace(features=random_features(net))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips.pretrained_networks.tv, MODELS[net], lambda pretrained: model)
        peer = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return lambda x, y: peer.to(x.dtype)(x, y).flatten()


def make_piq():
    piq = pytest.importorskip("piq", reason="pip install piq")
    heads = list(package_heads("vgg").values())
    model = SimpleNamespace(features=random_features("vgg"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda url, progress: heads)
        patch.setattr(piq.perceptual, "vgg16", lambda pretrained, progress: model)
        peer = piq.LPIPS(replace_pooling=True, reduction="none")
    return lambda x, y: peer((x + 1) / 2.0, (y + 1) / 2.0)


def value_and_grads(distance, x, y):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    d = distance(x, y)
    scale = torch.arange(1, len(d) + 1, dtype=d.dtype)  # so that a mix-up of samples shows
    return [d.detach(), *torch.autograd.grad((scale * d).sum(), (x, y))]


def assert_agree(ours, theirs, rtol):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= rtol * b.norm()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("size", [(33, 48), (64, 64)], ids=str)
def test_agrees_with_lpips_package(net, size):
    """In float32 the values; gradients in float64: where two values are equal but for rounding, max-pooling sends the
    gradient to one of them, and which depends on the processor."""
    model, peer = make(net, "max"), make_lpips_package(net)
    x, y = images(2, 3, *size)
    with torch.no_grad():
        assert_agree([model(x, y, resize=False)], [peer(x, y)], rtol=1e-5)
    double = copy.deepcopy(model).double()
    x, y = images(2, 3, *size, dtype=torch.float64)
    ours = value_and_grads(lambda x, y: double(x, y, resize=False), x, y)
    assert_agree(ours, value_and_grads(peer, x, y), rtol=1e-6)  # its constants are float32


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_default_agrees_with_piq(dtype, rtol):
    model, peer = copy.deepcopy(make("vgg")).to(dtype), make_piq()
    x, y = images(2, 3, 32, 48, dtype=dtype)
    ours = value_and_grads(lambda x, y: model(x, y, resize=False), x, y)
    assert_agree(ours, value_and_grads(peer, x, y), rtol)


@torch.no_grad()
def test_is_the_distance_of_the_original_losses():
    """As in consistency_losses of openai/consistency_models: resize below a width of 256, then piq."""
    x, y = images(1, 3, 20, 24)
    resized = [F.interpolate(image, size=224, mode="bilinear") for image in (x, y)]
    assert_agree([make("vgg")(x, y)], [make_piq()(*resized)], rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size, resized", [((40, 255), True), ((300, 99), True), ((40, 256), False)], ids=str)
def test_width_decides_on_resizing(size, resized):
    model = make("alex")
    pair = images(1, 3, *size)
    if resized:
        same = [F.interpolate(image, size=224, mode="bilinear") for image in pair]
    else:
        same = pair
    torch.testing.assert_close(model(*pair), model(*same, resize=False))


@torch.no_grad()
def test_value_range():
    model = make("alex")
    x, y = images(2, 3, 32, 32)
    expected = model(x, y, resize=False)
    unit = model((x + 1) / 2, (y + 1) / 2, resize=False, value_range=(0, 1))
    byte = model((x + 1) * 127.5, (y + 1) * 127.5, resize=False, value_range=(0, 255))
    torch.testing.assert_close(unit, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(byte, expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_gray_counts_as_three_equal_channels():
    model = make("alex")
    x, y = images(2, 1, 32, 40)
    expected = model(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1), resize=False)
    torch.testing.assert_close(model(x, y, resize=False), expected)


@pytest.mark.parametrize("net", NETS)
def test_empty_batch(net):
    assert make(net)(torch.zeros(0, 3, 32, 32), torch.zeros(0, 3, 32, 32)).shape == (0,)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("net", NETS)
def test_smallest_image(net, pooling):
    model, size = make(net, pooling), MIN_SIZE[net]
    assert model(*images(1, 3, size, size), resize=False).isfinite().all()
    for shape in (size - 1, size), (size, size - 1):
        with pytest.raises(ValueError, match=f"x must be {size} or more high and wide for '{net}', got"):
            model(*images(1, 3, *shape), resize=False)


def test_pooling_keeps_its_windows():
    averages = [layer for layer in make("squeeze", "avg").trunk if isinstance(layer, nn.AvgPool2d)]
    assert [(layer.kernel_size, layer.stride, layer.ceil_mode) for layer in averages] == [(3, 2, True)] * 3
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in make("squeeze", "avg").trunk)
    assert make("squeeze").pooling == make("alex").pooling == "max"


@torch.no_grad()
def test_dtypes():
    model = make("alex")
    x, y = images(2, 3, 32, 32, dtype=torch.bfloat16)
    expected = model(x.float(), y.float(), resize=False)
    assert torch.equal(model(x, y, resize=False), expected)
    assert torch.equal(model(x.float(), y, resize=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, y, resize=False)
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, expected, rtol=0.1, atol=0)
    double = copy.deepcopy(model).double()(x, y, resize=False)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected)


@pytest.mark.parametrize("net", NETS)
def test_equal_images_have_distance_zero_and_gradient_zero(net):
    x, _ = images(2, 3, 32, 32)
    d, *grads = value_and_grads(lambda x, y: make(net)(x, y, resize=False), x, x)
    assert torch.equal(d, torch.zeros(2))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_where_all_features_are_zero():
    pytest.importorskip("torchvision", reason=EXTRA)
    model = LPIPS("alex", pretrained=False)  # biases are zero, so zeros stay zeros
    model.trunk[0].weight.fill_(1)
    black, white = torch.full((1, 3, 32, 32), -1.0, requires_grad=True), torch.ones(1, 3, 32, 32)
    with torch.autograd.detect_anomaly():  # raises on a NaN in any step, also where the ReLU hides it later
        d = model(black, white, resize=False)
        d.sum().backward()
    assert d > 0
    assert torch.equal(black.grad, torch.zeros_like(black))


def plain_lpips(model, x, y):
    """The distance step by step in plain PyTorch, in the dtype of the trunk, contiguous and without a kernel."""
    trunk = copy.deepcopy(model.trunk)
    dtype = trunk[0].weight.dtype
    maps = [((image + 1) / 2 - model.mean[:, None, None]) / model.std[:, None, None] for image in (x, y)]
    maps = [each.to(dtype) for each in maps]
    distance, heads = 0, iter(model.heads.split(perceptual._TRUNKS[model.net].channels))
    for i, layer in enumerate(trunk):
        maps = [layer(each.contiguous()) for each in maps]
        if i in perceptual._TRUNKS[model.net].layers:
            distance = distance + reference.lpips_layer(*maps, next(heads))
    return distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_trunk_in_each_dtype(net, dtype):
    """error(ours) <= 2 error(plain PyTorch in the same dtype) + floor, against float64."""
    weights = {"trunk_weights": random_weights(net), "head_weights": package_heads(net)}
    model = LPIPS(net, **weights, dtype=dtype)
    x, y = images(2, 3, 40, 32)
    wide = LPIPS(net, **weights).double()
    exact = value_and_grads(lambda x, y: plain_lpips(wide, x, y), x.double(), y.double())
    plain = value_and_grads(lambda x, y: plain_lpips(model, x, y), x, y)
    ours = value_and_grads(lambda x, y: model(x, y, resize=False), x, y)
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        error, plain_error = ((each.double() - e).norm() for each in (a, b))
        assert error <= 2 * plain_error + FLOOR[dtype] * e.norm()


def test_dtype_is_that_of_the_trunk_alone():
    model = LPIPS("alex", trunk_weights=random_weights("alex"), dtype=torch.bfloat16)
    assert {buffer.dtype for buffer in model.trunk.buffers()} == {torch.bfloat16}
    assert model.heads.dtype == model.mean.dtype == torch.float32
    assert model.trunk[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16, float16 or None, got torch.float64"):
        LPIPS("alex", pretrained=False, dtype=torch.float64)


@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16], ids=str)
def test_dtype_on_a_gpu(asked):
    """bfloat16 from when it is there, unless another was asked for; traced without one."""
    model = LPIPS("alex", trunk_weights=random_weights("alex"), pretrained=False, dtype=asked)
    assert model.trunk[0].weight.dtype == (asked or torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        assert model.trunk[0].weight.dtype == (asked or torch.bfloat16) and model.heads.dtype == torch.float32
        assert model.trunk[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert model.float().trunk[0].weight.dtype == torch.float32  # asked for there
        assert model.double().trunk[0].weight.dtype == torch.float64


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_both_images_in_one_pass_where_no_graph_is_recorded(batch):
    model, passes = copy.deepcopy(make("alex")), []
    model.trunk[0].register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    x, y = images(batch, 3, 32, 32)
    expected = model(x.clone().requires_grad_(), y, resize=False).detach()
    assert passes == [batch, batch]
    for other in (y, y.bfloat16()):
        passes.clear()
        with torch.no_grad():
            made = model(x.clone().requires_grad_(), other, resize=False)
        assert passes == [2 * batch] and made.shape == (batch,)
    passes.clear()
    torch.testing.assert_close(model(x, y, resize=False), expected)
    assert passes == [2 * batch]


def test_reads_nothing_on_the_host():
    """Forward and backward: not one value comes to Python."""
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
            return func(*args, **(kwargs or {}))

    x, y = images(1, 3, 32, 32)
    with NoReads():
        make("alex")(x.requires_grad_(), y).sum().backward()
    assert x.grad.any()


def test_target_costs_no_graph():
    model, traced = copy.deepcopy(make("alex")), []
    model.trunk[0].register_forward_hook(lambda module, inputs, output: traced.append(output.requires_grad))
    x, y = images(1, 3, 32, 32)
    model(x.requires_grad_(), y, resize=False)
    assert sorted(traced) == [False, True]
    model(x, y.requires_grad_(), resize=False)
    assert traced[2:] == [True, True]


@pytest.mark.parametrize(
    "x, target, message",
    [
        ([3, 32, 32], [3, 32, 32], r"x must be \[B, 3, H, W\] or \[B, 1, H, W\], got \[3, 32, 32\]"),
        ([1, 4, 32, 32], [1, 4, 32, 32], r"x must be .* got \[1, 4, 32, 32\]"),
        ([1, 3, 32, 32], [1, 3, 32, 33], r"target must have the shape of x .*, got \[1, 3, 32, 33\]"),
        ([2, 3, 32, 32], [1, 3, 32, 32], "target must have the shape of x"),
        ([1, 3, 32, 32], [1, 1, 32, 32], "target must have the shape of x"),
        ([1, 3, 0, 32], [1, 3, 0, 32], "x must be 1 or more high and wide"),
    ],
)
def test_shape_errors(x, target, message):
    with pytest.raises(ValueError, match=message):
        make("alex")(torch.zeros(x), torch.zeros(target))


def test_other_errors_of_forward():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"value_range must be \(low, high\) with low < high, got \(1, -1\)"):
        make("alex")(x, x, value_range=(1, -1))
    with pytest.raises(TypeError, match="x must have a floating dtype, got torch.uint8"):
        make("alex")(x.byte(), x)
    with pytest.raises(TypeError, match="target is float64, the weights of LPIPS are torch.float32"):
        make("alex")(x, x.double())
    with pytest.raises(ValueError, match="x is on meta, the weights of LPIPS on cpu"):
        make("alex")(x.to("meta"), x.to("meta"))


@torch.no_grad()
def test_lpips_compiles_in_one_graph():
    x, y = images(1, 3, 32, 32)
    compiled = torch.compile(make("alex"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, resize=False), make("alex")(x, y, resize=False))
