"""What a run shows: its log, pictures, curves and TensorBoard."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cmfast
from cmfast.data import ImageData
from cmfast.engine import Sampler
from cmfast.objectives import EDM
from cmfast.training import Trainer, loop, pictures
from tests.training.toys import OBJECTIVES, OPTIONS, denoiser, exploding, trainer, weights


def test_the_log_is_json(tmp_path):
    """Which has no NaN and no infinity."""
    run = exploding(tmp_path, 0, replace(OPTIONS, steps=2, log_interval=1, on_nan="skip"))
    run.run(progress=False)
    lines = (tmp_path / loop.LOG).read_text().splitlines()
    assert json.loads(lines[0])["loss"] is None and not any("NaN" in line or "Infinity" in line for line in lines)
    assert run.losses()[0] == [1, 2] and [loss > 0 for loss in run.losses()[1]] == [False, True]


def test_pictures_are_drawn_as_the_objective_says(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "sample_grid", lambda model, path, seed, **options: seen.append(options))
    monkeypatch.setattr(pictures, "plot_losses", lambda *arguments: None)
    for name, steps in (("pd", 6), ("ect", 3)):
        trainer(name, tmp_path / name, replace(OPTIONS, steps=steps, sample_interval=3)).run(progress=False)
    shape = {"image_shape": (3, 8, 8)}
    levels = [{"sampler": "progdist", "steps": n, **shape} for n in (4, 2)]
    assert seen == [*levels, {"steps": 1, **shape}]


@pytest.mark.parametrize("channels, drawn", [(3, True), (8, False)])
def test_a_run_is_worth_more_than_its_pictures(tmp_path, channels, drawn):
    """The shape of images is that of the data; where there can be no picture, a warning."""

    class Plain(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    model = cmfast.Denoiser(Plain(channels, channels, 1), cmfast.Preconditioner.edm())
    data = ImageData(torch.zeros(4, channels, 8, 8))
    run = Trainer(model, EDM(), data, replace(OPTIONS, steps=1, batch_size=2, sample_interval=1), tmp_path)
    with nullcontext() if drawn else pytest.warns(UserWarning, match="a picture is missing at step 1: "):
        run.run(progress=False)
    assert (tmp_path / "samples" / "step-00000001.png").exists() == drawn and (tmp_path / loop.RESULT).exists()


def test_pictures_are_drawn_where_the_model_is_trained(tmp_path, monkeypatch):
    """By a copy of the average, which stays as it is, and which is gone after."""
    seen = []
    monkeypatch.setattr(pictures, "sample_grid", lambda model, *_, **__: seen.append((model.device.type, ref(model))))
    monkeypatch.setattr(pictures, "plot_losses", lambda *arguments: None)
    run = trainer("edm", tmp_path, replace(OPTIONS, steps=2))
    monkeypatch.setattr(run.step, "device", torch.device("meta"))
    before = weights(run.average())
    run._draw()
    ((device, model),) = seen
    assert device == "meta" and model() is None
    assert torch.equal(weights(run.average()), before)


@pytest.mark.parametrize("fits", [8, 3, 0])
def test_a_grid_is_drawn_as_memory_allows(tmp_path, monkeypatch, fits):
    """The same images, fewer at a time, and nothing of the model is left behind."""
    sample, sizes = Sampler._run_batch, []

    def scarce(self, index, *arguments):
        if len(index) > fits:
            raise torch.OutOfMemoryError("no more")
        sizes.append(self.batch_size)
        return sample(self, index, *arguments)

    model = denoiser(OBJECTIVES["edm"])
    pictures.sample_grid(model, tmp_path / "all.png", steps=2)
    monkeypatch.setattr(Sampler, "_run_batch", scarce)
    if not fits:
        with pytest.raises(torch.OutOfMemoryError):
            pictures.sample_grid(model, tmp_path / "few.png", steps=2)
        return
    pictures.sample_grid(model, tmp_path / "few.png", steps=2)
    assert sizes[-1] == (8 if fits == 8 else 1)
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=int) for name in ("all", "few"))
    assert np.abs(one - other).max() <= 1  # convolutions of another batch size round otherwise


def test_a_grid_leaves_nothing_of_a_model(tmp_path):
    model = denoiser(OBJECTIVES["edm"])
    pictures.sample_grid(model, tmp_path / "x.png", steps=2)
    left = ref(model)
    del model
    assert left() is None


def test_a_curve_leaves_matplotlib_as_it_was(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    before, figures = matplotlib.get_backend(), pyplot.get_fignums()
    try:
        matplotlib.use("svg")
        open_figure = pyplot.figure()
        pictures.plot_losses({"x": ([1, 2], [1.0, 0.5])}, tmp_path / "loss.png")
        assert matplotlib.get_backend() == "svg" and pyplot.get_fignums() == [*figures, open_figure.number]
        assert (tmp_path / "loss.png").stat().st_size > 1000
    finally:
        pyplot.close("all")
        matplotlib.use(before)


def test_tensorboard_shows_no_step_twice(tmp_path, monkeypatch):
    """And the last ones are there."""
    made, closed = [], []
    board = SimpleNamespace(SummaryWriter=lambda path, **options: made.append(options) or SimpleNamespace(
        add_scalar=lambda *arguments: None, close=lambda: closed.append(made[-1])))  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for steps, resume in ((2, False), (3, True)):
        run = trainer("edm", tmp_path, replace(OPTIONS, steps=steps), resume=resume, tensorboard=True)
        assert len(made) == len(closed)  # one that never runs leaves nothing open
        run.run(progress=False)
    assert made == closed == [{"purge_step": 1}, {"purge_step": 3}]


def test_the_log_and_the_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    run = trainer("ct", tmp_path, replace(OPTIONS, steps=10, sample_interval=10), settings={"recipe": "ct"})
    run.run(progress=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert all(line["images_per_s"] > 0 and line["memory_gb"] > 0 and line["num_scales"] > 2 for line in lines)
    assert (tmp_path / "samples" / "step-00000010.png").stat().st_size > 100
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "recipe: ct\n" in (tmp_path / "config.yaml").read_text()


def test_a_log_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "lo')
    assert pictures.read_log(tmp_path / "log.jsonl") == [{"step": 5, "loss": 1.0}]
