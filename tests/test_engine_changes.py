"""A model that changed is sampled as it is now, captured or not."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cmfast import Denoiser, Sampler, losses, runner
from cmfast.precondition import Preconditioner
from cmfast.watch import Change, Watch, evaluating
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork


class LoRA(nn.Module):
    """A layer with a low-rank addition, as adapters put it around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, 0.5
        self.down, self.up = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        return self.base(x) + self.scale * self.up(self.down(x))


class Dropping(ToyNetwork):
    def __init__(self):
        super().__init__()
        self.drop, self.gain = nn.Dropout(0.5), 1.0

    def forward(self, x, t, y):
        return self.gain * super().forward(self.drop(x), t, y)


def network():
    torch.manual_seed(0)
    return Dropping()


def write(model):
    with torch.no_grad():
        model.network.conv2.weight.mul_(1.5)


def load(model):
    torch.manual_seed(1)
    model.load_state_dict(Denoiser(Dropping(), image_shape=(3, 8, 8)).state_dict())


def swap_storage(model):
    model.network.conv1.weight.data = -model.network.conv1.weight.data


def new_parameter(model):
    model.network.conv1.weight = nn.Parameter(-model.network.conv1.weight.detach())


def new_module(model):
    torch.manual_seed(2)
    model.network.conv1 = nn.Conv2d(3, 8, 3, padding=1)


def inject(model):
    torch.manual_seed(2)
    model.network.conv1 = LoRA(model.network.conv1)


def cast(model):
    model.to(torch.float64)


def train(model):
    model.train()


def train_a_part(model):
    model.network.drop.train()


def set_an_attribute(model):
    model.network.gain = 0.5


def override_the_module(model):
    model.network.conv1.forward = lambda x: 2 * nn.functional.conv2d(x, model.network.conv1.weight, padding=1)


def override_the_denoiser(model):
    model.forward = lambda x, sigma, labels: 0.01 * x


def another_class(model):
    class Halved(nn.Conv2d):
        def forward(self, x):
            return 0.5 * super().forward(x)

    model.network.conv1.__class__ = Halved


def hook(model):
    model.network.conv1.register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(model):
    model.network.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))


def hook_the_denoiser(model):
    model.register_forward_hook(lambda module, inputs, output: 0.1 * output)


def parametrization(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.network.conv1, "weight", Twice())


# What happens, and whether it costs a capture, or leaves a graph out.
CHANGES = [
    (write, "goes on"),
    (load, "goes on"),
    (train, "goes on"),
    (train_a_part, "goes on"),
    (swap_storage, "anew"),
    (new_parameter, "anew"),
    (new_module, "anew"),
    (inject, "anew"),
    (cast, "anew"),
    (set_an_attribute, "anew"),
    (override_the_module, "anew"),
    (override_the_denoiser, "anew"),
    (another_class, "anew"),
    (parametrization, "anew"),
    (hook, "conv1 (Conv2d) has a hook"),
    (pre_hook, "network (Dropping) has a hook"),
    (hook_the_denoiser, "the model (Denoiser) has a hook"),
]


def plainly(model, n=3):
    """Images of a fresh copy of the model as it is now, call by call."""
    copied = copy.deepcopy(model).eval()
    return Sampler(copied, 2, steps=2, cuda_graph=False, optimize=False).sample(n)


@pytest.mark.parametrize("change, outcome", CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_changed_model(emulated, change, outcome, graph):
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, 2, steps=2, cuda_graph="auto" if graph else False)
    before = sampler.sample(3)
    assert torch.equal(before, plainly(model))
    captures = emulated.captures
    change(model)
    flags = [module.training for module in model.modules()]
    after, wanted = sampler.sample(3), plainly(model)
    assert torch.equal(after, wanted)
    if change is not cast:  # which may change no pixel
        assert torch.equal(after, before) == change.__name__.startswith("train")
    assert [module.training for module in model.modules()] == flags
    if graph:
        assert emulated.captures == captures + (outcome == "anew")
        path, why = sampler.explain()["loop"]
        assert (path == "eager" and outcome in why) if "hook" in outcome else path == "graph"
    sampler.sample(3)
    assert emulated.captures == captures + (graph and outcome == "anew")


