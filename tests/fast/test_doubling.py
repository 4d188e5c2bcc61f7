"""Images of twice the size, convolved without being made, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmfast.fast import doubling, optimize
from cmfast.fast.network import has_onednn
from cmfast.native import winograd
from cmfast.tolerances import FLOOR
from tests.fast.networks import check, inputs
from tests.golden_utils import small_unet

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="for CPUs with AVX2 or AVX512"
)
#: Inputs and outputs of the convolution, and the image before it is doubled.
SHAPES = [(64, 64, (1, 8, 8)), (32, 96, (3, 5, 7)), (96, 17, (2, 1, 4)), (7, 32, (5, 6, 1)), (64, 64, (0, 4, 4))]
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not has_onednn(torch.bfloat16), reason="this CPU has no convolutions in bfloat16 from oneDNN"
        ),
    ),
]


def convolution(channels: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    torch.manual_seed(channels + outputs)
    return nn.Conv2d(channels, outputs, 3, padding=1).to(dtype)


def image(channels: int, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch, height, width = size
    return torch.randn(batch, channels, height, width).to(dtype, memory_format=torch.channels_last)


def ordinary(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(F.interpolate(h, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def at_once(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return doubling.transposed(h, doubling.fold(weight), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, outputs, size", SHAPES, ids=str)
def test_values(channels, outputs, size, dtype):
    conv, h = convolution(channels, outputs, dtype), image(channels, size, dtype)
    parameters = conv.weight.detach(), conv.bias.detach()
    exact, eager = ordinary(h.double(), *(p.double() for p in parameters)), ordinary(h, *parameters)
    packed = doubling.pack(parameters[0], dtype, h.shape)
    for out in (at_once(h, *parameters), doubling.convolve(h, packed, parameters[1])):
        assert out.shape == exact.shape and out.dtype == dtype
        if size[0]:
            assert out.is_contiguous(memory_format=torch.channels_last)
            check(out, eager, exact, FLOOR[dtype], exact.abs().max())


@pytest.mark.parametrize("channels, outputs, size", SHAPES[:4], ids=str)
def test_gradients(channels, outputs, size):
    conv, h = convolution(channels, outputs), image(channels, size)
    given = [h, conv.weight.detach(), conv.bias.detach()]
    upstream = image(outputs, (size[0], 2 * size[1], 2 * size[2]))

    def gradients(function, dtype=torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        return torch.autograd.grad(function(*leaves), leaves, upstream.to(dtype))

    every = zip(gradients(at_once), gradients(ordinary), gradients(ordinary, torch.float64), strict=True)
    for found, eager, exact in every:
        check(found, eager, exact, FLOOR[torch.float32], exact.abs().max())


def test_gradients_of_gradients():
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 3), (4, 3, 3, 3), (4,))]
    assert torch.autograd.gradcheck(at_once, leaves) and torch.autograd.gradgradcheck(at_once, leaves)


def test_weights_are_added_before_they_are_rounded():
    weight = torch.randn(16, 24, 3, 3)
    assert torch.equal(doubling.fold(weight, torch.bfloat16), doubling.fold(weight).bfloat16())
    half = weight.bfloat16()
    assert torch.equal(doubling.fold(half), doubling.fold(half.float()).bfloat16())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
    ],
    ids=["1x1", "stride", "padding"],
)
def test_what_it_does_not_do(conv):
    h = torch.empty(8, 64, 8, 8)
    assert not doubling.fits(conv, h, kept=True)
    assert doubling.fits(convolution(64, 64), h, kept=True)


def test_filters_for_one_pass_are_for_many_pixels():
    conv = convolution(64, 64)
    assert doubling.fits(conv, torch.empty(8, 64, 8, 8), kept=False)
    assert not doubling.fits(conv, torch.empty(7, 64, 8, 8), kept=False)
    assert not doubling.fits(conv, torch.empty(8, 64, 8, 8, device="meta"), kept=True)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_networks_use_it(resblock_updown, monkeypatch):
    """Kept in sampling; in training and for a target where the batch is large enough. Where Winograd's are not."""
    monkeypatch.setattr(winograd, "refusal", lambda: "not now")
    model = small_unet(resblock_updown=resblock_updown).eval()
    transposed = []
    monkeypatch.setattr(F, "conv_transpose2d", lambda *a, f=F.conv_transpose2d: transposed.append(1) or f(*a))

    def made(recording: bool, pack: bool = True) -> tuple[bool, bool]:
        transposed.clear()
        fast = optimize(model, pack=pack)
        with torch.set_grad_enabled(recording):
            fast(*inputs(model))
        return "doubling" in fast._fast._weights.kinds(), bool(transposed)

    assert made(recording=False) == (True, False)
    assert made(recording=False, pack=False) == made(recording=True) == (False, False)
    monkeypatch.setattr(doubling, "LEAST_PIXELS", 1)
    assert made(recording=False) == (True, False)
    assert made(recording=False, pack=False) == made(recording=True) == (False, True)
