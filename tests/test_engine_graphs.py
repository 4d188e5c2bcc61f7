"""Graphs, emulated on the CPU: the bits of a run call by call, whatever buffers hold; errors that name the culprit."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmfast
from cmfast import Denoiser, Sampler, graphs, levels, ops, samplers
from cmfast.engine import DRAWING
from cmfast.graphs import CudaSpace, GraphError, ProgramCache
from cmfast.noise import CounterNoise
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork

SOLVERS = [{"sampler": name, "steps": 3} for name in samplers.SAMPLERS if name not in ("onestep", "multistep")]
FORMS = [{"sampler": "onestep"}, {"steps": 1}, {"steps": 3}, *SOLVERS, {"sampler": "heun", "steps": 3, "s_churn": 1.0}]
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


def eager(model, batch=3, **options):
    return Sampler(model, batch, cuda_graph=False, **options)


@EACH_FORM
def test_a_graph_makes_the_same_bits(model, emulated, form):
    graphed, plain = Sampler(model, 3, **form), eager(model, **form)
    assert graphed.explain()["loop"][0] == "graph" and plain.explain()["loop"][0] == "eager"
    for options in ({}, {"seed": 5}, {"seed": -(2**70)}, {"classes": 2}, {"classes": [0, 1, 2, 3, 4, 5, 6]}):
        assert torch.equal(graphed.sample(7, **options), plain.sample(7, **options))
    assert emulated.captures == 1 and emulated.replays == 15


@pytest.mark.parametrize("pixels", [None, "nearest"])
@EACH_FORM
def test_generate_from_given_noise(model, emulated, form, pixels):
    graphed, plain = Sampler(model, **form), eager(model, **form)
    for _ in range(2):
        noise, labels, given = torch.randn(2, 3, 8, 8), torch.randint(7, (2,)), []

        def draw(x, given=given):
            given.append(torch.randn_like(x))
            return given[-1]

        wanted = plain.generate(noise, labels, noise_fn=draw, pixels=pixels)
        made = graphed.generate(noise, labels, noise_fn=given, pixels=pixels)
        assert torch.equal(made, wanted)
        assert torch.equal(plain.generate(noise, labels, noise_fn=given, pixels=pixels), wanted)
        graphed.generate(torch.randn(2, 3, 8, 8), labels, noise_fn=given, pixels=pixels)
        assert torch.equal(made, wanted)
    assert emulated.captures == 1 and emulated.replays == 4


def test_generate_from_torchs_generator(model, emulated):
    graphed, plain = Sampler(model, steps=3), eager(model, steps=3)
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    torch.manual_seed(3)
    first, second = (graphed.generate(noise, labels) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(plain.generate(noise, labels), first) and torch.equal(plain.generate(noise, labels), second)
    assert not torch.equal(first, second)


def test_generate_from_functions_and_draws_runs_eagerly(model, emulated):
    graphed, plain = Sampler(model, steps=2), eager(model, steps=2)
    labels, index = torch.tensor([1, 2]), torch.tensor([7, 8])
    made = []
    for sampler in (graphed, plain):
        noise = CounterNoise(4, index)
        made.append(sampler.generate(noise.next(), labels, noise_fn=noise, pixels="trunc"))
    assert torch.equal(*made) and emulated.captures == 0
    asked = Sampler(model, cuda_graph=True)
    with pytest.raises(GraphError, match="cuda_graph=True cannot be had: noise is drawn by a function"):
        asked.generate(torch.randn(2, 3, 8, 8), labels, noise_fn=torch.randn_like)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(GraphError, match="cannot be had: the model .Denoiser. has a hook"):
        asked.sample(2)


@pytest.mark.parametrize("count, message", [(1, "more are drawn"), (3, "2 are drawn")])
def test_noise_of_the_wrong_number(model, emulated, count, message):
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for sampler in (Sampler(model, steps=3), eager(model, steps=3)):
        with pytest.raises(ValueError, match=message):
            sampler.generate(noise, labels, noise_fn=[noise] * count)


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_from_a_generator(model, emulated, steps):
    made = []
    for graph in (True, False):
        generator = torch.Generator().manual_seed(1)
        sampler = Sampler(model, 2, steps=steps, noise=generator, cuda_graph=graph)
        made.append(torch.cat([sampler.sample(3, classes=1), sampler.sample(2, classes=1)]))
    assert torch.equal(*made) and emulated.captures == 1
    assert not torch.equal(made[0][0], made[0][3])


def test_denoise_takes_every_shape(model, emulated):
    graphed = Sampler(model)
    for shape in [(2, 3, 8, 8), (1, 3, 16, 8), (2, 3, 8, 8)]:
        x, labels = torch.randn(shape), torch.randint(7, shape[:1])
        for sigma in (0.5, 1.5, torch.tensor(0.5), torch.rand(shape[0])):
            assert torch.equal(graphed.denoise(x, sigma, labels), model(x, sigma, labels))
    assert emulated.captures == 6 and emulated.replays == 12


def test_outputs_are_nobodys_buffers(model, emulated):
    sampler = Sampler(model, 2)
    batches = [images for images, _ in sampler.stream(6, classes=1)]
    x, labels = torch.randn(1, 3, 8, 8), torch.tensor([1])
    denoised = [sampler.denoise(x, sigma, labels) for sigma in (1.0, 2.0)]
    memory = {x.untyped_storage().data_ptr() for x in (*batches, *denoised)}
    assert len(memory) == 5 and not torch.equal(batches[0], batches[1])


def test_the_cache_has_a_bound(model, emulated):
    sampler = Sampler(model, cache_size=2)
    sizes = [8, 16, 8, 24, 8, 16]  # 24 pushes 16 out, which was not used for longest; 16 then 24
    for size in sizes:
        x = torch.randn(1, 3, size, 8)
        assert torch.equal(sampler.denoise(x, 1.0, torch.tensor([1])), model(x, 1.0, torch.tensor([1])))
    assert emulated.captures == 4 and emulated.drains == 2 and len(sampler._runner._programs) == 2


def test_a_pool_whose_graphs_are_gone_is_not_used_again(model, emulated):
    sampler = Sampler(model, 2)
    before = sampler.sample(2)
    sampler.refresh()
    assert torch.equal(sampler.sample(2), before) and emulated.captures == 2 and emulated.drains == 1


def test_programs_are_forgotten_when_none_runs(model, emulated):
    """Of one sampler in two threads, of which one finds that its batch is too large."""
    sampler, kept = Sampler(model, 2), []

    def take(pixels):
        thread = threading.Thread(target=sampler._runner.forget)
        thread.start()
        thread.join(0.1)
        kept.append(len(sampler._runner._programs))
        return thread

    sampler._make(range(2), 0, torch.tensor([1, 1]), lambda pixels: kept.append(take(pixels)))
    kept[1].join()
    assert kept[0] == 1 and len(sampler._runner._programs) == 0


def test_a_backend_is_captured_for_itself(model, emulated):
    sampler = Sampler(model, 2)
    sampler.sample(2)
    with cmfast.backend("reference"):
        sampler.sample(2)
    sampler.sample(2)
    assert emulated.captures == 2


class Reads(nn.Module):
    """Breaks a capture: looks at a value on the host."""

    def forward(self, x):
        return x if x.sum().item() < 1e9 else -x


class Culprit(ToyNetwork):
    def __init__(self):
        super().__init__()
        self.middle = nn.Sequential(nn.Identity(), Reads())

    def forward(self, x, t, y):
        return super().forward(self.middle(x), t, y)


def test_a_broken_capture_names_the_module(emulated):
    model = Denoiser(Culprit(), image_shape=(3, 8, 8)).eval()
    with pytest.raises(GraphError, match=r"in network\.middle\.1 \(Reads\): RuntimeError: .*not permitted") as error:
        Sampler(model, 2, cuda_graph=True).sample(2)
    assert isinstance(error.value, RuntimeError)
    sampler, plain = Sampler(model, 2), eager(model, 2)
    with pytest.warns(RuntimeWarning, match=r"middle\.1 \(Reads\).*goes on without a graph"):
        images = sampler.sample(4)
    assert torch.equal(images, plain.sample(4))
    assert sampler.explain()["loop"][0] == "eager" and "Reads" in sampler.explain()["loop"][1]
    captures = emulated.captures
    sampler.sample(4)
    assert emulated.captures == captures
    model.network.middle[1] = nn.Identity()
    assert torch.equal(sampler.sample(4), plain.sample(4))
    assert sampler.explain()["loop"][0] == "graph" and emulated.captures == captures + 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_capture_that_breaks_outside_of_modules(emulated):
    def noise(x):
        return torch.randn(x.shape, generator=torch.Generator())

    model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, cuda_graph=True, steps=2)
    loop = sampler._loop
    sampler._loop = lambda model, x, labels, noise_fn, pixels: loop(model, x, labels, noise, pixels)
    with pytest.raises(GraphError, match="outside of the model's modules: RuntimeError: a generator"):
        sampler.sample(2)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"callback": print}, "callback is called between steps"),
        ({"progress": True}, "progress is called between steps"),
        ({"cuda_graph": False}, "cuda_graph=False"),
    ],
    ids=["callback", "progress", "off"],
)
def test_why_there_is_no_graph(model, emulated, options, reason):
    options = {"sampler": "heun", "steps": 2, **options}
    sampler = Sampler(model, 2, **options)
    assert reason in sampler.explain()["loop"][1]
    assert torch.equal(sampler.sample(2), eager(model, 2, sampler="heun", steps=2).sample(2)) and not emulated.captures
    if "cuda_graph" not in options:
        with pytest.raises(RuntimeError, match=f"cuda_graph=True cannot be had: {reason}"):
            Sampler(model, **{**options, "cuda_graph": True})


def test_a_callback_that_is_put_in_later_is_called(model, emulated):
    sampler, seen = Sampler(model, 2, sampler="heun", steps=3), []
    sampler.sample(2)
    sampler.options["callback"] = lambda made: seen.append(made["i"])
    for _ in range(2):
        sampler.sample(2)
    assert seen == 2 * [0, 1, 2] and "callback" in sampler.explain()["loop"][1]
    del sampler.options["callback"]
    sampler.sample(2)
    assert len(seen) == 6 and emulated.replays == 2


def test_no_graph_of_functions_unless_asked_for(emulated):
    def function(x, sigma):
        return 0.1 * x

    assert "function" in Sampler(function, image_shape=(1, 4, 4)).explain()["loop"][1]
    graphed = Sampler(function, 2, image_shape=(1, 4, 4), cuda_graph=True)
    assert torch.equal(graphed.sample(3), Sampler(function, 2, image_shape=(1, 4, 4)).sample(3))
    assert emulated.captures == 1


def test_no_graph_under_autocast(model, emulated):
    sampler = Sampler(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in sampler.explain()["loop"][1]
        assert torch.equal(sampler.sample(2), eager(model, 2).sample(2))
    assert not emulated.captures


def test_inference_mode(model, emulated):
    """Buffers that are made inside serve outside, and the other way round."""
    sampler, wanted = Sampler(model, 2), eager(model, 2).sample(4)
    with torch.inference_mode():
        assert torch.equal(sampler.sample(4), wanted)
    assert torch.equal(sampler.sample(4), wanted)
    x, labels = torch.randn(1, 3, 8, 8), torch.tensor([1])
    before = sampler.denoise(x, 1.0, labels)
    with torch.inference_mode():
        assert torch.equal(sampler.denoise(x, 1.0, labels), before)
        made = Sampler(Denoiser(ToyNetwork(), image_shape=(3, 8, 8)), 2, cuda_graph=True)
    assert torch.equal(made.sample(2), eager(made.model, 2).sample(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_asking_for_a_graph_without_a_gpu(model):
    with pytest.raises(RuntimeError, match="cuda_graph=True cannot be had: .* cpu device"):
        Sampler(model, cuda_graph=True)


def test_how_a_real_space_calls_torch(monkeypatch):
    """Order matters: waits before runs, generators before a capture, and the stream of before after one that fails."""
    calls = []

    class Noted:
        """Anything of torch.cuda: notes what is called, and is a context of nothing."""

        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            return Noted(f"{self.name}.{name}")

        def __call__(self, *arguments, **options):
            calls.append((self.name, *(x.name for x in arguments if isinstance(x, Noted)), *options.values()))
            return Noted(self.name.replace("current_stream", "user").lower())

        def __enter__(self):
            calls.append((f"enter {self.name}",))

        def __exit__(self, *error):
            calls.append((f"exit {self.name}",))

    for name in ("Stream", "Event", "CUDAGraph", "graph", "current_stream", "set_stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, Noted(name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append(("clear",)), raising=False)
    space = CudaSpace(torch.device("cuda", 0))
    # From another ring of streams than those that threads and copies have.
    assert ("Stream", -1) in calls
    calls.clear()
    with space.turn():
        space.warm_up(lambda: calls.append("run"))
        ready = calls.index("run")
        assert ("stream.wait_stream", "user") in calls[:ready] and ("enter stream",) in calls[:ready]
        assert calls.count("run") == 2 and calls[-1] == ("user.wait_stream", "stream")
        result, replay = space.capture(lambda: "result", [Noted("generator")])
        assert result == "result" and replay.name == "cudagraph.replay"
        names = [call[0] for call in calls]
        assert (
            names.index("cudagraph.register_generator_state") < names.index("enter graph") < names.index("exit graph")
        )
        # Workspaces of cuBLAS are taken in the capture, and left to the pool.
        around = [name for name in names if name in ("clear", "enter graph", "exit graph")]
        assert around == ["clear", "enter graph", "exit graph", "clear"]
        assert next(call for call in calls if call[0] == "graph")[1:] == (
            "cudagraph",
            "pool",
            space.stream,
            "thread_local",
        )
        # What broke is ended, what its pool and generators are left with is put right, and nothing else is captured.
        pools = iter(["fresh pool"])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        ended = lambda *arguments: calls.append(("end", *arguments))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
        released = lambda *arguments: calls.append(("release", *arguments))  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_releasePool", released, raising=False)
        monkeypatch.setattr(torch, "empty", lambda *sizes, device: Noted("place"))
        monkeypatch.setattr(graphs, "_broken", [])
        before = len(calls)
        with pytest.raises(KeyError):
            space.capture(lambda: {}["x"], [Noted("generator")])
        assert calls[-1] == ("set_stream", "user") and space.pool == "fresh pool" and len(graphs._broken) == 1
        mended = calls[before:]
        assert [name for name, *_ in mended if name in ("clear", "exit graph")][:3] == ["clear", "exit graph", "clear"]
        mended = mended[mended.index(("end", 0, "pool")):]
        assert mended[1] == ("release", 0, "pool")
        assert [call for call in mended if call[0] == "graph"] == [
            ("graph", "cudagraph", None, space.stream, "thread_local")
        ]
        assert ("cudagraph.register_generator_state", "generator") in mended and ("place.zero_",) in mended
    assert calls.index(("user.wait_event", "event")) < ready and ("event.record", "user") in calls[-3:]


def test_what_a_real_space_gives_up_after_a_capture_that_broke(monkeypatch):
    """From PyTorch 2.14 on, which ends the capture itself and has the graph give up the pool: nothing."""
    given_up = []

    def ended(device, pool):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    for name in ("Stream", "Event", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: torch.zeros(sizes))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *arguments: given_up.append(arguments), raising=False)
    monkeypatch.setattr(graphs, "_broken", [])
    space = CudaSpace(torch.device("cuda", 0))
    pool = space.pool
    space._mend(object(), ())
    assert not given_up and not graphs._broken and space.pool is not pool


def test_a_real_space_waits_for_its_own_programs(monkeypatch):
    """Also for the one that another thread runs; and for no other stream, of which one may be in a capture."""
    calls = []

    class Event:
        def record(self, stream):
            calls.append("done")

        def synchronize(self):
            calls.append("waited")

    class Stream:
        def __init__(self, *arguments, **options):
            pass

        def wait_event(self, event):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("all"))
    space = CudaSpace(torch.device("cuda", 0))
    thread = threading.Thread(target=space.drain)
    with space.turn():
        thread.start()
        thread.join(0.1)
        assert not calls
    thread.join()
    assert calls == ["done", "waited"]


class OnHost(TorchDispatchMode):
    """Fails where anything touches the host's memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        touched = [
            x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"
        ]
        assert not touched, f"{func} in the loop has a tensor on the host"
        return out


