"""Bytes that kernels move, counted in Triton's interpreter, against the floors: each tensor once, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.kernels import group_norm_tiles, lpips
from cmfast.ops import _dispatch
from tests.ops.cases import draw, grid
from tests.ops.lists import make as make_lists
from tests.ops.norms import make
from tests.ops.perceptual import images, layer

pytestmark = pytest.mark.skipif(not _dispatch.INTERPRETING, reason="counts in Triton's interpreter")
S, M = 4, 2  # bytes of a float32 state and of a bfloat16 network input
SHAPE = (4, 3, 64, 64)


class Counter:
    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.bytes = 0
        #: Loads from one place count once where this is a set, as in a cache.
        self.places: set[int] | None = None
        real = interpreter._interpreter

        def load(pointers, mask, other, dtype):
            live = np.broadcast_to(mask, pointers.shape).astype(bool)
            count = int(live.sum())
            if self.places is not None:
                before = len(self.places)
                self.places.update(pointers[live].tolist())
                count = len(self.places) - before
            self.bytes += count * np.dtype(dtype).itemsize
            return real.load(pointers, mask, other, dtype)

        def store(pointers, value, mask):
            self.bytes += int(np.broadcast_to(mask, pointers.shape).sum()) * value.dtype.itemsize
            return real.store(pointers, value, mask)

        others = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
        monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**{**others, "load": load, "store": store}))

    def per_element(self, x):
        return self.bytes / x.numel()


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


def state():
    return torch.randn(SHAPE)


def output():
    return torch.randn(SHAPE, dtype=torch.bfloat16)


SIGMA, NEXT = torch.rand(4) + 1.0, torch.rand(4)
BF16 = {"dtype": torch.bfloat16}

#: Calls, and their floor in bytes per element of the batch.
FORWARD = {
    "init_noise": (lambda x, f: ops.init_noise(draw(x), SIGMA, shape=SHAPE[1:], **BF16), S + M),
    "scale_input": (lambda x, f: ops.scale_input(x, SIGMA, **BF16), S + M),
    "add_noise given": (lambda x, f: ops.add_noise(x, x, SIGMA, **BF16), 2 * S + S + M),
    "add_noise drawn": (lambda x, f: ops.add_noise(x, draw(x), SIGMA, **BF16), S + S + M),
    "add_noise_pair given": (lambda x, f: ops.add_noise_pair(x, x, SIGMA, NEXT, **BF16), 4 * S + 2 * M),
    "add_noise_pair drawn": (lambda x, f: ops.add_noise_pair(x, draw(x), SIGMA, NEXT, **BF16), 3 * S + 2 * M),
    "draw_pair": (lambda x, f: ops.draw_pair(x, draw(x), grid(x.device), **BF16), 3 * S + 2 * M),
    "draw_pair, one point": (
        lambda x, f: ops.draw_pair(x, draw(x), ops.LogNormal(), pair=False, **BF16), 2 * S + M,
    ),
    "dropout": (lambda x, f: ops.dropout(x, 0.2, draw(x)), S + S),
    "denoise": (lambda x, f: ops.denoise(f, x, SIGMA), M + S + S),
    "denoise clipped": (lambda x, f: ops.denoise(f, x, SIGMA, clip=True), M + S + S),
    "denoise_to_uint8": (lambda x, f: ops.denoise_to_uint8(f, x, SIGMA), M + S + 1),
    "renoise drawn": (lambda x, f: ops.renoise(f, x, SIGMA, NEXT, draw(x), clip=True), 2 * M + 2 * S),
    "renoise given": (lambda x, f: ops.renoise(f, x, SIGMA, NEXT, x, clip=True), 2 * M + 3 * S),
    "euler_step": (lambda x, f: ops.euler_step(f, x, SIGMA, NEXT), 2 * S + 2 * M),
    "heun_predictor": (lambda x, f: ops.heun_predictor(f, x, SIGMA, NEXT), S + 2 * M),
    "heun_corrector": (lambda x, f: ops.heun_corrector(f, f, x, SIGMA, NEXT), 2 * S + 3 * M),
    "midpoint_corrector": (lambda x, f: ops.midpoint_corrector(f, f, x, SIGMA, SIGMA, NEXT), 2 * S + 3 * M),
    "weighted_loss": (lambda x, f: ops.weighted_loss(x, x, SIGMA), 2 * S),
    "consistency_loss": (lambda x, f: ops.consistency_loss(f, x, SIGMA, f, "snr", x, NEXT), 2 * M + 2 * S),
    "consistency_loss target given": (lambda x, f: ops.consistency_loss(f, x, SIGMA, x, SIGMA), M + 2 * S),
    "normal": (lambda x, f: ops.normal(1, torch.arange(4), SHAPE[1:]), S),
    "to_uint8": (lambda x, f: ops.to_uint8(x), S + 1),
}

#: (call, which of (state, output) needs a gradient, floor of the backward pass)
BACKWARD = {
    "weighted_loss": (lambda x, f: ops.weighted_loss(x, torch.zeros_like(x), SIGMA), "x", 2 * S + S),
    "weighted_loss huber": (
        lambda x, f: ops.weighted_loss(x, torch.zeros_like(x), SIGMA, norm="huber", huber_c=0.1), "x", 2 * S + S,
    ),
    "consistency_loss": (
        lambda x, f: ops.consistency_loss(f, x, SIGMA, torch.zeros_like(f), "snr", torch.zeros_like(x), NEXT),
        "f",
        2 * M + 2 * S + M,
    ),
    "denoise": (lambda x, f: ops.denoise(f, x, SIGMA), "f", S + M),
    "denoise clipped": (lambda x, f: ops.denoise(f, x, SIGMA, clip=True), "f", S + M + S + M),
    "denoise both": (lambda x, f: ops.denoise(f, x, SIGMA), "fx", S + M + S),
    "renoise": (lambda x, f: ops.renoise(f, x, SIGMA, NEXT, draw(x))[0], "f", S + M),
    "euler_step": (lambda x, f: ops.euler_step(f, x, SIGMA, NEXT)[:2], "f", S + M + M),
    "heun_corrector": (lambda x, f: ops.heun_corrector(f, f, x, SIGMA, NEXT)[0], "x", S + S),
    "scale_input": (lambda x, f: ops.scale_input(x, SIGMA, **BF16)[0], "x", M + S),
    "add_noise": (lambda x, f: ops.add_noise(x, draw(x), SIGMA, **BF16)[:2], "x", S + M + S),
    "dropout": (lambda x, f: ops.dropout(x, 0.2, draw(x)), "x", S + S),
}  # fmt: skip


def check(counter, x, floor):
    moved = counter.per_element(x)
    assert floor <= moved <= 1.01 * floor, f"{moved:.3f} bytes per element, floor {floor}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last output"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, layout, counter):
    call, floor = FORWARD[name]
    x, f = state(), output()
    if layout != "contiguous":
        f = f.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    with cmfast.backend("triton"):
        call(x, f)
    check(counter, x, floor)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name, counter):
    call, needs, floor = BACKWARD[name]
    x, f = state().requires_grad_("x" in needs), output().requires_grad_("f" in needs)
    with cmfast.backend("triton"):
        results = call(x, f)
    results = results if isinstance(results, tuple) else (results,)
    counter.bytes = 0
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    check(counter, x, floor)


#: Group normalisation by what stands around it: the floors of both passes, where a slab fits on chip and where not.
NORMS = {
    "film": ((2 * M, 3 * M), (3 * M, 5 * M)),
    # A sum reads the residual and is written; its gradient is read.
    "sum": ((4 * M, 5 * M), (4 * M, 6 * M)),
    "dropout": ((2 * M, 3 * M), (3 * M, 5 * M)),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize("kind", NORMS)
def test_group_norm(kind, launches, last, counter, monkeypatch):
    """On a map so large that what is read and written for each channel of a program does not show, as for many samples
    of the U-Net's large maps."""
    monkeypatch.setattr(group_norm_tiles, "WHOLE", (2**20, 2**20) if launches == 1 else (0, 0))
    monkeypatch.setattr(group_norm_tiles, "ENOUGH", 1)
    monkeypatch.setattr(group_norm_tiles, "MANY", 1)
    norm = make((1, 16, 128, 64), 4, kind, dtype=torch.bfloat16, last=last)
    leaves, results = norm.graph("triton")
    forward, backward = (floors[launches == 3] for floors in NORMS[kind])
    check(counter, norm.tensors["x"], forward)
    counter.bytes = 0
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    check(counter, norm.tensors["x"], backward)
    assert all(leaf.grad is not None for leaf in leaves.values())


