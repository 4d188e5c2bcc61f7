"""Sampling in several processes, as `torchrun` starts them: batches in turn, the images of one process, bit for bit."""

from __future__ import annotations

from torch import Tensor

from cmfast.engine import Sampler
from cmfast.ranks import Ranks


def sample(
    sampler: Sampler, n: int, group: Ranks, *, labels: Tensor | None = None, seed: int = 0, progress: bool = False
) -> Tensor | None:
    """n images, as `sampler.sample` gives them, on rank 0; None elsewhere. labels: of all samples, as `sampler.labels`
    gives them.

    Rank r makes whole batches r, r + size, r + 2 size, ... of those that one process would make.

    Raises: RankError: a rank failed. With one process: what `Sampler.sample` raises.
    """
    from tqdm.auto import tqdm

    size = sampler.batch_size
    starts = range(0, n, size)
    mine = sampler.batches(starts[group.rank :: group.size], n, labels, seed=seed)
    images = sampler.empty(n if group.rank == 0 else 0)
    with tqdm(total=len(starts), unit="batch", disable=not progress or group.rank != 0) as bar:
        for first in starts[:: group.size]:
            batch = group.together(lambda: next(mine, None))
            sent = sampler.empty(size).zero_()
            if batch is not None:
                sent[: len(batch[0])] = batch[0]
            for rank, part in enumerate(group.gather(sent)):
                start = first + rank * size
                images[start : start + size] = part[: max(n - start, 0)]
            bar.update(min(group.size, len(starts) - first // size))
    return images if group.rank == 0 else None
