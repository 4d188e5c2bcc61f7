"""kill -9 at random moments, in runs and in the writing of pictures: what was whole before is whole after."""

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cmfast.training import checkpoints, state
from tests.training.fault_utils import ENVIRONMENT
from tests.training.test_loop import everything
from tests.training.toys import OPTIONS, trainer

#: Imports once, then for each line on its standard input does the work in a child, whose end it reports.
NURSERY = """
import os, sys, time, traceback
import torch
torch.set_num_threads(1)
{imports}
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            {work}
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TRAIN = {
    "imports": """
from dataclasses import replace
from tests.training.toys import OPTIONS, trainer
from cmfast.training import checkpoints
flush = checkpoints._flush
def slow(path):  # so that most kills fall into the middle of a checkpoint
    time.sleep(0.004)
    flush(path)
checkpoints._flush = slow
# Made here once, since that imports 900 modules: a second and a half of each child otherwise. No step is done, which
# would start threads.
import tqdm.auto, yaml
trainer("cd", sys.argv[1], OPTIONS)
""",
    "work": 'trainer("cd", sys.argv[1], replace(OPTIONS, steps=int(line), save_interval=1, keep=2), '
    'resume="auto").run(progress=False)',
}
PICTURES = {
    "imports": "from cmfast import images",
    "work": """
            value = int(line)
            while True:
                value = (value + 1) % 250
                images.save(sys.argv[1], torch.full((64, 64, 64, 3), value, dtype=torch.uint8))""",
}


class Nursery:
    """log: a file, since nobody reads a pipe while the process runs, which would wait once it is full."""

    def __init__(self, script, log, *arguments):
        command = [sys.executable, "-c", NURSERY.format(**script), *map(str, arguments)]
        self.log = log
        with open(log, "w") as stderr:
            # Without a buffer: `select` would not see a line in it, and wait.
            self.process = subprocess.Popen(
                command, env=ENVIRONMENT, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        assert self.process.stdout.readline() == b"ready\n", log.read_text()

    def run(self, seconds, line, until=lambda: True):
        """Do the work, and kill it so many seconds after something is there; whether it had to be killed."""
        self.process.stdin.write(b"%d\n" % line)
        child, start = int(self.process.stdout.readline()), time.monotonic()
        while not until() and not self._ended(0.001):
            assert time.monotonic() < start + 60, "nothing comes of it"
        if not self._ended(seconds):
            os.kill(child, signal.SIGKILL)
        ended = self.process.stdout.readline().split()
        assert ended in ([b"ended", b"0"], [b"ended", b"-9"]), self.log.read_text()
        return ended[1] == b"-9"

    def _ended(self, seconds):
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)  # with the child, where a test failed
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills, capsys):
    """After each kill the newest checkpoint is no older than before and loads as a whole; the run that goes on from
    there, at once, ends in the bits of one that was left alone."""
    chance = random.Random(0)
    run, home = tmp_path / "part", checkpoints.folder(tmp_path / "part")
    halves = reached = 0

    def further():
        return [step for step, _ in checkpoints.saved(run) if step > reached]

    with Nursery(TRAIN, tmp_path / "log", run) as nursery:
        for kill in range(kills):
            # At any time; some steps on, however slow this machine is; and within a checkpoint.
            moments = (0.7, lambda: True), (0.2, further), (0.0, lambda: any(home.glob(".unfinished-*")))
            seconds, until = moments[kill % 3]
            if seconds == 0:  # else what the last kill left would be taken for it
                for half in home.glob(".unfinished-*"):
                    shutil.rmtree(half)
            assert nursery.run(chance.uniform(0, seconds), 1_000_000, until)
            halves += any(home.glob(".unfinished-*"))
            saved = checkpoints.saved(run)
            assert not saved or saved[-1][0] >= reached, "the newest checkpoint is gone"
            for step, place in saved:
                assert state.read(place)["step"] == step
                assert all(torch.isfinite(x).all() for p in place.glob("*.safetensors") for x in load_file(p).values())
            reached = saved[-1][0] if saved else 0
        steps = reached + 3
        assert not nursery.run(60, steps)
    resumed = trainer("cd", run, replace(OPTIONS, steps=steps, save_interval=1, keep=2), resume=True)
    whole = trainer("cd", tmp_path / "whole", replace(OPTIONS, steps=steps, save_interval=steps))
    whole.run(progress=False)
    with capsys.disabled():
        print(f"\n{kills} kills, {halves} of them within a checkpoint, and {reached} steps")
    assert halves > 0 and reached > 0 and resumed.done == steps
    assert all(map(torch.equal, everything(resumed), everything(whole)))
    assert len(checkpoints.saved(run)) == 2 and not any(home.glob(".unfinished-*"))


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_writing_pictures(tmp_path, name, kills, capsys):
    """Under the final name there is always a whole file, of one colour."""
    path, chance, halves = tmp_path / name, random.Random(1), 0
    with Nursery(PICTURES, tmp_path.with_suffix(".log"), path) as nursery:
        for kill in range(kills):
            until = path.exists if kill % 2 == 0 else lambda: len(os.listdir(tmp_path)) > 1
            assert nursery.run(chance.uniform(0.0, 0.1 if kill % 2 == 0 else 0.002), kill, until)
            if name.endswith("npz"):
                with np.load(path) as arrays:
                    pixels = arrays["arr_0"]
                assert pixels.shape == (64, 64, 64, 3) and pixels.min() == pixels.max()
            else:
                pixels = np.asarray(Image.open(path))
                assert pixels.shape == (526, 526, 3) and len(np.unique(pixels)) <= 2
            left = [other for other in tmp_path.iterdir() if other != path]
            halves += bool(left)
            assert all(other.name.startswith(".x.") for other in left)
            for other in left:
                other.unlink()
    with capsys.disabled():
        print(f"\n{kills} kills, {halves} of them while {name} was written")
    assert halves > 0
