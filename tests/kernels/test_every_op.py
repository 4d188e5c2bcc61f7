"""What holds for every kernel: precision of values and gradients, layouts, memory, repetition, refusals."""

from __future__ import annotations

import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.kernels import launch
from tests.ops.cases import CASES, OUTPUTS, SHAPES, flat
from tests.ops.matrix import DTYPES, Call, check_path, dtype_id, make, upstream

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MAIN = DTYPES[1]
#: One dimension, two, five; samples of 2^10 + 17 and of 12 blocks; no pixels.
MORE_SHAPES = [(5,), (3, 17), (2, 1041), (2, 3, 2, 4, 4), (2, 3, 64, 64), (2, 3, 0, 4), (4, 32, 3, 1)]


@each
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(case, shape, dtypes, device):
    check_path(make(case, shape, dtypes, device), "triton")


@each
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_more_shapes(case, shape, device):
    check_path(make(case, shape, MAIN, device), "triton")


@each
def test_one_level_for_all(case, device):
    """A scalar sigma, and one scalar among levels [B]."""
    call = make(case, (3, 4, 6, 5), MAIN, device)
    for names in (list(call.sigmas), list(call.sigmas)[:1]):
        sigmas = {k: v[0] if k in names else v for k, v in call.sigmas.items()}
        check_path(Call(case, call.states, sigmas, call.dtype), "triton")


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(x):
    return torch.stack([x, x.flip(0)], dim=-1)[..., 0]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


#: What becomes of states, and of network outputs.
LAYOUTS = {
    "channels_last": (channels_last, channels_last),
    "channels_last output": (torch.clone, channels_last),
    "channels_last state": (channels_last, torch.clone),
    "misaligned": (misaligned, misaligned),
    "transposed": (transposed, transposed),
    "sliced": (sliced, misaligned),
}


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 3, 8, 8)], ids=str)
def test_layouts(case, layout, shape, device):
    """Wherever the numbers lie, the same numbers come out."""
    call = make(case, shape, MAIN, device)
    of_state, of_output = LAYOUTS[layout]
    states = {k: (of_output if k in OUTPUTS else of_state)(v) for k, v in call.states.items()}
    assert all(torch.equal(states[k], v) for k, v in call.states.items())
    same(call, Call(case, states, call.sigmas, call.dtype))


def same(call: Call, other: Call) -> None:
    plain, plain_grads = call.run_with_grads("triton", levels=False)
    values, grads = other.run_with_grads("triton", levels=False)
    for value, expected in zip([*values, *grads.values()], [*plain, *plain_grads.values()], strict=True):
        # Sums over a sample take another order; the noise of a draw may be made in a launch of its own.
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-6)


@each
def test_expanded(case, device):
    call = make(case, (3, 4, 6, 5), MAIN, device)
    expanded = {k: v[:1].expand_as(v) for k, v in call.states.items()}
    plain = Call(case, {k: v.contiguous() for k, v in expanded.items()}, call.sigmas, call.dtype)
    same(plain, Call(case, expanded, call.sigmas, call.dtype))


