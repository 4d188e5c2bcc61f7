"""The Sampler: images follow from (seed, index), whatever the batch."""

import copy
import threading

import numpy as np
import pytest
import torch

import cmfast
from cmfast import Denoiser, Sampler, ops, samplers, sharding
from cmfast.exact import MixtureDenoiser
from cmfast.memory import capturing, largest_that_fits
from cmfast.ranks import Ranks
from cmfast.tolerances import GOLDEN_LOOP, GOLDEN_VALUE
from cmfast.training import TrainOptions, TrainStep
from cmfast.transfer import HostCopies
from tests.golden_utils import relative_error, small_unet
from tests.toy import ToyNetwork


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Denoiser(ToyNetwork(), image_shape=(3, 8, 8)).eval()


@pytest.mark.parametrize("options", [{"steps": 2}, {"sampler": "heun", "steps": 4, "s_churn": 2.0}], ids=str)
def test_batch_size_changes_nothing(model, options):
    images = {b: Sampler(model, b, **options).sample(7, seed=3) for b in (1, 3, 64)}
    assert images[1].shape == (7, 8, 8, 3) and images[1].dtype == torch.uint8
    for other in (3, 64):
        # One level: matrix kernels of another batch size round differently.
        assert (images[other].int() - images[1].int()).abs().max() <= 1


def test_tail_is_bit_equal_at_one_batch_size(model):
    sampler = Sampler(model, 4, steps=2)
    assert torch.equal(sampler.sample(8, seed=0)[:5], sampler.sample(5, seed=0))


def test_progress(model, capsys):
    sampler = Sampler(model, 4, steps=2)

    def shared(n, progress):
        return sharding.sample(sampler, n, Ranks(), labels=sampler.labels(n), progress=progress)

    for sample in (sampler.sample, shared):
        assert torch.equal(sample(5, progress=True), sample(5, progress=False))
        shown = capsys.readouterr().err
        assert "2/2" in shown and "batch" in shown
        sample(5, progress=False)
        assert not capsys.readouterr().err


def test_seed_matters(model):
    sampler = Sampler(model, 4)
    assert not torch.equal(sampler.sample(4, seed=0), sampler.sample(4, seed=1))


@pytest.mark.parametrize("classes", [3, [3] * 5, torch.full((5,), 3)], ids=["one", "list", "tensor"])
def test_classes(model, classes):
    sampler = Sampler(model, 4)
    assert sampler.labels(5, classes=classes).tolist() == [3] * 5
    assert torch.equal(sampler.sample(5, classes=classes), sampler.sample(5, classes=3))


@pytest.mark.parametrize(
    "classes, message", [(7, "from 0 to 6"), (-1, "from 0 to 6"), ([1, 2], "one class or 5"), ([0, 0, 0, 0, 9], "9")]
)
def test_bad_classes(model, classes, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, 4).sample(5, classes=classes)


def test_unconditional():
    sampler = Sampler(lambda x, sigma: 0.1 * x, 2, image_shape=(1, 4, 4))
    assert sampler.labels(3) is None and sampler.sample(3).shape == (3, 4, 4, 1)
    with pytest.raises(ValueError, match="unconditional"):
        sampler.sample(3, classes=1)


def test_every_form_of_two_steps_is_the_same(model):
    forms = [{"steps": 2}, {"ts": (0, 22, 39)}, {"sigmas": Sampler(model, steps=2).sigmas}]
    images = [Sampler(model, 4, **form).sample(4) for form in forms]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_generate_is_the_algorithm(model):
    """Through the Sampler as without it, from given noise."""
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for name in samplers.SAMPLERS:
        sampler = Sampler(model, 2, sampler=name)
        torch.manual_seed(0)
        by_sampler = sampler.generate(noise, labels)
        torch.manual_seed(0)
        by_hand = samplers.sample(model, noise, sampler=name, sigmas=sampler.sigmas, labels=labels)
        assert relative_error(by_sampler, by_hand) <= GOLDEN_LOOP


def test_pixels_are_those_of_the_images(model):
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    for name in samplers.SAMPLERS:
        sampler = Sampler(model, 2, sampler=name)
        torch.manual_seed(0)
        images = sampler.generate(noise, labels)
        torch.manual_seed(0)
        assert torch.equal(sampler.generate(noise, labels, pixels="trunc"), ops.to_uint8(images))


def test_explain(model):
    explained = Sampler(model, dtype=torch.float32, optimize=False).explain()
    assert explained["network"] == ("as given", "optimize=False was asked for")
    assert explained["compile"][0] == "off" and "a minute or more" in explained["compile"][1]
    if not torch.cuda.is_available():
        assert explained["loop"] == ("eager", "the model is on a cpu device: CUDA graphs are for GPUs")
    function = Sampler(lambda x, sigma: x, image_shape=(1, 4, 4))
    assert function.explain()["network"] == ("as given", "the model is a function")
    with pytest.raises(RuntimeError, match="optimize=True cannot be had: the model is a function"):
        Sampler(lambda x, sigma: x, image_shape=(1, 4, 4), optimize=True)
    elsewhere = Sampler(copy.deepcopy(model).to("meta")).explain()["network"]
    assert elsewhere[0] == "as given" and elsewhere[1].endswith("the model is on a meta device")


