"""The benchmark of training: every provider runs on a tiny network, none that is off is timed, the bars are right."""

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cmfast import perceptual
from cmfast.benchmarks import (
    networks,
    phases,
    profile,
    timing,
    training,
    training_gate,
    training_start,
)
from cmfast.benchmarks import training_providers as providers
from cmfast.benchmarks import training_summary as summary
from cmfast.benchmarks.training_start import Trial
from cmfast.tolerances import TRAINED

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

#: In the place of the original's modules, in which nothing of ours is called but the network.
MODULES = {
    "unet": '''
import cmfast

class UNetModel(cmfast.UNetModel):
    """The same network; it wants these while it is built."""
    def __init__(self, **options):
        from einops import rearrange
        from flash_attn.flash_attention import FlashAttention
        super().__init__(**options)
''',
    "logger": '''
class Logger:
    CURRENT = None
    def __init__(self, dir, output_formats):
        assert dir is None and not output_formats
''',
    "nn": '''
def update_ema(target_params, source_params, rate=0.99):
    for targ, src in zip(target_params, source_params):
        targ.detach().mul_(rate).add_(src, alpha=1 - rate)
''',
    "fp16_util": '''
class MixedPrecisionTrainer:
    def __init__(self, *, model, use_fp16, initial_lg_loss_scale):
        assert not use_fp16
        self.master_params = list(model.parameters())
    def zero_grad(self):
        for p in self.master_params:
            p.grad = None
    def backward(self, loss):
        loss.backward()
''',
    "karras_diffusion": '''
import blobfile, torch as th
from mpi4py import MPI
from piq import LPIPS
from torchvision.transforms import RandomCrop

class KarrasDenoiser:
    def __init__(self, distillation, weight_schedule, loss_norm):
        assert weight_schedule == "uniform" and loss_norm == "l2"
        self.boundary = 0.002 if distillation else 0.0

    def denoise(self, model, x, t, **kwargs):
        s = t[:, None, None, None]
        c_skip = 0.25 / ((s - self.boundary) ** 2 + 0.25)
        c_out = 0.5 * (s - self.boundary) / (s**2 + 0.25) ** 0.5
        return c_out * model(x / (s**2 + 0.25) ** 0.5, 250 * th.log(t + 1e-44), **kwargs) + c_skip * x

    def consistency_losses(self, model, x_start, num_scales, model_kwargs, target_model, teacher_model,
                           teacher_diffusion, noise=None):
        noise = th.randn_like(x_start) if noise is None else noise
        indices = th.randint(0, num_scales - 1, (x_start.shape[0],), device=x_start.device)
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        t, t2 = ((high + i / (num_scales - 1) * (low - high)) ** 7 for i in (indices, indices + 1))
        over = lambda value: value[:, None, None, None]
        x_t = x_start + noise * over(t)
        with th.no_grad():
            d = (x_t - x_start) / over(t)
            if teacher_model is not None:
                d = (x_t - teacher_diffusion.denoise(teacher_model, x_t, t, **model_kwargs)) / over(t)
            x_t2 = x_t + d * over(t2 - t)
            if teacher_model is not None:
                second = teacher_diffusion.denoise(teacher_model, x_t2, t2, **model_kwargs)
                x_t2 = x_t + (d + (x_t2 - second) / over(t2)) * over((t2 - t) / 2)
            target = self.denoise(target_model, x_t2, t2, **model_kwargs)
        distiller = self.denoise(model, x_t, t, **model_kwargs)
        if self.loss_norm == "l2":
            return {"loss": ((distiller - target) ** 2).mean(dim=[1, 2, 3])}
        distiller, target = (th.nn.functional.interpolate(x, size=32, mode="bilinear") for x in (distiller, target))
        return {"loss": self.lpips_loss((distiller + 1) / 2.0, (target + 1) / 2.0)}
''',
}