def graph_of_states(call: Call, backend: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Leaves of the states, and the results that depend on them."""
    leaves, results = call.graph(backend, [k for k in call.states if k not in call.case.no_grad_to])
    return leaves, [r for r in results if r.requires_grad]


@each
@pytest.mark.parametrize("layout", ["channels_last", "expanded"])
def test_layout_of_incoming_gradients(case, layout, device):
    call = make(case, (2, 3, 8, 4), MAIN, device)
    leaves, results = graph_of_states(call, "triton")
    plain = [upstream(r) for r in results]
    if layout == "expanded":
        # Other numbers follow in memory, where a kernel that took it for dense would read.
        given = [torch.stack([g[0], g[0] + 1])[:1].expand_as(g) for g in plain]
        plain = [g.contiguous() for g in given]
    else:
        given = [channels_last(g) if g.ndim == 4 else g for g in plain]
    for_plain, for_given = (
        torch.autograd.grad(results, list(leaves.values()), grads, retain_graph=True) for grads in (plain, given)
    )
    for value, expected in zip(for_given, for_plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@each
@pytest.mark.parametrize("part", range(3))
def test_gradient_of_one_result(case, part, device):
    """Each result alone: the others bring no gradient, and need no memory for one."""
    call = make(case, (2, 3, 4, 4), MAIN, device)
    grads = {}
    for backend in ("triton", "reference"):
        leaves, results = graph_of_states(call, backend)
        if part >= len(results):
            assert part > 0
            return
        value = results[part]
        grads[backend] = torch.autograd.grad(value, list(leaves.values()), upstream(value), allow_unused=True)
    for value, expected in zip(*grads.values(), strict=True):
        if expected is None:
            assert value is None or not value.any()
        else:
            torch.testing.assert_close(value, expected, rtol=2**-7, atol=1e-6)


@each
def test_gradient_of_one_input(case, device):
    """Each input alone: no other gets a gradient."""
    call = make(case, (2, 3, 4, 4), MAIN, device)
    _, together = call.run_with_grads("triton")
    for name in together:
        leaves, results = call.graph("triton", [name])
        results = [r for r in results if r.requires_grad]
        if not results:
            assert together[name] is None or not together[name].any()
            continue
        (grad,) = torch.autograd.grad(results, leaves[name], [upstream(r) for r in results], allow_unused=True)
        if together[name] is None:
            assert grad is None or not grad.any()
        else:
            torch.testing.assert_close(grad, together[name], rtol=2**-7, atol=1e-6)


@each
@pytest.mark.parametrize("levels", [False, True], ids=["levels given", "levels vary"])
def test_the_same_results_carry_gradients(case, levels, device):
    """On both paths: c_noise where the levels vary, and only there."""
    call = make(case, (2, 3, 4, 4), MAIN, device)
    states = {k: v.requires_grad_() for k, v in call.states.items()}
    sigmas = {k: v.requires_grad_(levels) for k, v in call.sigmas.items()}
    carry = []
    for backend in ("triton", "reference"):
        with cmfast.backend(backend):
            carry.append([r.requires_grad for r in flat(case.call(states, sigmas, dtype=call.dtype))])
    assert carry[0] == carry[1]


def test_one_tensor_as_two_inputs(device):
    """Each place brings its own part of the gradient, also where that is differentiable itself."""
    x, sigma = torch.randn(2, 3, 4, 4, device=device, requires_grad=True), torch.rand(2, device=device) + 0.5
    grads = []
    for backend in ("triton", "reference"):
        with cmfast.backend(backend):
            value = ops.denoise(x, x, sigma)
        for differentiable in (False, True):
            grads.extend(torch.autograd.grad(value.sum(), x, retain_graph=True, create_graph=differentiable))
    for grad in grads[:-1]:
        torch.testing.assert_close(grad, grads[-1])


@each
def test_gradients_of_gradients(case, device):
    """From the reference: the kernels know first derivatives only."""
    call = make(case, (2, 3, 4, 4), (torch.float32, torch.float32), device)
    second = {}
    for backend in ("triton", "reference"):
        leaves, results = graph_of_states(call, backend)
        weights = [upstream(r).requires_grad_() for r in results]
        first = torch.autograd.grad(results, list(leaves.values()), weights, create_graph=True)
        total = sum((g.square() * upstream(g)).sum() for g in first)
        second[backend] = torch.autograd.grad(total, [*leaves.values(), *weights], allow_unused=True)
    for value, expected in zip(*second.values(), strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@each
def test_many_gradients_at_once(case, device):
    """`is_grads_batched`, as of a vectorized jacobian: from the reference."""
    call = make(case, (2, 3, 4, 4), (torch.float32, torch.float32), device)
    found = []
    for backend in ("triton", "reference"):
        leaves, results = graph_of_states(call, backend)
        weights = [torch.stack([upstream(r), upstream(r) * 2 + 1]) for r in results]
        options = {"is_grads_batched": True, "allow_unused": True}
        found.append(torch.autograd.grad(results, list(leaves.values()), weights, **options))
    for value, expected in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@each
def test_tensors_made_in_inference_mode(case, device):
    """A target, a state or levels that a sampler made: gradients of one state are as ever."""
    call = make(case, (2, 3, 4, 4), MAIN, device)
    name = next(k for k in call.states if k not in case.no_grad_to)
    leaves, results = call.graph("triton", [name])
    expected = torch.autograd.grad(results[0], leaves[name], upstream(results[0]))
    with torch.inference_mode():
        states, sigmas = ({k: v.clone() for k, v in each.items()} for each in (call.states, call.sigmas))
    states[name] = call.states[name]
    leaves, results = Call(case, states, sigmas, call.dtype).graph("triton", [name])
    assert torch.autograd.grad(results[0], leaves[name], upstream(results[0]))[0].equal(expected[0])


def test_gradients_of_levels_want_the_draw_as_it_was(device):
    """They draw the noise again: after a change in place that would be another's."""
    x, index = torch.zeros(2, 4, device=device), torch.arange(2, device=device)
    sigma = torch.ones((), device=device, requires_grad=True)
    with cmfast.backend("triton"):
        noised, *_ = ops.add_noise(x, ops.Draw(0, index), sigma)
        index.add_(10)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            noised.sum().backward()


@each
def test_same_bits_on_repetition(case, device):
    call = make(case, (2, 3, 64, 64), MAIN, device)
    first, first_grads = call.run_with_grads("triton", levels=False)
    second, second_grads = call.run_with_grads("triton", levels=False)
    for a, b in zip([*first, *first_grads.values()], [*second, *second_grads.values()], strict=True):
        assert torch.equal(a, b)


@each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last output"])
def test_no_copies(case, layout, device, monkeypatch):
    """The kernels read the tensors they were given, whether contiguous or channels_last."""
    call = make(case, (2, 3, 8, 8), MAIN, device)
    of_state, of_output = LAYOUTS.get(layout, (torch.clone, torch.clone))
    states = {k: (of_output if k in OUTPUTS else of_state)(v) for k, v in call.states.items()}
    seen = set()
    run = launch.launch

    def spy(kernel, programs, *arguments, **constants):
        seen.update(x.data_ptr() for x in arguments if isinstance(x, torch.Tensor))
        run(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", spy)
    Call(case, states, call.sigmas, call.dtype).run("triton")
    unread = {k for k, v in states.items() if v.data_ptr() not in seen} - set(case.no_grad_to)
    assert not unread


def bad_calls(device):
    """What is refused, by what the message must say."""
    x, sigma = torch.ones(2, 3, 4, 4, device=device), torch.ones(2, device=device)
    away, noise = x.to("meta"), ops.Draw(0, torch.arange(2, device=device))
    return {
        "model_output is on meta": lambda: ops.denoise(away, x, sigma),
        "sigma is on meta": lambda: ops.denoise(x, x, sigma.to("meta")),
        "next_sigma is on meta": lambda: ops.euler_step(x, x, sigma, sigma.to("meta")),
        "noise is on meta": lambda: ops.add_noise(x, away, sigma),
        "noise.index is on meta": lambda: ops.add_noise(x, noise._replace(index=noise.index.to("meta")), sigma),
        "weight is on meta": lambda: ops.weighted_loss(x, x, sigma.to("meta")),
        r"sigma must be a scalar or \[B\] with B = 2, got \[3\]": lambda: ops.scale_input(x, x[0, :, 0, 0]),
        "noise draws 1 samples, x_start has 2": lambda: ops.add_noise(x, noise._replace(index=noise.index[:1]), sigma),
        "x_t must have a floating dtype.*got torch.int64": lambda: ops.denoise(x, x.long(), sigma),
        "x must have a floating dtype.*float8": lambda: ops.to_uint8(x.to(torch.float8_e5m2)),
        "x must have a floating dtype.*complex64": lambda: ops.scale_input(x.to(torch.complex64), sigma),
        "dtype must be float32.*int8": lambda: ops.scale_input(x, sigma, dtype=torch.int8),
        "memory_format .* is for batches of 5": lambda: ops.scale_input(x, sigma, memory_format=torch.channels_last_3d),
        "memory_format must be": lambda: ops.scale_input(x, sigma, memory_format=torch.preserve_format),
        "x_t2 and next_sigma go together": lambda: ops.consistency_loss(x, x, sigma, x, "snr", x),
        "unknown weight 'sn'": lambda: ops.consistency_loss(x, x, sigma, x, "sn"),
        "unknown norm 'l3'": lambda: ops.weighted_loss(x, x, sigma, norm="l3"),
        "huber_c must be a number of 0 or more": lambda: ops.weighted_loss(x, x, sigma, norm="huber", huber_c=-1.0),
        "sigma_data must be positive": lambda: ops.denoise(x, x, sigma, sigma_data=0.0),
        "index must be an integer tensor": lambda: ops.normal(0, sigma, (3,)),
        "seed must be an integer": lambda: ops.normal(0.5, noise.index, (3,)),
        "shape is missing": lambda: ops.init_noise(noise, sigma),
        "shape and state_dtype go with a Draw": lambda: ops.init_noise(x, sigma, shape=(3, 4, 4)),
        "noise must be a torch.Tensor": lambda: ops.add_noise(x, 1.0, sigma),
    }


@pytest.mark.parametrize("message", bad_calls("cpu"))
def test_bad_input_is_refused_alike(message, device, monkeypatch):
    """Before anything is launched, with the same words on both paths."""
    monkeypatch.setattr(launch, "launch", lambda *arguments, **options: pytest.fail("launched"))
    call, words = bad_calls(device)[message], []
    for backend in ("triton", "reference"):
        with cmfast.backend(backend), pytest.raises((TypeError, ValueError), match=message) as error:
            call()
        words.append((error.type, str(error.value)))
    assert words[0] == words[1]


@pytest.mark.parametrize("name", ["denoise_to_uint8", "to_uint8"])
def test_pixels_carry_no_gradient(name, device):
    x, sigma = torch.ones(2, 3, 4, 4, device=device, requires_grad=True), torch.ones(2, device=device)
    for backend in ("triton", "reference"):
        with cmfast.backend(backend):
            pixels = ops.to_uint8(x) if name == "to_uint8" else ops.denoise_to_uint8(x, x, sigma)
        assert not pixels.requires_grad


@each
def test_no_reads_on_the_host(case, device):
    """Values of noise levels stay on the device."""
    if device.type == "cpu":
        pytest.skip("the CPU has no other side to read from; tests/ops/test_compile.py traces without values")
    call = make(case, (2, 3, 8, 8), MAIN, device)
    call.run_with_grads("triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run_with_grads("triton", levels=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
