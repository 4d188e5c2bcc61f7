"""What a data set gives to training: batches in an order that follows from (seed, step) alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cmfast import ops
from cmfast.noise import FLIP_DRAW, ORDER_DRAW

#: Images of a batch: of more, the list of their positions alone fills a memory.
MAX_BATCH = 2**24


class Batch(NamedTuple):
    """One rank's part of a step.

    images  [B, C, H, W], uint8 (a quarter of the bytes to move; `to_unit` on the device), or float32 in [-1, 1]
    labels  int64 [B], or None
    index   int64 [B], each image's position in the stream of all ranks: what its noise is drawn from
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from where copies to a GPU overlap with its work."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return Batch(self.images.pin_memory(), labels, self.index.pin_memory())


class Draw(NamedTuple):
    """Which images make a batch: their rows in the data set, their positions in the stream, which are mirrored."""

    rows: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    flips: Tensor | None


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels as float32 x / 127.5 - 1 in [-1, 1], on their device; floating-point images as they are.

    >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return images if images.is_floating_point() else images.to(torch.float32).div_(127.5).sub_(1.0)


class Dataset(ABC):
    """Images of one shape, perhaps with labels.

    flip     mirror every image left to right with probability 1/2, each time it is seen
    bounded  they lie in [-1, 1], or are pixels; False: data without a range, such as latents
    """

    flip: bool
    bounded: bool = True

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Labels are below it; None without labels."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells these images from others, in one line that can be read."""

    @property
    def listing(self) -> bytes | None:
        """What a run keeps of the data in its folder, to know them again; None: nothing."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, draws: Iterator[Draw], workers: int, pin_memory: bool) -> Iterator[Batch]:
        """The batches that were drawn."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Endless batches in an order that follows from `seed` alone; `start_step` skips as many steps.

        Epochs are permutations strung together, so that a batch may straddle two and every image is seen equally
        often. A step takes `world_size * batch_size` images, of which `rank` gets the rank-th part. What it gets
        depends neither on `workers`, the processes that read ahead, nor on where a run was interrupted. Images in
        memory need no workers and start none; closing the iterator ends those of the others. `pin_memory`: in
        page-locked memory.

        Raises: ValueError: no images, or a number out of range.
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("start_step", start_step, 0),
            ("world_size", world_size, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if batch_size > MAX_BATCH:
            raise ValueError(f"batch_size must be {MAX_BATCH:,} or less, got {batch_size:,}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to below world_size = {world_size}, got {rank}")
        if not len(self):
            raise ValueError("batches of a data set without images")
        start = (start_step * world_size + rank) * batch_size
        draws = _draws(len(self), batch_size, start, world_size * batch_size, seed, self.flip)
        return self._read(draws, workers, pin_memory and torch.cuda.is_available())


def _draws(size: int, batch_size: int, start: int, stride: int, seed: int, flip: bool) -> Iterator[Draw]:
    """`batch_size` positions from `start` on, then as many `stride` further, and so on."""
    epoch, order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
    while True:
        position, rows = start, []
        while position < start + batch_size:
            if position // size != epoch:
                epoch = position // size
                # PyTorch's generator takes 32 bits of a seed: a word of both, as neither fits beside the other.
                (word,) = ops.uniform_int(seed, torch.tensor([epoch], device="cpu"), 2**31, draw=ORDER_DRAW).tolist()
                generator = torch.Generator("cpu").manual_seed(word)
                order = torch.randperm(size, generator=generator, device="cpu")
            offset = position % size
            rows.append(order[offset : offset + start + batch_size - position])
            position += len(rows[-1])
        index = torch.arange(start, position, device="cpu")
        # Drawn from the position, which no worker, rank or interruption changes.
        flips = ops.uniform_int(seed, index, 2, draw=FLIP_DRAW).bool() if flip else None
        yield Draw(torch.cat(rows), index, flips)
        start += stride


def mirrored(images: Tensor, flips: Tensor | None) -> Tensor:
    """Images [B, C, H, W], left to right where `flips` [B]: torchvision's `horizontal_flip` of a batch."""
    return images if flips is None else torch.where(flips[:, None, None, None], images.flip(-1), images)
