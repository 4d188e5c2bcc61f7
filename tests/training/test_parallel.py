"""Two processes do what one does with the whole batch: the same losses, the same weights; and a resumed pair too. What
befalls one of them, both know of."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmfast import ranks
from cmfast.tolerances import TRAINING
from cmfast.training import pictures, state
from tests.training.parallel_run import CASES, RESUMED
from tests.training.toys import OBJECTIVES, PAIRED, denoiser, trainer, weights

HERE = Path(__file__).resolve()


def launch(script, *arguments, restarts=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", str(restarts), str(HERE.with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 if restarts else 240)
    assert done.returncode == 0, done.stderr[-3000:]


def files(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    return {path.name: load_file(path) for path in place.glob("*.safetensors")}


def alone(folder, name, steps, optimize):
    run = trainer(name, folder, replace(PAIRED, steps=steps, optimize=optimize))
    run.run(progress=False)
    return files(folder, steps)


def same(one, other, start):
    """Weights and every average, as a part of how far they came."""
    assert one.keys() == other.keys()
    for name in one:
        flat = [torch.cat([tensors[key].flatten() for key in sorted(tensors)]) for tensors in (one[name], other[name])]
        far = (flat[0] - start).abs().max()
        assert far > 0 and (flat[0] - flat[1]).abs().max() < TRAINING * far, name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The runs of parallel_run.py; a copy of one when it was interrupted, `left`."""
    folder = tmp_path_factory.mktemp("pairs")
    launch("parallel_run.py", str(folder))
    shutil.copytree(folder / "cd-fsdp" / "part", folder / "left")
    launch("parallel_run.py", str(folder), "resume")
    return folder


@pytest.mark.parametrize("name, kind", CASES)
def test_two_processes_learn_what_one_does(pairs, tmp_path, name, kind):
    """And the pair, interrupted and resumed, ends in its own bits."""
    tensors = denoiser(OBJECTIVES[name]).network.state_dict()
    start = torch.cat([tensors[key].flatten() for key in sorted(tensors)])
    folder = pairs / f"{name}-{kind}"
    one = alone(tmp_path, name, 4, optimize=kind == "ddp")  # networks that are shared out are not
    two = files(folder / "two", 4)
    same(one, two, start)
    losses = [[line["loss"] for line in pictures.read_log(run / "log.jsonl")] for run in (tmp_path, folder / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4
    if name in RESUMED:
        resumed = files(folder / "part", 4)
        assert all(torch.equal(two[file][key], resumed[file][key]) for file in two for key in two[file])


def test_a_run_of_two_goes_on_alone(pairs, tmp_path):
    shutil.copytree(pairs / "left", tmp_path / "left")
    run = trainer("cd", tmp_path / "left", replace(PAIRED, parallel="fsdp", microbatch=2), resume=True)
    assert run.done == 2 and len(state.read(run.out / "checkpoints" / "step-00000002")["random"]) == 2
    run.run(progress=False)
    assert torch.isfinite(weights(run.step.model)).all()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each case of pair_run.py found on the two processes, and the checkpoints that are there after it."""
    folder = tmp_path_factory.mktemp("pair")
    launch("pair_run.py", str(folder))

    def of(case):
        found = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
        return [one for one, _ in found], found[0][1]

    return of


def test_both_stop_at_a_step_just_saved(pair):
    found, saved = pair("stopped_at_a_step_just_saved")
    assert [kind for kind, _ in found] == ["Stopped"] * 2 and "after step 4 of 6" in found[1][1] and saved == [2, 4]
    assert found[0] == found[1]  # the same folder is named


def test_both_learn_what_one_of_them_lacks(pair):
    """Before they do anything together as a run, in which one that has failed would answer another question."""
    found, _ = pair("images_on_one_machine")
    (kind, message), other = found
    assert kind == "RankError" and message.startswith("rank 1: nowhere.npz: no such file") and other == [kind, message]


def test_both_see_a_nan_again(pair):
    """At the first step after a checkpoint: the one that is to be written is there."""
    found, saved = pair("a_nan_that_comes_again")
    assert [kind for runs in found for kind, _ in runs] == ["NaNLoss"] * 4 and saved == [2, 4]


def test_a_nan_of_one_leaves_the_buffers_of_both(pair):
    assert pair("a_nan_of_one")[0] == [[[True, 3]] * 2] * 2


def test_a_nan_of_one_leaves_the_scale_of_both(pair):
    assert pair("a_nan_of_one_in_float16")[0] == [[2.0**16] * 2] * 2


@pytest.mark.parametrize("case", ["a_full_disk", "a_full_disk_and_shared_weights"])
def test_both_see_a_full_disk(pair, case):
    found, saved = pair(case)
    assert found == [["RankError", "[Errno 28] No space left on device"]] * 2 and not saved


def test_both_go_on_from_the_same_step(pair):
    found, _ = pair("a_folder_on_each_machine")
    for message, step in zip(found, (2, 0)):
        assert f"would go on from step {step}: " in message and "one folder that all of them see" in message


def test_the_result_is_there_for_both(pair):
    assert pair("the_end")[0] == [["ended", "True"]] * 2


def test_both_wait_for_a_picture(pair):
    """Of which one makes it: a GPU's collectives would not wait as long."""
    assert pair("a_slow_picture")[0] == [["ended", "True", True]] * 2


def test_a_weight_without_gradient_is_named(pair):
    for kind, message in pair("a_weight_without_gradient")[0]:
        assert kind == "ValueError" and "never.weight, never.bias of the network had no part in this step" in message


def test_a_foreign_networks_dropout_differs(pair):
    (one, other), _ = pair("masks")
    assert one != other


def test_both_start_alike(pair):
    """Though each made other weights and buffers."""
    (one, other), _ = pair("where_they_start")
    assert one == other and one[0] == one[1]


def test_networks_of_any_blocks_are_shared_out(pair):
    """Whatever they hold in lists; also where they go on from a checkpoint."""
    for apart in pair("blocks_of_all_kinds")[0]:
        assert len(apart) == 5 and max(apart.values()) < TRAINING


def test_no_thread_is_left_with_a_message(pair):
    """Which took the process with it where Python ended first; those of torch's default group, DDP keeps."""
    for before, after in pair("threads")[0]:
        assert after <= before - 3


@pytest.mark.parametrize("late, kind", [("0", "ours"), ("1", "ours"), ("0", "original")])
def test_processes_that_start_again_do_not_call_those_that_are_gone(late, kind):
    """Whose addresses torchrun keeps."""
    launch("restart_run.py", late, kind, restarts=1)


def test_nobody_to_meet(monkeypatch):
    """Names where that was to be, as an error of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    soon = functools.partial(ranks.rendezvous, timeout=timedelta(seconds=1))
    monkeypatch.setattr(ranks, "rendezvous", soon)
    with pytest.raises(ranks.Lost, match=f"rank 1 could not meet the others at 127.0.0.1:{port}: .*"), ranks.ranks():
        pass
