"""Sampling in several processes: the bits of one, one file, and no one left waiting when one of them fails."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cmfast import Denoiser, Sampler, ranks, sharding
from tests.toy import ToyNetwork

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cmfast"]


def run(folder, processes, *arguments):
    launcher = TORCHRUN if processes > 1 else ["-m", "cmfast"]
    command = [sys.executable, *launcher, "sample", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_two_processes_write_what_one_writes(tmp_path):
    arguments = ["--num-images", "11", "--batch-size", "2", "--steps", "2", "--seed", "3"]
    for processes in (1, 2):
        done = run(tmp_path, processes, *arguments, "--out", f"{processes}.npz")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("11 images") == 1 and ("by 2 processes" in done.stdout) == (processes == 2)
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert one["arr_0"].shape == (11, 32, 32, 3)
        assert all((one[name] == two[name]).all() for name in ("arr_0", "arr_1"))
    assert {path.name for path in tmp_path.iterdir()} == {"1.npz", "2.npz"}


def test_all_fail_with_one_message(tmp_path):
    done = run(tmp_path, 2, "--num-images", "4", "--classes", "77", "--out", "x.npz")
    assert done.returncode and done.stderr.count("cmfast: error: classes must be from 0 to 9, got 77 to 77") == 1
    assert "Traceback" not in done.stderr.split("torch/distributed")[0] and not list(tmp_path.iterdir())


class Exchange:
    """In place of torch.distributed, between threads: what each rank gives, all of them get."""

    def __init__(self, size):
        self.barrier, self.given, self.local = threading.Barrier(size, timeout=20), [None] * size, threading.local()

    def __call__(self, value):
        self.given[self.local.rank] = value
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given


def in_threads(monkeypatch, size, work):
    """What `work(ranks)` returns or raises on each of `size` ranks."""
    exchange, results = Exchange(size), [None] * size

    def gather(x, parts, group):
        for part, given in zip(parts or [], exchange(x), strict=False):
            part.copy_(given)

    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: x.fill_(max(int(g) for g in exchange(x.clone()))))
    monkeypatch.setattr(dist, "all_gather_object", lambda out, x, group: out.__setitem__(slice(None), exchange(x)))
    monkeypatch.setattr(dist, "gather", gather)

    def start(rank):
        exchange.local.rank = rank
        try:
            results[rank] = work(ranks.Ranks(rank, rank, size))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def sampler(network=None, batch=2):
    torch.manual_seed(0)
    return Sampler(Denoiser(network or ToyNetwork(), image_shape=(3, 8, 8)).eval(), batch, steps=2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_any_number_of_ranks(monkeypatch, size, n):
    wanted = sampler().sample(n, seed=1)
    samplers = [sampler() for _ in range(size)]

    def work(group):
        mine = samplers[group.rank]
        return sharding.sample(mine, n, group, labels=mine.labels(n, seed=1), seed=1)

    first, *others = in_threads(monkeypatch, size, work)
    assert torch.equal(first, wanted) and others == [None] * (size - 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_later(monkeypatch, failing):
    class Fails(ToyNetwork):
        calls = 0

        def forward(self, x, t, y):
            self.calls += 1
            if self.calls > 4:
                raise RuntimeError("out of luck")
            return super().forward(x, t, y)

    samplers = [sampler(Fails() if rank == failing else None) for rank in range(2)]

    def work(group):
        return sharding.sample(samplers[group.rank], 20, group, labels=torch.zeros(20, dtype=torch.int64))

    errors = in_threads(monkeypatch, 2, work)
    where = "rank 1: " if failing else ""
    assert [str(error) for error in errors] == [f"{where}RuntimeError: out of luck"] * 2
    assert all(isinstance(error, ranks.RankError) for error in errors)
    assert [type(error.__cause__) for error in errors][failing] is RuntimeError


def test_a_connection_that_is_lost(monkeypatch):
    def lost(x, op, group):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", lost)
    with pytest.raises(ranks.RankError, match="rank 1 lost the connection .*closed by peer"):
        ranks.Ranks(1, 1, 2).together(lambda: 3)
