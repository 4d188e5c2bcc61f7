"""What tests of the C share: CPUs that it can be compiled for and run on here, and a mode that looks on."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Those that this one can be, by their names in `native.FLAGS`.
CPUS = {"AVX2": ["AVX2"], "AVX512": ["AVX2", "AVX512"]}.get(torch.backends.cpu.get_cpu_capability(), [])


class Looking(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))