def test_a_change_before_the_first_batch(emulated):
    for change, _ in CHANGES:
        model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
        sampler = Sampler(model, 2, steps=2)
        change(model)
        assert torch.equal(sampler.sample(2), plainly(model, 2)), change.__name__


def test_hooks_come_and_go(emulated):
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    sampler, calls = Sampler(model, 2), []
    before = sampler.sample(2)
    handle = model.network.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(sampler.sample(4)[:2], before) and len(calls) == 2
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    sampler.sample(2)
    assert "for all modules" in sampler.explain()["loop"][1] and len(calls) > 2
    everywhere.remove()
    assert torch.equal(sampler.sample(2), before) and emulated.captures == 1 and emulated.replays == 2


def test_attributes_that_a_network_writes_itself_are_its_own(emulated):
    class Counting(ToyNetwork):
        calls = 0

        def forward(self, x, t, y):
            self.calls += 1
            self.last = x.shape
            return super().forward(x, t, y)

    sampler = Sampler(Denoiser(Counting(), image_shape=(3, 8, 8)), 2)
    sampler.sample(8)
    assert emulated.captures == 1 and emulated.replays == 4
    sampler.model.network.width = 3  # someone else's
    sampler.sample(2)
    assert emulated.captures == 2


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_fused_optimizers_are_seen(optimizer):
    """torch's fused kernels write to parameters and leave their versions as they were."""
    model = nn.Linear(2, 2)
    watch = Watch(model)
    model(torch.ones(1, 2)).sum().backward()
    step = optimizer(model.parameters(), lr=0.1, fused=True)
    watch.settle()
    step.step()
    assert watch.change() == Change.VALUES


def test_what_changed():
    wanted = {write: Change.VALUES, load: Change.VALUES, swap_storage: Change.STORAGE, train: Change.NOTHING}
    for change, outcome in CHANGES:
        model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
        watch = Watch(model)
        change(model)
        unseen = "hook" in outcome or "train" in change.__name__
        known = wanted.get(change, Change.NOTHING if unseen else Change.STRUCTURE)
        assert watch.change() is known and watch.change() is Change.NOTHING, change.__name__
        write(model)
        assert watch.change(values=False) is Change.NOTHING, change.__name__


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.network.register_buffer("new", torch.zeros(1)),
        lambda m: m.network.register_parameter("new", nn.Parameter(torch.zeros(1))),
        lambda m: m.network.conv1.register_buffer("new", torch.zeros(1)),
        lambda m: m.network.drop.add_module("new", nn.Identity()),
        lambda m: delattr(m.network, "drop"),
        lambda m: setattr(m, "preconditioner", copy.copy(m.preconditioner)),
        lambda m: setattr(type(m.network), "forward", ToyNetwork.forward),
        lambda m: setattr(m, "network", network()),
        lambda m: m.network.conv1.half(),
    ],
    ids=["buffer", "parameter", "in a layer", "child", "gone", "preconditioner", "class", "network", "half"],
)
def test_what_counts_as_another_structure(change):
    model = Denoiser(type("Own", (Dropping,), {})(), image_shape=(3, 8, 8))
    watch = Watch(model)
    assert watch.change() is Change.NOTHING
    change(model)
    assert watch.change() is Change.STRUCTURE and watch.change() is Change.NOTHING


def test_weights_that_cannot_be_watched(emulated):
    class Special(torch.Tensor):
        pass

    model = Denoiser(network(), image_shape=(3, 8, 8))
    model.network.register_buffer("special", torch.zeros(1).as_subclass(Special))
    assert "a Special among the weights" in Sampler(model).explain()["loop"][1]
    del model.network.special
    model.network.register_buffer("away", torch.zeros(1, device="meta"))
    assert "several devices: cpu, meta" in Sampler(model).explain()["loop"][1]


