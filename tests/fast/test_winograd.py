"""Winograd's convolution on a CPU against float64, in every way of cutting it into strips."""

import pytest
import torch
from torch import nn

from cmfast.fast import winograd
from cmfast.tolerances import FLOOR

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="for CPUs with AVX2 or AVX512"
)


def convolution(channels: int, outputs: int) -> nn.Conv2d:
    torch.manual_seed(channels + outputs)
    return nn.Conv2d(channels, outputs, 3, padding=1)


@torch.no_grad()
def check(
    conv: nn.Conv2d,
    h: torch.Tensor,
    residual: torch.Tensor | None = None,
    workspace: winograd.Workspace | None = None,
) -> None:
    packed = winograd.pack(conv.weight, winograd.strip_shape(h.shape))
    out = winograd.convolve(h, packed, winograd.spread(conv.bias), residual, workspace=workspace)
    extra = 0 if residual is None else residual.double()
    exact = nn.functional.conv2d(h.double(), conv.weight.double(), conv.bias.double(), padding=1) + extra
    eager = conv(h) + (0 if residual is None else residual)
    assert out.is_contiguous(memory_format=torch.channels_last)
    error, allowed = ((x - exact).abs().max() for x in (out, eager))
    assert error <= 2 * allowed + FLOOR[torch.float32] * exact.abs().max()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("strip", [1, 5000, 40000, 1 << 21], ids=lambda n: f"strip{n}")
@pytest.mark.parametrize("shape", [(1, 64, 2, 2), (3, 64, 6, 10), (2, 96, 16, 4), (4, 80, 8, 8)], ids=str)
def test_every_strip(shape, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    check(convolution(shape[1], 112), image(*shape), image(shape[0], 112, *shape[2:]))


@pytest.mark.parametrize("shape", [(3, 64, 6, 10), (1, 96, 2, 2)], ids=str)
def test_transforms_for_a_compiler(shape):
    """In one expression, and with the same bits."""
    batch, channels, height, width = shape
    strip = torch.randn(batch, height + 2, width + 2, channels)
    tiles, untile = winograd._transforms(winograd.Workspace())
    assert torch.equal(winograd._tiles_in_one(strip), tiles(strip))
    assert winograd._tiles_in_one(strip).is_contiguous(memory_format=torch.channels_last)
    products = image(batch, 16 * channels, height // 2, width // 2)
    for residual in (None, torch.randn(batch, height, width, channels)):
        results = [torch.empty(batch, height, width, channels) for _ in range(2)]
        untile(products, results[0], residual)
        winograd._untile_in_one(products, results[1], residual)
        assert torch.equal(*results)


def test_shapes_of_the_published_network():
    check(convolution(192, 192), image(1, 192, 64, 64))
    check(convolution(768, 768), image(2, 768, 8, 8))


def test_memory_is_used_again_for_another_shape():
    """The zeros around an image are there again after a larger one was in the same memory."""
    conv, workspace = convolution(64, 64), winograd.Workspace()
    check(conv, 100 + image(2, 64, 12, 12), workspace=workspace)
    memory = {name: buffer.data_ptr() for name, buffer in workspace.by_name.items()}
    check(conv, image(1, 64, 4, 6), workspace=workspace)
    check(conv, image(1, 64, 6, 4), workspace=workspace)
    assert len(memory) == 4 and memory == {name: x.data_ptr() for name, x in workspace.by_name.items()}


def test_memory_is_that_of_a_strip(monkeypatch):
    """Whatever the number of images, and their height."""
    monkeypatch.setattr(winograd, "STRIP", 1 << 14)
    conv, sizes = convolution(64, 64), []
    for shape in [(1, 64, 4, 8), (9, 64, 4, 8), (2, 64, 64, 8)]:
        workspace = winograd.Workspace()
        check(conv, image(*shape), workspace=workspace)
        assert max(buffer.numel() for buffer in workspace.by_name.values()) <= 1 << 14
        sizes.append(workspace.by_name["padded"].numel())
    # Rows with a pixel around them: of one image, or eight at once.
    assert sizes == [6 * 10 * 64, 6 * 10 * 64, 10 * 10 * 64]


def test_in_and_out_of_inference_mode():
    conv, workspace = convolution(64, 64), winograd.Workspace()
    with torch.inference_mode():
        check(conv, image(1, 64, 4, 4), workspace=workspace)
    check(conv, image(1, 64, 4, 4), workspace=workspace)


def test_strips_are_alike():
    for shape in [(1, 192, 64, 64), (6, 768, 8, 8), (7, 64, 34, 2), (1, 256, 256, 256)]:
        samples, _, rows, columns = winograd.strip_shape(torch.Size(shape))
        assert shape[0] % samples == 0 and shape[2] // 2 % rows == 0 and columns == shape[3] // 2
        assert rows == shape[2] // 2 or samples == 1


@pytest.mark.parametrize(
    "conv, shape",
    [
        (nn.Conv2d(192, 192, 3, padding=1), (1, 192, 33, 32)),
        (nn.Conv2d(192, 192, 3, stride=2, padding=1), (1, 192, 32, 32)),
        (nn.Conv2d(192, 192, 1), (1, 192, 64, 64)),
        (nn.Conv2d(96, 192, 3, padding=1), (1, 96, 64, 64)),
        (nn.Conv2d(200, 192, 3, padding=1), (1, 200, 32, 32)),
        (nn.Conv2d(192, 3, 3, padding=1), (1, 192, 64, 64)),
        (nn.Conv2d(192, 192, 3, padding=1), (1, 192, 8, 8)),
    ],
    ids=["odd", "stride", "1x1", "narrow", "vectors", "last", "little work"],
)
def test_what_it_does_not_do(conv, shape):
    assert not winograd.fits(conv, torch.empty(shape))
    assert winograd.fits(nn.Conv2d(192, 192, 3, padding=1), torch.empty(1, 192, 32, 32))
