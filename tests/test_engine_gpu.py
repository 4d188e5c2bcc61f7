"""The engine with real graphs, on a GPU."""

import gc
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import cmfast
from cmfast import Denoiser, Sampler, samplers
from cmfast.graphs import GraphError
from cmfast.objectives import ConsistencyDistillation
from cmfast.training import TrainStep
from cmfast.training.frozen import Frozen
from tests.golden_utils import small_unet
from tests.toy import ToyNetwork
from tests.training.toys import DATA, PAIRED, denoiser, teacher, unet, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval().cuda()


def small():
    """A U-Net, of which a half is linear layers and attention."""
    return Denoiser(small_unet(num_classes=7), image_shape=(3, 8, 8)).eval().cuda()


class Shifted(nn.Module):
    """F of data of any shape."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, timesteps):
        return self.shift - 0.1 * x


def plain(model, batch=3, **options):
    return Sampler(model, batch, cuda_graph=False, **options)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_graph_makes_the_same_bits(model, name):
    graphed = Sampler(model, 3, sampler=name, cuda_graph=True)
    for options in ({}, {"seed": 5}, {"classes": 2}):
        assert torch.equal(graphed.sample(10, **options), plain(model, sampler=name).sample(10, **options))
    assert graphed.startup > 0


@pytest.mark.parametrize("shape", [(2,), (3, 17), (4, 8, 12), (3, 4, 6, 5)], ids=str)
@pytest.mark.parametrize("name", ["multistep", "heun"])
def test_data_that_are_no_pictures(name, shape):
    """Of any shape and range: float32 numbers, which go to the host as they are."""
    model = Denoiser(Shifted(), image_shape=shape, bounded=False).cuda()
    made = Sampler(model, 3, sampler=name, steps=4, cuda_graph=True).sample(7, seed=1)
    assert made.dtype == torch.float32 and made.shape == (7, *shape) and made.abs().max() > 1
    assert torch.equal(made, plain(model, sampler=name, steps=4).sample(7, seed=1))
    torch.testing.assert_close(made, plain(model.cpu(), sampler=name, steps=4).sample(7, seed=1), rtol=1e-3, atol=1e-3)


def test_given_noise_and_single_calls(model):
    graphed = Sampler(model, steps=3, cuda_graph=True)
    labels = torch.tensor([1, 2], device="cuda")
    for _ in range(2):
        noise, *draws = torch.randn(3, 2, 3, 8, 8, device="cuda").unbind()
        made = graphed.generate(noise, labels, noise_fn=draws)
        assert torch.equal(made, plain(model, steps=3).generate(noise, labels, noise_fn=draws))
        for sigma in (0.5, torch.rand(2, device="cuda")):
            assert torch.equal(graphed.denoise(noise, sigma, labels), plain(model).denoise(noise, sigma, labels))


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_from_a_generator(model, steps):
    made = []
    for graph in (True, False):
        generator = torch.Generator("cuda").manual_seed(1)
        sampler = Sampler(model, 2, steps=steps, noise=generator, cuda_graph=graph)
        made.append(torch.cat([sampler.sample(3, classes=1), sampler.sample(2, classes=1)]))
    assert torch.equal(*made)


def test_a_changed_model(model):
    sampler = Sampler(model, 2, cuda_graph=True)
    sampler.sample(4)
    conv = model.network.conv1
    with torch.no_grad():
        conv.weight.mul_(2)
    assert torch.equal(sampler.sample(4), plain(model, 2).sample(4))
    conv.weight.data = -conv.weight.data
    assert torch.equal(sampler.sample(4), plain(model, 2).sample(4))
    model.network.conv1 = nn.Conv2d(3, 8, 3, padding=1, device="cuda")
    assert torch.equal(sampler.sample(4), plain(model, 2).sample(4))


def test_a_broken_capture_names_the_module_and_leaves_nothing_behind(model):
    class Reads(nn.Module):
        def forward(self, x):
            return x if x.sum().item() < 1e9 else -x

    good, conv = Sampler(model, 2, cuda_graph=True), model.network.conv1
    wanted = good.sample(4)
    model.network.conv1 = nn.Sequential(Reads(), conv)
    with pytest.raises(GraphError, match=r"in network\.conv1\.0 \(Reads\)"):
        Sampler(model, 2, cuda_graph=True).sample(2)
    with pytest.warns(RuntimeWarning, match="goes on without a graph"):
        assert torch.equal(Sampler(model, 2).sample(4), wanted)
    model.network.conv1 = conv
    assert torch.equal(good.sample(4), wanted)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    # PyTorch's allocator and generator are out of the capture as well.
    torch.cuda.empty_cache()
    torch.randn(3, device="cuda")
    generated = Sampler(model, 2, noise=torch.Generator("cuda").manual_seed(0), cuda_graph=True)
    assert generated.sample(2).shape == (2, 3, 8, 8)


def test_a_broken_capture_keeps_no_memory(model):
    class Breaks(nn.Module):
        def forward(self, x):
            room = torch.zeros(2**26, dtype=torch.uint8, device="cuda")
            return x if room[0].item() < 1 else -x

    model.network.conv1 = nn.Sequential(Breaks(), model.network.conv1)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.warns(RuntimeWarning, match="goes on without a graph"):
        Sampler(model, 2).sample(2)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + 2**26


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("make", [lambda model: model, lambda _: cmfast.optimize(small(), torch.bfloat16)],
                         ids=["plain", "optimised"])
def test_threads_on_streams_of_their_own(model, make, graph):
    """What is made of an optimised network's weights by the first of them, all others use."""
    wanted = [plain(make(model), steps=2).sample(20, seed=i) for i in range(4)]
    model = make(model)
    shared, made = Sampler(model, 3, steps=2, cuda_graph=graph), [None] * 4

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            sampler = shared if i < 2 else Sampler(model, 3, steps=2, cuda_graph=graph)
            made[i] = sampler.sample(20, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_a_graph_that_goes_leaves_the_others_their_memory():
    """With it, PyTorch gives back the workspaces that cuBLAS has for its stream."""
    sampler, labels = Sampler(small(), cache_size=2, cuda_graph=True), torch.tensor([1], device="cuda")

    def denoised(size):
        x = torch.linspace(-1, 1, 3 * size**2, device="cuda").view(1, 3, size, size)
        return sampler.denoise(x, 1.0, labels)

    denoised(8)
    wanted = denoised(16)
    for _ in range(2):
        denoised(24)
        assert len(sampler._runner._programs) == 2
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # Whatever was given back is someone else's now.
        others = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
        assert torch.equal(denoised(16), wanted)
        torch.cuda.synchronize()
        assert all(x.isnan().all() for x in others)
        # As torch.compile(mode="reduce-overhead") does.
        torch._C._cuda_clearCublasWorkspaces()


@pytest.mark.parametrize("optimize", [True, False])
def test_a_run_with_graphs_is_one_without(optimize):
    """Of a teacher and a target, in microbatches of two sizes; convolutions add up in one order, and in float32."""
    objective, ends = ConsistencyDistillation(loss_norm="l2", start_scales=6), []
    for graphs in (True, False):
        options = replace(PAIRED, graphs=graphs, optimize=optimize, microbatch=4)
        models = denoiser(objective, unet(dropout=0.2)).cuda(), teacher(objective).cuda()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            step, batches = TrainStep(models[0], objective, options, teacher_model=models[1]), DATA.batches(6, seed=0)
            start = weights(step.model)
            for number in range(options.steps):
                step(next(batches), number)
        ends.append(torch.cat([weights(step.model), weights(step.target_model)]))
        networks = [step._target.network, step._teacher.network]
        assert all(isinstance(network, Frozen) == graphs for network in networks)
        assert not graphs or all(network.refusal is None and len(network._programs) > 1 for network in networks)
    assert (weights(step.model) - start).abs().max() > 1e-3
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_a_batch_that_does_not_fit(model):
    class Hungry(ToyNetwork):
        def forward(self, x, t, y):
            # Half the room for four images.
            torch.empty(len(x), room // 8, dtype=torch.uint8, device="cuda")
            return super().forward(x, t, y)

    # Other processes may test on the same device.
    room, whole = 2**31, torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / whole)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"batch_size=64 .*: the largest that does is [4-7]$"):
            Sampler(Denoiser(Hungry().cuda(), image_shape=(3, 8, 8)), 64).sample(64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