def test_evaluating_is_exact_and_counts():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Identity()))
    model[1][0].eval()
    flags = [module.training for module in model.modules()]
    with evaluating(model.modules()):
        with evaluating(model[1].modules()):
            assert not any(module.training for module in model.modules())
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(KeyError), evaluating(model.modules()):
        raise KeyError
    assert [module.training for module in model.modules()] == flags


def test_looking_costs_little():
    """Under a millisecond for a thousand modules where the machine is idle; ten here, where it may not be."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 4))
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(200)))
    watch = Watch(model)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        assert watch.change() is Change.NOTHING
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_tensors_of_inference_mode_count_no_writes():
    """So every look says that values may have changed."""
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
    watch = Watch(model)
    assert [watch.change(values=True) for _ in range(2)] == [Change.VALUES] * 2
    assert watch.change(values=False) is Change.NOTHING


def test_a_method_that_is_replaced_twice(emulated):
    """The number of attributes stays the same the second time."""
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    conv, sampler = model.network.conv1, Sampler(model, 2, steps=2)
    for factor in (2, -1):
        conv.forward = lambda x, factor=factor: factor * nn.functional.conv2d(x, conv.weight, padding=1)
        images = sampler.sample(2)
        assert torch.equal(images, Sampler(model, 2, steps=2, cuda_graph=False).sample(2))
    assert emulated.captures == 2


def test_settings_of_torchs_modules_are_seen_by_refresh(emulated):
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, 2, steps=2)
    before = sampler.sample(3)
    model.network.conv1.padding_mode = "circular"
    sampler.refresh()
    assert torch.equal(sampler.sample(3), plainly(model)) and not torch.equal(before, plainly(model))


def test_a_model_prepared_anew_meanwhile_is_not_captured_as_it_was(emulated, monkeypatch):
    """By another thread, between choosing the model and capturing it."""
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    sampler, settings, once = Sampler(model, 2), runner._settings, []

    def meanwhile(device):
        if not once:
            once.append(True)
            model.preconditioner = Preconditioner.edm(0.3)
            sampler.explain()
        return settings(device)

    monkeypatch.setattr(runner, "_settings", meanwhile)
    sampler.sample(2)
    assert torch.equal(sampler.sample(3), Sampler(model, 2, cuda_graph=False).sample(3)) and emulated.captures == 2


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_without_memory_to_look_at(emulated, layout):
    model = Denoiser(network(), image_shape=(3, 8, 8)).eval()
    wanted = Sampler(model, 2).sample(2)
    model.network.register_buffer("table", getattr(torch.ones(2, 2), layout)())
    sampler = Sampler(model, 2)
    assert torch.equal(sampler.sample(2), wanted)
    path, why = sampler.explain()["loop"]
    assert path == "eager" and why == f"a {model.network.table.layout} among the weights is not a plain tensor"


class Conditioned(nn.Module):
    """A network with an input that is no class: docs/migration.md."""

    def __init__(self, context):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("context", context)

    def forward(self, x, timesteps):
        return self.conv(x) + self.context[:, :, None, None]


@pytest.mark.parametrize("graph", [True, False])
def test_another_input_of_the_network(graph, emulated):
    """Written in place it is used by the graph that there is; another tensor in its place is another graph's."""
    torch.manual_seed(0)
    model = Denoiser(Conditioned(torch.zeros(2, 3)), image_shape=(3, 8, 8))
    sampler = Sampler(model, 2, steps=2, cuda_graph=graph)
    made = [sampler.sample(2)]
    for write in (lambda: model.network.context.copy_(torch.randn(2, 3)), lambda: replace_context(model)):
        write()
        made.append(sampler.sample(2))
        assert torch.equal(made[-1], Sampler(copy.deepcopy(model), 2, steps=2, cuda_graph=False).sample(2))
        assert not torch.equal(made[-1], made[-2])
    losses.improved_consistency_loss(model, torch.zeros(2, 3, 8, 8), num_scales=11)["loss"].sum().backward()
    assert model.network.conv.weight.grad.abs().sum() > 0 and model.network.context.grad is None


def replace_context(model):
    model.network.context = torch.randn(2, 3)
