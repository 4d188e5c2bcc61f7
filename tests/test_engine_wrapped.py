"""Networks around networks: weights derived from others, torch.jit."""

import copy

import pytest
import torch
from torch import nn

from cmfast import Denoiser, Sampler
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.test_engine_changes import write
from tests.toy import ToyNetwork


class Derived(nn.Module):
    """A network with a weight of its own making, as an optimised one has."""

    num_classes = None
    derives_weights = True

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.refreshed, self.replaces, self.doubled, self.of = [], False, None, None
        self.refresh()

    @torch.no_grad()
    def refresh(self, force=False):
        stale = force or self.of != (self.conv.weight.data_ptr(), self.conv.weight._version)
        if not stale:
            return False
        replace = self.doubled is None or self.replaces
        self.refreshed.append(force)
        if replace:
            self.__dict__["doubled"] = 2 * self.conv.weight
        else:
            self.doubled.copy_(2 * self.conv.weight)
        self.of = (self.conv.weight.data_ptr(), self.conv.weight._version)
        return replace

    def forward(self, x, t):
        return nn.functional.conv2d(x, self.doubled)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("graph", [True, False])
def test_derived_weights(emulated, replaces, graph):
    torch.manual_seed(0)
    derived = Derived()
    model = Denoiser(derived, image_shape=(3, 8, 8))
    sampler = Sampler(model, 2, cuda_graph="auto" if graph else False)
    derived.replaces = replaces
    assert sampler.explain()["network"] == ("as given", "the model brings its own derived weights")

    def check(captures):
        derived_now = copy.deepcopy(model)
        derived_now.network.doubled = 2 * derived.conv.weight.detach()
        derived_now.network.of = (derived_now.network.conv.weight.data_ptr(), derived_now.network.conv.weight._version)
        assert torch.equal(sampler.sample(2), Sampler(derived_now, 2, cuda_graph=False).sample(2))
        assert emulated.captures == captures * graph

    check(1)
    with torch.no_grad():
        derived.conv.weight.mul_(-1)
    check(1 + replaces)
    check(1 + replaces)
    derived.conv.weight.data = derived.conv.weight.data * 3
    check(2 + replaces)
    derived.conv.weight.data.mul_(-0.5)  # no one sees this
    with pytest.raises(AssertionError):
        check(2 + replaces)
    sampler.refresh()
    assert derived.refreshed[-1]
    check(2 + 2 * replaces)


class Refreshing(ToyNetwork):
    """With a method of a name that optimised networks use for something else."""

    def refresh(self):
        raise AssertionError("nobody asked for it")


def test_a_refresh_that_is_something_else(emulated):
    model = Denoiser(Refreshing(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, 2)
    for change in (lambda model: None, write):
        change(model)
        assert torch.equal(sampler.sample(2), Sampler(model, 2, cuda_graph=False).sample(2))
    sampler.refresh()
    assert sampler.explain()["network"][1].startswith("cannot optimize a Refreshing")
    assert emulated.captures == 1


class Plain(nn.Module):
    """Simple enough for TorchScript."""

    num_classes: None = None

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.drop(self.conv(x)) + t[:, None, None, None] / 1000


TORCH_JIT = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, (torch.randn(2, 3, 8, 8), torch.randn(2))),
    "freeze": lambda module: torch.jit.freeze(torch.jit.script(module)),
    "inside": lambda module: Around(torch.jit.script(module)),
}


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.network = module

    def forward(self, x, t):
        return self.network(x, t)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", TORCH_JIT)
def test_networks_of_torch_jit(emulated, how):
    """They run as they are, without a graph: nothing inside of them shows that it changed."""
    torch.manual_seed(0)
    network = Plain().eval()
    made = TORCH_JIT[how](network)
    model = Denoiser(made, image_shape=(3, 8, 8))
    sampler, plain = Sampler(model, 2, steps=2), Sampler(Denoiser(network, image_shape=(3, 8, 8)), 2, steps=2)
    assert torch.equal(sampler.sample(3), plain.sample(3))
    why = "is of torch.jit, inside of which no change is seen"
    assert sampler.explain()["loop"][0] == "eager" and why in sampler.explain()["loop"][1]
    with pytest.raises(RuntimeError, match=why):
        Sampler(model, 2, cuda_graph=True)
    if how == "freeze":
        return
    model.train()
    with torch.no_grad():
        network.conv.weight.mul_(2)  # which TorchScript shares
    assert torch.equal(sampler.sample(3), plain.sample(3))
    assert all(module.training for module in model.modules())
    model.network = network
    assert sampler.explain()["loop"][0] == "graph"


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_whole_model_of_torch_jit():
    model = Plain().eval()
    scripted, plain = (Sampler(each, 2, image_shape=(3, 8, 8)) for each in (torch.jit.script(model), model))
    assert torch.equal(scripted.sample(3), plain.sample(3))
