"""Rounds that count on a machine whose host moves its cores about."""

import functools
import itertools
import json
import math

import pytest
import torch

from cmfast.benchmarks import cases, cores, kernels, timing
from cmfast.benchmarks.comparisons import agreed


class Machine(cores.Cores):
    """Its waiting takes what `waits` says, reading after reading; from one to the next is a second."""

    def __init__(self, waits, nearest=math.inf):
        super().__init__(nearest)
        self.waits, self.clock = iter(waits), 0.0

    def seconds(self):
        self.clock += 1.0
        now = next(self.waits)
        self.nearest = min(self.nearest, now)
        return now


def timed(monkeypatch, machine, budget_s):
    """Numbers of the rounds that count."""
    monkeypatch.setattr(timing, "cores", machine)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.clock)
    samples, _ = timing.interleave({"a": functools.partial(next, itertools.count())}, budget_s, (5, 1000))
    return samples["a"]


@pytest.mark.parametrize(
    "waits, counted",
    [
        ([1.0] * 6, [0, 1, 2, 3, 4]),
        ([1.0, 1.1, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0], [0, 1, 4, 5, 6]),
        ([1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [3, 4, 5, 6, 7]),
    ],
    ids=["side by side", "apart for a moment", "side by side at last"],
)
def test_rounds_with_the_cores_apart_do_not_count(monkeypatch, waits, counted):
    machine = Machine(waits)
    assert timed(monkeypatch, machine, 4.0) == counted and machine.seconds_of_last in (1.0, 1.1)


@pytest.mark.parametrize(
    "waits, nearest",
    [([1.5, 1.0, 1.0, 1.0, *[1.5] * 100], math.inf), ([1.5] * 100, 1.0)],
    ids=["too few", "known from before"],
)
def test_all_count_where_patience_ends(monkeypatch, waits, nearest):
    machine = Machine(waits, nearest)
    assert timed(monkeypatch, machine, 20.0) == list(range(41)) and machine.seconds_of_last == 1.5


def test_an_operation_that_waits_is_timed():
    machine = cores.Cores()
    taken = machine.seconds()
    assert 0 < machine.nearest <= taken < 1
    assert cores.Cores(1e-12).near([taken]) == []


def test_results_say_it_and_the_next_run_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(timing, "SLICE_S", 1e-4)
    monkeypatch.setattr(kernels, "QUICK_S", 0.01)
    monkeypatch.setattr(kernels, "configs", lambda *arguments: cases.smallest())
    monkeypatch.setattr(cores.Cores, "seconds", lambda self: 7e-6)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", "denoise 2x", "--providers", "cmfast"]
    assert kernels.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    assert [row["sync_us"] for row in json.loads(path.read_text())["rows"]] == [7.0]
    assert cores.known(tmp_path, "kernels-*.json") == 7e-6 and cores.known(tmp_path, "other-*.json") == math.inf

    found = []
    monkeypatch.setattr(cores.Cores, "near", lambda self, rounds: found.append(self.nearest) or [0, 1, 2, 3, 4, 5, 6])
    assert kernels.main(arguments) == 0
    assert set(found) == {7e-6} and timing.cores is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert kernels.main(arguments) == 0
    assert "sync_us" not in json.loads(path.read_text())["rows"][0]


def test_two_runs_with_the_cores_otherwise():
    def run(sync_us):
        row = {"name": "a", "mode": "call", "p50_us": 1.0, "sync_us": sync_us, "times_cmfast": None}
        ratio = {"p20": 1.0, "p50": 1.0, "p80": 1.0}
        other = row | {"provider": "reference", "times_cmfast": ratio}
        return [{"suite": "kernels", "rows": [row | {"provider": "cmfast"}, other]}]

    remark = "cores apart in one of them"
    assert remark in agreed(run(6.0), run(8.0)) and remark in agreed(run(8.0), run(6.0))
    assert remark not in agreed(run(6.0), run(7.0))
