"""`cm.image_datasets`: batches of images from a folder, without MPI: each rank of torch.distributed reads its share."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cmfast.compat.openai import dist_util

_ENDINGS = ("jpg", "jpeg", "png", "gif")


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Batches without end: images float32 [B, 3, image_size, image_size] in [-1, 1], and {"y": labels int64 [B]}.

    Args:
        data_dir: a folder; images in folders below it count too. They are resized and cropped to a square.
        class_cond: with labels, else {}: the part of a file's name before its first underscore, numbered in sorted
            order.
        deterministic: in the order of their paths, else shuffled.
        random_crop, random_flip: crop somewhere, from an image up to 1/4 larger; mirror half of them.

    Raises: ValueError: no data_dir, no images in it, fewer for this rank than batch_size, no labels in the names. While
        iterating: an image that cannot be read, by its name.
    """
    if not data_dir:
        raise ValueError("data_dir is missing: give the folder with the images, --data_dir FOLDER")
    if not os.path.isdir(data_dir):
        raise ValueError(f"data_dir is no folder: {data_dir}")
    paths = _list_image_files_recursively(data_dir)
    if not paths:
        raise ValueError(f"no images in {data_dir}, nor in folders below it: files that end in {', '.join(_ENDINGS)}")
    dataset = ImageDataset(
        image_size,
        paths,
        classes=_classes(paths) if class_cond else None,
        shard=dist_util.get_rank(),
        num_shards=dist_util.get_world_size(),
        random_crop=random_crop,
        random_flip=random_flip,
    )
    if not 0 < batch_size <= len(dataset):
        share = f", {len(dataset)} for each rank" if dataset.num_shards > 1 else ""
        raise ValueError(f"batch_size is {batch_size}, and there are {len(paths)} images in {data_dir}{share}")
    return _forever(DataLoader(dataset, batch_size, shuffle=not deterministic, num_workers=1, drop_last=True))


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _classes(paths: Sequence[str]) -> list[int]:
    names = [os.path.basename(path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        if "_" not in name:
            raise ValueError(
                f"class_cond needs the class in each file's name, before an underscore, such as dog_17.png: {path}"
            )
    classes = [name.partition("_")[0] for name in names]
    numbers = {name: i for i, name in enumerate(sorted(set(classes)))}
    return [numbers[name] for name in classes]


def _list_image_files_recursively(data_dir: str) -> list[str]:
    found = []
    for entry in sorted(os.listdir(data_dir)):
        path = os.path.join(data_dir, entry)
        if entry.lower().endswith(tuple(f".{ending}" for ending in _ENDINGS)):
            found.append(path)
        elif os.path.isdir(path):
            found += _list_image_files_recursively(path)
    return found


class ImageDataset(Dataset[Any]):
    """(image float32 [3, resolution, resolution] in [-1, 1], {"y": label} or {}) of every num_shards-th path."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.num_shards = num_shards
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        image = _read(self.local_images[idx])
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(image, self.resolution)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        labels = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], dtype=np.int64)}
        return np.transpose(pixels.astype(np.float32) / 127.5 - 1, [2, 0, 1]), labels


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _resize(image: Image.Image, smaller_side: int) -> np.ndarray:
    """Pixels [H, W, 3], by halves with a box filter while twice as large or more, then bicubic."""
    while min(image.size) >= 2 * smaller_side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = smaller_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.array(image.resize(size, resample=Image.Resampling.BICUBIC))


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The square in the middle, resized: uint8 [image_size, image_size, 3]."""
    pixels = _resize(pil_image, image_size)
    top, left = ((size - image_size) // 2 for size in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> np.ndarray:
    """A square somewhere, min_crop_frac to max_crop_frac of the smaller side: uint8 [image_size, image_size, 3]."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = _resize(pil_image, random.randrange(smallest, largest + 1))
    top, left = (random.randrange(size - image_size + 1) for size in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]
