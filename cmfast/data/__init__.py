"""Data to train on: MNIST digits, a .npz file or a folder of images, in an order that resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cmfast.data.arrays import LABEL_NAMES, ImageData, mnist, read_npz
from cmfast.data.folder import FolderData
from cmfast.data.pixels import check_fit, fit_all
from cmfast.data.stream import Batch, Dataset, to_unit

__all__ = ["Batch", "Dataset", "FolderData", "ImageData", "mnist", "open_data", "to_unit"]


def open_data(
    source: str | Path | ImageData,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    flip: bool = False,
    labelled: bool | None = None,
    bounded: bool = True,
    skip_unreadable: bool = False,
    run: str | Path | None = None,
) -> Dataset:
    """The data set that `source` names.

    source           "mnist": the digits to train on; a .npz file, as `cmfast sample` and openai's evaluator write them:
                     `arr_0` [N, H, W, C] and labels `arr_1` [N] (or `images`, `x`, `data` and `labels`, `y`); a folder
                     of images, see `FolderData`
    image_size       the square in the middle of each image is resized to it; None: all have one size, which stays
    channels         1 (grey) or 3 (RGB); None: as they are, of a folder RGB
    flip             mirror images left to right, each time with probability 1/2
    labelled         True: labels are needed; False: they are left out; None: those that are found
    bounded          False: a .npz file of floats [N, C, ...] of any values, such as latents, taken as they are
    skip_unreadable  files of a folder that are no images are skipped, with a warning, instead of an error
    run              the folder of a run, of `cmfast.training.Trainer`, that is to go on with a folder of images: those
                     that are gone since it began are then such files, and the others keep their places

    >>> import torch
    >>> data = open_data(ImageData(torch.zeros(5, 1, 8, 8)), image_size=4)
    >>> next(data.batches(2, seed=0)).images.shape
    torch.Size([2, 1, 4, 4])

    Raises: ValueError, OSError: not there, or not such images, and why. ImportError: the digits are not installed.
    """
    check_fit(image_size, channels)
    named = "the data" if isinstance(source, ImageData) else source
    if isinstance(source, ImageData):
        data = source
    elif source == "mnist" and bounded:
        data = mnist()[0]
    else:
        path = Path(source)
        if source == "mnist" or (_is_folder(path) and not bounded):
            raise ValueError(f"{source} is images, which lie in [-1, 1]: bounded=False is for a .npz file")
        if _is_folder(path):
            return FolderData(
                path, image_size=image_size, channels=channels, flip=flip, labelled=labelled,
                skip_unreadable=skip_unreadable, run=run,
            )  # fmt: skip
        data = read_npz(path, bounded=bounded)
    if not len(data):
        raise ValueError(f"{named} holds no images")
    if labelled and data.labels is None:
        raise ValueError(f"labelled=True, and {named} has no labels: a .npz file has them in {', '.join(LABEL_NAMES)}")
    if not data.bounded and (image_size, channels) != (None, None):
        raise ValueError("image_size and channels are of images: leave them out where bounded=False")
    images = fit_all(data.images, image_size, channels)
    return replace(data, images=images, labels=None if labelled is False else data.labels, flip=flip)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder, or a .npz file. Raises: ValueError, OSError: neither."""
    if not path.exists():
        raise FileNotFoundError(f'{path}: no such file or folder; data is "mnist", a .npz file or a folder of images')
    if path.suffix.lower() == ".npz" and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a .npz file")
    if path.suffix.lower() != ".npz" and not path.is_dir():
        raise ValueError(f'{path}: data is "mnist", a .npz file or a folder of images')
    return path.is_dir()
