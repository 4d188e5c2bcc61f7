"""Bars of the training suite, and how it is called."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cmfast import perceptual
from cmfast.benchmarks import (
    gpu,
    memory,
    original_training,
    training,
)
from cmfast.benchmarks import training_providers as providers
from cmfast.benchmarks import training_summary as summary

CPU = torch.device("cpu")


@pytest.mark.parametrize("device, bar", [("cpu", summary.CPU_BAR), ("cuda", summary.GPU_BAR)])
def test_trials(device, bar):
    """What has a bar first, and without compiling unless that is asked for."""
    found = providers.trials(device, None, True)
    assert len(set(found)) == len(found)
    first = dataclasses.asdict(found[0])
    assert {name: first[name] for name in bar} == bar and {"openai", "cmfast"} <= set(found[0].providers)
    assert any("inductor" in trial.providers for trial in found)
    assert not any("inductor" in trial.providers for trial in providers.trials(device, None, False))
    assert {(trial.recipe, trial.loss_norm) for trial in found} == {("cd", "l2"), ("ct", "l2"), ("cd", "lpips")}
    assert {trial.network for trial in providers.trials(device, "unet32", False)} == {"unet32"}
    options = training.SUITE.arguments(["--providers", "cmfast,reference", "--batch", "2", "--device", device])
    chosen = training.chosen_trials(options, torch.device(device))
    assert {trial.batch for trial in chosen} == {2}
    assert {p for t in chosen for p in t.providers} == {"cmfast", "reference"}


def row(provider, ratio=1.0, *, bar, trial=0, allocated=1e9, reserved=1e9, **changes):
    times = {f"p{p}": ratio for p in (20, 50, 80)}
    peaks = {"peak_allocated_bytes": allocated, "peak_bytes": reserved}
    return {**bar, "trial": trial, "provider": provider, "times_cmfast": times, **peaks, **changes}


def outcomes(device, rows):
    lines = summary.bars({"environment": {"device_type": device}, "rows": rows})
    return [line.split(":")[0] for line in lines]


def test_bars_of_a_cpu():
    bar = summary.CPU_BAR
    assert outcomes("cpu", [row("cmfast", bar=bar), row("openai", 1.31, bar=bar)]) == ["met"]
    assert outcomes("cpu", [row("cmfast", bar=bar), row("openai", 1.29, bar=bar)]) == ["MISSED"]
    # One without the other, another trial, another setting.
    assert outcomes("cpu", [row("openai", 2.0, bar=bar)]) == ["not measured"]
    assert outcomes("cpu", [row("cmfast", bar=bar), row("openai", 2.0, bar=bar, trial=1)]) == ["not measured"]
    other = [row("cmfast", bar=bar, recipe="ct"), row("openai", 2.0, bar=bar, recipe="ct")]
    assert outcomes("cpu", other) == ["not measured"]


def test_bars_of_a_gpu():
    bar = summary.GPU_BAR
    rows = [
        row("cmfast", bar=bar), row("openai", 1.7, bar=bar),
        row("cmfast", bar=bar, trial=1), row("inductor", 0.98, bar=bar, trial=1),
    ]  # fmt: skip
    assert outcomes("cuda", rows) == ["met", "met", "met"]
    rows[0]["peak_bytes"] = 1.1e9
    rows[1]["times_cmfast"]["p50"], rows[3]["times_cmfast"]["p50"] = 1.5, 0.96
    assert outcomes("cuda", rows) == ["MISSED", "MISSED", "MISSED"]
    rows[0] |= {"peak_bytes": 0.9e9, "peak_allocated_bytes": 1.1e9}
    assert outcomes("cuda", rows)[2] == "MISSED"
    assert outcomes("cuda", []) == ["not measured"] * 3


@pytest.mark.skipif(not find_spec("piq"), reason="piq is not installed")
def test_stand_in_of_piq():
    """Where piq is missing, the original's LPIPS is that of the stand-in, with all gradients."""
    lpips = perceptual.LPIPS(pretrained=False)
    theirs = original_training.original_lpips(lpips)
    assert type(theirs).__module__.startswith("piq")
    stand_in = original_training.ContentLoss(theirs.model, theirs.layers, theirs.weights)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = []
    for measure in (theirs, stand_in):
        image = x.clone().requires_grad_()
        distance = measure(image, y)
        distance.sum().backward()
        made.append((distance, image.grad))
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_memory_of_a_cpu():
    if memory.settled(CPU) is None:
        pytest.skip("this system does not say")
    before = memory.settled(CPU)
    block = torch.ones(2**24)
    assert 60e6 < memory.peak(CPU).reserved - before.reserved < 200e6
    del block
    assert memory.settled(CPU).reserved - before.reserved < 30e6
    assert memory.peak(CPU).reserved - before.reserved < 30e6


def test_step_of_make_gpu(capsys):
    (step,) = [step for step in gpu.steps(Path("out")) if step.name == "training"]
    assert step.command("python3", 400.0)[-2:] == ["--seconds", "370"]
    assert gpu.main(["--dry", "--only", "training", "--openai", "/there"]) == 0
    assert "--openai /there" in capsys.readouterr().out