#: Every kind of block, few numbers.
MICRO = {**networks.NETWORKS["tiny"], "image_size": 8, "model_channels": 32}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "micro", MICRO)
    monkeypatch.setattr(training, "BUDGET_S", {"cpu": 0.01})
    monkeypatch.setattr(training, "PHASE_STEPS", 1)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with a `cm`."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "cm").mkdir()
    (folder / "cm" / "__init__.py").touch()
    for name, text in MODULES.items():
        (folder / "cm" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def one_trial(monkeypatch):
    """Sets the trials of a run."""

    def choose(*given, **options):
        trial = Trial("micro", 2, given, **options)
        monkeypatch.setattr(training, "trials", lambda *arguments: [trial])
        return trial

    return choose


def recorded(folder, *options):
    """The exit status and the JSON of a run."""
    status = training.main(["--device", "cpu", "--rounds", "1", "--out", str(folder / "out"), *options])
    (path,) = (folder / "out").glob("*.json")
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("recipe", ["cd", "ct"])
def test_every_provider(tmp_path, checkout, one_trial, monkeypatch, capsys, recipe):
    """The compiler aside: torch.compile gives back what it was given."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(training, "inductor_refusal", lambda device: None)
    one_trial(*providers.PROVIDERS, recipe=recipe)
    status, result = recorded(tmp_path, "--openai", str(checkout))
    assert status == 0, result["failures"]
    assert not result["missing"]
    assert [row["provider"] for row in result["rows"]] == list(providers.PROVIDERS)
    for row in result["rows"]:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["computes_in"] == "float32"
        assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"], rel=0.01)
        assert row["gflop"] > 0 and row["tflop_per_s"] == pytest.approx(row["gflop"] / row["p50_ms"], rel=0.2, abs=1e-3)
        assert row["first_step_s"] > 0 and row["recipe"] == recipe and row["kernels"] is None
        assert row["times_cmfast"]["p50"] > 0
    ours = result["rows"][-1]
    assert ours["times_cmfast"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    parts = {"student", "target", "backward", "optimizer and averages", phases.REST}
    assert set(ours["phases_ms"]) == parts | ({"teacher"} if recipe == "cd" else set())
    assert str(tmp_path) not in json.dumps(result) and str(checkout) not in json.dumps(result)
    out = capsys.readouterr().out
    assert "stand-ins for blobfile" in out and "not measured" in out
    assert training.main(["--report", str(next((tmp_path / "out").glob("*.json")))]) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.skipif(not find_spec("torchvision"), reason="torchvision is not installed")
def test_lpips(tmp_path, checkout, one_trial, monkeypatch):
    """The original's, with a trunk of random weights: nothing is downloaded. At 32x32 instead of 224x224."""
    monkeypatch.setattr(perceptual, "_resized", lambda image: 32)
    one_trial("openai", "cmfast", loss_norm="lpips")
    status, result = recorded(tmp_path, "--openai", str(checkout), "--batch", "1")
    assert status == 0, result["failures"]
    assert {row["provider"] for row in result["rows"]} == {"openai", "cmfast"} and result["rows"][0]["batch"] == 1
    assert "lpips" in result["rows"][-1]["phases_ms"]


def test_without_torchvision(tmp_path, one_trial, monkeypatch):
    """What it is missing for is said, and is no failure."""
    training_start._lpips.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    trial = one_trial("reference", "cmfast", loss_norm="lpips")
    status, result = recorded(tmp_path)
    assert status == 0 and not result["rows"] and not result["failures"]
    why = "torchvision, which has the trunk of LPIPS, is not installed for this Python"
    assert result["missing"] == {trial.setting: why}
    monkeypatch.setattr(providers, "trials", lambda *arguments: [trial])
    options = SimpleNamespace(openai=None, quick=False)
    found = profile.measure(profile.Trial("micro", 0, ("cmfast",)), options, CPU)
    assert not found["rows"] and not found["failures"] and "torchvision" in found["missing"]["cmfast"]


@pytest.mark.skipif(not find_spec("torchvision"), reason="torchvision is not installed")
def test_the_yardstick_of_lpips_is_not_in_half_precision(monkeypatch):
    """On a GPU its trunk becomes bfloat16 wherever it would be float32, unless that is asked for."""
    start = training.Start(Trial("micro", 2, ("cmfast",), loss_norm="lpips"), CPU)
    there, apply = [], torch.nn.Module._apply
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: bool(there)))
    monkeypatch.setattr(torch.nn.Module, "_apply", lambda *arguments: there.append(1) or apply(*arguments))
    dtypes = {}
    for dtype in (None, *TRAINED, torch.float64):
        there.clear()
        dtypes[dtype] = next(start.perceptual(dtype).trunk.buffers()).dtype
    assert dtypes.pop(None) == torch.bfloat16 and all(made == dtype for dtype, made in dtypes.items())
    exact, rounded = (next(start.perceptual(dtype).trunk.buffers()) for dtype in (torch.float64, torch.bfloat16))
    assert not torch.equal(exact, rounded.double())


