"""The engine in long use: thousands of calls, threads, weights that change again and again."""

import copy
import gc
import os
import random
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cmfast
from cmfast import Denoiser, Sampler, runner
from cmfast.data import ImageData
from cmfast.fast import plan, weights
from cmfast.watch import Change, Watch
from tests.fast.networks import count_small_networks
from tests.golden_utils import small_unet
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork


def unet(**changes) -> Denoiser:
    """Of one resolution: as small as an optimised network can be."""
    network = small_unet(num_classes=5, channel_mult=[1], attention_resolutions=[1], **changes)
    return Denoiser(network, image_shape=(3, 8, 8)).eval()


def toy() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


@pytest.fixture
def small_networks_count(monkeypatch):
    count_small_networks(monkeypatch)


# --- memory ---------------------------------------------------------------------------------------

#: [B, C, H, W]: batches and sizes in turn.
SHAPES = [(b, 3, h, w) for b in (1, 3) for h, w in ((8, 8), (16, 8), (12, 4))]
#: Calls after which each of them came at each kind of level.
SETTLED = 2 * len(SHAPES) * 3
#: Bytes that the process may have more at the end than after the first calls, whatever their number: the allocator's
#: own unrest. 10,000 calls that leave 2 KB each are over it.
UNREST = 16 << 20


def resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def alive() -> tuple[int, int]:
    """Tensors there are, and objects of Python."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(x), Tensor) for x in objects), len(objects)


def denoises(sampler: Sampler, i: int) -> None:
    shape = SHAPES[i // 2 % len(SHAPES)]
    sigma = (0.5, torch.tensor(3.0), torch.full(shape[:1], 70.0))[i // 2 // len(SHAPES) % 3]
    sampler.denoise(torch.full(shape, 0.1), sigma, torch.zeros(shape[0], dtype=torch.int64))


def samples(sampler: Sampler, i: int) -> None:
    sampler.batch_size = 1 + i // 2 % 4
    sampler.sample(1 + i % 5, seed=i)


LONG = [pytest.param(40, id="40"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


@pytest.mark.parametrize("calls", LONG)
@pytest.mark.parametrize("call", [denoises, samples], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["optimised", "graphs"])
def test_memory_stays_flat(kind, call, calls, emulated, counted):
    """No more tensors and objects than after the first calls, which took every shape, and at the end."""
    model = unet() if kind == "optimised" else toy()
    # More shapes than programs are kept: every other call captures, and lets one go.
    sampler = Sampler(model, 2, cuda_graph=kind == "graphs", cache_size=3)
    assert sampler.explain()["network"][0] == ("optimised" if kind == "optimised" else "as given")
    for i in range(SETTLED):
        call(sampler, i)
    before, objects = alive()
    memory = resident()
    # The last is one as before: what is kept follows from it.
    for i in range(calls - calls % SETTLED):
        call(sampler, i)
    after, objects_after = alive()
    grown, kept = resident() - memory, len(sampler._runner._programs)
    counted(f"{calls - calls % SETTLED:,} calls, {after - before:+} tensors of {before}, {objects_after - objects:+} "
            f"objects, {grown / 2**20:+.1f} MB, {kept} programs kept, {emulated.captures:,} captured, "
            f"{emulated.replays:,} replayed")  # fmt: skip
    # Fewer: what tests before this one left behind may go at any time.
    assert after <= before and objects_after - objects < 50 and grown < UNREST
    assert kept == 3 * (kind == "graphs") and emulated.replays >= 2 * emulated.captures


def test_kinds_of_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(runner, "KINDS", 8)
    sampler = Sampler(lambda x, sigma: 0.1 * x, image_shape=(1, 4, 4))
    for size in range(1, 40):
        sampler.denoise(torch.ones(1, 1, size, 4), 1.0)
    assert len(sampler._runner._ran) <= 8


@pytest.mark.parametrize("count", [pytest.param(6, id="6"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_samplers_that_are_thrown_away(count, counted):
    """What was made of weights goes with them."""
    model = unet()

    def use(i):
        Sampler(model, 2, dtype=(None, torch.bfloat16)[i % 2]).sample(2)

    for i in range(4):
        use(i)
    before, _ = alive()
    memory = resident()
    for i in range(count):
        use(i)
    after, _ = alive()
    grown = resident() - memory
    counted(f"{count} samplers, {after - before:+} tensors, {grown / 2**20:+.1f} MB")
    assert after == before and grown < 2 * UNREST and len(runner._runners) < 10


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def eager_switching():
    """Threads are interrupted a hundred times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


