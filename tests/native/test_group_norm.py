"""GroupNorm in C against float64, with all of its gradients, for every CPU that this one can be."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import cmfast
from cmfast import ops, reference
from cmfast.native import group_norm
from cmfast.tolerances import FLOOR
from tests.native.common import CPUS, Looking

pytestmark = pytest.mark.skipif(group_norm.refusal() is not None, reason=f"GroupNorm in C: {group_norm.refusal()}")
#: Sizes of x, and groups: of six channels and of one, all in one, more samples than threads and fewer, more pixels than
#: a part and parts that are not full, single pixels, other numbers of dimensions.
SHAPES = [((2, 192, 9, 7), 32), ((1, 16, 45, 33), 16), ((3, 48, 5, 5), 1), ((5, 32, 1, 1), 8), ((1, 64, 40, 30), 4)]
SHAPES += [((2, 32, 11), 4), ((2, 16, 3, 4, 5), 2), ((1, 16400, 2, 1), 8)]
NAMES = "x weight bias scale shift".split()


def last(x: torch.Tensor) -> torch.Tensor:
    """In channels_last, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def given(shape, film=True, dtype=torch.float32, mean=0.5) -> list[torch.Tensor]:
    """x, weight, bias, and the halves of a projection, or None."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(size, generator=generator)

    x = last(normal(*shape) + mean).to(dtype)
    scale, shift = (0.5 * normal(shape[0], 2 * shape[1])).chunk(2, 1)
    return [x, normal(shape[1]), normal(shape[1]), *((scale, shift) if film else (None, None))]


def exact(every, grad, groups, **options):
    """The result and every gradient in float64, and of plain PyTorch in the dtype of x."""
    found = []
    for convert in (lambda t: t.double(), lambda t: t):
        leaves = [None if t is None else convert(t).detach().requires_grad_() for t in every]
        x, weight, bias, scale, shift = leaves
        with cmfast.backend("reference"):
            y = ops.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, **options)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], convert(grad))
        found.append([y.detach(), *grads])
    return found


def near(made, eager, expected) -> None:
    """By the rule of tolerances.py, for the size of all of it."""
    floor = 4 * FLOOR[made.dtype] * expected.abs().max()
    error, of_eager = ((t.double() - expected).abs().max() for t in (made, eager))
    assert error <= 2 * of_eager + floor


@pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
@pytest.mark.parametrize("dtype", group_norm.DTYPES, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_values_and_gradients(shape, groups, cpu, dtype, film):
    every = given(shape, film, dtype)
    grad = last(torch.randn(shape)).to(dtype)
    for silu in (True, False):
        options = {"eps": 1e-3, "silu": silu}
        expected, eager = exact(every, grad, groups, **options)
        y, moments = group_norm.forward(*every, num_groups=groups, cpu=cpu, **options)
        grads = group_norm.backward(grad, *every, moments, num_groups=groups, silu=silu, cpu=cpu)
        made = [y, *(t for t in grads if t is not None)]
        assert y.stride() == every[0].stride() and len(made) == len(expected)
        for each in zip(made, eager, expected, strict=True):
            near(*each)


@pytest.mark.parametrize("cpu", CPUS)
def test_silu_of_large_numbers(cpu):
    """Also of those whose exponential is no number, or none but zero."""
    z = torch.tensor([0.0, 1e-30, 1.0, 10.0, 80.0, 120.0, 1e5, 3e38])
    z = torch.cat([z, -z])
    x, weight = last(torch.randn(1, 16, 3, 3)), torch.zeros(16)
    options = {"num_groups": 4, "silu": True, "cpu": cpu}
    y, moments = group_norm.forward(x, weight, z, None, None, eps=1e-5, **options)
    wide = z.double().requires_grad_()
    expected = torch.nn.functional.silu(wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    *_, of_bias, _, _ = group_norm.backward(torch.ones_like(x), x, weight, z, None, None, moments, **options)
    for made, right in ((y[0, :, 1, 1], expected), (of_bias / 9, slope)):
        torch.testing.assert_close(made.double(), right, rtol=4e-7, atol=1e-33)


@pytest.mark.parametrize("mean", [1e2, -1e4, 1e6])
def test_means_larger_than_deviations(mean):
    """They cost no digits, here and in the gradients, where PyTorch's in this layout do."""
    every, grad = given((2, 32, 16, 16), mean=mean), last(torch.randn(2, 32, 16, 16))
    expected, _ = exact(every, grad, 8, silu=False)
    y, moments = group_norm.forward(*every, num_groups=8, eps=1e-5, silu=False)
    grads = group_norm.backward(grad, *every, moments, num_groups=8, silu=False)
    for made, right in zip((y, *grads), expected, strict=True):
        assert (made - right).abs().max() <= 3e-6 * right.abs().max()
    variance, of_mean = torch.var_mean(every[0].double().unflatten(1, (8, 4)), (2, 3, 4), correction=0)
    torch.testing.assert_close(moments[1].double(), (variance + 1e-5).rsqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(moments[0] - moments[2] / moments[1].double(), of_mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", group_norm.DTYPES, ids=str)
def test_same_bits_for_any_batch_and_threads(dtype):
    x, weight, bias, scale, shift = given((5, 64, 24, 24), dtype=dtype)
    grad, before = last(torch.randn(5, 64, 24, 24)).to(dtype), torch.get_num_threads()

    def run(which):
        film, options = (scale[which], shift[which]), {"num_groups": 8, "silu": True}
        y, moments = group_norm.forward(x[which], weight, bias, *film, eps=1e-5, **options)
        return y, group_norm.backward(grad[which], x[which], weight, bias, *film, moments, **options)[0]

    together = run(slice(None))
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for which in (slice(None), slice(3, 4), slice(1, 3)):
                for made, expected in zip(run(which), together, strict=True):
                    assert torch.equal(made, expected[which])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("dtype", group_norm.DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_nothing_beyond_is_read_or_written(monkeypatch, shape, groups, dtype, cpu):
    """Memory that is not an argument's is NaN, and stays so; what is made is written whole."""
    margin = 256
    held = []

    def within(x):
        """x between margins."""
        flat = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype)
        inner = flat[margin:-margin]
        held.append(flat)
        return inner.view(x.movedim(1, -1).shape).movedim(-1, 1).copy_(x) if x.ndim > 1 else inner.copy_(x)

    def empty(*size, dtype=None, device=None):
        size = size[0] if isinstance(size[0], (tuple, list)) else size
        flat = torch.full((torch.Size(size).numel() + 2 * margin,), torch.nan, dtype=dtype)
        held.append(flat)
        return flat[margin:-margin].view(size)

    every = [within(t) if i != 3 and i != 4 else t for i, t in enumerate(given(shape, dtype=dtype))]
    grad = within(last(torch.randn(shape)).to(dtype))
    alone, moments = group_norm.forward(*every, num_groups=groups, eps=1e-5, silu=True, cpu=cpu)
    grads = group_norm.backward(grad, *every, moments, num_groups=groups, silu=True, cpu=cpu)
    monkeypatch.setattr(group_norm.torch, "empty", empty)
    monkeypatch.setattr(group_norm.torch, "empty_like", lambda x: within(torch.full_like(x, torch.nan)))
    y, moments = group_norm.forward(*every, num_groups=groups, eps=1e-5, silu=True, cpu=cpu)
    again = group_norm.backward(grad, *every, moments, num_groups=groups, silu=True, cpu=cpu)
    monkeypatch.undo()
    assert torch.equal(y, alone) and all(map(torch.equal, again, grads))
    assert all(flat[:margin].isnan().all() and flat[-margin:].isnan().all() for flat in held)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", group_norm.DTYPES, ids=str)
def test_nan_stays_with_its_group(dtype, value):
    x, weight, bias, *_ = given((3, 32, 6, 6), film=False, dtype=dtype)
    x[1, 3, 2, 2] = value
    y, moments = group_norm.forward(x, weight, bias, None, None, num_groups=4, eps=1e-5, silu=True)
    grad = torch.ones_like(x)
    of_x, *_ = group_norm.backward(grad, x, weight, bias, None, None, moments, num_groups=4, silu=True)
    for made in (y, of_x):
        nan = made.isnan().flatten(2).any(2)
        assert nan[1, :8].all() and nan.sum() == 8


@pytest.mark.parametrize("cpu", CPUS)
def test_bfloat16_is_rounded_once(cpu):
    """To the nearest, as of float32: whatever is computed in between is in float32."""
    every, options = given((2, 32, 9, 7), dtype=torch.bfloat16), {"num_groups": 8, "silu": True, "cpu": cpu}
    wide = [every[0].float(), *every[1:]]
    (y, moments), (y_wide, _) = (group_norm.forward(*given, eps=1e-5, **options) for given in (every, wide))
    assert torch.equal(y, y_wide.bfloat16())
    grad = last(torch.randn(2, 32, 9, 7)).bfloat16()
    pairs = (grad, every), (grad.float(), wide)
    of_x, of_wide = (group_norm.backward(g, *given, moments, **options)[0] for g, given in pairs)
    assert torch.equal(of_x, of_wide.bfloat16())


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
def test_nan_stays_nan_in_bfloat16(bits):
    """Whatever its bits, which rounding would carry over into the sign."""
    bias = torch.zeros(16, dtype=torch.int32).fill_(bits).view(torch.float32)
    x = last(torch.randn(1, 16, 2, 2)).bfloat16()
    y, _ = group_norm.forward(x, torch.ones(16), bias, None, None, num_groups=4, eps=1e-5, silu=False)
    assert y.isnan().all()


def leaves(every) -> list[torch.Tensor]:
    return [t.detach().requires_grad_() for t in every]


def operation(x, weight, bias, scale, shift, **options):
    return ops.group_norm_silu(x, 8, weight, bias, scale=scale, shift=shift, **options)


def test_the_operation_takes_it(monkeypatch):
    """With what is added before, dropout, and gradients that lie otherwise."""
    calls = []
    forward = group_norm.forward
    monkeypatch.setattr(group_norm, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    every = given((2, 32, 9, 5))
    draw = ops.Draw(3, torch.arange(2), 5)
    options = {"x_bias": torch.randn(32), "residual": last(torch.randn(2, 32, 9, 5)), "dropout": 0.4, "draw": draw}
    for change in (lambda t: t, lambda t: t.bfloat16() if t.ndim == 4 else t, lambda t: t.bfloat16()):
        changed = [change(t) for t in every]
        upstream = torch.randn(2, 32, 9, 5).to(changed[0].dtype)
        found = []
        for backend in ("auto", "reference"):
            inputs = leaves(changed)
            with cmfast.backend(backend):
                y, total = operation(*inputs, **options)
            found.append([y.detach(), total.detach(), *torch.autograd.grad(y, inputs, upstream)])
        for made, expected in zip(*found, strict=True):
            assert made.dtype == expected.dtype
            scale = expected.float().abs().max().item()
            tolerance = 2e-5 if made.dtype == changed[0].dtype == torch.float32 else 2e-2
            torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance * scale)
    assert len(calls) == 3


def test_gradients_of_gradients_and_of_some_inputs():
    every, found = given((2, 32, 4, 3)), []
    for backend in ("auto", "reference"):
        inputs = leaves(every)
        with cmfast.backend(backend):
            (first,) = torch.autograd.grad(operation(*inputs).sin().sum(), inputs[0], create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), inputs))
            weight = inputs[1]
            found[-1] += torch.autograd.grad(operation(every[0], weight, *every[2:]).sum(), weight)
    for made, expected in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_many_gradients_at_once():
    every = given((2, 32, 4, 3))
    inputs = leaves(every)
    y, many = operation(*inputs), torch.randn(3, 2, 32, 4, 3)
    together = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda grad: torch.autograd.grad(y, inputs, grad, retain_graph=True))(many)
    for made, expected in zip(mapped, together, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    for i, grad in enumerate(many):
        for made, expected in zip(together, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(made[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.contiguous(), id="contiguous"),
        pytest.param(lambda x: x[:, :24], id="channels"),
        pytest.param(lambda x: last(x[:, :8]), id="no line"),
        pytest.param(lambda x: x.double(), id="float64"),
        pytest.param(lambda x: x.half(), id="float16"),
        pytest.param(lambda x: x[:0], id="empty"),
        pytest.param(lambda x: x[:, :, 0, 0], id="no pixels"),
    ],
)
def test_what_it_does_not_do(change):
    x = last(torch.randn(2, 32, 5, 3))
    assert group_norm.fits(x) and not group_norm.fits(change(x))


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_who_looks_on_sees_pytorchs(which, checkpointed):
    """In the pass that it looks on at, and torch.utils.checkpoint finds in the other what it kept."""
    every, found = given((2, 32, 5, 3)), []
    for backend in ("auto", "reference"):
        inputs, first, second = leaves(every), Looking(), Looking()
        with cmfast.backend(backend):
            with first if which != "backward" else nullcontext():
                y = checkpoint(operation, *inputs, use_reentrant=False) if checkpointed else operation(*inputs)
            with second if which != "forward" else nullcontext():
                grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
        assert "var_mean" in first.seen or which == "backward"
        assert second.seen or which == "forward"
        found.append((y, *grads))
    for made, expected in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_a_trace_is_not_of_it():
    said, x = [], last(torch.randn(2, 32, 5, 3))
    torch.jit.trace(lambda x: said.append(group_norm.fits(x)) or x + 1, x)
    assert said[0] is False


def test_a_gradient_that_is_traced():
    """The graph is for other gradients as well."""
    inputs = leaves(given((2, 32, 5, 3)))
    y = operation(*inputs)

    def gradient(grad):
        return torch.autograd.grad(y, inputs[0], grad, retain_graph=True)[0]

    graph, other = make_fx(gradient)(torch.ones_like(y)), torch.randn_like(y)
    torch.testing.assert_close(graph(other), gradient(other), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    """Which traces the backward pass, where C is no operation."""
    every, grads = given((2, 32, 5, 3)), []
    for context in (nullcontext(), compiled_autograd._enable(torch.compile(backend="eager"))):
        inputs = leaves(every)
        y = operation(*inputs)
        with context:
            y.square().sum().backward()
        grads.append([each.grad for each in inputs])
    for made, expected in zip(*grads, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pack, unpack", [
    pytest.param(lambda t: t.contiguous(), lambda t: t, id="contiguous"),
    pytest.param(lambda t: (t.shape, t.flatten().clone()), lambda kept: kept[1].view(kept[0]), id="flat"),
])  # fmt: skip
def test_what_is_saved_in_another_layout(pack, unpack):
    """By hooks of the caller's, which keep it elsewhere."""
    every = given((2, 32, 5, 3))
    inputs, grad = leaves(every), torch.randn(2, 32, 5, 3)
    expected = torch.autograd.grad(operation(*inputs), inputs, grad)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = operation(*inputs)
    for made, right in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_negated_where_it_is_read():
    inputs = leaves(given((2, 32, 5, 3)))
    y, grad = operation(*inputs), last(torch.randn(2, 32, 5, 3))
    expected = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    for made, right in zip(torch.autograd.grad(y, inputs, torch._neg_view(-grad)), expected, strict=True):
        assert torch.equal(made, right)


def test_a_network_without_a_compiler(monkeypatch):
    every = given((2, 32, 5, 3))
    made = operation(*every)
    monkeypatch.setattr(group_norm, "refusal", lambda: "there is no C compiler")
    monkeypatch.setattr(group_norm, "forward", lambda *args, **options: pytest.fail("it was called"))
    torch.testing.assert_close(operation(*every), made)


def test_layers_of_a_network(monkeypatch):
    """Those of `optimize` take it, forward and backward."""
    calls = []
    for name in ("forward", "backward"):
        function = getattr(group_norm, name)
        wrapped = lambda *args, f=function, n=name, **options: calls.append(n) or f(*args, **options)  # noqa: E731
        monkeypatch.setattr(group_norm, name, wrapped)
    model = cmfast.UNetModel(
        image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(1,),
        channel_mult=(1, 2),
    )  # fmt: skip
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    out = cmfast.optimize(model)(torch.randn(1, 3, 8, 8), torch.ones(1))
    out.sum().backward()
    assert calls.count("forward") == calls.count("backward") == norms


def test_reference_says_the_same():
    x, weight, bias, scale, shift = given((2, 32, 5, 3))
    y = reference.group_norm_silu(x, 8, weight, bias, scale=scale, shift=shift)
    torch.testing.assert_close(operation(x, weight, bias, scale, shift), y)
