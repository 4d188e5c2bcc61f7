"""What a file of weights says of itself, looked at before it is believed: sizes, kinds of tensors, settings.

Each function raises a ValueError without the file's name, which its caller puts before it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Numbers of a header that count something; no network has as many of it.
COUNTS = 2**24
#: Channels, and as many sizes as there are convolutions for.
MOST_SIZES = 4
_COUNTED = (
    "image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "dims", "num_classes",
    "num_heads", "num_head_channels", "num_heads_upsample",
)  # fmt: skip
_NUMBERS = ("sigma_data", "boundary", "sigma_min", "sigma_max", "rho")


def check_archive(path: Path) -> None:
    """Of a .pt file that is a zip archive: nothing in it is compressed, as `torch.save` leaves it, and so nothing
    becomes larger than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                raise ValueError(
                    f"{info.filename[:80]} in it is compressed, or as large as {info.file_size:,} bytes in a file of "
                    f"{size:,}: torch.save writes no such archive. Unpack it and pack it again without compression"
                )


def check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Plain tensors of floating-point numbers, which together take no more than the file, `size` bytes."""
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor with values ({_kind(tensor)}): save dense weights")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        total += tensor.numel() * tensor.element_size()
    if total > size:
        raise ValueError(
            f"its tensors take {total:,} bytes and the file has {size:,}: some are views of the same numbers. Save "
            "them with .clone()"
        )


def check_settings(settings: Any) -> None:
    """The header of a safetensors file that `cmfast.save` wrote."""
    if not isinstance(settings, dict) or not isinstance(settings.get("network"), dict):
        raise ValueError("expected settings with those of a network in them")
    for name in _NUMBERS:
        value = settings.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {_short(value)}, expected a number")
    shape, classes = settings.get("image_shape"), settings.get("num_classes")
    if shape is not None and not (isinstance(shape, list) and 0 < len(shape) <= MOST_SIZES and all(map(_count, shape))):
        raise ValueError(f"image_shape is {_short(shape)}, expected channels and sizes, three numbers mostly")
    if classes is not None and not _count(classes):
        raise ValueError(f"num_classes is {_short(classes)}, expected a number of them")
    if not isinstance(bounded := settings.get("bounded", True), bool):
        raise ValueError(f"bounded is {_short(bounded)}, expected true or false")


def check_network(config: Mapping[str, Any], tensors: int) -> None:
    """The arguments of a `UNetModel` that has as many tensors: before blocks without number are made."""
    for name in _COUNTED:
        value = config.get(name)
        if value is not None and not _count(value) and value != -1:
            raise ValueError(f"{name} is {_short(value)}, expected a whole number from 1 to {COUNTS:,}")
    for name in ("channel_mult", "attention_resolutions"):
        values = config.get(name, [1])
        listed = not isinstance(values, str) and isinstance(values, Collection)
        numbers = listed and all(isinstance(value, Real) for value in values)
        if not numbers or not (name == "channel_mult") <= len(values) <= tensors:
            raise ValueError(f"{name} is {_short(values)}, expected a list of numbers")
    blocks = (config.get("num_res_blocks", 1) + 1) * len(config.get("channel_mult", (1, 2, 4, 8)))
    if blocks > tensors:
        raise ValueError(f"num_res_blocks and channel_mult make {blocks:,} blocks, and there are {tensors:,} tensors")


def _count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) <= COUNTS


def _kind(tensor: Tensor) -> str:
    return "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)


def _short(value: Any) -> str:
    short = isinstance(value, str) or not isinstance(value, Collection) or not len(value)
    text = repr(value) if short else type(value).__name__
    return text if len(text) < 40 else text[:37] + "..."
