"""How good are generated digits? A small classifier judges, and its features measure distances of distributions.

Everything is seeded, runs on a CPU in minutes, and can be repeated with `python -m cmfast quality`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast import data
from cmfast.denoiser import Denoiser
from cmfast.engine import Sampler
from cmfast.ops import _check

#: Of precision and recall: the nearest image but so many says how far an image reaches.
NEIGHBOURS = 3


class DigitClassifier(nn.Module):
    """A small convolutional network for [B, 1, 32, 32] digits; `features` [B, 64] is what distances are taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Of images [B, 1, 32, 32] in [-1, 1]: [B, 64]."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 32, 32] in [-1, 1]."""
        return self.head(self.trunk(images))


def train_classifier(training: data.ImageData, *, epochs: int = 12, seed: int = 0) -> DigitClassifier:
    """A classifier of the training digits, shifted by up to two pixels, after so many epochs; evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier().train()
        batch_size = 64
        steps = max(min(epochs, 1), epochs * len(training) // batch_size)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        batches = training.batches(batch_size, seed=seed)
        for _ in range(steps):
            images, labels, _ = next(batches)
            assert labels is not None
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images.roll(shift, dims=(2, 3))), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def _check_features(least: int, **sets: Tensor) -> None:
    """Two sets of features [N, D] of one D, N being `least` or more."""
    (first, x), _ = sets.items()
    for name, features in sets.items():
        if features.ndim != 2 or len(features) < least:
            raise ValueError(f"{name} must be features [N, D] of {least} images or more, got {list(features.shape)}")
        if features.shape[1] != x.shape[1]:
            raise ValueError(f"{name} has {features.shape[1]} features of each image, {first} has {x.shape[1]}")


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets x and y of features [N, D]: Heusel et al. 2017.

    Raises: ValueError: one of them has another shape, or fewer than two images.
    """
    _check_features(2, x=x, y=y)
    a, b = x.double().numpy(), y.double().numpy()
    cov_x, cov_y = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    # The trace of the square root of a product is the sum of the roots of its eigenvalues, real and not negative
    # but for rounding.
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_x @ cov_y).real, 0, None)).sum()
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(mean + np.trace(cov_x) + np.trace(cov_y) - 2 * roots)


def coverage(real: Tensor, made: Tensor, *, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: the share of made features [N, D] within the k-th neighbour's
    distance of some real one, and of real ones within that of some made one.

    Raises: ValueError: one of them has another shape, or not more than k images; k below 1.
    """
    k = _check.whole("k", k, least=1)
    _check_features(k + 1, real=real, made=made)

    def inside(points: Tensor, balls: Tensor) -> float:
        radius = torch.cdist(balls, balls).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        return (torch.cdist(points, balls) <= radius).any(1).double().mean().item()

    return inside(made, real), inside(real, made)


def nearest_distance(images: Tensor, training: Tensor) -> float:
    """The median pixel distance (root mean square, data range 2) of images to their nearest training image.

    Raises: ValueError: there are none, or those of training have another shape.
    """
    if not len(images) or not len(training) or images.shape[1:] != training.shape[1:]:
        got = f"{list(images.shape)} and {list(training.shape)}"
        raise ValueError(f"images and training must be images of one shape, one or more of each, got {got}")
    distances = torch.cdist(images.flatten(1), training.flatten(1)).min(1).values
    return float(distances.median()) / math.sqrt(images[0].numel())


@dataclass(frozen=True)
class Quality:
    """Measurements of one set of images.

    accuracy   share that the classifier sees the intended digit in
    frechet    Fréchet distance to the training digits in the classifier's features
    precision, recall   in those features, k = 3
    nearest    median distance to the nearest training digit
    """

    accuracy: float
    frechet: float
    precision: float
    recall: float
    nearest: float


def measure(
    classifier: DigitClassifier, images: Tensor, labels: Tensor, training: data.ImageData, *, seed: int = 0
) -> Quality:
    """Quality of images [N, 1, 32, 32] in [-1, 1] with their intended labels [N]: by a classifier, beside training
    digits.

    Raises: ValueError: not as many labels, or so few images or digits that some have no third neighbour.
    """
    if labels.shape != images.shape[:1]:
        n, got = len(images), list(labels.shape)
        raise ValueError(f"labels must be [N] with N = {n}, one for each of the images, got {got}")
    features = torch.cat([classifier.features(part) for part in images.split(500)])
    real = torch.cat([classifier.features(part) for part in training.images.split(500)])
    accuracy = (classifier.head(features).argmax(1) == labels).double().mean().item()
    # As many real ones as made, and as many made as real, else the balls of the larger set are smaller.
    count = min(len(real), len(features))
    chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:count]
    precision, recall = coverage(real[chosen], features[:count])
    nearest = nearest_distance(images, training.images)
    return Quality(accuracy, frechet_distance(features, real), precision, recall, nearest)


def made_by(sampler: Sampler, n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n samples of a sampler as float images [n, C, H, W] in [-1, 1], from their 8-bit pixels, and their labels [n].

    Raises: ValueError: the model has no classes.
    """
    labels = sampler.labels(n, seed=seed)
    if labels is None:
        raise ValueError("quality is measured of class-conditional models of digits; this one is unconditional")
    pixels = sampler.sample(n, seed=seed, progress=False)
    return pixels.movedim(-1, 1).float() / 127.5 - 1, labels


def report(model: Denoiser, teacher: Denoiser | None = None, *, num: int = 1000, seed: int = 0) -> str:
    """A Markdown table of num images each: real held-out digits, one and two steps of the model, 18 Heun steps of the
    teacher.

    Raises: ValueError: a model of other images than digits of 10 classes, or so few of them that some have no third
        neighbour, before any is drawn.
    """
    for name, each in (("model", model), ("teacher", teacher)):
        if each is not None and (each.image_shape, each.num_classes) != ((1, 32, 32), 10):
            made = f"{each.image_shape} of {each.num_classes or 'no'} classes"
            raise ValueError(f"{name}: quality is measured of digits (1, 32, 32) of 10 classes, and this makes {made}")
    if num <= NEIGHBOURS:
        raise ValueError(f"num must be {NEIGHBOURS + 1} or more, got {num}: precision and recall are of neighbours")
    training, held_out = data.mnist()
    assert held_out.labels is not None
    classifier = train_classifier(training)
    rows = {"held-out digits": measure(classifier, held_out.images, held_out.labels, training)}
    samplers = {f"{steps} step{'s'[: steps - 1]}": Sampler(model, 100, steps=steps) for steps in (1, 2)}
    if teacher is not None:
        samplers["teacher, 18 Heun steps (35 calls)"] = Sampler(teacher, 100, sampler="heun", steps=18)
    for name, sampler in samplers.items():
        rows[name] = measure(classifier, *made_by(sampler, num, seed=seed), training)
    lines = [
        "| images | class accuracy | Fréchet distance | precision | recall | distance to nearest training digit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, q in rows.items():
        lines.append(
            f"| {name} | {q.accuracy:.1%} | {q.frechet:.2f} | {q.precision:.2f} | {q.recall:.2f} | {q.nearest:.3f} |"
        )
    return "\n".join(lines)
