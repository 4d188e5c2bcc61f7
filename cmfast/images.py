"""Files of images: a PNG grid to look at, an .npz for the ADM evaluator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from cmfast.ops import _check
from cmfast.whole import written_whole

SUFFIXES = (".png", ".npz")


def check_output(path: Path | str) -> Path:
    """The path, if a file can be written there: before hours of sampling rather than after.

    Raises: ValueError: not .png or .npz. OSError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: the output must end in {' or '.join(SUFFIXES)}")
    target = Path(os.path.realpath(path))  # of a link, the file that `written_whole` replaces
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: this folder does not exist; make it first")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise PermissionError(f"{path} cannot be written: no permission")
    return path


def save(
    path: Path | str,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    columns: int | None = None,
) -> Path:
    """Write uint8 images [N, H, W, C], C = 1, 3 or 4: a grid if `path` ends in .png, arrays if in .npz.

    The .npz holds `arr_0` uint8 [N, H, W, 3] (grey images repeated) and, if given, `arr_1` the labels [N]: what
    openai's evaluator takes; but of four channels [N, H, W, 4], which it does not. The file appears when it is whole.
    columns: as of `grid`.

    Raises: ValueError: images of another dtype or shape, none for a picture, not as many labels, or a path that
        `check_output` refuses. OSError: it cannot be written.
    """
    path = check_output(path)
    pixels = _pixels(images)
    if path.suffix.lower() == ".npz":
        return save_arrays(path, pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels, labels)
    from PIL import Image

    tiled = grid(pixels, columns=columns)
    picture = Image.fromarray(tiled[..., 0] if tiled.shape[-1] == 1 else tiled)
    with written_whole(path) as unfinished:
        picture.save(unfinished, format="PNG")
    return path


def save_arrays(
    path: Path | str, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | Sequence[int] | None = None
) -> Path:
    """Write an .npz of `arr_0`, images [N, ...] of any dtype and shape as they are, and, if given, `arr_1`, labels [N].

    Raises: ValueError: not as many labels, or a path that `check_output` refuses. OSError: it cannot be written.
    """
    path = check_output(path)
    arrays = [np.asarray(images)] + ([] if labels is None else [np.asarray(labels)])
    if labels is not None and arrays[-1].shape != arrays[0].shape[:1]:
        got = list(arrays[-1].shape)
        raise ValueError(f"labels must be [N] with N = {len(arrays[0])}, one for each of the images, got {got}")
    with written_whole(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, *arrays)
    return path


def grid(images: Tensor | np.ndarray, *, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 images [N, H, W, C], C = 1, 3 or 4, side by side, as one array [rows, width, C]; by default as square as
    can be.

    columns: images in a row; gap: black pixels between two.
    Raises: ValueError: no images, images of another dtype or shape, columns below 1, or a negative gap.
    """
    pixels = _pixels(images)
    n, height, width, channels = pixels.shape
    if n == 0:
        raise ValueError("a picture of no images: ask for 1 or more, or write .npz")
    columns = int(np.ceil(np.sqrt(n))) if columns is None else _check.whole("columns", columns, least=1)
    gap = _check.whole("gap", gap, least=0)
    rows = -(-n // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _pixels(images: Tensor | np.ndarray) -> np.ndarray:
    """The images as an array. Raises: ValueError: they are not uint8 [N, H, W, C], C = 1, 3 or 4."""
    images = images if isinstance(images, Tensor) else np.asarray(images)
    dtype, shape = str(images.dtype).removeprefix("torch."), list(images.shape)
    if dtype != "uint8" or len(shape) != 4 or shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"images must be uint8 [N, H, W, C] with C = 1, 3 or 4, got {dtype} {shape}: "
            "ops.to_uint8 makes them of [B, C, H, W] in [-1, 1]"
        )
    return np.asarray(images)
