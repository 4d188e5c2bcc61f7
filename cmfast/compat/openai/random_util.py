"""`cm.random_util`: where noise comes from."""

from __future__ import annotations

from typing import Any

from cmfast import noise
from cmfast.noise import DeterministicGenerator, DeterministicIndividualGenerator
from cmfast.noise import TorchGenerator as DummyGenerator

__all__ = ["DeterministicGenerator", "DeterministicIndividualGenerator", "DummyGenerator", "get_generator"]


def get_generator(generator: str, num_samples: int = 0, seed: int = 0) -> Any:
    """`dummy` (torch's own), `determ` or `determ-indiv`, both of which give sample i of num_samples the same numbers in
    any batch and on any number of ranks.

    Raises: ValueError: another name; the message lists the known ones.
    """
    return noise.get_generator(generator, num_samples, seed)
