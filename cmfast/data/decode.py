"""Image files as pixels: JPEG by torchvision where it is installed, which is twice as fast, the others by Pillow.

Both take the same from a file: RGB, with transparency left out, 16 bits cut to 8, the first frame, no rotation that a
camera noted down (as torchvision's ImageFolder). Of a JPEG the two may differ by a level or so; a fingerprint names
the one that is used.

A header is read before anything is decoded. An image of more pixels than Pillow takes is refused, since a few thousand
bytes can claim to be one: twice its `MAX_IMAGE_PIXELS`, 179 million as it comes. Whoever has such images raises that.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

#: The suffixes of what is an image in a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
#: Their names in Pillow, which would otherwise try all it knows, and run other programs for some.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
#: Larger files are not read: no image of that many pixels has as many bytes.
MAX_BYTES = 2**30
#: How files start that Pillow decodes in any case: torchvision knows no BMP and no WebP of several frames, paints what
#: a GIF leaves transparent, and of a PNG with one byte changed it ends the process (0.29, by a segmentation fault).
PILLOWS = (b"BM", b"GIF", b"\x89PN", b"RIF")


def decoder() -> str:
    """What decodes here: "torchvision" or "Pillow"."""
    try:
        from torchvision.io import decode_image  # noqa: F401  # deprecated since 0.29: a later one may lack it
    except ImportError:
        return "Pillow"
    return "torchvision"


def decode(path: Path, by: str) -> Tensor:
    """The pixels of a file, uint8 [3, H, W]. Raises: what the decoder raises of a file that is no image."""
    _check_file(path)
    content = np.fromfile(path, np.uint8)
    if by == "Pillow" or content[:3].tobytes().startswith(PILLOWS):
        return _by_pillow(path)
    from torchvision.io import ImageReadMode, decode_image

    _size(io.BytesIO(content.data))
    image: Tensor = decode_image(torch.from_numpy(content), ImageReadMode.RGB)
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def _by_pillow(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() cuts off at 255
            pixels = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
            return torch.from_numpy(pixels).expand(3, -1, -1)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) as the header says. Raises: what Pillow raises of a file that is no image."""
    _check_file(path)
    return _size(path)


def _size(source: Path | BinaryIO) -> tuple[int, int]:
    from PIL import Image

    with Image.open(source, formats=FORMATS) as image:
        return image.height, image.width


def _check_file(path: Path) -> None:
    """Raises: ValueError: no file, such as a pipe, on which one would wait for ever; or too large."""
    if not path.is_file():
        raise ValueError("a link to nothing" if path.is_symlink() else "no file" if path.exists() else "it is gone")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"a file of {size:,} bytes, and no image has more than {MAX_BYTES:,}")


def reason(error: Exception) -> str:
    """What an error of these functions says, without the path of a file or a line in a decoder's source."""
    from PIL import UnidentifiedImageError

    return "not an image" if isinstance(error, UnidentifiedImageError) else re.sub(r"^.*\.cpp:\d+, ", "", str(error))
