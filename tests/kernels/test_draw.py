"""Kernels that draw more than noise: noise levels, and dropout's masks. The integers bit for bit."""

from __future__ import annotations

import pytest
import torch

import cmfast
from cmfast import curricula, ops, reference
from cmfast.tolerances import KERNEL_FLOOR
from tests.ops.cases import draw as some_draw
from tests.ops.matrix import close

INDEX = [0, 5, 2**33 + 1, 7, *range(100, 112)]
LEVELS = {
    "alike": lambda device: curricula.karras_grid(40, device=device),
    "one interval": lambda device: curricula.karras_grid(2, device=device),
    "halves": lambda device: curricula.halved_grid(5, device=device),
    "thresholds": lambda device: curricula.lognormal_grid(11, device=device),
    "many thresholds": lambda device: curricula.lognormal_grid(1281, device=device),
    "one threshold": lambda device: curricula.lognormal_grid(3, device=device),
    "lognormal": lambda device: ops.LogNormal(-1.2, 1.2),
    "wide": lambda device: ops.LogNormal(-1.1, 6.0),
    "below": lambda device: ops.LogNormal(-1.1, 2.0, curricula.stage_below(1)),
    "close below": lambda device: ops.LogNormal(-1.1, 2.0, curricula.stage_below(9, q=2.0, k=8.0, b=1.5)),
}


def drawn(x, draw, levels):
    """[sigma, next_sigma, mid_sigma] as far as there are any, and the point."""
    with cmfast.backend("triton"):
        made = ops.draw_pair(x, draw, levels, pair=False)
    return [level for level in made[2:] if level is not None], made.first[0]


@pytest.mark.parametrize(
    "name, seed, number, tensors",
    [(name, 2**40 + 3, 3, False) for name in LEVELS]
    + [("many thresholds", *counter) for counter in [(-5, 2**31, False), (0, 0, True), (11, 2**32 - 2, True)]],
)
def test_levels_are_those_of_the_reference(name, seed, number, tensors, device):
    """Of a grid they are a table's entries, and so equal: the index is drawn bit for bit."""
    index, levels = torch.tensor(INDEX, device=device), LEVELS[name](device)
    given = (torch.tensor(seed, device=device), torch.tensor(number, device=device)) if tensors else (seed, number)
    value, x = drawn(torch.zeros(len(INDEX), 3, device=device), ops.Draw(given[0], index, given[1]), levels)
    draw = ops.Draw(seed, index, number)
    exact = reference.draw_levels(draw, levels, torch.float64)
    eager = reference.draw_levels(draw, levels)
    assert len(value) == len(exact)
    for level, low, high in zip(value, eager, exact):
        if isinstance(levels, ops.Grid):
            assert torch.equal(level, low)
        else:  # by the size of each sample's sigma
            error, eager_error = (((x - high) / exact[0]).abs().max() for x in (level, low))
            assert error <= 2 * eager_error + KERNEL_FLOOR[torch.float32]
    noise = reference.normal(seed, index, (3,), draw=number)
    torch.testing.assert_close(x, value[0][:, None] * noise, rtol=1e-5, atol=1e-5)


def test_levels_do_not_depend_on_the_batch(device):
    levels = LEVELS["many thresholds"](device)
    index = torch.tensor(INDEX[:5], device=device)
    (together, _), _ = drawn(torch.zeros(5, 3, 32, 32, device=device), ops.Draw(3, index, 1), levels)
    (alone, _), _ = drawn(torch.zeros(2, 1, 1, 1, device=device), ops.Draw(3, index[2:4], 1), levels)
    assert torch.equal(alone, together[2:4])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 9, 5), (1, 70, 3, 3), (2, 3, 1, 1), (0, 4, 2, 2), (3, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_is_that_of_the_reference(shape, layout, dtype, device):
    if layout == torch.channels_last and len(shape) < 4:
        pytest.skip("has no channels_last")
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    draw = some_draw(x)
    with cmfast.backend("triton"):
        y = ops.dropout(x, 0.3, draw)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = reference.dropout_mask(draw, x.shape, 0.3)
    assert torch.equal(y != 0, mask & (x != 0)) and torch.equal(grad != 0, mask)
    assert y.dtype == dtype
    if x.numel():
        assert y.is_contiguous(memory_format=layout)
        exact = reference.dropout(x.double(), 0.3, draw)
        close(y.detach(), reference.dropout(x, 0.3, draw).detach(), exact.detach(), "dropout")
    torch.testing.assert_close(grad.float(), mask / 0.7, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.0)


@pytest.mark.parametrize("mean", [-100.0, 100.0])
def test_levels_far_out(mean, device):
    """At the ends of what float32 has: no other sign, nor infinity."""
    x, draw = torch.zeros(3, 2, device=device), ops.Draw(0, torch.arange(3, device=device))
    with cmfast.backend("triton"):
        drawn = ops.draw_pair(x, draw, ops.LogNormal(mean, 1.0), pair=False)
    assert drawn.sigma.isfinite().all() and (drawn.sigma > 0).all() and (drawn.sigma.log() * mean > 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_seeds_and_draws_of_any_shape_and_dtype(backend, dtype, shape, device):
    x, index = torch.zeros(2, 3, device=device), torch.arange(2, device=device)
    seed, number = (torch.full(shape, value, dtype=dtype, device=device) for value in (72, 5))
    levels = ops.LogNormal()
    with cmfast.backend(backend):
        given, numbers = (ops.draw_pair(x, draw, levels, pair=False) for draw in
                          (ops.Draw(seed, index, number), ops.Draw(72, index, 5)))  # fmt: skip
    assert given.sigma.equal(numbers.sigma) and given.first[0].equal(numbers.first[0])


def test_gradients_of_dropout_many_at_once_and_from_inference_mode(device):
    x = torch.ones(2, 5, 3, device=device, requires_grad=True)
    with torch.inference_mode():
        draw = ops.Draw(7, torch.arange(2, device=device))
    with cmfast.backend("triton"):
        y = ops.dropout(x, 0.5, draw)
    weights = torch.stack([torch.ones_like(y), torch.full_like(y, 2.0)])
    (grads,) = torch.autograd.grad(y, x, weights, is_grads_batched=True)
    assert grads.equal(weights * y.detach())


def test_dropout_by_tensors_and_twice_differentiated(device):
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    index = torch.arange(2, device=device)
    with cmfast.backend("triton"):
        expected = ops.dropout(x, 0.5, ops.Draw(2**40 + 7, index, 2**31 + 2))
        given = ops.Draw(torch.tensor(2**40 + 7, device=device), index, torch.tensor(2**31 + 2, device=device))
        y = ops.dropout(x, 0.5, given)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(again, (y != 0) * 8.0)
