"""`cm.dist_util`: torch.distributed for one process or for those of torchrun, without MPI."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmfast.checkpoint import read_pickle
from cmfast.ranks import connect, end_group

#: The GPU of a rank is rank % GPUS_PER_NODE where LOCAL_RANK is not set.
GPUS_PER_NODE = 8


def setup_dist() -> None:
    """Make the default process group, if there is none: nccl with a GPU, gloo without.

    Raises: RuntimeError: started by mpiexec or srun with several ranks, or with more ranks on this machine than GPUs;
        as `cmfast.ranks.connect`.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", int(os.environ.get("RANK", 0)) % GPUS_PER_NODE))
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} GPU(s): start at most "
                "one process for each"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        connect(backend)
        atexit.register(end_group)  # nobody else does: scripts of the original do not
        return
    # Of a step, which srun alone makes: a batch script has SLURM_NTASKS and SLURM_PROCID too, and is one process.
    ranks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if ranks > 1:
        raise RuntimeError(
            f"started by srun with {ranks} tasks, each of which would work alone: start torchrun by it, once on each "
            "machine, as in `srun --ntasks-per-node 1 torchrun --nproc-per-node N`"
        )
    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", 1)))
    if ranks > 1:
        raise RuntimeError(
            f"started by mpiexec with {ranks} ranks: use `torchrun --nproc-per-node {ranks}` in place of `mpiexec "
            f"-n {ranks} python`"
        )
    # A store inside the process: one process needs no port.
    store: Any = getattr(dist, "HashStore")  # noqa: B009  exported at run time alone
    dist.init_process_group(backend, store=store(), rank=0, world_size=1)
    atexit.register(end_group)


def get_rank() -> int:
    """The number of this process: of the process group, or before there is one of torchrun's environment."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    """The number of processes, known as `get_rank` is."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def dev() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_state_dict(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """What `torch.save` wrote to a file: tensors and plain containers, never code. Every rank reads the file.

    Args: kwargs: of `torch.load`, such as map_location.

    Raises:
        FileNotFoundError: no such file, or an empty path.
        cmfast.checkpoint.CheckpointError (a ValueError): empty, cut short, or with pickled Python objects in it.
    """
    if not os.fspath(path):
        raise FileNotFoundError("the path of a checkpoint is empty: give a file, as in --model_path FILE")
    # Not mapped: the file may be written again while its tensors are used.
    return read_pickle(Path(path), **{"mmap": False, **kwargs})


def sync_params(params: Iterable[Tensor]) -> None:
    """Copy the tensors of rank 0 to the others, in place."""
    for parameter in params:
        with torch.no_grad():
            dist.broadcast(parameter, 0)
