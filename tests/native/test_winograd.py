"""Winograd's convolution on a CPU against float64, and each of its gradients, for every CPU that this one can be."""

import ctypes
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from cmfast.native import winograd
from cmfast.tolerances import FLOOR
from tests.fast.networks import check
from tests.native.common import CPUS

pytestmark = pytest.mark.skipif(winograd.refusal() is not None, reason=f"Winograd: {winograd.refusal()}")
#: Samples, channels, outputs, rows, columns: odd sizes, single pixels, more tiles than a block, a panel that is not
#: full, nothing at all.
SHAPES = [(2, 64, 32, 6, 10), (3, 32, 48, 7, 5), (1, 16, 16, 1, 1), (2, 48, 80, 3, 1), (5, 16, 64, 14, 9)]
SHAPES += [(0, 32, 32, 4, 4)]


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def given(batch, channels, outputs, height, width, doubled: bool = False) -> list[torch.Tensor]:
    """The input, weight, bias and residual, which is twice as large where the input is to be doubled."""
    torch.manual_seed(channels + outputs)
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    weight = conv.weight.detach().to(memory_format=torch.channels_last)
    size = (2 * height, 2 * width) if doubled else (height, width)
    return [image(batch, channels, height, width), weight, conv.bias.detach(), image(batch, outputs, *size)]


def used() -> winograd.Workspace:
    """Memory with something in it."""
    workspace = winograd.Workspace()
    workspace.take(1 << 20).fill_(torch.nan)
    return workspace


def ordinary(h, weight, bias, residual, doubled: bool = False) -> torch.Tensor:
    h = F.interpolate(h, scale_factor=2.0, mode="nearest") if doubled else h
    return F.conv2d(h, weight, bias, padding=1) + residual


def as_float64(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("doubled", [False, True], ids=["as it is", "doubled"])
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, cpu, doubled):
    """Also of inputs and weights in another layout, and without bias and residual."""
    every = given(*shape, doubled)
    h, weight, bias, residual = every
    exact, eager = ordinary(*as_float64(every), doubled), ordinary(*every, doubled)
    options = {"doubled": doubled, "cpu": cpu}
    for form in (torch.channels_last, torch.contiguous_format):
        packed = winograd.pack(weight.contiguous(memory_format=form), cpu=cpu)
        x, added = (each.contiguous(memory_format=form) for each in (h, residual))
        out = winograd.convolve(x, packed, len(bias), bias, added, workspace=used(), **options)
        assert out.shape == exact.shape and out.is_contiguous(memory_format=torch.channels_last)
        if shape[0]:
            check(out, eager, exact, FLOOR[torch.float32], exact.abs().max())
    alone = winograd.convolve(h, packed, len(bias), **options)
    torch.testing.assert_close(alone + bias[:, None, None] + residual, out)


def test_shapes_of_the_published_network():
    for shape in [(1, 192, 192, 64, 64), (2, 768, 768, 8, 8), (1, 1344, 576, 16, 16)]:
        every = given(*shape)
        exact, eager = ordinary(*as_float64(every)), ordinary(*every)
        out = winograd.convolution(*every)
        check(out, eager, exact, FLOOR[torch.float32], exact.abs().max())


