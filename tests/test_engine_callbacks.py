"""What callbacks and modules write while a sampler runs."""

import copy

import pytest
import torch
from torch import nn

from cmfast import Denoiser, Sampler
from cmfast.unet import UNetModel
from cmfast.watch import Change, Watch
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork


class Guided(Denoiser):
    """With an attribute of its own, which counts in every call."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale, self.calls, self.used = 1.0, 0, []

    def __init_subclass__(cls):
        raise AssertionError(f"somebody made a {cls}")

    def network_output(self, model_input, c_noise, labels=None):
        self.calls += 1
        self.used.append(self.scale)
        return self.scale * super().network_output(model_input, c_noise, labels)


class GuidedInside(nn.Module):
    """The same, of a network around another."""

    num_classes = None
    __init_subclass__ = Guided.__init_subclass__

    def __init__(self, network):
        super().__init__()
        self.network, self.scale, self.calls, self.used = network, 1.0, 0, []

    def forward(self, x, t):
        self.calls += 1
        self.used.append(self.scale)
        return self.scale * self.network(x, t)


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_callback_sets_counts_at_once(inside):
    """In the optimised form too, where what a model notes down stays as well."""

    def run(optimize):
        network = UNetModel(8, 3, 32, 3, 1, [], channel_mult=(1,)).eval()
        model = Denoiser(GuidedInside(network)) if inside else Guided(network)
        guided = model.network if inside else model
        set_to = [2.0, 3.0, 4.0, 5.0]
        options = {"callback": lambda made: set_to and setattr(guided, "scale", set_to.pop(0))}
        sampler = Sampler(model, 1, sampler="euler", steps=4, image_shape=(3, 8, 8), optimize=optimize, **options)
        assert sampler.explain()["network"][0] == ("optimised" if optimize else "as given")
        sampler.sample(1)
        guided.scale = 7.0
        sampler.sample(1)
        return guided.used, guided.calls, sampler._runner._version

    used, calls, version = run(True)
    assert used == [1.0, 2.0, 3.0, 4.0] + 4 * [7.0] and calls == 8 and version == 1
    assert run(False) == (used, calls, version)


@pytest.mark.parametrize("graph_first", [False, True])
def test_what_a_callback_sets_is_no_bookkeeping(emulated, graph_first):
    """A graph that was captured before or after does not have it as it is now."""
    torch.manual_seed(0)
    model = Guided(ToyNetwork(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, 2, sampler="euler", steps=2)

    def check():
        wanted = Sampler(copy.deepcopy(model), 2, sampler="euler", steps=2, cuda_graph=False).sample(2)
        assert torch.equal(sampler.sample(2), wanted)

    if graph_first:
        check()
    for _ in range(2):
        sampler.options["callback"] = lambda made: setattr(model, "scale", 0.5 * model.scale)
        sampler.sample(4)
        del sampler.options["callback"]
        check()
        for model.scale in (1.0, 0.5):
            check()
    captures = emulated.captures
    check()
    assert emulated.captures == captures > 0


def test_what_a_module_writes_stays_that_modules():
    """A module that is put before it takes its place in the order, not its bookkeeping."""

    class Counting(nn.Module):
        calls = 0

    model = nn.Sequential(Counting())
    watch = Watch(model)
    model[0].calls += 1
    watch.settle()
    model[0].calls += 1
    assert watch.change() is Change.NOTHING
    model.insert(0, Counting())
    assert watch.change() is Change.STRUCTURE
    model[1].calls += 1
    assert watch.change() is Change.NOTHING
    model[0].calls += 1  # which it has not written itself yet
    assert watch.change() is Change.STRUCTURE
