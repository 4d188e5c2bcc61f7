"""Steps, noise, pixels and losses in C against float64, for every CPU that this one can be."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import cmfast
from cmfast import ops
from cmfast.native import losses, noise, steps
from tests.native.common import CPUS, Looking
from tests.ops.cases import CASES, OUTPUTS, flat
from tests.ops.matrix import check_path, dtype_id, make

pytestmark = pytest.mark.skipif(steps.refusal() is not None, reason=f"Steps in C: {steps.refusal()}")
IN_C = {name: case for name, case in CASES.items() if name.split()[0] in {*steps.FORMS, *losses.FORMS, "draw_pair"}}
each = pytest.mark.parametrize("name", IN_C)
#: Fewer numbers than a vector, some that fill none, a block and one, a part and more, samples smaller than a vector,
#: other numbers of dimensions.
SHAPES = [(2, 3, 7, 3), (3, 1, 1, 1), (2, 1025), (2, 3, 80, 75), (40, 3), (5,), (2, 3, 2, 4, 4)]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.fixture(autouse=True)
def means_of_few_numbers_too(monkeypatch):
    monkeypatch.setattr(ops.losses, "FEW", 0)


@pytest.fixture
def calls(monkeypatch):
    """The names of functions of C that were called."""
    names = []

    def watch(module):
        made = copy.copy(module.functions(None))
        for name, function in list(vars(made).items()):
            if callable(function):
                setattr(made, name, lambda *a, name=name, function=function: names.append(name) or function(*a))
        monkeypatch.setattr(module, "functions", lambda cpu=None: made)

    watch(steps)
    watch(losses)
    return names


def only(cpu, monkeypatch):
    """Has C serve that is compiled for a CPU."""
    for module in (steps, losses):
        made = module.functions(cpu)
        monkeypatch.setattr(module, "functions", lambda cpu=None, made=made: made)


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_values_and_gradients(name, shape, cpu, monkeypatch):
    only(cpu, monkeypatch)
    check_path(make(IN_C[name], shape, DTYPES[0], "cpu"), "auto")


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "output in channels_last", "state in channels_last"])
def test_layouts_and_outputs_of_other_dtypes(name, dtypes, layout, calls):
    """Of which all are served, and states keep their layout."""
    call = make(IN_C[name], (2, 3, 6, 5), dtypes, "cpu")
    for k, x in call.states.items():
        if layout == "channels_last" or layout.startswith("output" if k in OUTPUTS else "state"):
            call.states[k] = x.contiguous(memory_format=torch.channels_last)
    check_path(call, "auto")
    calls.clear()
    results = call.run("auto")
    assert calls
    with cmfast.backend("reference"):
        for made, expected in zip(results, call.run("reference"), strict=True):
            assert made.dtype == expected.dtype
            if expected.shape == (2, 3, 6, 5) and dtypes == DTYPES[0] and " in " not in layout:
                assert made.stride() == expected.stride()


#: Of dimensions of one element anything, such as NumPy's 0.
ODD = {
    "none": ((1, 3, 6, 5), (0, 1, 15, 3)),
    "one row": ((2, 3, 1, 4), (12, 1, 0, 3)),
    "one channel": ((2, 1, 4, 3), (12, 77, 3, 1)),
    "one sample": ((1, 3, 4, 3), (5, 12, 3, 1)),
}


@each
@pytest.mark.parametrize("which", ["states", "outputs", "all"])
@pytest.mark.parametrize("kind", ODD)
def test_strides_of_dimensions_of_one_element(name, kind, which):
    shape, strides = ODD[kind]
    call = make(IN_C[name], shape, DTYPES[0], "cpu")
    for k, x in call.states.items():
        if which == "all" or (k in OUTPUTS) == (which == "outputs"):
            call.states[k] = x.new_empty(200).as_strided(shape, strides).copy_(x)
    check_path(call, "auto")


@pytest.mark.parametrize("kind", ["scalar", "expanded", "strided"])
@each
def test_levels_lie_anywhere(name, kind):
    call = make(IN_C[name], (3, 2, 5, 4), DTYPES[0], "cpu")
    for k, sigma in list(call.sigmas.items()):
        if kind == "strided":
            call.sigmas[k] = torch.stack([sigma, -sigma], 1)[:, 0]
        else:
            call.sigmas[k] = sigma[0] if kind == "scalar" else sigma[:1].expand(3)
    check_path(call, "auto")


@each
def test_same_bits_for_any_batch_and_threads(name, monkeypatch):
    monkeypatch.setattr(steps, "LEAST", 0)
    call, before = make(IN_C[name], (3, 2, 100, 103), DTYPES[0], "cpu"), torch.get_num_threads()
    together = call.run("auto")
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, call.run("auto"), together))
    finally:
        torch.set_num_threads(before)
    if "draw" in name or name.endswith(" end"):
        return  # where samples differ by their place
    alone = copy.copy(call)
    alone.states, alone.sigmas = ({k: v[1:2] for k, v in part.items()} for part in (call.states, call.sigmas))
    for one, every in zip(alone.run("auto"), together, strict=True):
        assert torch.equal(one, every[1:2])


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("count", [1, 15, 33, 1024, 1031, 16385])
@each
def test_nothing_beyond_is_written(name, count, cpu, monkeypatch):
    only(cpu, monkeypatch)
    memory, like, empty = [], torch.empty_like, torch.empty

    def apart(x):
        """A tensor like x amid numbers that nobody may change."""
        flat = torch.full((x.numel() + 128,), 77, dtype=x.dtype)
        memory.append((flat, x.numel()))
        return flat[64 : 64 + x.numel()].view(x.shape)

    call = make(IN_C[name], (2, count), DTYPES[0], "cpu")
    # Levels of gradients come from C, too.
    leaves, _ = call.graph("auto")
    monkeypatch.setattr(steps.torch, "empty_like", lambda x: apart(like(x)))
    monkeypatch.setattr(steps.torch, "empty", lambda *size, **options: apart(empty(*size, **options)))
    call.run("auto")
    if name.split()[0] in losses.FORMS:
        call.run_with_grads("auto", levels=False)
    monkeypatch.undo()
    assert memory and leaves
    for flat_, numel in memory:
        assert (flat_[:64] == 77).all() and (flat_[64 + numel :] == 77).all()


@each
def test_who_looks_on_sees_pytorchs(name, calls):
    call = make(IN_C[name], (2, 3, 4, 4), DTYPES[0], "cpu")
    with Looking() as looking:
        call.run("auto")
    assert not calls and looking.seen - {"empty", "empty_like"}


LOSSES = [name for name in IN_C if name.split()[0] in losses.FORMS]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_before_who_looks_on(name, which, checkpointed, calls):
    """In one pass or in both: torch.utils.checkpoint finds in the other what it kept."""
    call, found = make(IN_C[name], (2, 3, 4, 4), DTYPES[0], "cpu"), []
    first = next(iter(call.states))
    for backend in ("auto", "reference"):
        leaf = call.states[first].clone().requires_grad_()

        def loss(leaf):
            return IN_C[name].call({**call.states, first: leaf}, call.sigmas)

        with cmfast.backend(backend):
            with Looking() if which != "backward" else nullcontext():
                value = checkpoint(loss, leaf, use_reentrant=False) if checkpointed else loss(leaf)
            with Looking() if which != "forward" else nullcontext():
                found.append((value, *torch.autograd.grad(value.sum(), leaf)))
    assert ("forward" in calls) == (which == "backward" or (checkpointed and which == "forward"))
    assert ("backward" in calls) == (which == "forward")
    for made, expected in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pack, unpack", [
    (lambda x: torch.stack([x, -x], -1), lambda x: x[..., 0]),
    (lambda x: x.double() if x.is_floating_point() else x, lambda x: x),
    (lambda x: x.double() if x.is_floating_point() and x.ndim == 1 else x, lambda x: x),
    (lambda x: -x if x.ndim > 1 else x, lambda x: torch._neg_view(x) if x.ndim > 1 else x),
], ids=["strides", "dtype", "of distances", "negated"])  # fmt: skip
def test_what_is_saved_comes_back_another(name, pack, unpack):
    """By a caller's hooks."""
    call, found = make(IN_C[name], (2, 3, 4, 5), DTYPES[0], "cpu"), []
    first = next(iter(call.states))
    for hooks in (torch.autograd.graph.saved_tensors_hooks(pack, unpack), nullcontext()):
        leaf = call.states[first].clone().requires_grad_()
        with hooks:
            value = IN_C[name].call({**call.states, first: leaf}, call.sigmas)
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    torch.testing.assert_close(found[0].float(), found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_negated_where_it_is_read(name, calls):
    call, found = make(IN_C[name], (2, 3, 4, 5), DTYPES[0], "cpu"), []
    first = next(iter(call.states))
    for grad in (torch._neg_view(torch.ones(2)), -torch.ones(2)):
        leaf = call.states[first].clone().requires_grad_()
        value = IN_C[name].call({**call.states, first: leaf}, call.sigmas)
        found.append(torch.autograd.grad(value, leaf, grad)[0])
    torch.testing.assert_close(*found)
    assert calls.count("backward") == 1


@pytest.mark.parametrize("name", LOSSES)
def test_many_gradients_at_once_and_gradients_of_gradients(name):
    call = make(IN_C[name], (2, 3, 4, 5), DTYPES[0], "cpu")
    first, found = next(iter(call.states)), []
    for backend in ("auto", "reference"):
        leaf = call.states[first].clone().requires_grad_()
        with cmfast.backend(backend):
            value = IN_C[name].call({**call.states, first: leaf}, call.sigmas)
        many = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
        (together,) = torch.autograd.grad(value, leaf, many, is_grads_batched=True, retain_graph=True)
        (slope,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        found.append((together, torch.autograd.grad(slope.square().sum(), leaf)[0]))
    for made, expected in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_distances_come_back_in_another_dtype(dtype):
    found = []
    for to in (dtype, torch.float32):
        leaf, options = X.clone().requires_grad_(), {"norm": "huber", "huber_c": 0.1}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=to: x.to(to) if x.ndim == 1 else x, lambda x: x):
            loss = ops.consistency_loss(leaf, X, torch.tensor(2.0), 2 * X, **options)
        found.append(torch.autograd.grad(loss.sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


X, SIGMA = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 2.0])
WITHOUT_MEMORY = {
    "zeros": lambda: torch._efficientzerotensor(X.shape),
    "sparse": lambda: X.to_sparse(),
    "a subclass": lambda: TwoTensor(X, X),
}


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_without_memory_of_their_own(kind, calls):
    ops.denoise(WITHOUT_MEMORY[kind](), X, SIGMA)
    assert not calls


@pytest.mark.parametrize("kind", ["zeros", "a subclass"])
@pytest.mark.parametrize("name", ["weighted_loss", "consistency_loss"])
def test_gradients_without_memory_of_their_own(kind, name, calls):
    leaf = X.clone().requires_grad_()
    loss = ops.weighted_loss(leaf, X, SIGMA) if name[0] == "w" else ops.consistency_loss(leaf, X, SIGMA, 2 * X)
    grad = torch._efficientzerotensor((2,)) if kind == "zeros" else TwoTensor(torch.ones(2), torch.ones(2))
    made = torch.autograd.grad(loss, leaf, grad)[0]
    assert made.shape == X.shape and "backward" not in calls


def test_a_hook_of_many_gradients(calls):
    """Its tensors stand for many, and look like one."""
    leaf = X.clone().requires_grad_()
    inner = leaf * 1
    inner.register_hook(lambda grad: ops.scale_input(grad, SIGMA)[0])
    many = torch.autograd.grad(inner.square().sum((1, 2, 3)), leaf, torch.eye(2), is_grads_batched=True)[0]
    assert many.shape == (2, *X.shape) and not calls


def test_numpys_truth():
    wanted = ops.denoise(3 * X, X, SIGMA, clip=True)
    assert torch.equal(ops.denoise(3 * X, X, SIGMA, clip=np.bool_(True)), wanted) and wanted.abs().max() == 1


def test_noise_of_a_state_in_channels_last_is_drawn_in_c(monkeypatch):
    drawn, normal = [], noise.normal
    monkeypatch.setattr(noise, "normal", lambda *args: drawn.append(1) or normal(*args))
    x = X.contiguous(memory_format=torch.channels_last)
    made, *_ = ops.add_noise(x, ops.Draw(3, torch.arange(2)), SIGMA)
    torch.testing.assert_close(made, ops.add_noise(X, ops.Draw(3, torch.arange(2)), SIGMA)[0])
    assert drawn and made.stride() == x.stride()


def test_a_trace_is_for_any_level(calls):
    """The reference is traced, not what C made of it."""
    x, f = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    traced = torch.jit.trace(lambda x, s: ops.denoise(f, x, s), (x, torch.ones(2)), check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(2 * x, torch.full((2,), 3.0)), ops.denoise(f, 2 * x, torch.full((2,), 3.0)))


@pytest.mark.parametrize("pre_dispatch", [False, True])
@each
def test_a_graph_has_pytorchs_operations(name, pre_dispatch, calls):
    call = make(IN_C[name], (2, 3, 4, 4), DTYPES[0], "cpu")
    made = make_fx(lambda states: IN_C[name].call(states, call.sigmas), pre_dispatch=pre_dispatch)(call.states)
    assert not calls
    others = {k: x + 0.5 if x.is_floating_point() else x for k, x in call.states.items()}
    for got, expected in zip(flat(made(others)), flat(IN_C[name].call(others, call.sigmas)), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_input_has_the_dtype_of_the_output(calls):
    x, f, sigma = torch.randn(2, 5), torch.randn(2, 5).bfloat16(), torch.tensor(2.0)
    results = [*ops.euler_step(f, x, sigma, sigma / 2), *ops.renoise(f, x, sigma, sigma / 2, x)]
    assert [each.dtype for each in results] == 2 * [torch.float32, torch.bfloat16, torch.float32] and len(calls) == 2


@pytest.mark.parametrize("norm, expected", [("l1", 1e20), ("l2", torch.inf), ("huber", torch.inf)])
def test_sums_beyond_float32(norm, expected, calls):
    """Are infinite, as plain PyTorch's are: the loss that a run stops for."""
    x, found = torch.full((1, 7), 1e20), []
    for backend in ("auto", "reference"):
        with cmfast.backend(backend):
            found.append(ops.weighted_loss(x, 0 * x, torch.ones(()), norm=norm).item())
    assert found == pytest.approx([expected] * 2) and calls


def test_means_of_few_numbers_are_pytorchs(calls, monkeypatch):
    monkeypatch.setattr(ops.losses, "FEW", 20)
    for norm, count, there in (("l1", 10, False), ("l2", 10, False), ("l2", 11, True), ("huber", 10, True)):
        calls.clear()
        x = torch.ones(2, count)
        assert ops.weighted_loss(x, 0 * x, torch.ones(()), norm=norm).shape == (2,)
        assert bool(calls) == there


def test_without_a_compiler(monkeypatch, calls):
    monkeypatch.setattr(steps, "refusal", lambda: "there is none")
    assert ops.explain("denoise")[0] == "reference" and "there is none" in ops.explain("denoise")[1]
    for case in IN_C.values():
        make(case, (2, 3, 4, 4), DTYPES[0], "cpu").run("auto")
    assert not calls


def test_what_is_said_of_it():
    for name in ("euler_step", "weighted_loss", "normal", "draw_pair", "radam_ema_", "ema_update_"):
        assert ops.explain(name)[0] == "C"
        path, why = ops.explain(name, dtype=torch.bfloat16)
        assert path == "reference" and "C is for float32" in why


@pytest.mark.parametrize("cpu", CPUS)
def test_pixels_are_those_of_the_reference(cpu, monkeypatch):
    """Number by number, where D is the state itself: at every boundary between two of them."""
    only(cpu, monkeypatch)
    levels = (torch.arange(256) / 127.5 - 1)[None, None]
    near = torch.cat([levels, levels.nextafter(torch.tensor(9.0)), levels.nextafter(torch.tensor(-9.0))], 1)
    x = torch.cat([near.flatten(), torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])]).view(2, 2, -1)
    for rounding in ("trunc", "nearest"):
        made = ops.to_uint8(x, rounding=rounding)
        of_d = ops.denoise_to_uint8(torch.zeros_like(x), x, torch.tensor(0.002), rounding=rounding)
        with cmfast.backend("reference"):
            expected = ops.to_uint8(x, rounding=rounding)
        assert torch.equal(made, expected) and torch.equal(of_d, expected) and made.is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("cpu", CPUS)
def test_pixels_of_an_output(cpu, layout, monkeypatch):
    """More than a block of them, of samples at levels of their own. Rounding makes a pixel another at most by one."""
    only(cpu, monkeypatch)
    x, f = (torch.randn(2, 3, 50, 33).contiguous(memory_format=layout) for _ in range(2))
    sigma, found = torch.tensor([0.3, 2.0]), []
    for backend in ("auto", "reference"):
        with cmfast.backend(backend):
            found.append(ops.denoise_to_uint8(f, x, sigma).int())
    assert found[0].shape == (2, 50, 33, 3)
    differences = (found[0] - found[1]).abs()
    assert differences.max() <= 1 and differences.float().mean() < 1e-3


def test_every_result_is_a_tensor_of_its_own():
    call = make(IN_C["add_noise_pair"], (2, 3, 4, 4), DTYPES[0], "cpu")
    results = flat(call.run("auto"))
    assert len({each.untyped_storage().data_ptr() for each in results}) == len(results)
