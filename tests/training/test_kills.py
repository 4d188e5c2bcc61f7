"""kill -9 at random moments, in runs and in the writing of pictures: what was whole before is whole after."""

import os
import random
import select
import signal
import subprocess
import sys
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
""",
    "work": 'trainer("cd", sys.argv[1], replace(OPTIONS, steps=int(sys.argv[2]), save_interval=1, keep=2), '
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
    def __init__(self, script, *arguments):
        command = [sys.executable, "-c", NURSERY.format(**script), *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, text=True, bufsize=1, **pipes)
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()

    def run(self, seconds, line=0):
        """Do the work, and kill it after that time; whether it had to be killed."""
        self.process.stdin.write(f"{line}\n")
        child = int(self.process.stdout.readline())
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        ended = self.process.stdout.readline().split()
        assert ended[0] == "ended" and ended[1] in ("0", "-9"), self.process.stderr.read()
        return ended[1] == "-9"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills, capsys):
    """After each kill the newest checkpoint is no older than before and loads as a whole; the run that goes on from
    there, at once, ends in the bits of one that was left alone."""
    steps, chance = 12 * kills, random.Random(0)
    run, home = tmp_path / "part", checkpoints.folder(tmp_path / "part")
    killed = halves = reached = 0
    with Nursery(TRAIN, run, steps) as nursery:
        while killed < kills:
            if not nursery.run(chance.uniform(0.1, 0.7)):
                break
            killed += 1
            halves += any(home.glob(".unfinished-*"))
            saved = checkpoints.saved(run)
            assert not saved or saved[-1][0] >= reached, "the newest checkpoint is gone"
            for step, place in saved:
                assert state.read(place)["step"] == step
                assert all(torch.isfinite(x).all() for p in place.glob("*.safetensors") for x in load_file(p).values())
            reached = saved[-1][0] if saved else 0
        assert not nursery.run(600)
    resumed = trainer("cd", run, replace(OPTIONS, steps=steps, save_interval=1, keep=2), resume=True)
    whole = trainer("cd", tmp_path / "whole", replace(OPTIONS, steps=steps, save_interval=steps))
    whole.run(progress=False)
    with capsys.disabled():
        print(f"\n{killed} kills, {halves} of them within a checkpoint; {reached} of {steps} steps after the last one")
    assert killed == kills and halves > 0 and resumed.done == steps
    assert all(map(torch.equal, everything(resumed), everything(whole)))
    assert len(checkpoints.saved(run)) == 2 and not any(home.glob(".unfinished-*"))


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_writing_pictures(tmp_path, name, kills, capsys):
    """Under the final name there is always a whole file, of one colour."""
    path, chance, halves = tmp_path / name, random.Random(1), 0
    with Nursery(PICTURES, path) as nursery:
        for kill in range(kills):
            assert nursery.run(0.1 + chance.uniform(0.0, 0.1), kill)
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
