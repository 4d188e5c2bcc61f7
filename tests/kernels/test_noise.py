"""Counter-based noise made in kernels: the integers bit for bit, the normals within rounding and in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import cmfast
from cmfast import ops, reference
from cmfast.kernels import launch
from cmfast.kernels.normal import _counter
from cmfast.kernels.philox import box_muller, words
from tests.ops.matrix import DTYPES, close, dtype_id

INDEX = [0, 5, 2**33 + 1, 7]


@triton.jit
def _words_kernel(
    out_ptr, index_ptr, first, seed, seed_high, draw,
    SEED_TENSOR: tl.constexpr, DRAW_TENSOR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = first + tl.arange(0, N)
    a, b, c, d = words(index_ptr, row, group, seed, seed_high, draw, SEED_TENSOR, DRAW_TENSOR)
    at = out_ptr + (row * N + tl.arange(0, N)) * 4
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))


@triton.jit
def _box_muller_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = box_muller(tl.load(a_ptr + i).to(tl.uint32), tl.load(b_ptr + i).to(tl.uint32))
    tl.store(out_ptr + i, x)
    tl.store(out_ptr + N + i, y)


def kernel_words(seed, index, draw, first=0, groups=16):
    """The words [B, groups, 4] that kernels draw from."""
    out = torch.empty(len(index), groups, 4, dtype=torch.int64, device=index.device)
    _words_kernel[(len(index),)](out, index, first, N=groups, **_counter(seed, draw))
    return out


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected, device):
    """The known-answer vectors of Random123 for philox4x32-10, through the counters that kernels make."""
    group, draw, low, high = counter
    index = torch.tensor([(high << 32 | low) - (1 << 64 if high >> 31 else 0)], device=device)
    assert tuple(kernel_words(key, index, draw, first=group, groups=1)[0, 0].tolist()) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 3, 2**64 - 1, -5])
@pytest.mark.parametrize("draw", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_integers_are_those_of_the_reference(seed, draw, tensors, device):
    index = torch.tensor(INDEX, device=device)
    signed = (seed + 2**63) % 2**64 - 2**63
    given = (torch.tensor(signed, device=device), torch.tensor(draw, device=device)) if tensors else (seed, draw)
    value = kernel_words(given[0], index, given[1])
    group = torch.arange(16, device=device).expand(len(INDEX), 16)
    counter = (group, torch.full_like(group, draw), (index & 0xFFFFFFFF)[:, None], (index >> 32)[:, None])
    expected = torch.stack(torch.broadcast_tensors(*reference.philox4x32(counter, seed)), dim=-1)
    assert torch.equal(value, expected)


def test_integers_are_those_of_numpy(device):
    """NumPy's Philox is the 4x64 variant, so its 4x32 is written out here, with Python's integers."""

    def philox(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    index = torch.tensor([2**33 + 1], device=device)
    value = kernel_words(2**40 + 3, index, 9)[0]
    for group in range(16):
        assert value[group].tolist() == philox((group, 9, 1, 2), (3, 2**8))


def triton_normal(*arguments, **options):
    with cmfast.backend("triton"):
        return ops.normal(*arguments, **options)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7, 5), (3, 64, 64), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normals_are_those_of_the_reference(shape, dtype, device):
    index = torch.tensor(INDEX, device=device)
    value = triton_normal(11, index, shape, draw=2, dtype=dtype)
    exact = reference.normal(11, index, shape, draw=2, dtype=torch.float64)
    assert value.shape == exact.shape and value.dtype == dtype
    # Polynomials good to a few units in the last place; halves are cut off in the interpreter.
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert ((value.double() - exact).abs() <= 4 * ulp * exact.abs() + 2e-7).all()


def test_box_muller_at_the_ends(device):
    """Every word is allowed: no infinity, no NaN, and the tail reaches 6.7."""
    ends = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 128, 2**32 - 1] + [77] * 6)
    a, b = (t.flatten().to(device) for t in torch.meshgrid(ends, ends, indexing="ij"))
    out = torch.empty(2, 256, device=device)
    _box_muller_kernel[(1,)](out, a, b, N=256)
    uniform = (a.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    radius, angle = torch.sqrt(-2 * torch.log(uniform)), b.double() * (2 * np.pi / 2**32)
    exact = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])
    assert out.isfinite().all() and out.abs().max() > 6.7
    assert (out.double() - exact).abs().max() < 2e-6


def test_a_sample_depends_on_its_index_alone(device):
    index = torch.tensor(INDEX, device=device)
    together = triton_normal(3, index, (3, 7, 5), draw=1)
    for i in range(len(INDEX)):
        assert torch.equal(triton_normal(3, index[i : i + 1], (3, 7, 5), draw=1)[0], together[i])
    assert torch.equal(triton_normal(3, index, (105,), draw=1), together.flatten(1))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_seeds_and_draws_on_the_device(backend, dtype, device):
    index = torch.tensor([0, 5, 9], device=device)
    seed, draw = torch.tensor(3, device=device, dtype=dtype), torch.tensor(1, device=device, dtype=dtype)
    with cmfast.backend(backend):
        expected = ops.normal(3, index, (105,), draw=1)
        assert torch.equal(ops.normal(seed, index.to(dtype), (105,), draw=draw), expected)


def test_larger_blocks_make_the_same(device, monkeypatch):
    """Of large batches, in which a thread makes more."""
    x = torch.randn(2, 3, 37, 41, device=device)
    draw, sigma = ops.Draw(3, torch.arange(2, device=device), 1), torch.tensor([2.0, 3.0], device=device)
    blocks = []

    def made():
        with cmfast.backend("triton"):
            yield ops.normal(3, draw.index, x.shape[1:])
            yield from ops.renoise(x, x, sigma, sigma / 2, draw)
            yield from ops.add_noise(x, draw, sigma)
            for pair in ops.add_noise_pair(x, draw, sigma, sigma / 2):
                yield from pair

    def run(plan, kernel, *arguments, **constants):
        blocks.append(plan.block)
        plain(plan, kernel, *arguments, **constants)

    plain = launch.Plan.run
    monkeypatch.setattr(launch.Plan, "run", run)
    expected = list(made())
    monkeypatch.setattr(launch, "MANY", 0)
    assert all(torch.equal(a, b) for a, b in zip(made(), expected, strict=True))
    assert blocks == 4 * [launch.BLOCK] + 4 * [2 * launch.BLOCK]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_operation_draws_the_same_noise(shape, layout, device):
    """Where a kernel draws, it draws `normal`: in any layout, bit for bit."""
    noise = ops.Draw(2**40 + 7, torch.tensor(INDEX, device=device), 3)
    expected = triton_normal(*noise[:2], shape, draw=noise.draw)
    zero, one = torch.zeros(4, *shape, device=device), torch.tensor(1.0, device=device)
    memory_format = torch.channels_last if layout == "channels_last" else None
    output = zero.contiguous(memory_format=memory_format or torch.contiguous_format)
    with cmfast.backend("triton"):
        drawn = [
            ops.init_noise(noise, one, shape=shape, memory_format=memory_format)[0],
            ops.add_noise(zero, noise, one, memory_format=memory_format)[0],
            ops.add_noise(output, noise, one)[0],
            *(point[0] for point in ops.add_noise_pair(zero, noise, one, one, memory_format=memory_format)),
            ops.renoise(output, zero, one, one, noise, sigma_min=0.0)[0],
        ]
        inputs = ops.init_noise(noise, one, shape=shape, sigma_data=None, memory_format=memory_format)[1]
    assert all(torch.equal(value, expected) for value in [*drawn, inputs])
    assert inputs.is_contiguous(memory_format=memory_format or torch.contiguous_format)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("levels", ["one level", "levels"])
def test_first_state_and_input(dtypes, layout, levels, device):
    """`init_noise` with noise drawn on the spot: state, network input and c_noise against float64."""
    noise = ops.Draw(5, torch.tensor(INDEX, device=device), 1)
    sigma = torch.tensor([80.0, 1.5, 0.002, 14.6], device=device)
    sigma = sigma if levels == "levels" else sigma[1]
    memory_format = torch.channels_last if layout == "channels_last" else None

    def run(backend, sigma, state_dtype, dtype):
        options = {"shape": (3, 8, 8), "state_dtype": state_dtype, "dtype": dtype, "memory_format": memory_format}
        with cmfast.backend(backend):
            return ops.init_noise(noise, sigma, **options)

    fast, eager = (run(backend, sigma, *dtypes) for backend in ("triton", "reference"))
    exact = run("reference", sigma.double(), torch.float64, torch.float64)
    for i, (value, low, high) in enumerate(zip(fast, eager, exact, strict=True)):
        close(value, low, high, f"result {i}")
    assert fast[1].is_contiguous(memory_format=memory_format or torch.contiguous_format)


class TestDistribution:
    @pytest.fixture(scope="class")
    def z(self, device):
        return torch.stack(
            [triton_normal(2, torch.arange(64, device=device), (4096,), draw=draw) for draw in (0, 1)]
        ).double()

    def test_moments(self, z):
        n = z.numel()
        mean, var = z.mean(), z.var()
        kurtosis = ((z - mean) ** 4).mean() / var**2 - 3
        assert abs(mean) < 5 / n**0.5
        assert abs(var - 1) < 5 * (2 / n) ** 0.5
        assert abs(kurtosis) < 5 * (24 / n) ** 0.5

    def test_kolmogorov_smirnov(self, z):
        stats = pytest.importorskip("scipy.stats", reason="scipy measures the distribution")
        for draw in z:
            assert stats.kstest(draw.flatten().cpu().numpy(), "norm").pvalue > 1e-3

    def test_tails(self, z):
        beyond = (z.abs() > 4).sum().item()
        # 6.33e-5 of them are expected beyond 4.
        assert abs(beyond - 6.33e-5 * z.numel()) < 6 * (6.33e-5 * z.numel()) ** 0.5

    def test_no_correlation(self, z):
        first, second = z
        pairs = {
            "draws": (first, second),
            "samples": (first[:-1], first[1:]),
            "neighbours": (first[:, :-1], first[:, 1:]),
            "cosine and sine": (first[:, ::2], first[:, 1::2]),
            "words of a group": (first[:, ::4], first[:, 2::4]),
        }
        for name, (a, b) in pairs.items():
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 5 / a.numel() ** 0.5, name
            squares = torch.corrcoef(torch.stack([a.flatten().square(), b.flatten().square()]))[0, 1]
            assert abs(squares) < 5 / a.numel() ** 0.5, name

    def test_seeds_differ(self, z, device):
        other = triton_normal(3, torch.arange(64, device=device), (4096,)).double()
        assert abs(torch.corrcoef(torch.stack([other.flatten(), z[0].flatten()]))[0, 1]) < 5 / other.numel() ** 0.5
