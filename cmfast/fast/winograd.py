"""3x3 convolutions on a CPU in 4/9 of the multiplications: Winograd's F(2x2, 3x3), Lavin & Gray 2016.

An output tile of 2x2 pixels comes from an input tile of 4x4, Y = A' ((G g G') * (B' d B)) A, and the products of one
place in all tiles are a matrix multiplication over channels: 16 of them, which oneDNN does as one grouped 1x1
convolution. Everything is channels_last, so each addition of a transform runs over whole rows of channels. Tiles are
done in strips that stay in cache.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Fewest channels, as the harmonic mean of inputs and outputs, and multiplications of an ordinary convolution, that pay
#: for the transforms: these grow with their sum, and what they save with their product.
LEAST_CHANNELS = 150
LEAST_WORK = 190_000_000
#: What it is done in: bfloat16 has no digits to spare for the transforms.
DTYPE = torch.float32
#: What the number of channels must be divisible by: the widest vector.
VECTOR = 16
#: Elements of a strip's transformed input, at most, where a row of tiles is no more.
STRIP = 1 << 21

_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def wide(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be done so, and gains by it in images that are not small."""
    channels = conv.in_channels, conv.out_channels
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and 2 * math.prod(channels) >= LEAST_CHANNELS * sum(channels)
        and not any(count % VECTOR for count in channels)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def fits(conv: nn.Conv2d, h: Tensor) -> bool:
    """Whether the convolution of h [B, C, H, W] can be done so, and gains by it."""
    work = 9 * conv.in_channels * conv.out_channels * (h.numel() // h.shape[1])
    return h.dtype == DTYPE and wide(conv) and work >= LEAST_WORK and not any(size % 2 for size in h.shape[2:])


def transform(weight: Tensor) -> Tensor:
    """G g G' of a weight [K, C, 3, 3]: [16 K, C, 1, 1], the place in the tile before the channel."""
    g = torch.tensor(_FILTER, dtype=torch.float64, device=weight.device)
    places = torch.einsum("ai,kcij,bj->abkc", g, weight.double(), g)
    return places.reshape(-1, weight.shape[1], 1, 1).to(weight.dtype)


def strip_shape(shape: torch.Size) -> tuple[int, int, int, int]:
    """Samples, places and channels, rows and columns of tiles of a strip for inputs of `shape`: all strips are alike.

    oneDNN lays out a weight for one shape; with another it is many times slower.
    """
    batch, channels, height, width = shape
    row = 16 * channels * (width // 2)
    rows = _divisor(height // 2, STRIP // row)
    samples = _divisor(batch, STRIP // (row * rows)) if rows == height // 2 else 1
    return samples, 16 * channels, rows, width // 2


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is no more than the limit, or 1."""
    return next((d for d in range(min(limit, number), 1, -1) if number % d == 0), 1)


def pack(weight: Tensor, strip: tuple[int, int, int, int]) -> Tensor:
    """The transformed weight as oneDNN wants it, for strips of that shape."""
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(transform(weight), [0, 0], [1, 1], [1, 1], 16, list(strip))


def spread(bias: Tensor) -> Tensor:
    """A bias [K] for the products, [16 K]: at the place that every output adds once."""
    return F.pad(bias[None], (0, 0, 5, 10)).flatten()


class Workspace(threading.local):
    """Memory that one convolution leaves to the next, as fresh pages cost as much as the arithmetic: that of a strip,
    in each thread its own. It goes with its thread, or with what holds this object."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of whatever was in it, until this name is next taken."""
        count = math.prod(shape)
        buffer = self.by_name.get(name)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):
                # Said, as defaults may be others.
                buffer = self.by_name[name] = torch.empty(count, dtype=torch.float32, device="cpu")
        return buffer[:count].view(shape)


def convolve(
    h: Tensor,
    packed: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    workspace: Workspace | None = None,
    compiled: bool = False,
) -> Tensor:
    """The 3x3 convolution of h [B, C, H, W] with zeros around it, plus residual.

    packed, bias: of `pack` for the strips of h, and of `spread`. workspace: of the network; None: of this call alone.
    compiled: the transforms, by inductor.
    """
    workspace = workspace or Workspace()
    tiles, untile = _compiled_transforms() if compiled else _transforms(workspace)
    batch, channels, height, width = h.shape
    image, added = h.permute(0, 2, 3, 1), None if residual is None else residual.permute(0, 2, 3, 1)
    out = torch.empty(batch, height, width, bias.numel() // 16, dtype=h.dtype, device=h.device)

    samples, _, rows, _ = strip_shape(h.shape)
    strip = workspace.take("padded", samples, 2 * rows + 2, width + 2, channels)
    for side in (strip[:, :, 0], strip[:, :, -1]):
        side.zero_()
    for b in range(0, batch, samples):
        for r in range(0, height // 2, rows):
            # The rows of its tiles, and one on either side where the image goes on.
            start, end = 2 * r - 1, 2 * (r + rows) + 1
            first, last = max(start, 0), min(end, height)
            for outside in (strip[:, : first - start], strip[:, last - start :]):
                outside.zero_()
            strip[:, first - start : last - start, 1:-1].copy_(image[b : b + samples, first:last])
            products = torch.ops.mkldnn._convolution_pointwise(
                tiles(strip), packed, bias, [0, 0], [1, 1], [1, 1], 16, "none", [], ""
            )
            place = slice(b, b + samples), slice(2 * r, 2 * (r + rows))
            untile(products, out[place], None if added is None else added[place])
    return out.permute(0, 3, 1, 2)


def _transforms(workspace: Workspace) -> tuple[Any, Any]:
    return functools.partial(_tiles, workspace), functools.partial(_untile, workspace)


def _tiles(workspace: Workspace, strip: Tensor) -> Tensor:
    """B' d B of a padded strip [b, 2 r + 2, W + 2, C], as an image [b, 16 C, r, W / 2] in channels_last."""
    batch, height, width, channels = strip.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    half = workspace.take("half", batch, rows, 4, width, channels)
    d = [strip[:, i : i + 2 * rows - 1 : 2] for i in range(4)]
    for place, (first, second, sign) in enumerate(_INPUT):
        torch.add(d[first], d[second], alpha=sign, out=half[:, :, place])
    whole = workspace.take("whole", batch, rows, columns, 4, 4, channels)
    d = [half[:, :, :, i : i + 2 * columns - 1 : 2].transpose(2, 3) for i in range(4)]
    for place, (first, second, sign) in enumerate(_INPUT):
        torch.add(d[first], d[second], alpha=sign, out=whole[:, :, :, :, place])
    return whole.flatten(3).permute(0, 3, 1, 2)


#: B': each row is a sum or difference of two.
_INPUT = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))


def _untile(workspace: Workspace, products: Tensor, out: Tensor, residual: Tensor | None) -> None:
    """A' m A of an image [b, 16 K, r, c] in channels_last, plus residual, into out [b, 2 r, 2 c, K]."""
    batch, places, rows, columns = products.shape
    m = products.permute(0, 2, 3, 1).view(batch, rows, columns, 4, 4, places // 16)
    half = workspace.take("folded", batch, rows, columns, 4, 2, places // 16)
    torch.add(m[..., 0, :], m[..., 1, :], out=half[..., 0, :]).add_(m[..., 2, :])
    torch.sub(m[..., 1, :], m[..., 2, :], out=half[..., 1, :]).sub_(m[..., 3, :])
    # [b, r, row in the tile, c, column in the tile, K]
    pixels = out.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
    torch.add(half[:, :, :, 0], half[:, :, :, 1], out=pixels[:, :, 0]).add_(half[:, :, :, 2])
    torch.sub(half[:, :, :, 1], half[:, :, :, 2], out=pixels[:, :, 1]).sub_(half[:, :, :, 3])
    if residual is not None:
        out += residual


def _tiles_in_one(strip: Tensor) -> Tensor:
    """`_tiles` for a compiler, which makes one pass of it."""

    def differences(x: Tensor, dim: int) -> list[Tensor]:
        count = x.shape[dim] // 2 - 1
        d = [x.narrow(dim, i, 2 * count - 1).unfold(dim, 1, 2).squeeze(-1) for i in range(4)]
        return [d[first] + sign * d[second] for first, second, sign in _INPUT]

    places = [place for half in differences(strip, 1) for place in differences(half, 2)]
    return torch.cat(places, dim=3).permute(0, 3, 1, 2)


def _untile_in_one(products: Tensor, out: Tensor, residual: Tensor | None) -> None:
    """`_untile` for a compiler, which makes one pass of it."""
    batch, places, rows, columns = products.shape
    m = products.permute(0, 2, 3, 1).reshape(batch, rows, columns, 4, 4, places // 16)

    def sums(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        return parts[0] + parts[1] + parts[2], parts[1] - parts[2] - parts[3]

    halves = [sums([m[:, :, :, i, j] for j in range(4)]) for i in range(4)]
    pixels = [torch.stack(row, dim=3) for row in zip(*(sums(list(h)) for h in zip(*halves)))]
    result = torch.stack(pixels, dim=2).reshape(out.shape)
    out.copy_(result if residual is None else result + residual)


@functools.cache
def _compiled_transforms() -> tuple[Any, Any]:
    """Both, for any shape: one compilation each."""
    return torch.compile(_tiles_in_one, dynamic=True), torch.compile(_untile_in_one, dynamic=True)
