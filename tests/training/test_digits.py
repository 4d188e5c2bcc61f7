"""The recipe of the bundled model: its stages, a few steps of each, whole and stopped between two."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from cmfast import checkpoint, digits
from cmfast.data import ImageData
from cmfast.ops import Draw
from cmfast.training import Stopped, checkpoints

STEPS = {"edm": 2, "shape": 1, "cd": 2, "guided": 1}


@pytest.fixture
def recipe(monkeypatch):
    """The recipe with its own network and objectives, on few small batches."""
    generator = torch.Generator().manual_seed(0)
    data = ImageData(torch.rand(16, 1, 32, 32, generator=generator) * 2 - 1, torch.arange(16) % 10)
    monkeypatch.setattr(digits.data, "mnist", lambda: (data, data))
    for stage in ("MNIST_EDM", "MNIST_SHAPE", "MNIST_CD", "MNIST_GUIDED"):
        monkeypatch.setattr(digits, stage, replace(getattr(digits, stage), batch_size=4, warmup=0))
    return lambda out: digits.train_mnist(out, progress=False, **{f"{stage}_steps": n for stage, n in STEPS.items()})


def terminated_in(stage, patch):
    """SIGTERM comes when the last step of a stage has been saved."""
    finish = digits.Trainer._finish

    def finishing(self):
        if self.out.name == stage:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    patch.setattr(digits.Trainer, "_finish", finishing)


def bits(path):
    return [p.detach() for p in checkpoint.load(path).parameters()]


def test_stages_stopped_between_two(recipe, tmp_path):
    """The same call goes on, and ends in the bits of one that was left alone."""
    pytest.importorskip("matplotlib", reason="it draws the curves of the stages")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        terminated_in("shape", patch)
        with pytest.raises(Stopped, match="stopped before the stage 'cd'; those before it are in"):
            recipe(tmp_path / "part")
    assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["edm", "shape"]
    paths = recipe(tmp_path / "part")
    assert [path.name for path in paths] == ["teacher.safetensors", "model.safetensors", "loss.png"]
    assert {stage: checkpoints.saved(tmp_path / "part" / stage)[-1][0] for stage in STEPS} == STEPS
    Image.open(paths[2]).verify()
    with pytest.MonkeyPatch.context() as patch:
        terminated_in("guided", patch)  # all is done by then
        whole = recipe(tmp_path / "whole")
    for part, other in zip(paths[:2], whole):
        assert all(map(torch.equal, bits(part), bits(other)))
    teacher, student = map(checkpoint.load, paths[:2])
    assert (teacher.preconditioner.name, student.preconditioner.name) == ("edm", "consistency")
    assert sum(p.numel() for p in student.parameters()) <= 2_000_000
    assert not all(map(torch.equal, bits(paths[0]), bits(paths[1])))


def test_guidance_pushes_away_from_another_class():
    """Toy D that is the label: right + weight (right - wrong), with wrong never the same class."""

    class ByLabel(nn.Module):
        num_classes = 7

        def forward(self, x, sigma, labels=None):
            return labels.to(x.dtype)[:, None, None, None].expand_as(x)

    labels = torch.arange(7).repeat(20)
    x = torch.zeros(140, 1, 2, 2)
    out = digits.guided(ByLabel(), 0.5, Draw(0, torch.arange(140)))(x, torch.ones(140), labels)[:, 0, 0, 0]
    wrong = labels - (out - labels) / 0.5
    assert (wrong != labels).all() and set(wrong.tolist()) == set(range(7))
