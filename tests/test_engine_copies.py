"""Samplers and optimised networks that are copied, pickled, saved, sent to other processes or forked."""

import copy
import io
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import cmfast
from cmfast import Denoiser, Sampler, watch
from cmfast.fast.network import _looking
from cmfast.memory import capturing
from tests.golden_utils import small_unet
from tests.graph_emulator import emulated_graphs  # noqa: F401  (the fixture `emulated`)
from tests.toy import ToyNetwork


def saved(value):
    """Through a file of torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch.save": saved}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def unet() -> Denoiser:
    """Of one resolution: as small as an optimised network can be."""
    network = small_unet(num_classes=5, channel_mult=[1], attention_resolutions=[1])
    return Denoiser(network, image_shape=(3, 8, 8)).eval()


def toy() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


def halve(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def unet2d() -> torch.nn.Module:
    pytest.importorskip("diffusers")
    from tests.compat.diffusers_utils import small_unet

    return small_unet()


@each_way
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["UNetModel", "Denoiser", "UNet2DModel"])
def test_optimised_networks(kind, dtype, way):
    """The same outputs, by the fast pass, of weights of its own; used before or not; the state dict goes both ways."""
    model = {"UNetModel": small_unet, "Denoiser": unet, "UNet2DModel": unet2d}[kind]()
    fast = cmfast.optimize(model.eval(), dtype)
    x, levels = torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.ones(2)
    labels = (torch.tensor([1, 2]),) if kind == "Denoiser" else ()

    def call(m):
        with torch.no_grad():
            out = m(x, levels, *labels)
        return getattr(out, "sample", out)

    unused = way(fast)
    wanted = call(fast)
    for twin in (unused, way(fast), way(way(fast))):
        assert type(twin) is type(fast) and cmfast.fast.refusal(twin) is None
        assert torch.equal(call(twin), wanted)
        halve(twin)
        assert not torch.equal(call(twin), wanted) and torch.equal(call(fast), wanted)
        assert not twin.load_state_dict(model.state_dict()).missing_keys and torch.equal(call(twin), wanted)
    halve(fast)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(call(fast), wanted)


OPTIONS = {
    "graph": {"cuda_graph": True, "optimize": False, "cache_size": 3},
    "optimised": {"cuda_graph": True, "steps": 2},
    "bfloat16": {"cuda_graph": False, "sampler": "heun", "steps": 2, "s_noise": 2.0, "dtype": torch.bfloat16},
    "compiled": {"cuda_graph": False, "compile": True},
}


@each_way
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samplers(options, way, emulated, monkeypatch):
    """A sampler of its own, of a model of its own, with the same settings and images, captured for itself."""
    monkeypatch.setattr("cmfast.networks.COMPILE_OPTIONS", {"backend": "eager", "dynamic": False})
    with cmfast.backend("reference"):
        model = toy() if "compile" in options else unet()
        sampler = Sampler(model, 2, **options)
        unused = way(sampler)
        wanted = sampler.sample(3, seed=1)
        for twin in (unused, way(sampler)):
            emulated.captures = 0
            assert twin.explain() == sampler.explain() and vars(twin).keys() == vars(sampler).keys()
            assert twin._runner.__getstate__() == {**sampler._runner.__getstate__(), "model": twin.model}
            assert torch.equal(twin.sample(3, seed=1), wanted) and emulated.captures == options["cuda_graph"]
            halve(twin.model)
            assert not torch.equal(twin.sample(3, seed=1), wanted) and torch.equal(sampler.sample(3, seed=1), wanted)


@each_way
def test_a_generator_goes_with_its_sampler(way):
    sampler = Sampler(unet(), 2, noise=torch.Generator().manual_seed(1))
    sampler.sample(2, classes=1)
    twin = way(sampler)
    assert torch.equal(twin.sample(4, classes=1), sampler.sample(4, classes=1))


def test_a_shallow_copy_shares_the_model():
    """And has settings of its own."""
    sampler = Sampler(unet(), 2, steps=2)
    wanted, twin = sampler.sample(2), copy.copy(sampler)
    twin.sigmas = [80.0]
    assert torch.equal(twin.sample(2), Sampler(sampler.model, 2).sample(2)) and torch.equal(sampler.sample(2), wanted)


def test_what_cannot_be_pickled_is_named():
    sampler = Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(sampler)
    assert torch.equal(copy.deepcopy(sampler).sample(2), sampler.sample(2))


# --- processes ------------------------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
# Python 3.12 and later warn that threads may hold locks: ours are looked after, which is what is tested.
quietly = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(function) -> bytes:
    """What the function returns, or the text of its error, in a forked process that has a minute."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)
            try:
                result = function()
            except BaseException as error:
                result = f"{type(error).__name__}: {error}".encode()
            os.write(writer, result)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {status}: {result!r}"
    return result


