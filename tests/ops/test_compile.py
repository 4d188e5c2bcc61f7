"""torch.compile(fullgraph=True) on CUDA, traced here without a GPU: fake tensors, no launch."""

from types import SimpleNamespace

import pytest
import torch
import torch.utils._triton
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

import cmfast
from cmfast import ops
from cmfast.ops import _dispatch
from tests.ops import cases, perceptual
from tests.ops.cases import CASES, flat
from tests.ops.norms import make

pytestmark = pytest.mark.skipif(
    not _dispatch.HAS_TRITON or _dispatch.INTERPRETING, reason="traces launches of compiled kernels"
)
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MODE = FakeTensorMode()


@pytest.fixture(autouse=True)
def as_with_a_gpu(monkeypatch):
    # Dynamo wraps kernels only where it sees a GPU.
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    # Real ones of other tests do not go with fake tensors.
    monkeypatch.setattr(cases, "_indices", {})
    torch._dynamo.reset()


def cuda(*shape, **options):
    with MODE:
        return torch.empty(*shape, device="cuda", **options)


def traced(function, *arguments):
    """The results of a function compiled whole, and how many kernels its graph launches."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with MODE:
        results = flat(torch.compile(function, fullgraph=True, backend=keep)(*arguments))
    modules = [module for graph in graphs for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    names = [str(node.target) for module in modules for node in module.graph.nodes]
    return results, sum("triton_kernel_wrapper" in name for name in names)


@each
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_operation(case, gradient, backend):
    """Whole, in one graph. `auto` leaves to inductor what inductor fuses, and keeps the kernels that draw noise."""
    states = {k: cuda(2, 3, 8, 8).requires_grad_(gradient) for k in case.states}
    sigmas = {k: cuda(2) for k in case.sigmas}
    with cmfast.backend(backend):
        results, kernels = traced(case.call, states, sigmas)
    expected = flat(case.call({k: torch.ones(2, 3, 8, 8) for k in states}, {k: torch.ones(2) for k in sigmas}))
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]
    drawn = any(name.endswith("drawn") and each is case for name, each in CASES.items())
    assert (kernels > 0) == (backend == "triton" or drawn)


@pytest.mark.parametrize("name", ["scale_input", "add_noise_pair", "renoise drawn", "euler_step", "heun_corrector"])
def test_training_in_two_graphs(name, monkeypatch):
    """AOTAutograd makes the backward pass too, with results among them that have no gradient."""
    import triton
    from triton.backends.compiler import GPUTarget

    # It would ask a GPU for its stream, and asks what a kernel writes, of which it makes the program for a GPU.
    monkeypatch.setattr(_dispatch, "device_refusal", lambda device: None)
    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    case, graphs = CASES[name], []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with MODE, cmfast.backend("triton"):
        states = {k: torch.empty(2, 3, 8, 8, requires_grad=True) for k in case.states}
        sigmas = {k: torch.empty(2) for k in case.sigmas}
        compiled = torch.compile(case.call, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        results = flat(compiled(states, sigmas))
        sum(result.sum() for result in results if result.requires_grad).backward()
    assert len(graphs) == 2 and any(state.grad is not None for state in states.values())


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_dropout(gradient):
    """The kernel, in both passes, since it draws."""
    x, index = cuda(2, 3, 4, 4).requires_grad_(gradient), cuda(2, dtype=torch.int64)
    results, kernels = traced(lambda x, index: ops.dropout(x, 0.2, ops.Draw(7, index)), x, index)
    assert results[0].shape == (2, 3, 4, 4) and results[0].requires_grad == gradient
    assert kernels == 1 + gradient


def test_normal():
    results, kernels = traced(lambda index: ops.normal(3, index, (3, 8, 8)), cuda(2, dtype=torch.int64))
    assert kernels == 1 and results[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("drawn")])
def test_large_indices_are_no_part_of_a_region(name):
    """Inductor takes a sum of `arange` and 2^33 for one of 32 bits, which Triton refuses. Users' indices are given."""
    states = {k: torch.ones(2, 3, 8, 8) for k in CASES[name].states}
    sigmas = {k: torch.ones(2) for k in CASES[name].sigmas}
    CASES[name].call(states, sigmas)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(CASES[name].call, fullgraph=True, backend=keep)(states, sigmas)
    assert len(graphs) == 1 and str(2**33) not in graphs[0]


