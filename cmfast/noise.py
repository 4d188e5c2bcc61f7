"""Where noise comes from: counters (seed, sample index, draw), or the original's three generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmfast import ops

#: x -> standard normal noise like x.
NoiseFn = Callable[[Tensor], Tensor]

#: The draw numbers that labels and the mirroring of training images use. Noise counts up from 0, noise levels of
#: training count down from `cmfast.reference.LEVEL_DRAW`, and dropout's layers up from `cmfast.dropout.DROPOUT_DRAW`.
LABEL_DRAW = 0xFFFFFFFF
FLIP_DRAW = 0xFFFFFFFE
#: The order of a training set in an epoch, which is the index; and the other class that guidance pushes away from.
ORDER_DRAW = 0xC0000000
OTHERS_DRAW = 0xC0000001


class CounterNoise:
    """Noise of samples `index` int64 [B] under `seed`: the k-th call is draw k, whatever batch they come in.

    >>> x = torch.empty(2, 1, 4, 4)
    >>> first = CounterNoise(0, torch.tensor([5, 6]))(x)
    >>> alone = CounterNoise(0, torch.tensor([6]))(x[:1])
    >>> bool((first[1] == alone[0]).all())
    True
    """

    def __init__(self, seed: int | Tensor, index: Tensor) -> None:
        self.seed, self.index, self.draw = seed, index, 0

    def __call__(self, x: Tensor) -> Tensor:
        """The next draw, of the shape and dtype of x. Raises: ValueError: x has another number of samples."""
        if x.shape[0] != self.index.shape[0]:
            raise ValueError(f"x has a batch of {x.shape[0]}, the noise of {self.index.shape[0]} samples")
        noise = self.next()
        return ops.normal(noise.seed, noise.index, tuple(x.shape[1:]), draw=noise.draw, dtype=x.dtype)

    def next(self) -> ops.Draw:
        """The next draw, for an operation that makes the noise itself."""
        noise = ops.Draw(self.seed, self.index, self.draw)
        self.draw += 1
        return noise


class GivenNoise:
    """Noise that is there already: the k-th call returns the k-th of `tensors`.

    >>> given = GivenNoise([torch.ones(2), torch.zeros(2)])
    >>> given(torch.empty(2)), given(torch.empty(2))
    (tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.used = list(tensors), 0

    def __call__(self, x: Tensor) -> Tensor:
        """The next tensor, which must be like x. Raises: ValueError: there is none."""
        if self.used == len(self.tensors):
            raise ValueError(f"noise_fn holds {self.used} tensors and more are drawn: give one for each draw")
        self.used += 1
        return self.tensors[self.used - 1]

    def check_used(self) -> None:
        """Raises: ValueError: tensors are left over."""
        if self.used != len(self.tensors):
            raise ValueError(f"noise_fn holds {len(self.tensors)} tensors, and {self.used} are drawn: give as many")


def take(noise_fn: NoiseFn, x: Tensor) -> Tensor | ops.Draw:
    """Noise of noise_fn like x [B, ...], for an operation: drawn where it is used if it comes from counters."""
    return noise_fn.next() if isinstance(noise_fn, CounterNoise) else noise_fn(x)


def counter_labels(seed: int, index: Tensor, num_classes: int) -> Tensor:
    """A class below num_classes for each sample, int64 [B], from (seed, index[b]) alone; index int64 [B]."""
    return ops.uniform_int(seed, index, num_classes, draw=LABEL_DRAW)


def get_generator(name: str, num_samples: int = 0, seed: int = 0) -> Any:
    """The generators of openai/consistency_models by its names: `dummy`, `determ`, `determ-indiv`.

    num_samples: how many there will be in all, for the last two. seed: of theirs.

    Raises: ValueError: another name; the message lists the known ones.
    """
    if name == "dummy":
        return TorchGenerator()
    if name == "determ":
        return DeterministicGenerator(num_samples, seed)
    if name == "determ-indiv":
        return DeterministicIndividualGenerator(num_samples, seed)
    raise ValueError(f"unknown generator {name!r}; known: dummy, determ, determ-indiv")


class TorchGenerator:
    """torch's global generator."""

    def randn(self, *size: int, **options: Any) -> Tensor:
        """`torch.randn(*size, **options)`."""
        return torch.randn(*size, **options)

    def randint(self, *args: Any, **options: Any) -> Tensor:
        """`torch.randint(*args, **options)`."""
        return torch.randint(*args, **options)

    def randn_like(self, *args: Any, **options: Any) -> Tensor:
        """`torch.randn_like(*args, **options)`."""
        return torch.randn_like(*args, **options)


class _IndexedGenerator:
    """Numbers of sample i do not depend on batch size or rank count; ranks take turns over the indices.

    Args: num_samples: how many samples there will be in all; seed.
    Raises: ValueError: num_samples below 1.
    """

    def __init__(self, num_samples: int, seed: int = 0) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more for this generator, got {num_samples}")
        ready = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if ready else 0
        self.world_size = dist.get_world_size() if ready else 1
        self.num_samples = num_samples
        self.done_samples = 0
        self.seed = self._stream_seed = seed
        self._generators: dict[str, list[torch.Generator]] = {}

    def _seeds(self) -> list[int]:
        """One seed for each torch generator behind this one."""
        raise NotImplementedError

    def _on(self, device: torch.device | str | None) -> list[torch.Generator]:
        """The torch generators of a device, made when first asked for."""
        where = torch.device(device or "cpu")
        if where.type == "cuda" and where.index is None:
            # "cuda" and "cuda:0" must not be two generators that draw the same numbers.
            where = torch.device("cuda", torch.cuda.current_device())
        key = str(where)
        if key not in self._generators:
            self._generators[key] = [torch.Generator(key).manual_seed(seed) for seed in self._seeds()]
        return self._generators[key]

    def _indices(self, batch: int) -> list[int]:
        """This rank's samples; past the end the last one again, as the original has it."""
        start = self.done_samples + self.rank
        return [min(start + i * self.world_size, self.num_samples - 1) for i in range(batch)]

    def randn_like(self, tensor: Tensor) -> Tensor:
        """`randn` of the shape, dtype and device of `tensor`."""
        return self.randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def randn(self, *size: int, dtype: torch.dtype = torch.float, device: Any = "cpu") -> Tensor:
        """N(0, 1) of the next samples of this rank, [size[0], ...] in `dtype` on `device`."""
        raise NotImplementedError

    def set_done_samples(self, done_samples: int) -> None:
        """done_samples are made already: the next is that of this index."""
        self.done_samples = done_samples

    def get_seed(self) -> int:
        """The seed it was made with."""
        return self.seed

    def set_seed(self, seed: int) -> None:
        """Start over from a seed. As in the original, `get_seed` goes on naming the first."""
        self._stream_seed = seed
        self._generators.clear()


class DeterministicGenerator(_IndexedGenerator):
    """`determ`: every draw makes the numbers of all samples with one generator and keeps this batch's."""

    def _seeds(self) -> list[int]:
        return [self._stream_seed]

    def randn(self, *size: int, dtype: torch.dtype = torch.float, device: Any = "cpu") -> Tensor:
        (generator,) = self._on(device)
        everything = torch.randn(self.num_samples, *size[1:], generator=generator, dtype=dtype, device=device)
        return everything[self._indices(size[0])]

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: torch.dtype = torch.long, device: Any = "cpu"
    ) -> Tensor:
        """Integers from low up to high - 1 of the next samples of this rank, of `size`, in `dtype` on `device`."""
        (generator,) = self._on(device)
        shape = (self.num_samples, *size[1:])
        everything = torch.randint(low, high, shape, generator=generator, dtype=dtype, device=device)
        return everything[self._indices(size[0])]

    def set_done_samples(self, done_samples: int) -> None:
        """done_samples are made already; starts over from the seed, as the original does."""
        super().set_done_samples(done_samples)
        self.set_seed(self.seed)


class DeterministicIndividualGenerator(_IndexedGenerator):
    """`determ-indiv`: a generator for each sample, seeded with index + num_samples seed."""

    def _seeds(self) -> list[int]:
        return [i + self.num_samples * self._stream_seed for i in range(self.num_samples)]

    def randn(self, *size: int, dtype: torch.dtype = torch.float, device: Any = "cpu") -> Tensor:
        generators = self._on(device)
        rows = [
            torch.randn(1, *size[1:], generator=generators[i], dtype=dtype, device=device)
            for i in self._indices(size[0])
        ]
        return torch.cat(rows)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: torch.dtype = torch.long, device: Any = "cpu"
    ) -> Tensor:
        """Integers from low up to high - 1 of the next samples of this rank, of `size`, in `dtype` on `device`."""
        generators = self._on(device)
        rows = [
            torch.randint(low, high, (1, *size[1:]), generator=generators[i], dtype=dtype, device=device)
            for i in self._indices(size[0])
        ]
        return torch.cat(rows)
