"""LPIPS on a CPU, a few images at a time and by C, against the same network by plain PyTorch."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cmfast
from cmfast import perceptual_cpu
from cmfast.native import winograd
from cmfast.perceptual import LPIPS
from cmfast.tolerances import FLOOR

needs_c = pytest.mark.skipif(winograd.refusal() is not None, reason=f"Winograd: {winograd.refusal()}")
pytest.importorskip("torchvision", reason='pip install "cmfast[lpips]"')


@pytest.fixture(scope="module")
def vgg():
    """With channels that count differently."""
    torch.manual_seed(0)
    lpips = LPIPS(pretrained=False)
    lpips.heads.uniform_(0.5, 1.5)
    return lpips


@pytest.fixture
def model(vgg):
    """One of its own."""
    return copy.deepcopy(vgg)


def images(batch, size=32):
    torch.manual_seed(size)
    return [torch.rand(batch, 3, size, size) * 2 - 1 for _ in range(2)]


def measured(lpips, image, target, resize=False):
    """The distances, and the gradient for weights that differ."""
    image = image.detach().requires_grad_()
    distance = lpips(image, target, resize=resize)
    (gradient,) = torch.autograd.grad(distance, image, torch.arange(1, len(image) + 1).to(distance))
    return distance.detach(), gradient


def plainly(lpips, *arguments, **options):
    with cmfast.backend("reference"):
        return measured(lpips, *arguments, **options)


def counted(monkeypatch, owner, name):
    """How often a function is called, and with what."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(args) or function(*args, **options))
    return calls


@pytest.mark.parametrize(
    "net, batch, size, resize",
    [("vgg", 3, 40, False), ("alex", 3, 40, False), ("squeeze", 3, 40, False), ("vgg", 2, 32, True)],
)
def test_values_and_gradients(monkeypatch, net, batch, size, resize):
    monkeypatch.setattr(perceptual_cpu, "PIXELS", 2 * size * size)
    torch.manual_seed(1)
    lpips, pair = LPIPS(net, pretrained=False), images(batch, size)
    wide = copy.deepcopy(lpips).double()
    exact = measured(wide, *(x.double() for x in pair), resize=resize)
    eager, fast = (f(lpips, *pair, resize=resize) for f in (plainly, measured))
    with torch.no_grad():
        fast = *fast, lpips(*pair, resize=resize)
    for made, other, expected in zip(fast, (*eager, eager[0]), (*exact, exact[0]), strict=True):
        scale = expected.norm()
        assert (made - expected).norm() <= 2 * (other - expected).norm() + 8 * FLOOR[torch.float32] * scale


@needs_c
def test_all_but_the_first_convolution_are_in_c(model, monkeypatch):
    calls = counted(monkeypatch, winograd, "convolution")
    monkeypatch.setattr(winograd, "LEAST_TILES", 0)
    measured(model, *images(1))
    weights = [layer.weight for layer in model.trunk if isinstance(layer, torch.nn.Conv2d)]
    # Of the image and of its target.
    assert [id(call[1]) for call in calls] == [id(weight) for weight in weights[1:] for _ in range(2)]


@pytest.mark.parametrize("records", [True, False])
def test_a_few_images_at_a_time(model, monkeypatch, records):
    monkeypatch.setattr(perceptual_cpu, "PIXELS", 3 * 32 * 32 - 1)
    calls, pair = counted(monkeypatch, model, "_measure"), images(5)
    with torch.set_grad_enabled(records):
        model(pair[0].requires_grad_(records), pair[1], resize=False)
    assert [len(call[0]) for call in calls] == [2, 2, 1]
    calls.clear()
    model(*images(2, 60), resize=False)  # larger than what is done at once
    assert [len(call[0]) for call in calls] == [1, 1]


def test_a_sample_has_the_same_bits_in_any_batch(model, monkeypatch):
    monkeypatch.setattr(perceptual_cpu, "PIXELS", 32 * 32)
    pair = images(3)
    together = model(*pair, resize=False)
    assert torch.equal(model(*(x[1:2] for x in pair), resize=False), together[1:2])


