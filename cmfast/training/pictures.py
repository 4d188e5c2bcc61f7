"""Pictures of a run: samples, and the curve of its loss."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cmfast import images
from cmfast.denoiser import Denoiser
from cmfast.engine import Sampler
from cmfast.whole import written_whole

#: Images of a grid, and its columns.
COUNT, COLUMNS = 64, 8
#: How many are drawn at a time, where no more fit into memory.
BATCHES = COUNT, 8, 1


def sample_grid(model: Denoiser, path: Path, *, seed: int = 0, **options: Any) -> Path:
    """A grid of samples; options: of `cmfast.Sampler`, as `Objective.sampling` has them.

    Raises: torch.OutOfMemoryError: not one image at a time fits.
    """
    classes = None if model.num_classes is None else [i % model.num_classes for i in range(COUNT)]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        pixels = _drawn(model, seed=seed, classes=classes, options=options)
    path.parent.mkdir(parents=True, exist_ok=True)
    return images.save(path, pixels, columns=COLUMNS)


def _drawn(model: Denoiser, *, options: Mapping[str, Any], **which: Any) -> torch.Tensor:
    *larger, least = BATCHES
    for size in larger:
        with suppress(torch.OutOfMemoryError):
            return Sampler(model, size, cuda_graph=False, **options).sample(COUNT, **which)
    return Sampler(model, least, cuda_graph=False, **options).sample(COUNT, **which)


def copy_on(model: Denoiser, device: torch.device) -> Denoiser:
    """A copy of a model on another device; the model itself where it is there."""
    return model if model.device == device else copy.deepcopy(model).to(device)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last may be cut short by a crash, and is then left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def log_line(values: Mapping[str, Any]) -> str:
    """A line of a log: JSON, which has no NaN and no infinity: null stands for them."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def plot_losses(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """(steps, losses) of each title with their running mean, one panel a curve. Raises: ImportError: no matplotlib."""
    try:
        # Not pyplot, whose windows and backend are those of the whole process: of a notebook, say.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the loss curve needs matplotlib: pip install "cmfast[demo]"') from error
    figure = Figure(figsize=(5 * len(curves), 3.5))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False)
    for panel, (title, (steps, losses)) in zip(panels[0], curves.items()):
        window = max(1, len(losses) // 50)
        values = torch.tensor(losses, device="cpu")
        panel.plot(steps, values, linewidth=0.5, alpha=0.4)
        if len(values):
            means = values.unfold(0, window, 1).mean(1)
            panel.plot(steps[window - 1 :], means)
        panel.set(title=title, xlabel="step", ylabel="loss")
        if (values > 0).any():
            panel.set_yscale("log")
    figure.tight_layout()
    with written_whole(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])
