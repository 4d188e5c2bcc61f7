"""What befalls a run from outside: processes that die, full disks, read-only folders, files that vanish."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import cmfast
from cmfast import cli
from cmfast.data import decode, open_data
from cmfast.data.folder import LISTING
from cmfast.training import checkpoints
from tests.training.fault_utils import ENDLESS, ENVIRONMENT, pictures, run
from tests.training.test_loop import everything
from tests.training.toys import OPTIONS, trainer, unet


# Of rank 1 it is as where that one fails, below: three imports of torch that show little more.
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others(tmp_path, rank):
    """By an error that says so, within seconds and not at the end of some time limit."""
    data = pictures(tmp_path / "images")
    more = ["--save-interval", 3, "--out", tmp_path / "run"]
    done, seconds = run(2, "die", *ENDLESS, "--data", data, *more, rank=rank, at=5)
    assert done.returncode != 0 and seconds < 60
    assert f"cmfast: error: rank {1 - rank} lost the connection to another: " in done.stderr, done.stderr[-3000:]
    assert [step for step, _ in checkpoints.saved(tmp_path / "run")] == [3]
    resume = ["train", "--device", "cpu", "--resume", "--steps", "6", "--out", str(tmp_path / "run")]
    assert cli.main(resume) == 0 and (tmp_path / "run" / "model.safetensors").exists()


def test_a_process_that_fails_says_why(tmp_path):
    """Itself: the first one only sees that it is gone."""
    data = pictures(tmp_path / "images")
    done, seconds = run(2, "fail", *ENDLESS, "--data", data, "--out", tmp_path / "run", rank=1)
    assert done.returncode != 0 and seconds < 60
    assert done.stderr.count("cmfast: error: rank 1: out of luck") == 1, done.stderr[-3000:]
    assert "cmfast: error: rank 0 lost the connection to another: " in done.stderr


FULL = """
import resource, sys
from pathlib import Path
from tests.training.test_faults import full
full(Path(sys.argv[1]), int(sys.argv[2]))
"""


def full(folder, room):
    """Go on with a run where no file may have more than `room` bytes; what was raised."""
    import resource

    run = trainer("edm", folder, OPTIONS, resume=True)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        run.run(progress=False)
    except OSError as error:
        print("refused", error)


@pytest.mark.parametrize("part", [0.5, "state"])
def test_no_room(tmp_path, part):
    """As the kernel refuses it, in the middle of whichever file comes to be too large: an OSError, and what was there
    is there, and the run goes on from it."""
    pytest.importorskip("resource")
    trainer("edm", tmp_path / "part", replace(OPTIONS, steps=10)).run(progress=False)
    (_, place), *_ = checkpoints.saved(tmp_path / "part")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    # state.pt is the largest: above all others, so that it is the one that does not fit.
    weights = max(len(content) for name, content in before.items() if name != "state.pt")
    assert len(before["state.pt"]) > weights + 1000
    room = weights + 500 if part == "state" else int(part * weights)
    command = [sys.executable, "-c", FULL, str(tmp_path / "part"), str(room)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("refused "), done.stderr
    assert str(tmp_path) in done.stdout or "File too large" in done.stdout
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert os.listdir(place.parent) == [place.name]
    resumed = trainer("edm", tmp_path / "part", OPTIONS, resume=True)
    assert resumed.done == 10
    resumed.run(progress=False)
    whole = trainer("edm", tmp_path / "whole", OPTIONS)
    whole.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))


EACH = """
import json, sys
from cmfast import cli
for arguments in json.loads(sys.argv[1]):
    print(cli.main([*arguments, "--device", "cpu"]), flush=True)
