"""The network a Sampler runs: compiled in whole or by blocks, optimised, with weights that stay those of the model."""

import shutil

import pytest
import torch
from torch import nn

import cmfast
from cmfast import Denoiser, Sampler, UNetModel, networks
from cmfast.fast import Refused
from cmfast.graphs import GraphError
from cmfast.native import winograd
from cmfast.networks import sharing
from cmfast.tolerances import GOLDEN_VALUE
from tests.golden_utils import relative_error
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork


def toy():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


def tiny():
    """A U-Net with residual blocks of four kinds and an attention block."""
    torch.manual_seed(0)
    network = UNetModel(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2), num_classes=7, use_scale_shift_norm=True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Denoiser(network, image_shape=(3, 8, 8)).eval()


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile without a compiler; the graphs it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setitem(networks.COMPILE_OPTIONS, "backend", backend)
    return graphs


@pytest.mark.skipif(winograd.refusal() is not None, reason=f"Winograd: {winograd.refusal()}")
def test_convolutions_of_its_own_are_not_compiled(compiled):
    """Those of an optimised network on a CPU; of one in bfloat16, or not optimised, a compiler's are as good."""
    for options, path in (({}, "off"), ({"dtype": torch.bfloat16}, "whole"), ({"optimize": False}, "whole")):
        sampler = Sampler(tiny(), 2, compile=True, **options)
        assert sampler.explain()["compile"][0] == path
    assert "faster convolutions of its own" in Sampler(tiny(), 2, compile=True).explain()["compile"][1]


def close(a, b):
    return (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("model", [toy, tiny])
def test_the_whole_network(compiled, model):
    model = model()
    sampler, plain = (
        Sampler(model, 2, steps=2, compile=True, optimize=False),
        Sampler(model, 2, steps=2, optimize=False),
    )
    assert sampler.explain()["compile"][0] == "whole" and not compiled
    assert close(sampler.sample(4), plain.sample(4)) and len(compiled) == 1 and sampler.startup > plain.startup
    started = sampler.startup
    with torch.no_grad():
        next(model.network.parameters()).mul_(-1)
    assert close(sampler.sample(4), plain.sample(4)) and len(compiled) == 1 and sampler.startup == started


def test_a_function(compiled):
    sampler = Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4), compile="whole")
    assert torch.equal(sampler.sample(2), Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4)).sample(2))
    assert len(compiled) == 1


def test_the_blocks_of_a_network(compiled):
    """More kinds of blocks than torch.compile's own limit are compiled, each once."""
    model = tiny()
    blocks = [m for m in model.network.modules() if type(m).__name__ in ("ResBlock", "AttentionBlock")]
    sampler, plain = Sampler(model, 2, steps=2, compile="regional"), Sampler(model, 2, steps=2, optimize=False)
    assert "compiles the blocks" in sampler.explain()["network"][1]
    with torch._dynamo.config.patch(recompile_limit=2):
        assert close(sampler.sample(4), plain.sample(4))
    assert 4 <= len(compiled) <= len(blocks) and not any(block._compiled_call_impl for block in blocks)
    count = len(compiled)
    for change in (lambda conv: conv.weight.mul_(-1), lambda conv: setattr(conv, "weight", nn.Parameter(-conv.weight))):
        with torch.no_grad():
            change(blocks[0].in_layers[2])
        assert close(sampler.sample(4), plain.sample(4))
    assert len(compiled) >= count
    with pytest.raises(ValueError, match="blocks of a UNetModel, got a ToyNetwork"):
        Sampler(toy(), compile="regional")


def test_the_blocks_of_an_optimised_network(compiled):
    """Are compiled as those of the network that it was made of."""
    model = tiny()
    sampler = Sampler(cmfast.optimize(model), 2, steps=2, compile="regional")
    assert "compiles the blocks" in sampler.explain()["network"][1]
    assert close(sampler.sample(4), Sampler(model, 2, steps=2, optimize=False).sample(4)) and len(compiled) >= 4
    with pytest.raises(RuntimeError, match="optimize=True cannot be had: compile='regional'"):
        Sampler(cmfast.optimize(model), compile="regional", optimize=True)


def test_a_copy_shares_no_part_that_occurs_twice():
    network = tiny().network
    network.middle_block[2] = network.middle_block[0]
    network.register_module("absent", None)
    copy = sharing(network)
    assert {id(part) for part in network.modules()}.isdisjoint(map(id, copy.modules())) and copy.absent is None


