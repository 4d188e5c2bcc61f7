"""`cm.random_util`: where noise comes from."""

from cmfast.noise import DeterministicGenerator, DeterministicIndividualGenerator, get_generator
from cmfast.noise import TorchGenerator as DummyGenerator

__all__ = ["DeterministicGenerator", "DeterministicIndividualGenerator", "DummyGenerator", "get_generator"]
