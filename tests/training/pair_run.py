"""What two processes do together, in the processes that torchrun starts: one case after the other in a folder."""

import faulthandler
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cmfast import Denoiser, Preconditioner, recipes
from cmfast.data import ImageData
from cmfast.objectives import EDM
from cmfast.ranks import Ranks, ranks
from cmfast.training import Trainer, TrainOptions, TrainStep, checkpoints, loop, pictures, state

DATA = ImageData(torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
OPTIONS = TrainOptions(steps=6, batch_size=2, learning_rate=1e-2, log_interval=1, save_interval=2, averages=("0.9",))


class Network(nn.Module):
    """A convolution whose output can be made NaN, with a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.factor = nn.Conv2d(3, 3, 1), 1.0
        self.register_buffer("shift", torch.randn(()))

    def forward(self, x, t):
        return self.factor * self.conv(x) + self.shift


def trainer(out, group, network=None, **options):
    resume = options.pop("resume", False)
    model = Denoiser(network or Network(), Preconditioner.edm(), image_shape=(3, 4, 4))
    return Trainer(model, EDM(), DATA, replace(OPTIONS, **options), out, group=group, resume=resume)


@contextmanager
def each_step(act):
    """Have act(step, number) called before each."""
    step = TrainStep.__call__

    def acting(self, batch, number):
        act(self, number)
        step(self, batch, number)

    TrainStep.__call__ = acting
    try:
        yield
    finally:
        TrainStep.__call__ = step


def outcome(run):
    """How it ends: the name of what is raised, and the message."""
    try:
        run.run(progress=False)
        return ["ended", str((run.out / "model.safetensors").exists())]
    except BaseException as error:
        return [type(error).__name__, str(error)]


def stopped_at_a_step_just_saved(out, group):
    def act(step, number):
        if number == 2 and group.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with each_step(act):
        return outcome(trainer(out, group))


def a_nan_that_comes_again(out, group):
    def act(step, number):
        step.model.network.factor = float("nan") if number == 4 else 1.0

    with each_step(act):
        return [outcome(trainer(out, group)), outcome(trainer(out, group, resume=True))]


def a_nan_of_one(out, group):
    """Whether BatchNorm's buffers are numbers after it, of those that are shared out, too; and the steps it counts."""
    def act(step, number):
        step.model.network[0].factor = float("nan") if number == 1 and group.rank else 1.0

    class Normed(nn.Sequential):
        def forward(self, x, t):
            return self[1](self[0](x, t))

    found = []
    for kind in ("ddp", "fsdp"):
        network = Normed(Network(), nn.BatchNorm2d(3))
        run = trainer(out / kind, group, network, parallel=kind, on_nan="skip", steps=4)
        with each_step(act):
            run.run(progress=False)
        norm = run.step.model.network[1]
        found.append([bool(norm.running_mean.isfinite().all()), int(norm.num_batches_tracked)])
    return found


def a_nan_of_one_in_float16(out, group):
    """The scale of the loss after it, of gradients that are averaged and of those that are shared out."""
    def act(step, number):
        step.model.network.factor = float("nan") if number == 1 and group.rank else 1.0

    found = []
    for kind in ("ddp", "fsdp"):
        run = trainer(out / kind, group, parallel=kind, on_nan="skip", steps=4, dtype="float16")
        with each_step(act):
            run.run(progress=False)
        found.append(run.step.scaler.get_scale())
    return found


def a_full_disk(out, group, kind="ddp"):
    def full(*_, **options):
        raise OSError(28, "No space left on device")

    save, state.save_weights = state.save_weights, full
    try:
        return outcome(trainer(out, group, parallel=kind))
    finally:
        state.save_weights = save


def a_full_disk_and_shared_weights(out, group):
    return a_full_disk(out, group, "fsdp")


def a_folder_on_each_machine(out, group):
    if group.rank == 0:
        trainer(out / "0", Ranks(), steps=2).run(progress=False)
    try:
        return trainer(out / str(group.rank), group, resume="auto").done
    except ValueError as error:
        return str(error)


def the_end(out, group):
    save = loop.save_weights

    def slow(*arguments, **options):
        time.sleep(0.5)
        save(*arguments, **options)

    loop.save_weights = slow
    try:
        return outcome(trainer(out, group, steps=1))
    finally:
        loop.save_weights = save


def images_on_one_machine(out, group):
    """A recipe whose images the second process does not find."""
    if group.rank == 0:
        np.savez(out.with_suffix(".npz"), np.zeros((4, 8, 8, 3), np.uint8))
    data = {"data": str(out.with_suffix(".npz")) if group.rank == 0 else "nowhere.npz"}
    options = {"steps": 1, "batch_size": 2}
    settings = {"recipe": "edm", "paths": data, "network": "tiny", "options": options}
    try:
        return [recipes.trainer(settings, out, group=group).done]
    except Exception as error:
        return [type(error).__name__, str(error)]


def a_slow_picture(out, group):
    """Whether it is there when a process goes on."""
    draw, found = pictures.sample_grid, []

    def slow(model, path, **options):
        time.sleep(0.5)
        return draw(model, path, **options)

    def act(step, number):
        if number:
            found.append((out / "samples" / f"step-{number:08d}.png").exists())

    pictures.sample_grid = slow
    try:
        with each_step(act):
            return [*outcome(trainer(out, group, steps=2, sample_interval=1)), *found]
    finally:
        pictures.sample_grid = draw


class Odd(Network):
    """A part of it is never used, or one drops by torch's generator; each process would make another."""

    def __init__(self, kind, rank):
        super().__init__(rank)
        self.kind, self.masks = kind, []
        if kind == "unused":
            self.never = nn.Linear(2, 2)

    def forward(self, x, t):
        if self.kind == "drops":
            self.masks.append(nn.functional.dropout(torch.ones(8), 0.5).tolist())
        return super().forward(x, t)


def a_weight_without_gradient(out, group):
    return outcome(trainer(out, group, Odd("unused", group.rank)))


def masks(out, group):
    network = Odd("drops", group.rank)
    outcome(trainer(out, group, network, steps=1))
    return network.masks[0]


def where_they_start(out, group):
    """Weights and buffers, of those that are shared out, too."""
    found = []
    for kind in ("ddp", "fsdp"):
        run = trainer(out, group, Odd("", group.rank), parallel=kind)
        found.append([state.whole(x).flatten().tolist() for x in run.step.model.state_dict().values()])
    return found


class Block(nn.Module):
    """A convolution, and others in a list of its own."""

    def __init__(self, inner=0):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(4, 4, 3, padding=1), nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(inner))

    def forward(self, x):
        x = x + torch.relu(self.conv(x))
        for inner in self.inner:
            x = inner(x)
        return x