def together(*functions) -> list:
    """What the functions return, each in a thread of its own, started at one moment."""
    results, gate = [None] * len(functions), threading.Barrier(len(functions))

    def work(i):
        gate.wait()
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


ROUNDS = [pytest.param(2, id="2"), pytest.param(100, id="100", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("shared", ["one sampler", "one network", "one model"])
def test_threads(shared, rounds, eager_switching, counted, small_networks_count):
    """Four threads that begin at once with what nobody has used yet, after weights changed: the bits of one thread.

    They share a sampler; or an optimised network, each in a sampler of its own; or the model alone.
    """
    model = unet(model_channels=64)
    x = [torch.randn(b, 3, 8, 8, generator=torch.Generator().manual_seed(b)) for b in (1, 2, 3, 1)]
    labels = [torch.arange(len(batch)) for batch in x]
    fast = cmfast.optimize(model)
    both = [Sampler(fast, 2, steps=2) for _ in range(4)]
    for i in range(rounds):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01 if i % 2 else 1 / 1.01)
        alone = Sampler(copy.deepcopy(model), 2, steps=2)
        wanted = [alone.denoise(x[k], 1.5, labels[k]) for k in range(3)] + [alone.sample(3, seed=i)]
        if shared == "one sampler":
            # One that is new, and one that has to see that weights changed.
            samplers = [both[0] if i % 2 else Sampler(model, 2, steps=2)] * 4
        elif shared == "one network":
            samplers = both if i % 2 else [Sampler(cmfast.optimize(model), 2, steps=2)] * 4
        else:
            samplers = [Sampler(model, 2, steps=2) for _ in range(4)]
        calls = [lambda k=k, s=samplers[k]: s.denoise(x[k], 1.5, labels[k]) for k in range(3)]
        made = together(*calls, lambda i=i, s=samplers[3]: s.sample(3, seed=i))
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True)), f"round {i}"
    counted(f"{rounds} rounds of 4 threads, all bits equal")


def test_a_first_look_in_two_threads(monkeypatch):
    """The second comes while the first makes its plan of the network."""
    looking, arrived, plans = threading.Event(), threading.Event(), []

    def slowly(model):
        plans.append(model)
        looking.set()
        arrived.wait(0.3)
        return plan.of_unet(model)

    monkeypatch.setattr("cmfast.fast.network.of_unet", slowly)
    model = unet()
    sampler, alone = Sampler(model, 2), Sampler(model, 2, optimize=False)

    def second():
        looking.wait()
        try:
            return sampler.sample(2)
        finally:
            arrived.set()

    first, other = together(lambda: sampler.sample(2), second)
    assert len(plans) == 1
    assert torch.equal(first, other) and (first.int() - alone.sample(2).int()).abs().max() <= 1


def test_a_weight_made_again_in_two_threads(monkeypatch):
    """The second comes while the first casts weights that changed: it takes none of before."""
    model = unet()
    fast = cmfast.optimize(model, torch.bfloat16)
    x, sigma, labels = torch.ones(1, 3, 8, 8), torch.ones(1), torch.tensor([1])
    call = torch.no_grad()(lambda: fast(x, sigma, labels))
    before = call()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    wanted = torch.no_grad()(cmfast.optimize(copy.deepcopy(model), torch.bfloat16))(x, sigma, labels)
    making, arrived, made = threading.Event(), threading.Event(), weights._Kept._made

    def slowly(self):
        if not making.is_set():
            making.set()
            arrived.wait(0.3)
        return made(self)

    monkeypatch.setattr(weights._Kept, "_made", slowly)

    def second():
        making.wait()
        try:
            return call()
        finally:
            arrived.set()

    assert all(torch.equal(out, wanted) for out in together(call, second)) and not torch.equal(before, wanted)


