"""Doubling with its convolution is timed where it is right."""

import json

import pytest
import torch

from cmfast.benchmarks import doubling
from cmfast.fast import doubling as fast
from cmfast.native import winograd


def recorded(folder, *options):
    status = doubling.main(["--device", "cpu", "--quick", "--batch", "2", "--out", str(folder), *options])
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(doubling, "QUICK_S", 0.01)
    monkeypatch.setattr(doubling, "QUICK_MAPS", ((32, 8),))
    for module in (fast, winograd):
        monkeypatch.setattr(module, "LEAST_PIXELS", 1)


def test_forward_and_training(tmp_path):
    status, result = recorded(tmp_path)
    names = [(row["name"], row["provider"]) for row in result["rows"]]
    modes = [f"2x32x8x8 float32, {mode}" for mode in (doubling.FORWARD, doubling.TRAINING)]
    assert status == 0 and names == [(mode, name) for mode in modes for name in ("reference", "cmfast")]
    forward, training = (row["times_cmfast"]["p50"] for row in result["rows"] if row["provider"] == "reference")
    assert forward > 0 < training


@pytest.mark.parametrize("by", [fast, winograd], ids=lambda module: module.__name__)
@pytest.mark.parametrize("mode", [doubling.FORWARD, doubling.TRAINING])
def test_a_wrong_filter_is_not_timed(tmp_path, monkeypatch, mode, by):
    if by is fast:
        monkeypatch.setattr(winograd, "refusal", lambda: "not now")
    elif winograd.refusal() is not None:
        pytest.skip(f"Winograd: {winograd.refusal()}")
    name = "fold" if by is fast else "pack"
    right = getattr(by, name)
    monkeypatch.setattr(by, name, lambda *arguments, **options: 1.01 * right(*arguments, **options))
    status, result = recorded(tmp_path, "--only", f"float32, {mode}")
    failures = {failure["trial"].split(", ")[1]: failure["reason"] for failure in result["failures"]}
    assert status == 1 and failures[mode].startswith("image: relative error 0.0")
    assert "cmfast" not in {row["provider"] for row in result["rows"] if row["name"].endswith(mode)}


def test_trials_of_a_gpu():
    options = doubling.SUITE.arguments(["--device", "cuda", "--list"])
    found = doubling.SUITE.chosen(options)
    assert len(found) == 16 and {trial.dtype for trial in found} == {torch.bfloat16}
    assert found[0].providers == ("reference", "inductor", "cmfast") and found[0].batch == 64
