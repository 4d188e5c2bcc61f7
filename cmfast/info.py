"""What is installed and found here, and which path each operation takes: `python -m cmfast info`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from cmfast import __version__, ops
from cmfast.native import attention, group_norm, noise, optimizer, steps, winograd

PACKAGES = ("torch", "triton", "numpy", "safetensors", "torchvision", "lpips", "diffusers")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def report() -> str:
    """Versions, devices, and a line for each operation and device. To paste into a bug report."""
    return "\n".join([*_versions(), "", *_devices(), "", *_paths()])


def _versions() -> Iterator[str]:
    yield f"cmfast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} is not installed"
    yield f"CUDA of PyTorch: {torch.version.cuda or 'none'}, HIP: {torch.version.hip or 'none'}"


def _devices() -> Iterator[str]:
    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for name, functions, where in (
        ("3x3 convolutions", winograd, "by Winograd in float32, where it gains"),
        ("GroupNorm", group_norm, "in C in float32 and bfloat16, in channels_last"),
        ("attention", attention, "in C in float32, without gradients"),
        ("noise from counters", noise, "in C in float32"),
        ("steps, losses and LPIPS", steps, "in C for states of float32"),
        ("optimizers and averages", optimizer, "in C in float32"),
    ):
        why = functions.refusal()
        yield f"{name} on a CPU: " + (f"PyTorch's ({why})" if why else where)
    if not torch.cuda.is_available():
        yield "no GPU that PyTorch can use"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def _paths() -> Iterator[str]:
    chosen = os.environ.get("CMFAST_BACKEND")
    yield f"backend: {ops.current_backend()} (CMFAST_BACKEND {f'is {chosen}' if chosen else 'is not set'})"
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in DTYPES:
            yield f"{device}, {str(dtype).removeprefix('torch.')}:"
            groups: dict[tuple[str, str], list[str]] = {}
            for name in (*ops.FUSED, *ops.SMALL):
                groups.setdefault(ops.explain(name, device, dtype), []).append(name)
            for (path, why), names in groups.items():
                yield f"  {path}: {', '.join(names)}\n      ({why})"