# --- weights --------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A convolution with a low-rank addition, as adapters put it around one."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Conv2d(base.in_channels, 2, 1), nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


def step(model, fused):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    x = torch.linspace(-1, 1, 192).view(1, 3, 8, 8)
    model(x, torch.tensor(1.0), torch.tensor([1])).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def state(model, factor):
    return {name: factor * x for name, x in model.state_dict().items()}


def swap(model):
    for p in model.parameters():
        p.data = 0.9 * p.data


def lora(model):
    """Put in, or taken out again."""
    layers = model.network.middle_block[0].in_layers
    layers[2] = layers[2].base if isinstance(layers[2], LoRA) else LoRA(layers[2])


def average(model):
    """As an average is brought into a model."""
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [torch.full_like(p, 0.02) for p in model.parameters()], 0.1)


def swap_part(model):
    model.network.input_blocks[0][0] = copy.deepcopy(model.network.input_blocks[0][0])
    with torch.no_grad():
        model.network.input_blocks[0][0].weight.mul_(-1)


CHANGES = [
    lambda m: step(m, False),
    lambda m: step(m, True),
    lambda m: m.load_state_dict(state(m, 1.1)),
    lambda m: m.load_state_dict(state(m, 0.95), assign=True),
    swap,
    lora,
    lora,
    average,
    swap_part,
    lambda m: m.train(),
    lambda m: m.eval(),
    lambda m: None,
]


@pytest.mark.parametrize("changes", [pytest.param(5, id="5"), pytest.param(150, id="150", marks=pytest.mark.slow)])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_changes_in_any_order(dtype, graph, changes, emulated, counted):
    """One, two or three changes between two batches: images of a sampler made now, or its refusal."""
    # Forms that write in place read values on the host, which no graph allows.
    with cmfast.backend("reference" if graph else "auto"):
        chosen, model = random.Random(8), unet()
        torch.manual_seed(0)
        options = {"steps": 2, "cuda_graph": graph, "dtype": dtype}
        sampler, same, refused = Sampler(model, 2, **options), [], 0
        for i in range(changes):
            for change in chosen.choices(CHANGES, k=chosen.randint(1, 3)):
                change(model)
            try:
                wanted = Sampler(copy.deepcopy(model), 2, **options).sample(3, seed=i)
            except ValueError as error:
                refused += 1
                for _ in range(2):
                    with pytest.raises(ValueError) as ours:
                        sampler.sample(3, seed=i)
                    assert str(ours.value) == str(error) and "expected Conv2d" in str(error)
                continue
            same.append(torch.equal(sampler.sample(3, seed=i), wanted))
        assert all(same) and (refused > 0) == (dtype is not None)
        counted(f"{len(same)} batches after changes with the bits of a new sampler, {refused} refused as it refuses, "
                f"{emulated.captures} captures")  # fmt: skip


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_memory_that_comes_back(dtype, graph, emulated):
    """Weights that were swapped twice, and lie again where they first were, as allocators mostly have it."""
    with cmfast.backend("reference" if graph else "auto"):
        model = unet()
        conv = model.network.input_blocks[0][0]
        memory = conv.weight.detach().numpy().copy()
        conv.weight.data = torch.from_numpy(memory)
        options = {"cuda_graph": graph, "dtype": dtype}
        sampler = Sampler(model, 2, **options)
        before, address, version = sampler.sample(2), conv.weight.data_ptr(), conv.weight._version
        conv.weight.data = torch.zeros_like(conv.weight)
        memory *= -1.5
        conv.weight.data = torch.from_numpy(memory)
        assert (conv.weight.data_ptr(), conv.weight._version) == (address, version)
        wanted = Sampler(copy.deepcopy(model), 2, **options).sample(2)
        assert torch.equal(sampler.sample(2), wanted) and not torch.equal(wanted, before)


def test_swapped_weights_that_are_kept():
    """Weights that somebody keeps, and puts back."""
    model = toy()
    watch, conv = Watch(model), model.network.conv1
    kept = conv.weight.data
    conv.weight.data = -kept
    assert watch.change() is Change.STORAGE and watch.change() is Change.NOTHING
    conv.weight.data = kept
    assert watch.change() is Change.STORAGE and watch.change() is Change.NOTHING