@EACH_FORM
def test_nothing_is_copied_between_host_and_device(form):
    """With tensors that say they are on a GPU, whose values no one can read."""
    name = form.get("sampler", "multistep")
    options = {key: value for key, value in form.items() if key == "s_churn"}
    sigmas = samplers.sampler_sigmas(name, steps=form.get("steps"))
    with FakeTensorMode():
        with torch.device("cuda"):
            model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()
            index, seed, labels = torch.arange(4), torch.full((), 3), torch.zeros(4, dtype=torch.int64)
        options |= {"sampler": name, "sigmas": sigmas, "labels": labels, "image_shape": (3, 8, 8), "pixels": "trunc"}

        def run():
            noise = CounterNoise(seed, index)
            draws = {"noise_fn": noise} if name in DRAWING else {}
            return samplers.sample(model, noise.next(), **options, **draws)

        kept = {}
        with levels.keep_levels(kept):
            run()
            with OnHost():
                made = run()
        assert kept and made.device.type == "cuda" and made.dtype == torch.uint8
        with pytest.raises(AssertionError, match="on the host"), OnHost():
            run()


def test_threads(emulated):
    """Samplers in threads, of one model and of two, one of them in training mode, are those in sequence."""
    torch.manual_seed(0)
    model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).train()
    other = Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()
    cases = [(model, {"steps": 2}), (model, {"sampler": "heun", "steps": 3}), (other, {"steps": 2})] * 2
    wanted = [eager(m, **options).sample(9, seed=i) for i, (m, options) in enumerate(cases)]
    for graph in ("auto", False):
        made = [None] * len(cases)
        shared = Sampler(model, 3, steps=2, cuda_graph=graph)

        def work(i, graph=graph, made=made, shared=shared):
            m, options = cases[i]
            sampler = shared if i in (0, 3) else Sampler(m, 3, cuda_graph=graph, **options)
            made[i] = sampler.sample(9, seed=i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
        assert model.training and all(module.training for module in model.modules()) and not other.training
    assert emulated.captures == 5


def test_cache_without_programs():
    cache = ProgramCache(1)
    cache.clear(None)
    assert len(cache) == 0 and cache.get("x") is None


def test_noise_and_labels_are_bit_equal(model, emulated, monkeypatch):
    """For batches of 1, 3 and 64, as a graph and call by call: the bytes of the noise, and the labels, as pixels."""

    def record(model, noise, *, labels, noise_fn, **options):
        first = ops.normal(noise.seed, noise.index, (3, 8, 8), draw=noise.draw)
        parts = [first, noise_fn(first), labels[:, None].float()]
        return torch.cat([part.flatten(1) for part in parts], dim=1).view(torch.uint8)

    monkeypatch.setattr("cmfast.engine.sample", record)
    seen = [
        Sampler(model, batch, steps=2, cuda_graph=graph).sample(5, seed=1)
        for batch in (1, 3, 64)
        for graph in (True, False)
    ]
    assert seen[0].shape == (5, 4 * (2 * 192 + 1)) and emulated.captures == 3
    assert all(torch.equal(seen[0], other) for other in seen[1:])
