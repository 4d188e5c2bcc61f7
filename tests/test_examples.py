"""The examples do what they say: pictures and files that are right, errors that fall, tables that stand in the docs."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cmfast
from cmfast.checkpoint import meta_network
from cmfast.unet_config import PUBLISHED
from tests.training import toys

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def example(monkeypatch):
    """The module of an example, by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module


def test_sample(example, tmp_path):
    example("sample").main(["--out", str(tmp_path), "--num", "9", "--seed", "5"])
    for steps in (1, 2):
        picture = np.array(Image.open(tmp_path / f"digits_{steps}step.png"))
        assert picture.shape == (100, 100)  # three times 32, and two gaps of 2
        sampler = cmfast.Sampler(cmfast.load(), 3, steps=steps)
        pixels = sampler.sample(9, seed=5, classes=range(9)).numpy()[..., 0]
        for i, wanted in enumerate(pixels):
            top, left = 34 * (i // 3), 34 * (i % 3)
            tile = picture[top : top + 32, left : left + 32]
            # Digits: dark around, bright within; the same in batches of another size.
            assert np.abs(tile.astype(int) - wanted).max() <= 1
            assert tile[:2].mean() < 32 and tile.max() > 200


def test_distil_toy(example, capsys):
    found = example("distil_toy").main(["--steps", "120"])
    before, after, denoiser = (found[name] for name in ("before", "after", "the denoiser itself"))
    # At sigma from 0.3 to 5; higher levels take more steps, lower ones leave nothing to learn.
    assert all(b < 0.6 * a for a, b in zip(before[1:4], after[1:4]))
    assert all(b < 0.6 * a for a, b in zip(denoiser[1:4], after[1:4]))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_own_network(example, tmp_path):
    before, after = example("own_network").main(["--out", str(tmp_path)])
    assert after < 0.2 * before and (tmp_path / "model.safetensors").exists()


def test_own_loop(example):
    start, untrained = example("own_loop").main(["--steps", "0"])
    assert start == pytest.approx(untrained)
    before, after = example("own_loop").main(["--steps", "40"])
    assert before == start and after < 0.7 * before


def test_shards(example, tmp_path, monkeypatch):
    """Two processes make what one makes, and what is there stays."""
    main = example("shards").main
    arguments = ["--out", str(tmp_path), "--files", "3", "--images", "5", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        main(arguments)
    names = ["000000.npz", "000001.npz", "000002.npz"]
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(written) == names[::2]
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in written.items())
    sampler = cmfast.Sampler(cmfast.load(), 4)
    for seed, name in enumerate(names):
        with np.load(tmp_path / name) as arrays:
            assert arrays["arr_0"].shape == (5, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
            assert (arrays["arr_0"] == sampler.sample(5, seed=seed).numpy()).all()
            assert (arrays["arr_1"] == sampler.labels(5, seed=seed).numpy()).all()


def tables(text):
    """Runs of lines that begin with a bar."""
    return re.findall(r"(?:^\|.*\n)+", text, re.M)


def test_scaling_prints_the_tables_of_its_page(example, capsys):
    example("scaling").main([])
    printed = capsys.readouterr().out
    assert "".join(tables(printed)) == re.sub(r"\n\n", "\n", printed)
    assert tables(printed) == tables((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"))
    assert len(tables(printed)) == 7


def test_scaling_takes_other_inputs(example, capsys):
    main = example("scaling").main
    main(["--set", "sample_ms=15.2", "--set", "global_batch=1024"])
    assert "| ImageNet-64 | 1,000,000,000 | 16.5 | 33 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--set", "sample=1"])
    assert "there is no input 'sample'" in capsys.readouterr().err


def test_what_scaling_counts(example, tmp_path):
    """Parameters, bytes of a checkpoint, and what the formulas come to where that is known."""
    scaling = example("scaling")
    given = scaling.Inputs()
    network = meta_network({**PUBLISHED["ImageNet-64"][0], **PUBLISHED["ImageNet-64"][1]})
    assert given.parameters == pytest.approx(sum(p.numel() for p in network.parameters()), rel=5e-4)

    values = {name: value for name, value, _ in scaling.OTHERS["ImageNet-64 on two CPU cores"]}
    results = json.loads((ROOT / "benchmarks/results/cpu-amd-epyc/sampling-CPU-AMD-EPYC.json").read_text())
    (row,) = (r for r in results["rows"] if (r["name"], r["provider"]) == ("batch 1, multistep, 1 step", "cmfast"))
    assert values["sample_ms"] == pytest.approx(row["p50_ms"], rel=0.1) and values["sample_batch"] == row["batch"]

    run = toys.trainer("cd", tmp_path, replace(toys.OPTIONS, averages=("0.9", "0.99", "0.999")))
    parameters = sum(p.numel() for p in run.step.model.parameters())
    run.step(next(run.data.batches(6, seed=0)), 0)
    written = sum(path.stat().st_size for path in run.save().iterdir())
    assert written == pytest.approx(replace(given, parameters=parameters).checkpoint_bytes, rel=0.05)

    assert given.ddp_ms(1, 50) == given.fsdp_ms(1, 50, 64) == 0
    assert given.ddp_ms(2, 50) == pytest.approx(4 * given.parameters / (given.within_gb_s * 1e6))
    assert given.ddp_ms(1000, 50) < 8 * given.parameters / (50 * 1e6) < 1.01 * given.ddp_ms(1000, 50)
    for gpus in scaling.SIZES:
        best = given.best_interval_s(gpus)
        assert all(given.added(gpus, best) < given.added(gpus, other * best) for other in (0.9, 1.1))
        in_turn, overlapped = (given.step_ms(2, gpus, 50, overlap=overlap) for overlap in (False, True))
        assert in_turn == pytest.approx(given.compute_ms(2) + given.ddp_ms(gpus, 50))
        assert given.compute_ms(2) <= overlapped < in_turn
