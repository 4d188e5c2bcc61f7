"""One process writes a run: a second is refused by name, and one that was killed is in nobody's way."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cmfast import cli
from cmfast.training import Locked, lock
from cmfast.training.lock import locked
from tests.training.fault_utils import ENDLESS, ENVIRONMENT, pictures, run
from tests.training.toys import OPTIONS, trainer

pytest.importorskip("fcntl")

HOLD = """
import os, sys, time
from pathlib import Path
sys.path.append(sys.argv[3])
from lock import locked  # alone: the package would bring torch
with locked(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "fork" else 1
    sys.stdout.write(f"{os.getpid()}\\n")  # in one piece: two processes write
    sys.stdout.flush()
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a run; to be killed."""
    started = []

    def start(folder, kind="alone"):
        command = [sys.executable, "-c", HOLD, str(folder), kind, os.path.dirname(lock.__file__)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        pids = [int(process.stdout.readline()) for _ in range(2 if kind == "fork" else 1)]
        return process, pids

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()


def test_the_second_is_refused(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(Locked, match=rf"run is being trained by another process \(process {os.getpid()} on .*wait"):
            with locked(tmp_path / "run"):
                pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_a_trainer_holds_it_while_it_runs(tmp_path, monkeypatch):
    one, other = (trainer("edm", tmp_path, replace(OPTIONS, steps=2)) for _ in range(2))
    step = type(one.step).__call__

    def meanwhile(self, batch, number):
        if self is one.step:
            with pytest.raises(Locked, match=f"process {os.getpid()} "):
                other.run(progress=False)
        step(self, batch, number)

    monkeypatch.setattr(type(one.step), "__call__", meanwhile)
    one.run(progress=False)
    # The other has been made before there was a checkpoint, and would start over.
    with pytest.raises(Locked, match="another process has written .*step-00000002 since this one looked.*step 0"):
        other.run(progress=False)
    more = replace(OPTIONS, steps=3)
    trainer("edm", tmp_path, more, resume=True).run(progress=False)


def test_another_process_and_its_end(tmp_path, holder):
    process, (pid,) = holder(tmp_path)
    run = trainer("edm", tmp_path, replace(OPTIONS, steps=1))
    with pytest.raises(Locked, match=f"process {pid} on "):
        run.run(progress=False)
    os.kill(pid, signal.SIGKILL)
    process.wait()
    run.run(progress=False)


def test_children_do_not_keep_it(tmp_path, holder):
    """A worker that decodes images outlives its parent by seconds."""
    process, pids = holder(tmp_path, "fork")
    with pytest.raises(Locked, match=f"process {process.pid} on "):
        with locked(tmp_path):
            pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (child,) = set(pids) - {process.pid}
    os.kill(child, 0)  # it is there still
    with locked(tmp_path):
        pass


def test_of_two_processes_the_first_asks(tmp_path, holder, capsys):
    """The command line under torchrun, too: all end with the message, told once."""
    _, (pid,) = holder(tmp_path / "run")
    data = pictures(tmp_path / "images")
    arguments = [*ENDLESS, "--data", data, "--out", tmp_path / "run"]
    said = f"cmfast: error: {tmp_path}/run is being trained by another process (process {pid} on "
    assert cli.main(["train", "--device", "cpu", *map(str, arguments)]) == 2 and said in capsys.readouterr().err
    done, _ = run(2, "nothing", *arguments)
    assert done.returncode == 1 and done.stderr.count(said) == 1, done.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_without_locks(tmp_path, monkeypatch):
    """Without the module there is none; on a file system without them, a warning."""
    with monkeypatch.context() as patch:
        patch.setattr(lock, "fcntl", None)
        with locked(tmp_path), locked(tmp_path):
            pass

    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="file system without locks .*no other process trains there"):
        with locked(tmp_path):
            pass


def test_the_file_is_no_link(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"run/\.lock"):
        with locked(tmp_path / "run"):
            pass
    assert (tmp_path / "precious").read_text() == "text"