def test_seeds_on_the_device():
    results, kernels = traced(
        lambda seed, index, sigma: ops.init_noise(ops.Draw(seed, index), sigma, shape=(3, 8, 8)),
        cuda((), dtype=torch.int64),
        cuda(2, dtype=torch.int64),
        cuda(()),
    )
    assert kernels == 1 and results[0].shape == (2, 3, 8, 8)


def test_network_inputs_are_laid_out_as_asked():
    """No transform is at work, though Dynamo answers that one is."""
    x = cuda(2, 3, 8, 8)
    for asked in (torch.channels_last, torch.contiguous_format):
        (made, _), _ = traced(lambda x, asked=asked: ops.scale_input(x, x[:, 0, 0, 0], memory_format=asked), x)
        assert made.is_contiguous(memory_format=asked)


@pytest.mark.parametrize("name", ["dropout", "normal"])
def test_transforms_in_a_region_have_no_kernels(name):
    """Which AOTAutograd could not put there."""

    def call(x, index):
        draw = ops.Draw(7, index)
        return ops.dropout(x, 0.2, draw) if name == "dropout" else x * ops.normal(7, index, (3,))

    vmapped = torch.func.vmap(call, in_dims=(0, None))
    results, kernels = traced(vmapped, cuda(4, 2, 3), cuda(2, dtype=torch.int64))
    assert results[0].shape == (4, 2, 3) and not kernels


def test_gradients_of_levels_are_inductors():
    states = {k: cuda(2, 3, 8, 8).requires_grad_() for k in ("f", "x")}
    with cmfast.backend("auto"):
        results, kernels = traced(CASES["add_noise drawn"].call, states, {"sigma": cuda(2).requires_grad_()})
    assert kernels == 0 and results[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("size", [8, 64], ids=["a slab", "three launches"])
@pytest.mark.parametrize("kind", ["plain", "dropout", "all"])
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_group_norm(backend, gradient, kind, size):
    """`auto` leaves it to inductor, unless it drops; its parameters' gradients are the kernels' own."""
    norm = make((2, 192, size, size), 32, kind, last=True)
    options = {k: v for k, v in norm.options.items() if k != "draw"}
    with MODE:
        tensors = {
            k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda", requires_grad=gradient)
            for k, v in norm.tensors.items()
        }
    index = cuda(2, dtype=torch.int64)

    def call(tensors, index):
        drawn = {"draw": ops.Draw(7, index)} if "dropout" in options else {}
        return ops.group_norm_silu(num_groups=32, **tensors, **options, **drawn)

    with cmfast.backend(backend):
        results, kernels = traced(call, tensors, index)
    expected = norm.run("reference")
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]
    assert all(r.requires_grad == gradient for r in results)
    assert (kernels > 0) == (backend == "triton" or "dropout" in options)


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", ["layer", "input"])
def test_lpips(name, backend, gradient):
    """`auto` leaves both to inductor."""
    call = perceptual.layer((2, 64, 8, 8)) if name == "layer" else perceptual.images((2, 3, 8, 8), 28)
    tensors = {k: cuda(*v.shape).requires_grad_(gradient and v.ndim > 1) for k, v in call.tensors.items()}
    with cmfast.backend(backend):
        results, kernels = traced(lambda tensors: call.function(**tensors, **call.options), tensors)
    assert [r.shape for r in results] == [call.run("reference").shape]
    assert results[0].requires_grad == gradient and (kernels > 0) == (backend == "triton")