@pytest.mark.parametrize("doubled", [False, True], ids=["as it is", "doubled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, doubled):
    """In every selection."""
    every = given(*shape, doubled)
    upstream = image(*every[3].shape)

    def gradients(function, dtype=torch.float32, wanted=(True,) * 4):
        leaves = [x.to(dtype, copy=True).requires_grad_(want) for x, want in zip(every, wanted, strict=True)]
        function(*leaves, doubled=doubled).backward(upstream.to(dtype))
        return [x.grad for x in leaves]

    exact, eager = gradients(ordinary, torch.float64), gradients(ordinary)
    for wanted in itertools.product((True, False), repeat=4):
        if not any(wanted):
            continue
        for found, other, right, want in zip(
            gradients(winograd.convolution, wanted=wanted), eager, exact, wanted, strict=True
        ):
            assert (found is not None) == want
            if want and right.numel():
                check(found, other, right, FLOOR[torch.float32], right.abs().max())


@pytest.mark.parametrize("doubled", [False, True], ids=["as it is", "doubled"])
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_weight(shape, cpu, doubled):
    h, weight, bias, grad = given(*shape, doubled)

    def found(dtype):
        leaf = weight.to(dtype).requires_grad_()
        made = ordinary(h.to(dtype), leaf, bias.to(dtype), 0, doubled)
        return torch.autograd.grad(made, leaf, grad.to(dtype))[0]

    exact = found(torch.float64)
    out = winograd.gradient(h, grad, weight, doubled=doubled, workspace=used(), cpu=cpu)
    check(out, found(torch.float32), exact, FLOOR[torch.float32], exact.abs().max())
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("doubled", [False, True], ids=["as it is", "doubled"])
def test_sums_that_would_be_too_many(monkeypatch, doubled):
    """The gradient of the weight is PyTorch's, with the bits of it."""
    monkeypatch.setattr(winograd, "MOST_SUMS", 0)
    monkeypatch.setattr(winograd, "gradient", lambda *args, **options: pytest.fail("it was summed all the same"))
    h, weight, bias, residual = given(*SHAPES[0], doubled)
    leaf = weight.clone().requires_grad_()
    found = (torch.autograd.grad(function(h, leaf, bias, residual, doubled=doubled), leaf, residual)[0]
             for function in (winograd.convolution, ordinary))  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("doubled", [False, True], ids=["as it is", "doubled"])
def test_gradients_of_gradients(doubled):
    """PyTorch's."""
    every = given(2, 16, 32, 4, 5, doubled)

    def second(function):
        leaves = [x.clone().requires_grad_() for x in every]
        first = torch.autograd.grad(function(*leaves, doubled=doubled).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves)

    for found, expected in zip(second(winograd.convolution), second(ordinary), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def threads():
    """Has PyTorch take another number of threads for a while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits(threads):
    """Of a sample: whatever the batch, the threads, and what is around it."""
    h, weight, bias, residual = given(4, 32, 48, 10, 6)
    packed = winograd.pack(weight)
    together = winograd.convolve(h, packed, 48, bias, residual)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(winograd.convolve(h, winograd.pack(weight), 48, bias, residual), together)
        every = [winograd.convolve(h[i : i + 1], packed, 48, bias, residual[i : i + 1]) for i in range(4)]
        assert torch.equal(torch.cat(every), together)
    h[1:] = torch.nan
    assert torch.equal(winograd.convolve(h, packed, 48, bias, residual)[0], together[0])


def test_bits_of_threads(threads):
    """That do not wait for each other. Of the gradient of the weight they are the same each time, and for other numbers
    of threads within rounding."""
    h, weight, _, grad = given(16, 32, 32, 24, 24)
    threads(1)
    alone, out = winograd.gradient(h, grad, weight), winograd.convolve(h, winograd.pack(weight), 32)
    for count in (2, 3):
        threads(count)
        first = winograd.gradient(h, grad, weight)
        torch.testing.assert_close(first, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
        for _ in range(10):
            assert torch.equal(winograd.gradient(h, grad, weight), first)
            assert torch.equal(winograd.convolve(h, winograd.pack(weight), 32), out)


@pytest.mark.parametrize("cpu", CPUS)
def test_memory_around_is_left_alone(cpu):
    """Nothing is written beside the output, the gradient and the workspace; what is there does not count."""
    batch, channels, outputs, height, width = 3, 32, 48, 5, 7
    h, weight, bias, grad = given(batch, channels, outputs, height, width)
    made, margin = winograd.functions(cpu), 1024
    block, threads = made.rows, 2

    def within(x: torch.Tensor, around: float = torch.nan) -> tuple[torch.Tensor, int]:
        memory = torch.full((x.numel() + 2 * margin,), around)
        memory[margin:-margin] = x.permute(0, 2, 3, 1).flatten() if x.ndim == 4 else x
        return memory, memory.data_ptr() + 4 * margin

    room = max(made.room(channels, block), made.gradient_room(channels, outputs, block))
    given_ = [within(x) for x in (h, winograd.pack(weight, cpu=cpu), bias, grad)]
    written = [within(torch.full(shape, torch.nan), 7.0) for shape in (grad.shape, weight.shape, (threads * room,))]
    pointers = [ctypes.c_void_p(at) for _, at in (*given_, *written)]
    before = [memory.clone() for memory, _ in given_]
    sizes = batch, height, width, channels, outputs
    made.convolve(*pointers[:5], pointers[6], *sizes, False, block, threads)
    strides = 1, 9 * channels, channels
    made.gradient(pointers[0], pointers[3], pointers[5], pointers[6], *sizes, False, *strides, block, threads)
    for memory, _ in written:
        assert (memory[:margin] == 7).all() and (memory[-margin:] == 7).all()
    for (memory, _), earlier in zip(given_, before, strict=True):
        assert torch.equal(memory.nan_to_num(7), earlier.nan_to_num(7))
    out = written[0][0][margin:-margin].view(batch, height, width, outputs).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, ordinary(h, weight, bias, grad))
    assert written[1][0][margin:-margin].isfinite().all()


def test_memory_is_used_again_for_another_shape():
    workspace, seen = winograd.Workspace(), []
    for shape in [(2, 64, 32, 12, 12), (1, 32, 32, 4, 6), (1, 64, 48, 6, 4)]:
        every = given(*shape)
        torch.testing.assert_close(winograd.convolution(*every, workspace=workspace), ordinary(*every))
        seen.append(workspace.memory)
    assert seen[0] is seen[1] is seen[2] is not None


def test_in_and_out_of_inference_mode():
    every, workspace = given(1, 64, 64, 4, 4), winograd.Workspace()
    with torch.inference_mode():
        first = winograd.convolution(*every, workspace=workspace)
    assert torch.equal(winograd.convolution(*every, workspace=workspace), first)


def test_blocks():
    """As much work for each thread, and no more of it at once than stays in a cache."""
    made = winograd.functions()
    for tiles, threads in itertools.product((0, 1, 16, 64, 100, 1024, 99999), (1, 2, 3, 16)):
        block = made.block(tiles, threads)
        rounds = -(-tiles // (block * threads))
        assert made.rows <= block <= winograd.BLOCK and block % made.rows == 0
        assert block * rounds * threads < tiles + threads * made.rows * max(rounds, 1)


@pytest.mark.parametrize(
    "conv, shape, dtype",
    [
        (nn.Conv2d(64, 64, 3, stride=2, padding=1), (4, 64, 32, 32), torch.float32),
        (nn.Conv2d(64, 64, 3), (4, 64, 32, 32), torch.float32),
        (nn.Conv2d(64, 64, 1), (4, 64, 32, 32), torch.float32),
        (nn.Conv2d(16, 16, 3, padding=1), (4, 16, 32, 32), torch.float32),
        (nn.Conv2d(200, 192, 3, padding=1), (4, 200, 32, 32), torch.float32),
        (nn.Conv2d(192, 3, 3, padding=1), (4, 192, 32, 32), torch.float32),
        (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 2, 2), torch.float32),
        (nn.Conv2d(64, 64, 3, padding=1), (4, 64, 32, 32), torch.bfloat16),
    ],
    ids=["stride", "padding", "1x1", "narrow", "vectors", "last", "few tiles", "bfloat16"],
)
def test_what_it_does_not_do(conv, shape, dtype):
    assert not winograd.fits(conv, torch.empty(shape, dtype=dtype), True)


def test_what_it_does(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    fits = [winograd.fits(conv, torch.empty(1, 64, size, size), kept) for size in (7, 22, 23) for kept in (True, False)]
    assert fits == [True, False, True, False, True, True]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert not winograd.fits(conv, torch.empty(1, 64, 7, 7), True)


FEW = """
import torch
from cmfast.native import winograd
torch.set_num_threads(4)
assert torch.get_num_threads() == 4
h, grad, weight = torch.randn(4, 16, 24, 24), torch.randn(4, 16, 24, 24), torch.randn(16, 16, 3, 3)
workspace = winograd.Workspace()
workspace.take(1 << 20).fill_(torch.nan)
found = winograd.gradient(h, grad, weight, workspace=workspace).double()
# Not in float32: oneDNN waits for ever for threads that there are not.
exact = torch.nn.grad.conv2d_weight(h.double(), weight.shape, grad.double(), padding=1)
torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
"""


def test_fewer_threads_than_were_asked_for():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", FEW], env=environment, check=True, timeout=100)


def test_many_gradients_at_once():
    """`is_grads_batched`, as of a vectorized jacobian: PyTorch's."""
    every = given(2, 16, 32, 4, 5)
    found = []
    for function in (winograd.convolution, ordinary):
        leaves = [x.clone().requires_grad_() for x in every]
        upstream = torch.stack([every[3], 2 * every[3] + 1])
        found.append(torch.autograd.grad(function(*leaves), leaves, upstream, is_grads_batched=True))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_trace_is_not_of_it():
    """Which would see no more than an empty tensor."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    said = []
    torch.jit.trace(lambda h: said.append(winograd.fits(conv, h, True)) or h + 1, torch.randn(2, 64, 16, 16))
    assert said[0] is False and winograd.fits(conv, torch.randn(2, 64, 16, 16), True)


@pytest.mark.parametrize("layout", ["expanded", "a slice of channels", "misaligned", "transposed"])
def test_views(layout):
    h, weight, bias, residual = given(2, 32, 48, 6, 8)
    if layout == "expanded":
        residual = residual[:1].expand(2, -1, -1, -1)
        bias = bias[:1].expand(48)
    elif layout == "a slice of channels":
        h, residual = torch.cat([h, h], 1)[:, 16:48], torch.cat([residual, residual], 1)[:, 24:72]
    elif layout == "misaligned":
        h, weight, residual = (torch.cat([x[0, 0, 0, :1], x.flatten()])[1:].view_as(x) for x in (h, weight, residual))
    else:
        h, weight, residual = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (h, weight, residual))
    every = h, weight, bias, residual
    leaves, others = ([x.detach().requires_grad_() for x in every] for _ in range(2))
    torch.testing.assert_close(winograd.convolution(*leaves), ordinary(*others))
    winograd.convolution(*leaves).sum().backward()
    ordinary(*others).sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda h, w, b, r: (h, w.double(), b, r), TypeError, "weight must be float32 on the CPU, got torch.float64"),
        (lambda h, w, b, r: (h, w, b.bfloat16(), r), TypeError, "bias must be float32 on the CPU"),
        (lambda h, w, b, r: (h, w.to("meta"), b, r), TypeError, "got torch.float32 on meta"),
        (lambda h, w, b, r: (h[:, :16], w, b, r), ValueError, r"packed must have shape"),
        (lambda h, w, b, r: (h, w, b[1:], r), ValueError, r"bias must have shape \[48\], got \[47\]"),
        (lambda h, w, b, r: (h, w, b, r[..., 1:]), ValueError, r"residual must have shape \[2, 48, 6, 8\]"),
    ],
    ids=["float64", "bfloat16", "meta", "channels", "bias", "residual"],
)
def test_what_c_must_not_be_given(change, error, message):
    """Of a network whose parts were moved or replaced, say."""
    with pytest.raises(error, match=message):
        winograd.convolution(*change(*given(2, 32, 48, 6, 8)))


def test_filters_of_memory_given_up():
    """By `.data`, after which new memory may have the old address."""
    weight, filters = torch.randn(16, 16, 3, 3), winograd.Filters()
    packed = filters.of(weight, False)
    assert filters.of(weight, False) is packed
    ((key, kept),) = filters._kept.items()
    filters._kept[key] = kept._replace(storage=StorageWeakRef(torch.empty(1).untyped_storage()))
    assert filters.of(weight, False) is not packed


def test_filters_of_inference_mode():
    """Of which nobody counts what is written to them."""
    h, filters = torch.randn(1, 16, 4, 4), winograd.Filters()
    with torch.inference_mode():
        weight = torch.randn(16, 16, 3, 3)
        once = winograd.convolve(h, filters.of(weight, False), 16)
        weight.mul_(2)
        torch.testing.assert_close(winograd.convolve(h, filters.of(weight, False), 16), 2 * once)


def test_a_gradient_that_is_negated_where_it_is_read():
    h, weight, bias, residual = (x.requires_grad_() for x in given(2, 32, 16, 6, 8))
    y, grad = winograd.convolution(h, weight, bias, residual), image(2, 16, 6, 8)
    expected = torch.autograd.grad(y, (h, weight, bias), grad, retain_graph=True)
    for made, right in zip(torch.autograd.grad(y, (h, weight, bias), torch._neg_view(-grad)), expected, strict=True):
        torch.testing.assert_close(made, right)


def test_filters_go_with_their_weight():
    filters = winograd.Filters()
    for _ in range(3):
        weight = torch.randn(16, 16, 3, 3)
        filters.of(weight, False), filters.of(weight, True)
        assert len(filters._kept) == 2
    del weight
    assert not filters._kept
