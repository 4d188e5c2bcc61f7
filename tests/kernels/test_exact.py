"""What must hold exactly: the boundary, pixels, offsets beyond 2^31, and no byte moved twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.kernels import losses
from cmfast.ops import _check, _dispatch
from tests.ops.cases import CASES
from tests.ops.matrix import DTYPES, check_path, dtype_id, make

interpreter_only = pytest.mark.skipif(not _dispatch.INTERPRETING, reason="looks into Triton's interpreter")
gpu_only = pytest.mark.skipif(_dispatch.INTERPRETING, reason="takes minutes in the interpreter")


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.7, 3.3333])
@pytest.mark.parametrize("boundary", [0.0, 0.002, 0.3])
def test_identity_at_the_boundary_bit_for_bit(dtypes, sigma_data, boundary, device):
    state, model = dtypes
    x = torch.randn(3, 3, 7, 5, device=device).to(state)
    output = torch.randn(3, 3, 7, 5, device=device).to(model)
    options = {"sigma_data": sigma_data, "boundary": boundary}
    with cmfast.backend("triton"):
        for sigma in (torch.tensor(boundary, device=device), torch.full((3,), boundary, device=device)):
            assert torch.equal(ops.denoise(output, x, sigma, **options), x)
            later, *_ = ops.renoise(output, x, sigma, sigma, 1e9 * x.float(), sigma_min=boundary, **options)
            assert torch.equal(later, x)


def test_nothing_is_added_below_sigma_min(device):
    x, noise = torch.randn(2, 3, 8, 8, device=device), torch.full((2, 3, 8, 8), 1e9, device=device)
    sigma = torch.tensor(1.5, device=device)
    with cmfast.backend("triton"):
        value, *_ = ops.renoise(x, x, sigma, torch.tensor(0.001, device=device), noise)
        assert torch.equal(value, ops.denoise(x, x, sigma))


def test_a_next_level_that_is_lost(device):
    """Values of levels are not looked at on a GPU: NaN goes on to what is made of it."""
    x, levels = torch.ones(1, 3, 4, 4, device=device), torch.tensor([1.0, math.nan], device=device)
    with cmfast.backend("triton"), _check.unread():
        assert all(r.isnan().all() for r in ops.renoise(x, x, levels[0], levels[1], x))


def test_an_infinite_state_does_not_reach_a_denoiser(device):
    x, one = torch.full((1, 1, 4, 4), math.inf, device=device), torch.ones(1, 1, 4, 4, device=device)
    with cmfast.backend("triton"):
        assert torch.equal(ops.denoise(one, x, torch.tensor(1.0, device=device), sigma_data=None), one)


@pytest.mark.parametrize("sigma", [0.0, 1e-44, 1e-38, 0.002, 1.0, 80.0, 1e4, math.inf], ids=str)
def test_network_time_at_any_level(sigma, device):
    level = torch.tensor([sigma], device=device)
    x = torch.zeros(1, 3, 4, 4, device=device)
    value, expected = [], []
    for backend, out in (("triton", value), ("reference", expected)):
        with cmfast.backend(backend):
            out.append(ops.scale_input(x, level)[1])
    torch.testing.assert_close(value, expected, rtol=3e-7, atol=1e-4)


@pytest.mark.parametrize("level", [1e-30, 1e-38, 1e-44])
def test_steps_beside_the_smallest_levels(level, device):
    """From them, and with a second slope there: the ratio of the levels may be infinite in float32, the step is not."""
    x = torch.tensor([[1.0, -2.0, 1e-20], [0.0, 3.0, 0.0]], device=device)
    # D is x, but for one element: there (x - D) / level is -1e6.
    output, tiny, one = x.clone(), torch.tensor(level, device=device), torch.ones((), device=device)
    output[1, 0] = 1e6 * level
    inputs = output, 2 * output - x, x, tiny, one
    for step in (
        lambda f, f_2, x, tiny, one: ops.euler_step(f, x, tiny, one, sigma_data=None),
        lambda f, f_2, x, tiny, one: ops.heun_corrector(f, f_2, x, one, tiny, sigma_data=None),
        lambda f, f_2, x, tiny, one: ops.midpoint_corrector(f, f_2, x, tiny, one, one, sigma_data=None),
    ):
        with cmfast.backend("triton"):
            value = step(*inputs)[0].cpu()
        with cmfast.backend("reference"):
            expected = step(*(t.cpu().double() for t in inputs))[0]
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
        assert abs(expected[1, 0]) > 1e5


@pytest.mark.parametrize("rounding", ["trunc", "nearest"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last output"])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 5, 5), (0, 3, 4, 4), (3, 4, 6)], ids=str)
def test_pixels(rounding, layout, shape, device):
    x = torch.randn(shape, device=device) * 1.5
    special = torch.tensor([-1.0, 1.0, 0.0, math.nan, math.inf, -math.inf, 1 / 255, -1 / 255], device=device)
    x.view(-1)[: min(8, x.numel())] = special[: min(8, x.numel())]
    output = torch.randn_like(x)
    if len(shape) == 4 and layout != "contiguous":
        output = output.contiguous(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    sigma = torch.rand(shape[0], device=device) + 0.1
    results = {}
    for backend in ("triton", "reference"):
        with cmfast.backend(backend):
            results[backend] = (
                ops.to_uint8(x, rounding=rounding),
                ops.to_uint8(x.bfloat16(), rounding=rounding),
                ops.denoise_to_uint8(output, x, sigma, rounding=rounding),
                ops.denoise_to_uint8(output, x, sigma, rounding=rounding, sigma_data=None),
            )
    for i, (value, expected) in enumerate(zip(*results.values(), strict=True)):
        assert value.shape == expected.shape and value.dtype == torch.uint8
        # An infinite state makes D infinite or NaN by the order of operations; else a level where D rounds over.
        finite = x.isfinite().movedim(1, -1) if i == 2 else torch.ones_like(value, dtype=torch.bool)
        difference = (value.int() - expected.int()).abs()[finite]
        assert (difference == 0).all() if i != 2 else (difference <= 1).all() and (difference > 0).sum() <= 2


@pytest.mark.parametrize(
    "limits",
    [{}, {"WHOLE": 0}, {"WHOLE": 0, "ENOUGH": 2}, {"WHOLE": 0, "PARTS": 4}],
    ids=["one program", "a program for each block", "few programs", "few parts"],
)
def test_sums_of_long_samples(limits, device, monkeypatch):
    """However many programs sum a sample, and blocks each of them, they sum all of it, once. Samples are short here,
    and the limits between the ways lower."""
    for name, value in limits.items():
        monkeypatch.setattr(losses, name, value)
    check_path(make(CASES["consistency_loss l2"], (2, 9001), DTYPES[1], device), "triton")


def test_huber_without_c_at_no_distance(device):
    """The square root of zero has no slope: the gradient is zero."""
    x = torch.ones(2, 3, 4, 4, device=device, requires_grad=True)
    with cmfast.backend("triton"):
        loss = ops.weighted_loss(x, torch.ones_like(x), torch.ones(2, device=device), norm="huber")
        loss.sum().backward()
    assert not loss.any() and not x.grad.any()
    x.grad = None
    with cmfast.backend("triton"):
        sigma = torch.ones(2, device=device)
        loss = ops.consistency_loss(x, x.detach(), sigma, x.detach(), sigma, x.detach(), sigma, norm="huber")
        loss.sum().backward()
    assert not loss.any() and not x.grad.any()


@interpreter_only
def test_elements_beyond_int32(monkeypatch):
    """The last programs of a launch over more than 2^31 elements: memory that is not touched costs nothing."""
    from triton.runtime import interpreter

    elements, last = 2**31 + 4096, 3
    programs = elements // 1024
    x, output, out = (torch.from_numpy(np.zeros((1, elements), np.int16)).view(torch.bfloat16) for _ in range(3))
    x[0, -3072:] = torch.arange(3072) % 128
    real = interpreter.GridExecutor.__call__

    def only_the_last(self, *arguments, **options):
        assert self.grid == (programs,)
        self.grid = (last,)
        builder = interpreter.interpreter_builder
        set_index = builder.set_grid_idx

        def shifted(i, j, k):
            set_index(i, j, k)
            builder.grid_idx = (i + programs - last, j, k)

        monkeypatch.setattr(builder, "set_grid_idx", shifted)
        return real(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", only_the_last)
    # A guarded buffer would be written, all 4 GiB of it.
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: out)
    with cmfast.backend("triton"):
        value = ops.denoise(output, x, torch.tensor(0.002))
    assert torch.equal(value[0, -3072:], x[0, -3072:]) and not value[0, -6144:-3072].any()


@gpu_only
def test_more_than_int32_elements_on_a_gpu(device):
    if torch.cuda.get_device_properties(device).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    shape = (2, 3, 19000, 19000)
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x[-1, -1, -1, -4:] = 1.0
    with cmfast.backend("triton"):
        value = ops.denoise(torch.zeros_like(x), x, torch.full((2,), 0.002, device=device))
    assert torch.equal(value, x)
