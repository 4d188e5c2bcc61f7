"""A folder of images, for tests of what is read from one."""

import torch
from PIL import Image

from tests.test_data import pixels


def write(path, image, **options):
    """A uint8 image [3, H, W], or one of Pillow's, as a file."""
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_folder(path):
    """23 images of two classes: cat/00, dog/01, cat/02, ..."""
    for i in range(23):
        write(path / ("cat", "dog")[i % 2] / f"{i:02}.png", pixels(3, 8, 8, seed=i))
    return path