def test_kernels_are_counted_when_all_is_timed(tmp_path, one_trial, monkeypatch):
    """Also the parts of a step: a profiler slows down launches for as long as it is attached."""
    done, interleave, parts = [], timing.interleave, training.phases
    monkeypatch.setattr(timing, "interleave", lambda *a, **more: (interleave(*a, **more), done.append("timed"))[0])
    monkeypatch.setattr(training, "phases", lambda *args: (parts(*args), done.append("parts"))[0])
    monkeypatch.setattr(timing, "count_kernels", lambda device, work: (work(), done.append("counted"), 7)[2])
    one_trial("reference", "cmfast")
    status, result = recorded(tmp_path)
    assert status == 0 and done == ["timed", "parts", "counted", "counted"]
    assert [row["kernels"] for row in result["rows"]] == [7, 7]


def test_one_that_fails_while_it_is_timed(tmp_path, one_trial, monkeypatch):
    """The others have their rows all the same."""
    class Fails(providers.Plain):
        def step(self, number, drawn=None):
            if drawn is None and number > training.STEPS + 3:
                raise torch.OutOfMemoryError("this many bytes")
            super().step(number, drawn)

    monkeypatch.setitem(providers.PROVIDERS, "reference", Fails)
    one_trial("reference", "cmfast", recipe="ct")
    status, result = recorded(tmp_path, "--rounds", "3")
    assert status == 1 and [row["provider"] for row in result["rows"]] == ["cmfast"]
    assert result["rows"][0]["phases_ms"] and result["rows"][0]["times_cmfast"]
    assert [(f["provider"], f["reason"]) for f in result["failures"]] == [
        ("reference", "OutOfMemoryError: this many bytes")
    ]


def test_yardsticks_are_gone_before_a_provider_is_made(tmp_path, one_trial, monkeypatch):
    """Each holds weights, moments and averages: beside those of a trial a GPU of 80 GB has no room for them."""
    made, alive, seen = [], weakref.WeakSet(), []

    class Yardstick(providers.Plain):
        def __init__(self, start, **options):
            made.append(options["dtype"])
            alive.add(self)
            super().__init__(start, **options)

    class Ours(providers.Ours):
        def __init__(self, start):
            gc.collect()
            seen.append((list(made), len(alive)))
            super().__init__(start)

    monkeypatch.setattr(training_gate, "Plain", Yardstick)
    monkeypatch.setitem(providers.PROVIDERS, "cmfast", Ours)
    one_trial("cmfast", recipe="ct")
    status, result = recorded(tmp_path)
    assert status == 0, result["failures"]
    assert seen == [([torch.float64, torch.float32], 0)] and len(made) == 2


def test_dtypes_of_a_trial(monkeypatch):
    trial = Trial("micro", 2, ("cmfast", "openai"), dtype="bfloat16")
    start = SimpleNamespace(trial=trial, device=torch.device("cuda"), openai=Path("checkout"))
    assert providers.dtypes_of(trial.providers, start) == {torch.bfloat16, torch.float16}
    assert providers.dtypes_of(("cmfast", "reference"), start) == {torch.bfloat16}
    start.device = CPU
    assert providers.dtypes_of(("openai",), start) == {torch.float32}
    # Of one that is not there, nothing is computed.
    start.openai = None
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    assert providers.dtypes_of(trial.providers, start) == {torch.bfloat16}


def test_half_precision(tmp_path, one_trial):
    one_trial("reference", "cmfast", dtype="bfloat16")
    status, result = recorded(tmp_path)
    assert status == 0, result["failures"]
    assert [row["computes_in"] for row in result["rows"]] == ["bfloat16", "bfloat16"]


def test_what_is_missing_is_no_win(tmp_path, one_trial, capsys):
    one_trial("openai", "cmfast")
    status, result = recorded(tmp_path)
    assert status == 0 and [row["provider"] for row in result["rows"]] == ["cmfast"]
    assert "--openai" in result["missing"]["openai"]
    assert "met:" not in capsys.readouterr().out