class Samples(Dataset):
    """An image is made by whoever asks for it."""

    def __init__(self, sampler, count):
        self.sampler, self.count = sampler, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.sampler.sample(1, seed=i)[0]


@forks
@quietly
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_forked_workers(graph, emulated):
    """Workers of a DataLoader go on with a sampler that was used before, and that is used beside them."""
    with cmfast.backend("reference"):
        sampler = Sampler(unet(), 2, steps=2, cuda_graph=graph)
        wanted = torch.stack([sampler.sample(1, seed=i)[0] for i in range(6)])
        loader = DataLoader(Samples(sampler, 6), 2, num_workers=2, multiprocessing_context="fork")
        made = []
        for batch in loader:
            made.append(batch)
            assert torch.equal(sampler.sample(1, seed=1)[0], wanted[1])
    assert torch.equal(torch.cat(made), wanted)


@pytest.mark.slow
def test_spawned_workers(counted):
    """They get the sampler by pickle, after it was used, and make what it had made on."""
    sampler = Sampler(unet(), 2, steps=2)
    wanted = torch.stack([sampler.sample(1, seed=i)[0] for i in range(6)])
    loader = DataLoader(Samples(sampler, 6), 2, num_workers=2, multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(loader)), wanted)
    counted("6 images by 2 spawned workers, all bits equal")


@forks
@quietly
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_fork_while_a_thread_samples(graph, emulated):
    """Its locks are the other thread's, which the child does not have; weights that changed there are seen there."""
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(ToyNetwork):
        def forward(self, x, t, y):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                go_on.wait(60)
            return super().forward(x, t, y)

    torch.manual_seed(0)
    model = Denoiser(Waiting(), image_shape=(3, 8, 8)).eval()
    sampler = Sampler(model, 2, cuda_graph=graph)
    wanted = Sampler(model, 2, cuda_graph=False).sample(2)
    thread = threading.Thread(target=sampler.sample, args=(2,))
    thread.start()
    inside.wait()

    def child():
        same = torch.equal(sampler.sample(2), wanted)
        halve(model)
        assert same and torch.equal(sampler.sample(2), Sampler(model, 2, cuda_graph=False).sample(2))
        return b"right"

    try:
        assert in_child(child) == b"right"
    finally:
        go_on.set()
        thread.join()
    assert torch.equal(sampler.sample(2), wanted)


def test_a_fork_takes_locks_in_the_order_of_a_capture():
    """Which looks at the model: in another order, the two would wait for each other."""
    inside, looked = threading.Event(), []

    def capture():
        with capturing:
            inside.set()
            time.sleep(0.2)
            looked.append(_looking.acquire(timeout=5))
            _looking.release()

    thread = threading.Thread(target=capture)
    thread.start()
    inside.wait()
    watch._take_locks()
    watch._leave_locks()
    thread.join()
    assert looked == [True]


@forks
@quietly
def test_a_fork_while_a_plan_is_made():
    """Of an optimised network, in another thread."""
    fast = cmfast.optimize(unet(), torch.bfloat16)
    sampler = Sampler(fast, 2)
    wanted, inside, go_on = sampler.sample(2), threading.Event(), threading.Event()

    def hold():
        with _looking:
            inside.set()
            go_on.wait(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        assert in_child(lambda: str(torch.equal(sampler.sample(2), wanted)).encode()) == b"True"
    finally:
        go_on.set()
        thread.join()


@forks
@quietly
@pytest.mark.parametrize("what", ["threads", "cuda"])
def test_what_a_forked_process_cannot_do(what, monkeypatch):
    """PyTorch's threads would be waited for without end, and its GPU fails by names of its own."""
    sampler = Sampler(unet(), 2)
    wanted = sampler.sample(2)

    def child():
        message = "this process was forked, and 2 threads of PyTorch did not come along: .*set_num_threads"
        if what == "threads":
            torch.set_num_threads(2)
        else:
            message = "forked from one that used the GPU, and CUDA does not work in it: start it by 'spawn'"
            monkeypatch.setattr(type(sampler._runner), "device", torch.device("cuda"))
        for call in (lambda: sampler.sample(2), sampler.explain, sampler.refresh):
            with pytest.raises(RuntimeError, match=message):
                call()
        torch.set_num_threads(1)
        monkeypatch.undo()
        return str(torch.equal(sampler.sample(2), wanted)).encode()

    assert in_child(child) == b"True"
    assert torch.equal(sampler.sample(2), wanted)
