"""SIGTERM ends a run after the step at hand, with a checkpoint and status 0, on all processes at the same step."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from cmfast import cli
from cmfast.training import NaNLoss, Stopped, checkpoints
from tests.training.fault_utils import ENDLESS, pictures, run
from tests.training.test_loop import everything, exploding
from tests.training.toys import OPTIONS, trainer


def at_step(patch, run, at, act):
    """Have `act` called when a step begins."""
    step = type(run.step).__call__

    def acting(self, batch, number):
        if number == at:
            act()
        step(self, batch, number)

    patch.setattr(type(run.step), "__call__", acting)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(run, at, act=terminate):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, run, at, act)
        with pytest.raises(Stopped) as caught:
            run.run(progress=False)
    return caught.value


def test_the_step_at_hand_is_the_last(tmp_path):
    """And the run that goes on from there ends in the bits of one that was not stopped."""
    before = signal.getsignal(signal.SIGTERM)
    ended = stopped(trainer("edm", tmp_path / "part"), 12)
    assert ended.code == 0 and "stopped after step 13 of 20" in str(ended) and "step-00000013" in str(ended)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [step for step, _ in checkpoints.saved(tmp_path / "part")] == [10, 13]
    assert not (tmp_path / "part" / "model.safetensors").exists()
    resumed = trainer("edm", tmp_path / "part", resume=True)
    assert resumed.done == 13
    resumed.run(progress=False)
    whole = trainer("edm", tmp_path / "whole")
    whole.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))
    assert (tmp_path / "part" / "model.safetensors").exists()
    assert resumed.losses()[0] == [5, 10, 13, 15, 20]


def test_the_same_trainer_goes_on(tmp_path):
    run = trainer("edm", tmp_path, replace(OPTIONS, steps=4))
    stopped(run, 1)
    run.run(progress=False)
    assert run.done == 4 and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("at, steps", [(0, [1]), (9, [10]), (18, [10, 19])])
def test_any_step(tmp_path, at, steps):
    stopped(trainer("edm", tmp_path), at)
    assert [step for step, _ in checkpoints.saved(tmp_path)] == steps


def test_the_last_step_ends_the_run(tmp_path):
    run = trainer("edm", tmp_path, replace(OPTIONS, steps=3))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, run, 2, terminate)
        run.run(progress=False)
    assert (tmp_path / "model.safetensors").exists()


def test_a_handler_that_was_there_is_called_too(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        stopped(trainer("edm", tmp_path), 1)
        assert called == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stop_by_hand_and_twice(tmp_path):
    run = trainer("edm", tmp_path)
    stopped(run, 1, lambda: (run.stop(), terminate(), terminate()))
    assert [step for step, _ in checkpoints.saved(tmp_path)] == [2]


def test_another_thread_leaves_signals_alone(tmp_path):
    run, seen = trainer("edm", tmp_path, replace(OPTIONS, steps=2)), []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, run, 1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
        thread = threading.Thread(target=run.run, kwargs={"progress": False})
        thread.start()
        thread.join()
    assert seen == [before] and run.done == 2


@pytest.fixture
def python_hears_ctrl_c():
    """Not so in a process that a shell has put into the background: SIGINT is ignored there."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_ends_at_once(tmp_path, python_hears_ctrl_c):
    """As before: no checkpoint; and nothing is left in the way of a resume."""
    run = trainer("edm", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, run, 12, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run.run(progress=False)
    assert [step for step, _ in checkpoints.saved(tmp_path)] == [10]
    assert signal.getsignal(signal.SIGTERM) is before
    trainer("edm", tmp_path, resume=True).run(progress=False)


def test_a_nan_is_not_saved_unseen(tmp_path):
    """Stopped between two readings, after a bad step: the state is that before it, and the error says so."""
    run = exploding(tmp_path, 6)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, run, 7, terminate)
        with pytest.raises(NaNLoss, match="the loss of step 6"):
            run.run(progress=False)
    assert [step for step, _ in checkpoints.saved(tmp_path)] == [6]


@pytest.mark.parametrize("what, workers", [("stop", 0), ("stop all", 1)])
def test_the_command_line(tmp_path, what, workers):
    """Also where every process of a job is told, those that decode images among them."""
    more = ["--workers", workers, "--out", tmp_path / "run"]
    done, seconds = run(1, what, *ENDLESS, "--data", pictures(tmp_path / "images"), *more)
    assert done.returncode == 0, done.stderr
    assert "stopped after step 4 of 1000000" in done.stdout and "--resume" in done.stdout
    assert seconds < 60 and [step for step, _ in checkpoints.saved(tmp_path / "run")] == [4]
    resume = ["train", "--device", "cpu", "--resume", "--steps", "6", "--out", str(tmp_path / "run")]
    assert cli.main(resume) == 0 and (tmp_path / "run" / "model.safetensors").exists()


def test_one_of_two_processes_is_told(tmp_path):
    """Both end after the same step, one later: what the other says travels while a step is computed."""
    data = pictures(tmp_path / "images")
    done, seconds = run(2, "stop", *ENDLESS, "--data", data, "--out", tmp_path / "run", rank=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped after step 5") == 1 and seconds < 90
    assert [step for step, _ in checkpoints.saved(tmp_path / "run")] == [5]
