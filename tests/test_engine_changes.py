"""A model that changed is sampled as it is now, captured or not."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cmfast import Denoiser, Sampler, runner
from cmfast.precondition import Preconditioner
from cmfast.unet import UNetModel
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