def test_denoise(model):
    sampler = Sampler(model)
    x, labels = torch.randn(2, 3, 16, 8), torch.tensor([1, 2])
    for sigma in (0.002, torch.tensor(3.0), torch.tensor([1.0, 70.0])):
        assert relative_error(sampler.denoise(x, sigma, labels), model(x, sigma, labels)) <= GOLDEN_VALUE
    assert not sampler.denoise(x, 1.0, labels).requires_grad
    with pytest.raises(ValueError, match="labels are missing"):
        sampler.denoise(x, 1.0)


def test_batches_are_handed_out_one_later_where_copies_travel(model, monkeypatch):
    """As on a GPU: a batch comes when the next has been started, and none is lost or overwritten."""
    wanted = [images.clone() for images, _ in Sampler(model, 2).stream(7)]

    class Travelling(HostCopies):
        def __init__(self, device):
            super().__init__(device)
            self.ahead = 1

    monkeypatch.setattr("cmfast.engine.HostCopies", Travelling)
    sampler, started = Sampler(model, 2), []
    make = sampler._make
    sampler._make = lambda index, *rest: (started.append(index.start), make(index, *rest))
    seen = []
    for images, labels in sampler.stream(7):
        seen.append((images, labels, len(started)))
    assert [count for *_, count in seen] == [2, 3, 4, 4] and [len(labels) for _, labels, _ in seen] == [2, 2, 2, 1]
    assert all(torch.equal(images, other) for (images, *_), other in zip(seen, wanted, strict=True))


