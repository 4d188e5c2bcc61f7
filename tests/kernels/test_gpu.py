"""What only a GPU shows: graphs that replay with other inputs, compiled regions that run, streams, a second GPU."""

from __future__ import annotations

import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.ops import _dispatch
from tests.ops.cases import CASES, Case, flat
from tests.ops.matrix import DTYPES, Call, make
from tests.ops.norms import make as make_norm

pytestmark = pytest.mark.skipif(_dispatch.INTERPRETING, reason="needs a GPU: the interpreter has no streams or graphs")
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MAIN = DTYPES[1]


@pytest.fixture(autouse=True)
def guard():
    """None: Dynamo and graphs want the real torch.empty."""


def on(call: Call) -> list[torch.Tensor]:
    return [*call.states.values(), *call.sigmas.values()]


@each
def test_graph_replays_with_changed_inputs(case: Case, device):
    """Captured once, an operation computes from what the buffers hold at each replay, noise levels included."""
    call = make(case, (3, 3, 16, 16), MAIN, device)
    with cmfast.backend("triton"):
        # Compilation is not for a capture: launch once before.
        case.call(call.states, call.sigmas, dtype=call.dtype)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = flat(case.call(call.states, call.sigmas, dtype=call.dtype))
    for seed in (1, 2):
        changed = make(case, (3, 3, 16, 16), MAIN, device, seed=seed)
        for buffer, value in zip(on(call), on(changed), strict=True):
            buffer.copy_(value)
        graph.replay()
        for value, expected in zip(captured, changed.run("triton"), strict=True):
            assert torch.equal(value, expected)


def test_graph_replays_with_another_seed_and_other_samples(device):
    """Seeds, draws and sample indices that are tensors are read at each replay."""
    seed, draw = (torch.tensor(i, device=device) for i in (1, 0))
    index, sigma = torch.arange(4, device=device), torch.tensor(80.0, device=device)

    def run():
        return ops.init_noise(ops.Draw(seed, index, draw), sigma, shape=(3, 16, 16), dtype=torch.bfloat16)

    with cmfast.backend("triton"):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        seed.fill_(2**40 + 1)
        draw.fill_(5)
        index.add_(1000)
        graph.replay()
        expected = ops.init_noise(ops.Draw(2**40 + 1, index, 5), sigma, shape=(3, 16, 16), dtype=torch.bfloat16)
    assert all(torch.equal(value, other) for value, other in zip(captured, expected, strict=True))


def test_training_step_in_a_graph(device):
    """Forward and backward of a loss, captured together."""
    call = make(CASES["consistency_loss karras"], (4, 3, 16, 16), MAIN, device)
    output = call.states["f"].requires_grad_()

    def step():
        with cmfast.backend("triton"):
            loss = call.case.call(call.states, call.sigmas).sum()
        return torch.autograd.grad(loss, output)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        output.mul_(0.5)
        call.sigmas["sigma"].mul_(1.5)
    graph.replay()
    assert torch.equal(captured, step())


@each
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiled_whole(case, gradient, backend, device):
    """torch.compile(fullgraph=True) with inductor runs, and gives the same numbers."""
    torch._dynamo.reset()
    call = make(case, (2, 3, 16, 16), MAIN, device)
    compiled = Call(
        Case(torch.compile(case.call, fullgraph=True), case.states, case.sigmas, case.no_grad_to),
        call.states,
        call.sigmas,
        call.dtype,
    )
    # What is expected comes first, and makes the indices of draws, which are then no part of the region.
    if gradient:
        expected, expected_grads = call.run_with_grads("reference", levels=False)
        values, grads = compiled.run_with_grads(backend, levels=False)
        values, expected = [*values, *grads.values()], [*expected, *expected_grads.values()]
    else:
        expected, values = call.run("reference"), compiled.run(backend)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2**-6, atol=1e-4)


def test_on_a_stream_of_ones_own(device):
    call = make(CASES["renoise drawn"], (2, 3, 64, 64), MAIN, device)
    expected = call.run("triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values = call.run("triton")
    stream.synchronize()
    assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    call = make(CASES["heun_corrector"], (2, 3, 16, 16), MAIN, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    values = call.run("triton")
    assert all(value.device.index == 1 for value in values)
    for value, other in zip(values, call.run("reference"), strict=True):
        torch.testing.assert_close(value, other, rtol=2**-6, atol=1e-4)


@each
def test_auto_takes_the_kernel(case, device):
    """On a GPU nobody has to ask for it."""
    call = make(case, (2, 3, 8, 8), MAIN, device)
    assert all(torch.equal(a, b) for a, b in zip(call.run("auto"), call.run("triton"), strict=True))
    assert all(ops.explain(name, device)[0] == "triton" for name in ops.FUSED)


norms = pytest.mark.parametrize("size", [8, 64], ids=["a slab", "three launches"])


@norms
def test_group_norm_in_a_graph(size, device):
    """Both passes, captured together, of another batch and other samples' masks at the next replay."""
    norm = make_norm((2, 192, size, size), 32, dtype=torch.bfloat16, last=True, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        norm.run_with_grads("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_grads = norm.run_with_grads("triton")
    with torch.no_grad():
        for tensor in norm.tensors.values():
            tensor.mul_(0.75).add_(0.25)
    norm.options["draw"].index.add_(1000)
    graph.replay()
    values, grads = norm.run_with_grads("triton")
    for value, other in zip([*captured, *captured_grads.values()], [*values, *grads.values()], strict=True):
        assert torch.equal(value, other)


@norms
@pytest.mark.parametrize("kind", ["film", "all"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_group_norm_compiled_whole(backend, kind, size, device):
    torch._dynamo.reset()
    norm = make_norm((2, 192, size, size), 32, kind, last=True, device=device)
    leaves, expected = norm.graph("reference")
    with cmfast.backend(backend):
        results = torch.compile(norm.call, fullgraph=True)(leaves)
    weights = [torch.ones_like(r) for r in results]
    for made, other in zip(results, expected, strict=True):
        torch.testing.assert_close(made, other, rtol=1e-4, atol=1e-4)
    for grads in zip(*(torch.autograd.grad(r, list(leaves.values()), weights) for r in (results, expected))):
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-2)