class Altered(providers.Ours):
    """cmfast with a fault."""

    def __init__(self, fault, start):
        super().__init__(start)
        self.fault = fault
        if fault == "the student is its own target":
            with torch.no_grad():
                pairs = zip(self.training.target_model.parameters(), self.training.model.parameters())
                for target, student in pairs:
                    target.copy_(student)
        if fault == "an error":
            raise RuntimeError("this one does not run")
        if fault == "another draw":
            self.training.options = dataclasses.replace(self.training.options, seed=1)
        if fault == "one gradient":
            list(self.training.model.parameters())[19].register_hook(lambda gradient: gradient * 1.01)
        if fault == "no target":
            self.training.stage = self.training.stage._replace(target_rate=1.0)
            self.training.enter = lambda stage: None
            self.training._target_rate.set_(1.0)
        if fault == "an average":
            self.training.averages._rates[1] = 0.51

    def loss(self):
        return super().loss() * (1.001 if self.fault == "the loss" else 1.0)

    def state(self):
        state = super().state()
        if self.fault == "NaN":
            state["target"][-1] = state["target"][-1] * float("nan")
        return state


FAULTS = [
    "the student is its own target", "an error", "another draw", "one gradient", "no target", "an average",
    "the loss", "NaN",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_provider_is_not_timed(tmp_path, one_trial, monkeypatch, capsys, fault):
    monkeypatch.setitem(providers.PROVIDERS, "cmfast", lambda start: Altered(fault, start))
    one_trial("reference", "cmfast", recipe="ct")
    status, result = recorded(tmp_path)
    assert status == 1
    assert [row["provider"] for row in result["rows"]] == ["reference"]
    assert [failure["provider"] for failure in result["failures"]] == ["cmfast"]
    assert result["rows"][0]["times_cmfast"] is None
    reason = "this one does not run" if fault == "an error" else "relative error"
    assert reason in result["failures"][0]["reason"]
    assert "FAILED, not timed: micro, batch 2" in capsys.readouterr().out


def test_a_wrong_baseline_is_caught_too(tmp_path, one_trial, monkeypatch):
    norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *a, **k: norm(x, *a, **k) * (1 + 1e-2 * (x.dtype == torch.float32)))
    one_trial("reference", recipe="ct")
    status, result = recorded(tmp_path)
    assert status == 1 and "plain PyTorch" in result["failures"][0]["reason"]


def test_a_loss_that_is_lost_while_timed(tmp_path, one_trial, monkeypatch):
    monkeypatch.setattr(training, "LEARNING_RATE", 1e30)
    one_trial("reference", "cmfast", recipe="ct")
    status, result = recorded(tmp_path)
    assert status == 1 and not result["rows"]
    assert [(f["provider"], "not finite" in f["reason"]) for f in result["failures"]] == [
        ("reference", True), ("cmfast", True)
    ]  # fmt: skip


@pytest.mark.parametrize("name, missing", [("reference", True), ("cmfast", False)])
def test_out_of_memory(tmp_path, one_trial, monkeypatch, name, missing):
    """Of a rival a fact about it; of cmfast a failure."""

    def full(start):
        raise torch.OutOfMemoryError("this many bytes")

    monkeypatch.setitem(providers.PROVIDERS, name, full)
    one_trial(name, recipe="ct")
    status, result = recorded(tmp_path)
    assert status == int(not missing) and not result["rows"]
    assert ("does not fit into memory" in result["missing"].get(name, "")) == missing
    assert len(result["failures"]) == int(not missing)


def test_time_limit_is_recorded(tmp_path):
    status, result = recorded(tmp_path, "--seconds", "0", "--compile")
    assert status == 0 and result["truncated"] and not result["rows"]
    assert len(result["not_started"]) == len(providers.trials("cpu", None, True))
    assert all(line.startswith("not measured") for line in summary.bars(result))


def test_runs_as_a_module():
    command = [sys.executable, "-m", "cmfast.benchmarks.training", "--device", "cpu", "--list"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == [str(trial) for trial in providers.trials("cpu", None, False)]


def test_phases_add_up(tmp_path, one_trial):
    """Every part is timed where it happens, and nothing stays wrapped."""
    trial = one_trial("cmfast")
    ours = providers.Ours(training.Start(trial, CPU))
    step, seen = ours.training, []
    network, optimizer_step = step.student.network, step.optimizer.step
    backward = torch.Tensor.backward

    def one():
        seen.append(len(seen))
        ours.step(seen[-1])

    parts = phases.phases(step, one, 2)
    assert list(parts) == ["student", "teacher", "target", "backward", "optimizer and averages", "rest"]
    assert all(seconds > 0 for seconds in parts.values()) and len(seen) == 3
    assert step.student.network is network and torch.Tensor.backward is backward
    assert step.optimizer.step == optimizer_step
    assert step.student.network.refusal is None  # as it is without the clock