"""


def obedient():
    """Before a program starts: that it may not write where permissions forbid it, whoever runs it."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_a_folder_that_cannot_be_written(tmp_path):
    images = pictures(tmp_path / "images")
    model = tmp_path / "model.safetensors"
    cmfast.save(cmfast.Denoiser(unet(), image_shape=(3, 8, 8)), model)
    short = ["--recipe", "edm", "--network", "tiny", "--batch-size", "2", "--steps", "1", "--data", str(images)]
    assert cli.main(["train", "--device", "cpu", *short, "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "locked").mkdir()
    for folder in (tmp_path / "locked", tmp_path / "run", tmp_path / "run" / "checkpoints"):
        folder.chmod(0o555)
    (tmp_path / "run" / ".lock").chmod(0o444)
    commands = {
        "locked/run": ["train", *short, "--out", str(tmp_path / "locked" / "run")],
        "run/.lock": ["train", "--resume", "--steps", "2", "--out", str(tmp_path / "run")],
        "x.png": ["sample", "--model", str(model), "--num", "1", "--out", str(tmp_path / "locked" / "x.png")],
    }
    try:
        command = [sys.executable, "-c", EACH, json.dumps(list(commands.values()))]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=obedient)
        assert done.stdout.split() == ["2"] * 3, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("cmfast: error: ")]
        assert len(errors) == 3 and all("ermission" in error for error in errors)
        assert all(where in error for where, error in zip(commands, errors))
    finally:
        for folder in (tmp_path / "locked", tmp_path / "run", tmp_path / "run" / "checkpoints"):
            folder.chmod(0o755)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes(tmp_path, workers, capsys):
    """The run ends with its name, and goes on without it, or when it is back."""
    images, out = pictures(tmp_path / "images"), tmp_path / "run"
    content = (images / "2.png").read_bytes()
    short = ["--recipe", "edm", "--network", "tiny", "--batch-size", "2", "--data", str(images), "--save-interval", "1"]
    arguments = ["train", "--device", "cpu", "--workers", str(workers)]
    resume = [*arguments, "--resume", "--steps", "4", "--out"]
    assert cli.main([*arguments, *short, "--steps", "2", "--out", str(out)]) == 0
    opened = cmfast.data.open_data(images)
    (images / "2.png").unlink()
    with pytest.raises(ValueError, match=r"images/2\.png cannot be read: it is gone; with skip_unreadable"):
        for batch, _ in zip(opened.batches(2, seed=0, workers=workers), range(4)):
            assert batch
    capsys.readouterr()
    assert cli.main([*resume, str(out)]) == 2
    assert "1 of 4 files in" in (said := capsys.readouterr().err)
    assert said.endswith("2.png (it is gone); put them there as they were, or skip them with skip_unreadable=True\n")
    # One that began before runs kept a listing; and one with other images as well.
    for other in ("old", "more", "without"):
        shutil.copytree(out, tmp_path / other)
    (tmp_path / "old" / LISTING).unlink()
    assert cli.main([*resume, str(tmp_path / "old"), "--skip-unreadable"]) == 2
    assert "is of another configuration" in capsys.readouterr().err  # there are three images now
    (images / "9.png").write_bytes(content)
    assert cli.main([*resume, str(tmp_path / "more"), "--skip-unreadable"]) == 2
    assert "is of another configuration" in capsys.readouterr().err
    (images / "9.png").unlink()
    with pytest.warns(UserWarning, match="1 of 4 files .* are skipped"):
        assert cli.main([*resume, str(tmp_path / "without"), "--skip-unreadable"]) == 0
    with pytest.warns(UserWarning, match="1 of 4 files .* are skipped"):  # by the run's settings
        assert cli.main([*arguments, "--resume", "--steps", "5", "--out", str(tmp_path / "without")]) == 0
    (images / "2.png").write_bytes(content)
    assert cli.main([*resume, str(out)]) == 0


def test_a_run_whose_picture_vanished_ends_in_the_same_bits(tmp_path):
    """As one that was not interrupted, and met it at the same step."""
    for i, path in enumerate(sorted(pictures(tmp_path / "images").iterdir())):
        folder = path.with_name("ab"[i % 2])
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    options = replace(OPTIONS, batch_size=1, steps=2)
    data = open_data(tmp_path / "images")
    trainer("edm", tmp_path / "part", options, data=data).run(progress=False)
    seen = [batch.images for batch, _ in zip(data.batches(1, seed=options.seed), range(2))]
    other = open_data(tmp_path / "images", skip_unreadable=True)
    whole = trainer("edm", tmp_path / "whole", replace(options, steps=9), data=other)
    gone = next(
        path
        for path in sorted((tmp_path / "images").rglob("*.png"))
        if not any(torch.equal(decode.decode(path, "Pillow"), images[0]) for images in seen)
    )
    gone.unlink()
    with pytest.warns(UserWarning, match=f"{gone.name} cannot be read: it is gone"):
        whole.run(progress=False)
    with pytest.warns(UserWarning, match=f"1 of 4 files .*{gone.name} .it is gone.; they are skipped"):
        data = open_data(tmp_path / "images", skip_unreadable=True, run=tmp_path / "part")
    resumed = trainer("edm", tmp_path / "part", replace(options, steps=9), data=data, resume=True)
    assert resumed.done == 2
    resumed.run(progress=False)
    assert all(map(torch.equal, everything(resumed), everything(whole)))
