"""The processes of a run, as `torchrun` starts them: what they do together, and what happens where one fails."""

from __future__ import annotations

import gc
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: its defaults keep the one they find, for good
from torch import Tensor
from torch.distributed import PrefixStore, Store, default_pg_timeout  # type: ignore[attr-defined]  # exported, untyped
from torch.distributed.rendezvous import rendezvous

Result = TypeVar("Result")

#: In what torch says when the other end of a connection is gone.
_LOST = re.compile(r"gloo|nccl|connection|process ?group|broken pipe", re.IGNORECASE)


class RankError(RuntimeError):
    """Something failed in one of the processes, and so in all; the message says where and what."""


class Lost(RankError):
    """A process is gone: its connection is. What it says itself, if anything, is in its own output."""


class Ranks:
    """The processes of a run: this one's number (rank), its number on this machine, and how many there are.

    messages: torch's group that the methods speak in; None for the default one.
    """

    def __init__(
        self, rank: int = 0, local_rank: int = 0, size: int = 1, messages: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.local_rank, self.size, self.messages = rank, local_rank, size, messages

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here, if it returns everywhere.

        Raises: RankError: it failed on some rank: everywhere, so that no one waits for a rank that gave up. Its own
            exception, if there is one process only.
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        made: list[Result] = []
        try:
            made.append(work())
        except Exception as error:
            failure = error
        failed = torch.tensor([int(failure is not None)])
        try:
            dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self.messages)
            messages: list[str | None] = [None] * self.size
            if failed.item():
                dist.all_gather_object(messages, None if failure is None else _described(failure), self.messages)
        except RuntimeError as error:
            raise Lost(f"rank {self.rank} lost the connection to another: {error}") from (failure or error)
        for rank, message in enumerate(messages):
            if message is not None:
                # What fails on the first rank mostly fails on all, as it would in one process.
                raise RankError(f"rank {rank}: {message}" if rank else message) from failure
        return made[0]

    @contextmanager
    def connected(self) -> Iterator[None]:
        """What fails within because another process is gone, says so. Raises: Lost: in its place."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RankError) or not _LOST.search(str(error)):
                raise
            raise Lost(f"rank {self.rank} lost the connection to another: {error}") from error

    def any(self, yes: bool) -> Callable[[], bool]:
        """Whether `yes` on any rank: a question on its way; the function that comes back waits for the answer."""
        if self.size == 1:
            return lambda: yes
        flag = torch.tensor([int(yes)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.messages, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flag.item())

        return answer

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks of a tensor on the CPU, on each."""
        if self.size > 1:
            dist.all_reduce(x, group=self.messages)
            x = x / self.size
        return x

    def least(self, x: Tensor) -> Tensor:
        """The least over all ranks of a tensor on the CPU, on each."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.messages)
        return x

    def same(self, number: int) -> bool:
        """Whether it is one number on all ranks."""
        low, negative_high = self.least(torch.tensor([number, -number], device="cpu")).tolist()
        return bool(low == -negative_high)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, on the first; nothing on the others. They are on the CPU and of one shape."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        dist.gather(x, parts or None, group=self.messages)
        return parts


def _described(error: Exception) -> str:
    """The message; with its type, where it is not one that is written for users."""
    known = (ValueError, OSError, ImportError, RankError)
    return str(error) if isinstance(error, known) else f"{type(error).__name__}: {error}"


def _unused(store: Store, rank: int, size: int) -> Store:
    """A part of the store that no process has used before.

    torchrun keeps a store while it starts processes again (PyTorch 2.11 to 2.14), and addresses of those that are gone
    would be taken for theirs. So each writes a name of its own, and all take that of the first, once it has named them.
    """
    own, others = uuid.uuid4().hex, range(1, size)
    end = time.monotonic() + default_pg_timeout.total_seconds()
    store.set(f"cmfast/{rank}", own)
    while time.monotonic() < end:
        if rank == 0:
            store.set("cmfast/called", " ".join([own, *(store.get(f"cmfast/{r}").decode() for r in others)]))
            if store.check([f"cmfast/{own}/{r}" for r in others]):
                return PrefixStore(own, store)
        else:
            first, *called = store.get("cmfast/called").decode().split()
            if own in called:
                store.set(f"cmfast/{first}/{rank}", "")
                return PrefixStore(first, store)
        time.sleep(0.01)
    raise Lost(f"rank {rank} waited for the others, and not all of them came")


def connect(backend: str) -> int:
    """Make torch's default group of the processes that torchrun started, in this attempt of its; returns the number of
    this one.

    Raises: Lost: not all of them came, or where they meet (MASTER_ADDR, MASTER_PORT) cannot be reached. ValueError: a
        variable of torchrun's is missing.
    """
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=_unused(store, rank, size), rank=rank, world_size=size)
    except dist.DistError as error:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise Lost(f"rank {os.environ['RANK']} could not meet the others at {place}: {error}") from error
    return rank


def end_group() -> None:
    """End torch's default group, if there is one, and its threads with it: for the end of a process.

    A thread of gloo's lets go of a message a little after that has come, under Python's lock: one that asks for it
    while Python ends aborts the process. What `DistributedDataParallel` has wrapped trains no more.
    """
    if not dist.is_initialized():
        return
    from torch.nn.parallel import DistributedDataParallel

    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel):
            for name in ("reducer", "logger", "process_group"):
                held.__dict__.pop(name, None)
    gc.collect()
    dist.destroy_process_group()


@contextmanager
def ranks(*, tensors_on: str = "cpu") -> Iterator[Ranks]:
    """The processes that torchrun started, connected; this one alone if it did not.

    tensors_on: "cuda" where gradients travel between GPUs. Images and messages travel on the host, where gloo does all
    that is needed, with GPUs or without.

    Raises: as `connect`.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    if tensors_on == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    rank = connect("cpu:gloo,cuda:nccl" if tensors_on == "cuda" else "gloo")
    # A group of its own for messages is gone at the end, and its threads with it (why: `end_group`); DDP and FSDP keep
    # the default one, and may be there longer.
    messages: Any = dist.new_group(backend="gloo")
    group = Ranks(rank, int(os.environ.get("LOCAL_RANK", 0)), size, messages)
    del messages
    try:
        yield group
    finally:
        group.messages = None
        dist.destroy_process_group()
