"""`python -m cmfast.compat.openai SCRIPT.py`: scripts for openai's `cm` run as they are, on one rank and on two."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.compat.openai import _shim, script_util
from cmfast.compat.openai.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
SCRIPT = SCRIPTS / "sample_images.py"
NETWORK = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "class_cond": True,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A small network with random weights, none of them zero."""
    torch.manual_seed(0)
    model, _ = script_util.create_model_and_diffusion(**script_util.model_and_diffusion_defaults() | NETWORK)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save({name: 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}, path)
    return path


def saved_images(folder, pixels):
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{'ab'[i % 2]}_{i}.png")
    return folder


def launch(log_dir, script, *, ranks=1, settings=(), options=()):
    """Run a script for `NETWORK`; returns the facts that it writes, and what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    network = [word for name, value in NETWORK.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, "-m", "cmfast.compat.openai", *settings, str(script), *network, *options]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OPENAI_LOGDIR": str(log_dir), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=log_dir.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((log_dir / "facts.json").read_text()), done.stdout


def run(log_dir, model_path, *, options=(), **how):
    """The images and facts that the script writes; what it prints."""
    facts, printed = launch(log_dir, SCRIPT, options=[*options, "--model_path", str(model_path)], **how)
    with np.load(log_dir / "images.npz") as images:
        return images["arr_0"], facts, printed


def test_script_on_one_rank_and_on_two(tmp_path, model_path):
    options = ["--sampler", "multistep", "--ts", "0,22,39"]
    one, facts, printed = run(tmp_path / "one", model_path, settings=["--set", "rho=6"], options=options)
    assert one.shape == (4, 3, 16, 16)
    assert np.abs(one).max() <= 1 and one.std() > 0.01
    assert printed.startswith(f"Logging to {tmp_path / 'one'}\n")
    assert facts["settings"]["rho"] == 6.0 and facts["settings"]["loss_norm"] == "lpips"
    assert facts["same"]
    assert not {"mpi4py", "blobfile", "flash_attn", "piq", "lpips", "clip", "torchvision"} & set(facts["modules"])
    assert facts["argv"][0] == str(SCRIPT) and facts["argv"][-1] == str(model_path)
    assert facts["path"] == str(SCRIPT.parent)
    assert len(facts["errors"]) == 3
    assert all("cm.losses is not part of" in error and "karras_diffusion" in error for error in facts["errors"])

    settings = ["--set", "rho=6", "--set", "loss_norm=l2"]
    two, facts, _ = run(tmp_path / "two", model_path, ranks=2, settings=settings, options=options)
    # Sample i is the same on any number of ranks.
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
    assert facts["means"] == {"rank": 0.5}
    assert facts["synced"] == [3.0, 3.0]
    assert facts["settings"]["loss_norm"] == "l2"
    assert (tmp_path / "two" / "log-rank001.txt").read_text().startswith("Logging to")


def test_training_on_two_ranks_and_on_from_there_on_one(tmp_path):
    """On the CPU too gradients come from all ranks: with data and noise of its own, each ends with the same weights."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    images = saved_images(tmp_path / "images", pixels)
    options = ["--data_dir", str(images), "--training_mode", "consistency_training", "--loss_norm", "l2"]
    options += [
        "--schedule_sampler",
        "loss-second-moment",
        "--start_scales",
        "4",
        "--weight_schedule",
        "uniform",
        "--dropout",
        "0.1",
        "--use_fp16",
        "True",
    ]
    two = [*options, "--microbatch", "3", "--total_training_steps", "2"]
    facts, _ = launch(tmp_path / "two", SCRIPTS / "train_images.py", ranks=2, options=two)
    assert [fact["step"] for fact in facts] == [2, 2]
    assert facts[0]["weights"] == facts[1]["weights"] and facts[0]["draw"] != facts[1]["draw"]
    assert facts[0]["losses_seen"] == facts[1]["losses_seen"] and sum(facts[0]["losses_seen"]) >= 16
    assert facts[0]["loss_norm"] == "l2"
    assert not {"mpi4py", "blobfile", "flash_attn", "piq", "lpips", "scipy"} & set(facts[0]["modules"])

    checkpoint = tmp_path / "two" / "model000002.pt"
    one = [*options, "--total_training_steps", "3", "--resume_checkpoint", str(checkpoint)]
    (fact,), printed = launch(tmp_path / "one", SCRIPTS / "train_images.py", options=one)
    assert (fact["start"], fact["step"]) == (2, 3)
    assert f"loading EMA from checkpoint: {tmp_path / 'two' / 'ema_0.9_000002.pt'}" in printed
    names = ("ema_0.9_000003.pt", "model000003.pt", "opt000003.pt", "target_model000003.pt")
    assert sorted(path.name for path in (tmp_path / "one").glob("*.pt")) == sorted(names)