@needs_c
@pytest.mark.parametrize("how", ["written to", "replaced", "given up"])
def test_weights_that_change_are_seen(model, how):
    pair, layer = images(1), model.trunk[2]
    before = measured(model, *pair)
    with torch.no_grad():
        if how == "written to":
            layer.weight.neg_()
        elif how == "replaced":
            layer.weight = -layer.weight
        else:
            layer.weight.data = -layer.weight
    after = measured(model, *pair)
    assert not torch.allclose(before[0], after[0], rtol=1e-3)
    for made, expected in zip(after, plainly(model, *pair), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@needs_c
def test_filters_are_made_once(model, monkeypatch):
    measured(model, *images(1))
    calls = counted(monkeypatch, winograd, "pack")
    measured(model, *images(1))
    assert not calls
    model.to("cpu")  # which may be elsewhere, and then here again
    measured(model, *images(1))
    assert calls


@needs_c
def test_convolutions_share_memory(model):
    measured(model, *images(1))
    assert model._on_cpu._workspace.memory is not None


def test_copies_have_weights_of_their_own(model):
    pair = images(1)
    before = measured(model, *pair)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(measured(copied, *pair)[1], before[1])
        copied.trunk[5].weight.mul_(-1)
        assert not torch.equal(measured(copied, *pair)[1], before[1])
        assert torch.equal(measured(model, *pair)[1], before[1])


def test_gradients_of_gradients(model):
    """Of a penalty on the gradient."""
    found = []
    for backend in ("auto", "reference"):
        image, target = images(2)
        image.requires_grad_()
        with cmfast.backend(backend):
            (gradient,) = torch.autograd.grad(model(image, target, resize=False).sum(), image, create_graph=True)
            found += torch.autograd.grad(gradient.square().sum(), image)
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-3 * found[1].abs().max().item())


def test_within_a_checkpoint(model, monkeypatch):
    """Of the caller's: it keeps nothing, and has all of it made again, once."""
    calls = counted(monkeypatch, model, "_measure")
    image, target = images(2)
    image.requires_grad_()
    distance = checkpoint(lambda x: model(x, target, resize=False), image, use_reentrant=False)
    (gradient,) = torch.autograd.grad(distance, image, torch.tensor([1.0, 2.0]))
    assert len(calls) == 2
    torch.testing.assert_close(gradient, measured(model, image, target)[1])


@pytest.mark.parametrize("which", ["target", "heads", "trunk"])
def test_whatever_needs_a_gradient_has_one(model, which):
    image, target = images(2)
    image.requires_grad_()
    leaf = {"target": target, "heads": model.heads, "trunk": model.trunk[5].weight}[which].requires_grad_()
    gradients = []
    for backend in ("auto", "reference"):
        with cmfast.backend(backend):
            gradients += torch.autograd.grad(model(image, target, resize=False).sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


def test_hooks_are_called(model):
    shapes = []
    model.trunk[7].register_forward_hook(lambda layer, args, out: shapes.append(out.shape[1]))
    with torch.no_grad():
        model(*images(3), resize=False)
    assert shapes == [128]  # all images at once, as ever


def test_a_hook_may_keep_what_it_sees(model):
    """And add to the loss, of which there is one backward pass for all."""
    kept, (image, target) = [], images(2)
    model.trunk[8].register_forward_hook(lambda layer, args, out: kept.append(out))
    (model(image.requires_grad_(), target, resize=False).sum() + kept[0].square().mean()).backward()
    assert image.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_for_any_batch(model):
    traced = torch.jit.trace(lambda x, y: model(x, y, resize=False), tuple(images(2)), check_trace=False)
    torch.testing.assert_close(traced(*images(4)), model(*images(4), resize=False), rtol=1e-4, atol=1e-5)


def test_where_hooks_for_what_is_saved_are_forbidden(model):
    pair = images(2)
    expected = measured(model, *pair)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert torch.equal(measured(model, *pair)[1], expected[1])


def test_more_threads_have_more_images(monkeypatch):
    for threads, count in ((1, 1), (4, 1), (16, 4), (64, 16)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert perceptual_cpu.at_once(224, 224) == count
        assert perceptual_cpu.at_once(512, 512) == max(1, count * 49 // 256)


@needs_c
def test_fused_optimizers_are_seen(model):
    """They write without a trace, but for what `watch` counts."""
    pair, weight = images(1), torch.nn.Parameter(model.trunk[2].weight)
    del model.trunk[2].weight
    model.trunk[2].weight = weight
    with torch.no_grad():
        model(*pair, resize=False)
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, fused=True).step()
    with torch.no_grad():
        made = model(*pair, resize=False)
        with cmfast.backend("reference"):
            torch.testing.assert_close(made, model(*pair, resize=False), rtol=1e-4, atol=0)


def test_autocast_is_the_callers(model):
    dtypes = []
    model.trunk[3].register_forward_hook(lambda layer, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        measured(model, *images(1))
    assert set(dtypes) == {torch.bfloat16}


def test_nan_stays_with_its_image(model):
    image, target = images(3)
    image[1, 0, 3, 3] = torch.nan
    distance, gradient = measured(model, image, target)
    assert distance.isnan().tolist() == [False, True, False]
    assert gradient.isnan().flatten(1).any(1).tolist() == [False, True, False]
