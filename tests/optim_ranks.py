"""What each of four ranks does in tests/test_optim.py: sharded steps against those of a whole model.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m tests.optim_ranks
"""

import copy
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cmfast import optim
from cmfast.ema import Averages
from tests.toy import ToyNetwork


def fully_sharded() -> None:
    torch.manual_seed(0)
    whole = ToyNetwork()
    sharded, target = copy.deepcopy(whole), copy.deepcopy(whole)
    for network in (sharded, target):
        fully_shard(network.conv1)
        fully_shard(network)
    averages = [Averages(whole, [0.9, "power:0.1"]), Averages(sharded, [0.9, "power:0.1"], targets={0: target})]
    optimizers = [
        optim.RAdam(network.parameters(), lr=0.01, max_norm=2.0, averages=each)
        for network, each in zip((whole, sharded), averages)
    ]
    x, y = torch.randn(4, 3, 6, 6), torch.arange(4)
    for step in range(10):
        for network, optimizer in zip((whole, sharded), optimizers):
            optimizer.zero_grad()
            network(x + step, torch.ones(4), y).square().sum().backward()
            if step == 4:
                # In the part of one rank alone.
                gradient = next(network.parameters()).grad
                part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                if network is whole or dist.get_rank() == 0:
                    part.view(-1)[0] = math.inf
            optimizer.step()
        ours, expected = (optimizer.grad_norm for optimizer in reversed(optimizers))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0, equal_nan=True)
    assert [optimizer.skipped.item() for optimizer in optimizers] == [1, 1]
    pairs = [(sharded.parameters(), whole.parameters()), (target.parameters(), averages[0].tensors(0))]
    pairs += [(averages[1].tensors(k), averages[0].tensors(k)) for k in range(2)]
    for ours, expected in pairs:
        for value, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(value.full_tensor(), other, rtol=1e-4, atol=1e-6)
    found = optimizers[1]
    found.max_norm, found.found_inf = None, torch.tensor(float(dist.get_rank() == 1))
    before = [p.to_local().clone() for p in sharded.parameters()]
    found.step()
    assert found.skipped.item() == 2
    assert all(torch.equal(p.to_local(), old) for p, old in zip(sharded.parameters(), before))
    copied = ToyNetwork()
    averages[1].copy_to(copied, 1)
    again = Averages(sharded, [0.9, "power:0.1"])
    again.load_state_dict(averages[1].state_dict())
    for value, other, loaded in zip(copied.parameters(), averages[1].tensors(1), again.tensors(1)):
        assert torch.equal(value, other.full_tensor()) and torch.equal(loaded.full_tensor(), value)


def fully_sharded_and_tensor_parallel() -> None:
    """Parts of a weight lie over both dimensions of the mesh, as placements that are of another class than Shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    parallel = copy.deepcopy(whole)
    parallelize_module(parallel, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(parallel, mesh=mesh["dp"])
    optimizers = [optim.RAdam(model.parameters(), lr=0.01, max_norm=2.0) for model in (whole, parallel)]
    x = torch.randn(4, 8)
    for step in range(3):
        for model, optimizer in zip((whole, parallel), optimizers):
            optimizer.zero_grad()
            (model(x) - 2).square().sum().backward()
            if step == 2 and (model is whole or dist.get_rank() == 0):
                gradient = model[0].weight.grad
                (gradient if model is whole else gradient.to_local())[0, 0] = math.nan
            optimizer.step()
        ours, expected = (optimizer.grad_norm for optimizer in reversed(optimizers))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0, equal_nan=True)
    for value, other in zip(parallel.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value.full_tensor(), other, rtol=1e-4, atol=1e-6)
    found = optimizers[1]
    found.max_norm, found.found_inf = None, torch.tensor(float(dist.get_rank() == 3))
    found.step()
    assert [optimizer.skipped.item() for optimizer in optimizers] == [1, 2]


def main() -> None:
    dist.init_process_group("gloo")
    fully_sharded()
    fully_sharded_and_tensor_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Not by way of the interpreter's end: a thread of gloo's that lets go of its last tensor then aborts the process,
    # once in a long while (pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)
