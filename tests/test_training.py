"""The training loop: it learns, resumes exactly, and loses nothing in a crash."""

import pytest
import torch

from cmfast import Denoiser, Preconditioner
from cmfast.data import ImageData
from cmfast.recipes import as_consistency_model, distillation_loss, edm_loss, guided, mnist_model
from cmfast.training import Trainer, TrainOptions
from tests.toy import ToyNetwork

GENERATOR = torch.Generator().manual_seed(0)
DATA = ImageData(torch.rand(40, 3, 8, 8, generator=GENERATOR) * 0.2 + 0.5, torch.arange(40) % 7)
OPTIONS = TrainOptions(steps=30, batch_size=8, learning_rate=3e-3, warmup=5, ema_rate=0.9, save_every=10)


def toy():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), Preconditioner.edm())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_averages(tmp_path):
    trainer = Trainer(toy(), edm_loss(), DATA, OPTIONS, tmp_path / "edm.pt")
    average = trainer.run(progress=False)
    assert sum(trainer.losses[-5:]) < 0.7 * sum(trainer.losses[:5])
    assert not torch.equal(weights(average), weights(trainer.model)) and not average.training


def test_resumed_is_uninterrupted(tmp_path):
    whole = Trainer(toy(), edm_loss(), DATA, OPTIONS, tmp_path / "whole.pt")
    whole.run(progress=False)

    class Interrupted(Exception):
        pass

    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 17:
            raise Interrupted
        return edm_loss()(*arguments)

    with pytest.raises(Interrupted):
        Trainer(toy(), failing, DATA, OPTIONS, tmp_path / "part.pt").run(progress=False)
    torch.manual_seed(12345)
    resumed = Trainer(toy(), edm_loss(), DATA, OPTIONS, tmp_path / "part.pt")
    assert resumed.step == 10
    resumed.run(progress=False)
    assert resumed.losses == whole.losses
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert torch.equal(weights(resumed.average), weights(whole.average))


def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(toy(), edm_loss(), DATA, OPTIONS, tmp_path / "edm.pt")
    trainer.run(progress=False)
    before = (tmp_path / "edm.pt").read_bytes()

    def crash(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert (tmp_path / "edm.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_other_options_are_refused(tmp_path):
    Trainer(toy(), edm_loss(), DATA, OPTIONS, tmp_path / "edm.pt").run(progress=False)
    with pytest.raises(ValueError, match="was trained with"):
        Trainer(toy(), edm_loss(), DATA, TrainOptions(7, 8, 1e-3), tmp_path / "edm.pt")


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"save_every": 0}, {"ema_rate": 1.0}], ids=str)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainOptions(**{"steps": 1, "batch_size": 1, "learning_rate": 1e-3, **options})


def test_batches_see_every_image_equally_and_resume():
    batches = DATA.batches(6, seed=1)
    seen = [next(batches) for _ in range(20)]
    counts = torch.zeros(40)
    for images, *_ in seen:
        for image in images:
            counts[(DATA.images == image).flatten(1).all(1).nonzero()] += 1
    assert (counts == 3).all()
    labelled = ImageData(DATA.images, torch.arange(40)).batches(40, seed=1)
    assert not torch.equal(next(labelled)[1], next(labelled)[1])  # each epoch has an order of its own
    later = DATA.batches(6, seed=1, start_step=13)
    assert all(torch.equal(next(later)[0], images) for images, *_ in seen[13:])


def test_the_recipe_distils(tmp_path):
    """The recipe's own network and losses, a few steps of each stage."""
    torch.manual_seed(0)
    digits = ImageData(torch.rand(16, 1, 32, 32) * 2 - 1, torch.arange(16) % 10)
    options = TrainOptions(steps=2, batch_size=4, learning_rate=1e-3)
    teacher = Trainer(mnist_model(), edm_loss(), digits, options, tmp_path / "edm.pt").run(progress=False)
    student = as_consistency_model(teacher)
    assert student.preconditioner.name == "consistency" and teacher.preconditioner.name == "edm"
    assert sum(p.numel() for p in student.parameters()) <= 2_000_000
    before = weights(teacher)
    average = Trainer(student, distillation_loss(teacher, 2), digits, options, tmp_path / "cd.pt").run(progress=False)
    assert torch.equal(weights(teacher), before) and not torch.equal(weights(average), before)


def test_guidance_pushes_away_from_another_class():
    """Toy D that is the label: right + weight (right - wrong), with wrong never the same class."""

    class ByLabel(Denoiser):
        def forward(self, x, sigma, labels=None, *, clip=False):
            return labels.to(x.dtype)[:, None, None, None].expand_as(x)

    labels = torch.arange(7).repeat(20)
    x = torch.zeros(140, 1, 2, 2)
    out = guided(ByLabel(ToyNetwork(num_classes=7)), 0.5)(x, torch.ones(140), labels)[:, 0, 0, 0]
    wrong = labels - (out - labels) / 0.5
    assert (wrong != labels).all() and set(wrong.tolist()) == set(range(7))
