"""Networks shared between processes: gradients averaged (DDP), or weights shared out as well (FSDP2)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmfast.denoiser import Denoiser
from cmfast.ranks import Ranks


@torch.no_grad()
def spread(model: Denoiser) -> None:
    """Give every process the first one's weights and buffers, so that all start alike."""
    for tensor in (*model.parameters(), *model.buffers()):
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def anywhere(flag: Tensor) -> Tensor:
    """Whether a flag, a scalar on the device, is set on any process."""
    flags = flag.float()
    dist.all_reduce(flags)
    return flags > 0


def check_used(model: Denoiser) -> None:
    """After a backward pass: ValueError where a weight has no gradient, since its part of the mean over processes, and
    that of others which travel together with it, was then waited for in vain."""
    network: Any = model.network
    unused = [name for name, p in network.module.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        names = ", ".join(unused[:3]) + " and others" * (len(unused) > 3)
        raise ValueError(
            f"{names} of the network had no part in this step, and several processes wait for a gradient of each "
            "weight: call requires_grad_(False) on what the network does not use, or give parallel='fsdp'"
        )


def shard(model: Denoiser, group: Ranks) -> None:
    """Share out the weights of a model's network, in place: each process keeps its part of every tensor (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network: Any = model.network
    mesh = init_device_mesh(model.device.type, (group.size,))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    # Else the network's own tensors stay put together after a pass without gradient, and updates of a target go unseen.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is put together at a time: what a network holds in lists, inner blocks before those that they are in.

    Each once, and none without a `forward`, around which it would be put together, nor with weights that are another's
    too, which have to be in one part of the network.
    """
    uses = Counter(_slots(network))
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    found = {id(block): block for blocks in lists for block in blocks if _whole_by_itself(block, uses)}
    return sorted(found.values(), key=lambda block: sum(1 for _ in block.modules()))


def _whole_by_itself(block: nn.Module, uses: Mapping[int, int]) -> bool:
    called = type(block).forward is not nn.Module.forward
    return called and all(uses[weight] == times for weight, times in Counter(_slots(block)).items())


def _slots(module: nn.Module) -> Iterator[int]:
    """The weights of a module, one that it has by two names twice."""
    for inner in module.modules():
        yield from (id(p) for p in inner._parameters.values() if p is not None)


def averaging(model: Denoiser) -> Denoiser:
    """The same model, whose gradients become their mean over all processes in the backward pass (DDP).

    Its network is what is wrapped, so that losses still start from the network's output.
    """
    from torch.nn.parallel import DistributedDataParallel

    network: Any = model.network
    devices = [model.device] if model.device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, devices, gradient_as_bucket_view=True)
    for name in ("input_dtype", "input_format", "num_classes"):
        if hasattr(network, name):
            setattr(wrapped, name, getattr(network, name))
    return with_network(model, wrapped)


def with_network(model: Denoiser, network: nn.Module) -> Denoiser:
    """A Denoiser with another network and everything else shared."""
    outer = copy.copy(model)
    outer._modules = {**model._modules, "network": network}
    return outer


@contextmanager
def synchronising(model: Denoiser, last: bool) -> Iterator[None]:
    """Gradients travel in the backward pass of the last microbatch alone."""
    network: Any = model.network
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(last)
        yield
    elif not last and hasattr(network, "no_sync"):
        with network.no_sync():
            yield
    else:
        yield


def distributed_like(value: Any, like: Tensor) -> Any:
    """A whole tensor, shared out as another of its shape is; anything else as it is."""
    if not isinstance(value, Tensor) or not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]  # a DTensor