def test_a_copy_shares_the_weights():
    network = tiny().network
    copy = sharing(network)
    pairs = list(zip(network.modules(), copy.modules(), strict=True))
    assert all(type(a) is type(b) and a is not b and a._parameters is b._parameters for a, b in pairs)
    network.input_blocks[0][0].weight = nn.Parameter(torch.zeros(32, 3, 3, 3))
    x, t, y = torch.randn(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert torch.equal(copy(x, t, y), network(x, t, y))


@pytest.mark.parametrize("compile", [True, "regional"])
def test_hooks_are_called_all_the_same(compiled, compile):
    model, calls = tiny(), []
    sampler = Sampler(model, 2, compile=compile, optimize=False)
    model.network.middle_block.register_forward_hook(lambda *_: calls.append(1))
    sampler.sample(2)
    assert calls == [1] and not compiled and "has a hook" in sampler.explain()["compile"][1]


@pytest.mark.parametrize("where", ["middle_block", ""], ids=["part", "network"])
def test_hooks_that_were_there_first(where):
    """They are called; once they are gone the network is the optimised one."""
    model, calls = tiny(), []
    handle = model.network.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    sampler, plain = Sampler(model, 2), Sampler(tiny(), 2, optimize=False)
    assert torch.equal(sampler.sample(2), plain.sample(2)) and calls == [1]
    path, why = sampler.explain()["network"]
    assert path == "as given" and why.endswith("has a hook")
    model.note = "another structure, while it has a hook"
    sampler.sample(2)
    handle.remove()
    assert sampler.explain()["network"][0] == "optimised"
    assert torch.equal(sampler.sample(2), Sampler(tiny(), 2).sample(2)) and calls == [1, 1]


def test_compiled_and_captured(compiled, emulated):
    model = toy()
    sampler, plain = Sampler(model, 2, steps=2, compile=True), Sampler(model, 2, steps=2, cuda_graph=False)
    for seed in (0, 1):
        assert close(sampler.sample(4, seed=seed), plain.sample(4, seed=seed))
    assert len(compiled) == 1 and emulated.captures == 1 and emulated.replays == 4


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and none of g\+\+.* install"):
        Sampler(toy(), compile=True)
    assert Sampler(toy(), 2).sample(2).shape == (2, 8, 8, 3)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_inductor():
    model = toy()
    torch._dynamo.reset()
    sampler, plain = Sampler(model, 2, compile=True), Sampler(model, 2)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    assert relative_error(sampler.denoise(x, 1.0, labels), plain.denoise(x, 1.0, labels)) <= GOLDEN_VALUE
    assert sampler.startup > 0.01


class Fast(nn.Module):
    """An optimised network: weights of its own, made of the given ones."""

    num_classes = 7
    derives_weights = True

    def __init__(self, network):
        super().__init__()
        self.network, self.derived = network, None
        self.refresh()

    def refresh(self, force=False):
        weight = self.network.conv1.weight
        self.derived, replaced = weight.detach().clone(), self.derived is not None
        return replaced

    def forward(self, x, t, y):
        state = {"conv1.weight": self.derived}
        return torch.func.functional_call(self.network, state, (x, t, y))


@pytest.fixture
def optimizer(monkeypatch):
    """An `optimize` for networks whose conv1 is a convolution; what it was called with."""
    calls = []

    def optimize(model, dtype=None):
        kind = type(model.network.conv1).__name__
        if kind != "Conv2d":
            raise Refused(f"conv1 is a {kind}")
        calls.append(dtype)
        return Denoiser(Fast(model.network), image_shape=model.image_shape)

    monkeypatch.setattr(networks.fast, "optimize", optimize)
    return calls


@pytest.mark.parametrize("graph", ["auto", False])
def test_an_optimised_network(optimizer, emulated, graph):
    model = toy()
    sampler, plain = Sampler(model, 2, cuda_graph=graph), Sampler(model, 2, optimize=False, cuda_graph=False)
    assert sampler.explain()["network"][0] == "optimised" and optimizer == [None]

    def check(captures, calls):
        assert torch.equal(sampler.sample(3), plain.sample(3))
        assert emulated.captures == captures * (graph == "auto") and len(optimizer) == calls

    check(1, 1)
    with torch.no_grad():
        model.network.conv1.weight.mul_(-1)
    check(2, 1)
    model.network.conv1.weight.data = 2 * model.network.conv1.weight.data
    check(3, 1)
    model.network.conv1.weight = nn.Parameter(-model.network.conv1.weight.detach())
    check(4, 2)
    model.network.conv1 = nn.Sequential(model.network.conv1)
    check(5, 2)
    assert sampler.explain()["network"] == ("as given", "conv1 is a Sequential")
    handle = model.network.register_forward_hook(lambda *_: None)
    check(5, 2)
    handle.remove()
    check(5, 2)


def double(parameter):
    parameter.data = 2 * parameter.data


@pytest.mark.parametrize("graph", ["auto", False])
def test_the_optimised_u_net(emulated, graph):
    """`cmfast.optimize` itself: captured, and with the weights of now."""
    # In the reference's forms, as those that write in place are the CPU's alone.
    with cmfast.backend("reference"):
        model = tiny()
        sampler = Sampler(model, 2, steps=2, cuda_graph=graph)
        plain = Sampler(model, 2, steps=2, cuda_graph=False, optimize=False)
        assert sampler.explain()["network"][0] == "optimised"
        conv, projection = model.network.input_blocks[0][0], model.network.middle_block[0].emb_layers[1]
        changes = [
            lambda: conv.weight.mul_(-1),
            lambda: projection.weight.mul_(-1),
            lambda: double(projection.weight),
            lambda: setattr(conv, "weight", nn.Parameter(-conv.weight)),
            lambda: model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()}),
        ]
        before = plain.sample(5)
        assert close(sampler.sample(5), before)
        for change in changes:
            with torch.no_grad():
                change()
            wanted = plain.sample(5)
            assert close(sampler.sample(5), wanted) and not close(before, wanted)
            before = wanted
        projection.weight.data.mul_(-1)
        sampler.refresh()
        assert close(sampler.sample(5), plain.sample(5))
        assert (emulated.replays > 0 and sampler.explain()["loop"][0] == "graph") == (graph == "auto")