class Parts(nn.Module):
    """Has no `forward`."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Block(), Block()


class Listed(nn.Module):
    """Lists of blocks, of several kinds."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.start, self.end = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        block = Block(1)
        blocks = {
            "lists in blocks": [Block(2), Block(1)],
            "lists in lists": [nn.ModuleList([Block(), Block(1)]), nn.ModuleList([Block()])],
            "one block twice": [block, block],
            "one weight twice": [Block(1), Block(), Block()],
            "blocks in parts": [Parts(), nn.ModuleDict({"one": Block(), "two": Block()}), nn.Identity()],
        }
        self.blocks = nn.ModuleList(blocks[kind])
        if kind == "one weight twice":
            self.blocks[1].conv.weight = self.blocks[0].conv.weight

    def forward(self, x, t):
        x = self.start(x)
        for block in self.blocks:
            if isinstance(block, (Parts, nn.ModuleDict)):
                block = block.children()
            for each in block if not isinstance(block, nn.Module) or isinstance(block, nn.ModuleList) else [block]:
                x = each(x)
        return self.end(x)


def blocks_of_all_kinds(out, group):
    """How far those that are shared out, and resumed, come from those that are not, as a part of how far they came."""
    found = {}
    for kind in ("lists in blocks", "lists in lists", "one block twice", "one weight twice", "blocks in parts"):
        ends = [torch.cat([p.detach().flatten() for p in Listed(kind).parameters()])]
        for parallel, stops in (("ddp", [4]), ("fsdp", [2, 4])):
            for steps in stops:
                place = out / kind.replace(" ", "-") / parallel
                run = trainer(place, group, Listed(kind), parallel=parallel, steps=steps, resume="auto")
                run.run(progress=False)
            ends.append(torch.cat([p.detach().flatten() for p in run.average().parameters()]))
        start, one, other = ends
        found[kind] = ((one - other).abs().max() / (one - start).abs().max()).item()
    return found


CASES = [
    blocks_of_all_kinds,
    images_on_one_machine,
    a_weight_without_gradient,
    masks,
    where_they_start,
    stopped_at_a_step_just_saved,
    a_nan_that_comes_again,
    a_nan_of_one,
    a_nan_of_one_in_float16,
    a_full_disk,
    a_full_disk_and_shared_weights,
    a_folder_on_each_machine,
    the_end,
    a_slow_picture,
]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(90, exit=True)  # where one waits for the other for ever
    with ranks() as group:
        for case in CASES:
            out = Path(folder, case.__name__)
            found = case(out, group)
            saved = [step for step, _ in checkpoints.saved(out)]
            Path(folder, f"{case.__name__}-{group.rank}.json").write_text(json.dumps([found, saved]))
        threads = [len(os.listdir("/proc/self/task"))]
    for _ in range(100):
        # One that was joined may be listed for a moment more.
        threads[1:] = [len(os.listdir("/proc/self/task"))]
        if threads[1] <= threads[0] - 3:
            break
        time.sleep(0.05)
    Path(folder, f"threads-{group.rank}.json").write_text(json.dumps([threads, []]))


if __name__ == "__main__":
    main(sys.argv[1])