@pytest.mark.parametrize(
    "name, value",
    [
        ("sigmas", [80.0, 5.0]), ("sampler", "euler"), ("options", {"s_churn": 9.0}), ("pixels", "nearest"),
        ("pixels", None),
    ],
)  # fmt: skip
def test_settings_that_change(name, value, emulated):
    """A sampler's own, written to after a graph was captured."""
    model = toy()
    options = {"sampler": "heun", "sigmas": [80.0, 9.0, 0.5]}
    made = []
    for graph in (True, False):
        sampler = Sampler(model, 2, cuda_graph=graph, **options)
        before = sampler.sample(2)
        setattr(sampler, name, value)
        made.append(sampler.sample(2))
        assert not torch.equal(made[-1], before)
    assert torch.equal(*made)


def test_another_generator(emulated):
    """A sampler's generator that was replaced after a graph was captured."""
    model, made = toy(), []
    for graph in (True, False):
        sampler = Sampler(model, 2, steps=2, cuda_graph=graph, noise=torch.Generator().manual_seed(1))
        sampler.sample(2, classes=1)
        sampler.noise = torch.Generator().manual_seed(1)
        made += [sampler.sample(2, classes=1)]
        sampler.noise = "counter"
        made += [sampler.sample(2, classes=1)]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3]) and not torch.equal(made[0], made[1])


def test_the_id_of_a_generator_stays_its_own(emulated, monkeypatch):
    """For as long as there is a program that is found by it: a graph of CUDA's keeps the state alone."""

    class Generator(torch.Generator):
        """Of which there are weak references in torch 2.11, too."""

    monkeypatch.setattr(emulated, "capture", lambda space, function, generators: (function(), lambda: None))
    sampler = Sampler(toy(), 2, steps=2, cuda_graph=True, noise=Generator().manual_seed(1))
    sampler.sample(2, classes=1)
    known = weakref.ref(sampler.noise)
    sampler.noise = "counter"
    sampler.sample(2, classes=1)
    assert known() is not None
    sampler._runner.forget()
    assert known() is None


@pytest.mark.parametrize("graph", [True, False])
def test_levels_of_float64(graph, emulated):
    """A number for a level of a float64 state is that number: at sigma_min D is x, bit for bit."""
    model = toy().double()
    sampler, x, labels = Sampler(model, cuda_graph=graph), torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 2])
    for sigma in (0.002, 0.3, 0.002):
        assert torch.equal(sampler.denoise(x, sigma, labels), model(x, sigma, labels))
    assert torch.equal(sampler.denoise(x, 0.002, labels), x)


def test_defaults_of_others(small_networks_count):
    """torch's default dtype and device are nobody's business: float64, or a device without memory."""
    model, args = small_unet(model_channels=64).eval(), (torch.ones(1, 3, 8, 8), torch.ones(1))
    with torch.no_grad():
        wanted = cmfast.optimize(model)(*args)
        for _ in range(2):
            torch.set_default_dtype(torch.float64)
            try:
                assert torch.equal(cmfast.optimize(model)(*args), wanted)
            finally:
                torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(cmfast.optimize(model)(*args), wanted)


@pytest.mark.parametrize("graph", [False, "auto"])
def test_sampling_and_data_on_the_device_they_are_told(graph, emulated):
    wanted = Sampler(toy(), 2, steps=2, cuda_graph=graph).sample(3, seed=1)
    source = ImageData(torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1), torch.arange(12))
    batch = next(source.batches(5, seed=2))
    model = toy()
    with torch.device("meta"):
        assert torch.equal(Sampler(model, 2, steps=2, cuda_graph=graph).sample(3, seed=1), wanted)
        assert Sampler(model, 2).sample(0).device.type == "cpu"
        again = next(source.batches(5, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True))


def test_tf32_by_its_new_name():
    """PyTorch refuses to answer by the old name then."""
    sampler = Sampler(toy(), 2)
    wanted, before = sampler.sample(2), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(sampler.sample(2), wanted)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