def test_a_broken_capture_of_a_fast_pass(emulated):
    """Which is not taken where parts have hooks: so it is named as a whole."""
    model = tiny()
    model.network.hooked = lambda: any(module._forward_hooks for module in model.network.modules())
    forward = type(model.network).forward

    class Reads(UNetModel):
        def forward(self, x, *rest):
            return forward(self, x if self.hooked() or x.sum().item() < 1e9 else -x, *rest)

    model.network.__class__ = Reads
    with pytest.raises(GraphError, match="broke in the fast pass of Reads: RuntimeError: .*not permitted"):
        Sampler(model, 2, cuda_graph=True, optimize=False).sample(2)


def test_dtype_goes_to_what_optimises(optimizer):
    model = toy()
    Sampler(model, dtype=torch.bfloat16)
    assert optimizer == [torch.bfloat16]
    model.network.conv1 = nn.Sequential(model.network.conv1)
    assert Sampler(model, dtype=torch.float32).explain()["network"][0] == "as given"
    with pytest.raises(ValueError, match="dtype=torch.bfloat16 needs .* conv1 is a Sequential"):
        Sampler(model, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="optimize=True cannot be had: conv1 is a Sequential"):
        Sampler(model, optimize=True)


@pytest.mark.parametrize("own", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_for_a_network_that_is_optimised_already(own, dtype):
    """As for the network it was made of, whose weights it shares."""
    model = tiny()
    fast, args = cmfast.optimize(model, dtype=own), (torch.randn(2, 3, 8, 8), 3.0, torch.tensor([1, 2]))
    sampler, wanted = Sampler(fast, 2, dtype=dtype), Sampler(model, 2, dtype=dtype)
    assert torch.equal(sampler.denoise(*args), wanted.denoise(*args))
    with torch.no_grad():
        model.network.input_blocks[0][0].weight.mul_(-1)
    assert torch.equal(sampler.denoise(*args), wanted.denoise(*args))
    assert (sampler.explain()["network"][0] == "as given") == ((own or torch.float32) == dtype)
    if own not in (None, dtype):
        with pytest.raises(ValueError, match=f"optimize=False was asked for. Its own dtype is {own}"):
            Sampler(fast, 2, dtype=dtype, optimize=False)


def test_a_training_model_is_optimised_in_evaluation_mode(optimizer):
    model = toy().train()
    sampler = Sampler(model, 2)
    assert torch.equal(sampler.sample(2), Sampler(model, 2, optimize=False).sample(2)) and model.network.training