def test_streams_for_copies(monkeypatch):
    """One of each thread for each device, however often it samples: PyTorch has 32."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or len(made))

    def work():
        for index in (0, 1, 0, 1):
            HostCopies(torch.device("cuda", index))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [device.index for device in made] == [0, 1, 0, 1]
    assert HostCopies(torch.device("cpu"))._stream is None


def test_no_memory_is_given_back_while_a_graph_is_captured(monkeypatch):
    free = []

    def empty_cache():
        thread = threading.Thread(target=lambda: free.append(capturing.acquire(blocking=False)))
        thread.start()
        thread.join()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert largest_that_fits(lambda size: None, 4) == 3 and free == [False, False]


@pytest.mark.parametrize("largest", [0, 1, 5, 7])
def test_a_batch_that_does_not_fit(model, largest):
    class Small(ToyNetwork):
        def forward(self, x, t, y):
            if len(x) > largest:
                message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"
                raise (torch.OutOfMemoryError("CUDA out of memory") if largest % 2 else RuntimeError(message))
            return super().forward(x, t, y)

    sampler = Sampler(Denoiser(Small(), image_shape=(3, 8, 8)), 8)
    message = f"batch_size=8 does not fit .*: the largest that does is {largest}$" if largest else "not one image does"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        sampler.sample(16)


def test_other_errors_pass(model):
    with pytest.raises(RuntimeError, match="channels"):
        Sampler(model, 2, image_shape=(4, 8, 8)).sample(2)


def test_ts(model):
    assert Sampler(model, steps=1).ts == (0, 39)
    assert Sampler(model, steps=2).ts == Sampler(model, ts=(0, 22, 39)).ts == (0, 22, 39)
    assert Sampler(model, sampler="euler", ts=(0, 7, 11), num_scales=12).ts == (0, 7, 11)


def test_start_up_is_reported(model):
    sampler = Sampler(model, 2)
    before = sampler.startup
    sampler.sample(2)
    assert 0 <= before < 1 and sampler.startup == before  # nothing to compile or capture here


def test_training_mode_is_left_as_it_was(model):
    model.train()
    seen = []
    handle = model.network.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    Sampler(model, 2).sample(2)
    handle.remove()
    assert seen == [False] and model.training
    model.eval()


def test_none_at_all(model):
    assert Sampler(model, 4).sample(0).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"sampler": "nope"}, "known:"),
        ({"steps": 1, "ts": (0, 39)}, "not more"),
        ({"cache_size": 0}, "cache_size"),
        ({"cuda_graph": "yes"}, "cuda_graph must be 'auto', True or False"),
        ({"optimize": None}, "optimize must be"),
        ({"compile": "all"}, "'regional'"),
        ({"noise": "torch"}, "a torch.Generator"),
        ({"dtype": torch.bfloat16, "optimize": False}, "dtype=torch.bfloat16 needs .* Its own dtype is torch.float32"),
    ],
    ids=str,
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(model, **options)
    with pytest.raises(ValueError, match="image_shape"):
        Sampler(lambda x, sigma: x)
    with pytest.raises(ValueError, match="n must"):
        Sampler(model).sample(-1)


def test_another_model_is_another_sampler(model):
    sampler = Sampler(model, 2)
    assert sampler.model is model
    with pytest.raises(AttributeError, match="model"):
        sampler.model = model


@pytest.mark.parametrize("use", ["sampler", "samples", "loss", "training"])
def test_a_bare_network_is_no_model(use):
    """It takes the arguments of D, and its results would be taken for images."""
    network, x = small_unet(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(TypeError, match=r"the model is a UNetModel, a network .*wrap it in cmfast.Denoiser\(network\)"):
        if use == "sampler":
            Sampler(network, 2)
        elif use == "samples":
            cmfast.sample(network, x)
        elif use == "loss":
            cmfast.losses.denoising_loss(network, x, torch.ones(2))
        else:
            TrainStep(network, cmfast.objectives.EDM(), TrainOptions(steps=1, batch_size=1, learning_rate=1e-4))


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_nothing_is_compiled_where_pytorch_compiles_nothing(variable, model, monkeypatch):
    monkeypatch.setenv(variable, "1")
    said = Sampler(model, 2, compile=True).explain()["compile"]
    assert said == ("off", f"{variable}=1 has PyTorch compile nothing")


def test_classes_are_whole_numbers():
    model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8), num_classes=5)
    with pytest.raises(ValueError, match=r"classes must be whole numbers, got torch.float32"):
        Sampler(model, 2).sample(2, classes=[0.9, 1.9])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_options_are_looked_at_before_anything_is_sampled(name, model):
    with pytest.raises(TypeError, match=f"unknown option stpes of the {name} sampler; known: .*clip_denoised"):
        Sampler(model, 2, sampler=name, stpes=2)
    assert Sampler(model, 2, sampler=name, clip_denoised=False).sample(2).shape == (2, 8, 8, 3)


def test_a_wrapped_model_says_what_the_one_inside_does(model):
    inner = Denoiser(ToyNetwork(), image_shape=(3, 8, 8), sigma_max=14.0, num_classes=3).eval()
    sampler = Sampler(torch.nn.DataParallel(inner), 2)
    assert sampler.image_shape == (3, 8, 8) and sampler.num_classes == 3 and sampler.sigmas == [14.0]
    assert torch.equal(sampler.sample(2, seed=1), Sampler(inner, 2).sample(2, seed=1))


def test_a_stream_goes_on_outside_of_inference_mode(model):
    stream = Sampler(model, 2).stream(6)
    with torch.inference_mode():
        first, _ = next(stream)
    batches = [first, *(images for images, _ in stream)]
    assert torch.equal(torch.cat(batches), Sampler(model, 2).sample(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_no_image(model, dtype):
    def images(noise):
        return Sampler(model, 2, steps=2, noise=noise).sample(3)

    before = [images("counter"), images(torch.Generator().manual_seed(0))]
    torch.set_default_dtype(dtype)
    try:
        after = [images("counter"), images(torch.Generator().manual_seed(0))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("sampler", ["heun", "progdist"])
def test_the_default_device_is_not_asked_for_levels(model, sampler):
    wanted = Sampler(model, 2, sampler=sampler, steps=3)
    with torch.device("meta"):
        assert Sampler(model, 2, sampler=sampler, steps=3).sigmas == wanted.sigmas


def test_labels_are_a_copy():
    sampler = Sampler(Denoiser(ToyNetwork(), image_shape=(3, 8, 8), num_classes=5), 2)
    classes = torch.tensor([1, 2, 3, 4])
    stream = sampler.stream(4, classes=classes)
    _, first = next(stream)
    classes.fill_(0)
    assert first.tolist() == [1, 2] and next(stream)[1].tolist() == [3, 4]


def test_buffers_say_where_a_model_is():
    exact = MixtureDenoiser(torch.zeros(2, 1, 4, 4)).to("meta")
    assert Sampler(exact, 2, image_shape=(1, 4, 4)).device.type == "meta"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number, got 2.0"),
        ({"cache_size": "8"}, TypeError, "cache_size must be a whole number, got '8'"),
        ({"steps": 1.5}, TypeError, "steps must be a whole number, got 1.5"),
        ({"sampler": "heun", "steps": 0}, ValueError, "steps must be 1 or more, got 0"),
        ({"image_shape": 8}, ValueError, r"image_shape must be \(C, H, W\), or \(C, ...\) of data .*, got 8"),
        ({"image_shape": (3, 8, 0)}, ValueError, "image_shape must be 1 or more, got 0"),
        ({"sigmas": "80"}, TypeError, "sigmas must be noise levels, a sequence or a tensor .*, got '80'"),
        ({"sigmas": 80.0}, TypeError, "sigmas must be noise levels, a sequence or a tensor .*, got 80.0"),
        ({"sigmas": torch.ones(2, 2)}, TypeError, "sigmas must be noise levels, a sequence or a tensor"),
        ({"sigmas": [0.0]}, ValueError, r"sigmas must be positive, only the last may be 0, .* got \[0.0\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_of_the_wrong_kind(model, options, error, message):
    with pytest.raises(error, match=message):
        Sampler(model, **{"batch_size": 2, **options})


def test_numbers_of_numpy(model):
    sampler = Sampler(model, np.int64(2), steps=np.int32(2), image_shape=np.array([3, 8, 8]))
    assert torch.equal(sampler.sample(np.int64(3)), Sampler(model, 2, steps=2).sample(3))
    with pytest.raises(TypeError, match="n must be a whole number, got 3.0"):
        sampler.sample(3.0)