#: The ImageNet-64 U-Net's parameters, and the averages of its training.
UNET, AVERAGES = 296_000_000, 4


def of_parameters(count, copies=None):
    """Lists of tensors, of which the small ones are so few that what is read for each does not show."""
    shapes = [(256, 128), (128,), (3, 64, 3, 3), (16, 16, 3, 3)]
    return make_lists(shapes=shapes, rates=[0.9] * count, copies=copies, step=7, lr=0.01)


@pytest.mark.parametrize("k, copies", [(0, M), (1, 0), (AVERAGES, M)])
def test_averages(k, copies, counter):
    lists = of_parameters(k, torch.bfloat16 if copies else None)
    counter.bytes = 0
    lists.update("triton")
    check(counter, torch.cat([p.flatten() for p in lists.parameters]), S + 2 * S * k + copies)


@pytest.mark.parametrize("op", ["radam_ema_", "adam_ema_"])
@pytest.mark.parametrize("k, copies, clip", [(0, 0, 0), (AVERAGES, M, 0), (AVERAGES, M, S)])
def test_a_step_of_an_optimizer(op, k, copies, clip, counter):
    """Parameters and moments read and written, gradients read, and read once more for their norm."""
    lists = of_parameters(k, torch.bfloat16 if copies else None)
    lists.options |= {"max_norm": 1.0} if clip else {}
    counter.bytes = 0
    lists.take(op, "triton")
    elements = torch.cat([p.flatten() for p in lists.parameters])
    check(counter, elements, 7 * S + 2 * S * k + copies + clip)
    if k == AVERAGES:
        assert counter.per_element(elements) * UNET <= 20e9