def test_ranks_whose_machine_has_no_checkpoint_go_on_as_the_first_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "cmfast.compat.openai", str(SCRIPTS / "resume_elsewhere.py"), str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for start, steps in (0, 2), (2, 6):
        done = subprocess.run([*command, str(steps)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, second = (json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second and (first["start"], first["step"]) == (start, steps)
    assert not list((tmp_path / "node1").glob("*.pt"))


@pytest.mark.parametrize("where", ["installed", "checkout", "beside a cm"])
def test_spawned_processes_find_cm_and_settings(where, tmp_path):
    """Wherever cmfast is found: they are given sys.path and the environment, and nothing else."""
    images = saved_images(tmp_path / "images", np.zeros((2, 8, 8, 3), dtype=np.uint8))
    script = SCRIPTS / "spawn_workers.py"
    if where == "beside a cm":
        script = shutil.copy(script, tmp_path)
        (tmp_path / "cm").mkdir()
        (tmp_path / "cm" / "__init__.py").write_text("raise ImportError('another cm')")
    # -S and PYTHONPATH: what is installed, but for an editable cmfast.
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    command = [sys.executable, "-S", "-m", "cmfast.compat.openai", "--set", "rho=5", str(script), str(images)]
    paths = installed if where == "checkout" else [str(ROOT), *installed]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    facts = tmp_path / "facts.json"
    done = subprocess.run([*command, str(facts)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, repr(done.stderr)
    assert json.loads(facts.read_text()) == {
        "rho": 5.0,
        "module": "cmfast.compat.openai.karras_diffusion",
        "images": [2, 3, 8, 8],
        "path": _shim.WORKERS if where == "beside a cm" else str(SCRIPTS),
    }


def test_another_cm_is_found_where_no_script_runs(tmp_path):
    """Nor does a tool that imports every module there is take the name."""
    (tmp_path / "cm.py").write_text("mine = True")
    code = "import cmfast.compat.openai._shim, cmfast.compat.openai._workers.cm, cm; assert cm.mine"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: SCRIPT.py"),
        (["missing.py"], "no such script: missing.py"),
        (["--set", "rhoo=3", str(SCRIPT)], "'rhoo=3'; known names: sigma_data, sigma_max, sigma_min, rho, weight_sch"),
        (["--set", "rho", str(SCRIPT)], "name=value, got 'rho'"),
        (["--set", "rho=seven", str(SCRIPT)], "--set rho=seven: expected a float"),
        (["--set", "distillation=2", str(SCRIPT)], "--set distillation=2: expected true or false"),
        (["--seed", "3", str(SCRIPT)], "unrecognized arguments: --seed"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "usage: python -m cmfast.compat.openai" in printed


def test_arguments_after_the_script_are_its_own(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.touch()
    for name in ("argv", "path", "meta_path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv(_shim.SETTINGS, "[]")
    ran = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: ran.append((path, run_name, sys.argv)))
    main([str(script), "--set", "rho=3", "-h", "--", "x"])
    assert ran == [(str(script), "__main__", [str(script), "--set", "rho=3", "-h", "--", "x"])]


def test_set_defaults():
    def function(needed, size=1.0, name="a", flag=False):
        return needed, size, name, flag

    _shim.set_defaults(function, ["size=2", "flag=True"])
    assert function(0) == (0, 2.0, "a", True)
    assert function(0, 3.0, flag=False) == (0, 3.0, "a", False)