def test_a_skipped_step_moves_nothing(counter):
    lists = of_parameters(AVERAGES, torch.bfloat16)
    lists.options["found_inf"] = torch.ones(())
    counter.bytes = 0
    lists.take("radam_ema_", "triton")
    assert counter.per_element(torch.cat([p.flatten() for p in lists.parameters])) < 0.5


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("wanted, gradients", [(("features",), 1), (("features", "target_features"), 2)])
def test_lpips_layer(wanted, gradients, last, counter, monkeypatch):
    """Both maps read once in either pass: the backward pass measures lengths again, which is less than reading them.
    In programs of as many tiles as there are for many samples, where the weights do not show."""
    monkeypatch.setattr(lpips, "ENOUGH", 1)
    call = layer((1, 64, 64, 32), dtype=torch.bfloat16, last=last)
    _, result = call.graph("triton", *wanted)
    check(counter, call.tensors["features"], 2 * M)
    counter.bytes = 0
    result.sum().backward()
    check(counter, call.tensors["features"], 2 * M + gradients * M)


@pytest.mark.parametrize("size", [(28, 20), None], ids=["resized", "own size"])
def test_lpips_input(size, counter):
    """Each pixel read once from memory, often from a cache; each of the result written once."""
    call = images((1, 3, 16, 16), size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    x, counter.places = call.tensors["image"], set()
    _, result = call.graph("triton", "image")
    floor = S * x.numel() + M * result.numel()
    assert floor <= counter.bytes <= 1.01 * floor
    counter.bytes, counter.places = 0, set()
    result.backward(torch.ones_like(result))
    assert floor <= counter.bytes <= 1.01 * floor


def test_the_counter_sees_a_second_read(counter):
    """A kernel that read its input twice would be found."""
    with cmfast.backend("triton"):
        x = state()
        ops.scale_input(x, SIGMA, **BF16)
        ops.scale_input(x, SIGMA, **BF16)
    with pytest.raises(AssertionError, match="bytes per element"):
        check(counter, x, S + M)
