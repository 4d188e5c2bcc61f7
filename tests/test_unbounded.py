"""Data that is no picture: of any shape, and of no range, such as latents. And pictures that are not pixels."""

import copy
import warnings

import numpy as np
import pytest
import torch

import cmfast
from cmfast import Denoiser, Preconditioner, Sampler, UNetModel, cli, data, editing, ops, recipes, samplers
from cmfast.data import ImageData
from cmfast.exact import MixtureDenoiser
from cmfast.objectives import EDM, ImprovedConsistencyTraining
from cmfast.samplers import SAMPLERS
from cmfast.training import Trainer, TrainOptions
from tests.toy import ToyNetwork

SHAPES = [(2,), (3, 17), (4, 8, 12), (3, 4, 6, 5)]
#: Where the data of `far` lie: nowhere near [-1, 1].
MEAN, STD = 6.0, 0.25


def far(x, sigma):
    """D of data from N(6, 0.25^2), exactly: (sigma^2 mean + std^2 x) / (sigma^2 + std^2)."""
    level = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2 if sigma.ndim else sigma**2
    return (level * MEAN + STD**2 * x) / (level + STD**2)


def latents(**options):
    """A small model of data without a range, whose samples go beyond [-1, 1]."""
    torch.manual_seed(0)
    network = UNetModel(8, 4, 32, 4, 1, [], channel_mult=(1, 2), num_head_channels=16)
    with torch.no_grad():  # a new U-Net ends in zeros
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    options = {"image_shape": (4, 8, 8), "bounded": False, **options}
    return Denoiser(network, Preconditioner.edm(sigma_data=1.0), **options).eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_clamped(sampler, shape):
    steps = 1 if sampler == "onestep" else 25
    sampled = Sampler(far, 7, sampler=sampler, steps=steps, image_shape=shape, bounded=False)
    made = sampled.sample(512, seed=1)
    assert made.dtype == torch.float32 and made.shape == (512, *shape)
    assert made.mean().item() == pytest.approx(MEAN, abs=0.06)
    if sampler not in ("onestep", "multistep"):  # which end at a mean, as this is D of a diffusion model
        assert made.std().item() == pytest.approx(STD, rel=0.3)
    few = Sampler(far, 5, sampler=sampler, sigmas=sampled.sigmas, image_shape=shape, bounded=False).sample(8, seed=1)
    torch.testing.assert_close(few, made[:8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bounded_is_the_default(sampler):
    """What comes out is clamped then, also where D is not: as in the original."""
    noise = torch.randn(3, 2, 4, 4)
    for clip in (True, False):
        made = samplers.sample(far, noise, sampler=sampler, clip_denoised=clip)
        assert made.max() == 1 and made.mean() > 0.9
    assert samplers.sample(far, noise, sampler=sampler, bounded=False).mean() > 5


def test_a_sampler_alone():
    """Without `sample` around it."""
    model = Denoiser(lambda x, t: torch.full_like(x, MEAN), Preconditioner.edm(sigma_data=1.0), bounded=False)
    assert samplers.sample_multistep(model, 80.0 * torch.ones(2, 3), [80.0]).mean() > 5
    model.bounded = True
    assert samplers.sample_multistep(model, 80.0 * torch.ones(2, 3), [80.0]).mean() == 1


def test_pixels_and_pictures_in_floats():
    model = Denoiser(ToyNetwork(), image_shape=(3, 8, 8), num_classes=7)
    floats = Sampler(model, 4, steps=2, pixels=None).sample(9, seed=2)
    assert floats.dtype == torch.float32 and floats.shape == (9, 3, 8, 8) and floats.abs().max() <= 1
    for rounding in ("trunc", "nearest"):
        pixels = Sampler(model, 4, steps=2, pixels=rounding).sample(9, seed=2)
        assert torch.equal(pixels, ops.to_uint8(floats, rounding=rounding))
    assert torch.equal(Sampler(model, 4, steps=2).sample(9, seed=2), ops.to_uint8(floats))
    assert Sampler(model, 4, pixels=None).sample(0).shape == (0, 3, 8, 8)
    batches = list(Sampler(model, 4, steps=2, pixels=None).stream(9, seed=2))
    assert torch.equal(torch.cat([images for images, _ in batches]), floats)


def test_the_model_says_it(tmp_path):
    model = latents()
    expected = Sampler(model, 4, optimize=False).sample(6)
    assert expected.abs().max() > 1.5 and expected.dtype == torch.float32
    cmfast.save(model, tmp_path / "latents.safetensors")
    for same in (copy.deepcopy(model), cmfast.load(tmp_path / "latents.safetensors"), cmfast.optimize(model)):
        assert same.bounded is False
        torch.testing.assert_close(Sampler(same, 4).sample(6), expected, rtol=1e-4, atol=1e-4)
    noise = torch.randn(2, 4, 8, 8)
    assert cmfast.sample(model, noise).abs().max() > 1.5
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(samplers.sample(wrapped, noise), samplers.sample(model, noise))
    # One who knows better has the last word.
    clamped = Sampler(latents(bounded=True), 4, steps=3)
    assert torch.equal(Sampler(model, 4, steps=3, bounded=True).sample(4), clamped.sample(4))
    clamped = samplers.sample(latents(bounded=True), noise, sampler="euler")
    assert torch.equal(samplers.sample(model, noise, sampler="euler", bounded=True), clamped)


def test_a_signal_is_saved_and_loaded(tmp_path):
    network = UNetModel(8, 2, 32, 2, 1, [], channel_mult=(1, 2), num_head_channels=16, dims=1)
    model = Denoiser(network, image_shape=(2, 8)).eval()
    cmfast.save(model, tmp_path / "signal.safetensors")
    loaded = cmfast.load(tmp_path / "signal.safetensors")
    assert loaded.image_shape == (2, 8) and loaded.bounded is True
    made = Sampler(loaded, 2).sample(3)
    assert made.dtype == torch.float32 and made.shape == (3, 2, 8)  # which is no picture, if in [-1, 1]
    assert torch.equal(made, Sampler(model, 2).sample(3)) and made.abs().max() <= 1
    assert torch.equal(Sampler(loaded, 2, pixels="trunc").sample(3), ops.to_uint8(made))


def test_edits_are_not_clamped():
    known = MixtureDenoiser(torch.full((1, 4, 8, 8), MEAN), std=STD)
    known.bounded = False
    images, mask = torch.full((2, 4, 8, 8), 7.0), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    filled, _ = editing.inpaint(known, images, 80.0 * torch.randn(2, 4, 8, 8), [80.0, 2.0, 0.5], mask)
    assert torch.equal(filled[..., :4], images[..., :4])
    assert filled[..., 4:].mean().item() == pytest.approx(MEAN, abs=0.1)


@pytest.mark.parametrize("objective", [EDM(), ImprovedConsistencyTraining(total_steps=40)], ids=["edm", "ict"])
def test_latents_are_trained_on(tmp_path, objective):
    """Their scale stays theirs, no grid of them is drawn, and the result knows what it makes."""
    images = ImageData(3.0 * torch.randn(32, 4, 8, 8), bounded=False)
    options = TrainOptions(steps=4, batch_size=4, sample_interval=2, learning_rate=1e-3, averages=("0.5",))
    model = latents()
    model.preconditioner = Preconditioner.by_name(objective.preconditioning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(model, objective, images, options, tmp_path).run(progress=False)
    assert not list(tmp_path.rglob("step-*.png")) and (tmp_path / "loss.png").is_file()
    assert cmfast.load(tmp_path / "model.safetensors").bounded is False
    batch = next(images.batches(4, seed=0))
    assert batch.images.abs().max() > 3


def test_data_and_model_agree(tmp_path):
    options = TrainOptions(steps=1, batch_size=4, learning_rate=1e-3)
    for bounded in (True, False):
        images = ImageData(torch.zeros(8, 4, 8, 8), bounded=not bounded)
        with pytest.raises(ValueError, match=rf"\(bounded={not bounded}\) and the model's do not: make it a Denoiser"):
            Trainer(latents(bounded=bounded), EDM(sigma_data=1.0), images, options, tmp_path)


def test_the_command_writes_numbers(tmp_path, capsys):
    cmfast.save(latents(), tmp_path / "latents.safetensors")
    arguments = ["sample", "--model", str(tmp_path / "latents.safetensors"), "--num", "3", "--device", "cpu", "--out"]
    assert cli.main([*arguments, str(tmp_path / "out.png")]) == 2
    assert "there is no picture, as the model's data have no range (bounded=False)" in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "out.npz")]) == 0
    with np.load(tmp_path / "out.npz") as file:
        expected = Sampler(cmfast.load(tmp_path / "latents.safetensors"), 3).sample(3)
        assert file.files == ["arr_0"] and torch.equal(torch.from_numpy(file["arr_0"]), expected)
    assert cli.main([*arguments, str(tmp_path / "out.png"), "--option", "bounded=True"]) == 0
    assert cli.main([*arguments, str(tmp_path / "out.png"), "--option", "pixels=trunc"]) == 2
    assert "pixels='trunc' are made of data in [-1, 1]" in capsys.readouterr().err


def test_the_command_trains_on_numbers(tmp_path, capsys):
    """What `sample` writes is what `--data` reads; a model that starts from another one knows of what kind it is."""
    latents_file, run = tmp_path / "latents.npz", tmp_path / "run"
    np.savez(latents_file, 4.0 + np.random.default_rng(0).standard_normal((16, 4, 8, 8), np.float32))
    network = ["model_channels=32", "num_res_blocks=1", "attention_resolutions=[]", "channel_mult=[1]"]
    few = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
    settings = ["data.bounded=False", *(f"network.{setting}" for setting in network)]
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["train", "--recipe", "edm", "--data", str(latents_file), *few, "--out", str(run)]
    assert cli.main(arguments) == 2
    assert "of latents, or other data that are no images, say bounded=False" in capsys.readouterr().err
    assert cli.main([*arguments, *options]) == 0, capsys.readouterr().err
    made = tmp_path / "made.npz"
    assert cli.main(["sample", "--model", str(run / "model.safetensors"), "--num", "8", "--out", str(made)]) == 0
    again = ["train", "--recipe", "cd", "--loss-norm", "l2", "--teacher", str(run / "model.safetensors")]
    assert cli.main([*again, "--data", str(made), *few, "--out", str(tmp_path / "cd")]) == 0
    assert cmfast.load(tmp_path / "cd" / "model.safetensors").bounded is False


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 17), (5, 3, 4, 4)], ids=str)
def test_numbers_of_a_file(tmp_path, shape):
    values = np.random.default_rng(0).standard_normal(shape)
    np.savez(tmp_path / "numbers.npz", data=values, y=np.arange(5))
    opened = data.open_data(tmp_path / "numbers.npz", bounded=False)
    assert opened.image_shape == shape[1:] and opened.num_classes == 5 and opened.bounded is False
    assert torch.equal(opened.images, torch.from_numpy(values).float())
    assert next(opened.batches(2, seed=0)).images.shape == (2, *shape[1:])


def test_files_without_such_numbers(tmp_path):
    np.savez(tmp_path / "pixels.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "numbers.npz", images=np.zeros((2, 4, 4, 4)))
    for source, options, message in [
        ("mnist", {}, "mnist is images, which lie in"),
        (tmp_path, {}, "is images, which lie in"),
        (tmp_path / "pixels.npz", {}, "images must be floating point where bounded=False, got uint8"),
        (tmp_path / "numbers.npz", {"image_size": 2}, "image_size and channels are of images"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.open_data(source, bounded=False, **options)
    signals = ImageData(torch.zeros(8, 2, 16), bounded=False)
    with pytest.raises(ValueError, match=r"a new network is for \[C, H, W\], and the data are \[2, 16\]: give --init"):
        recipes._of_data(signals)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: sampler(bounded=False, pixels="trunc"), ValueError, "pixels='trunc' are made of data in"),
        (lambda: sampler(pixels="round"), ValueError, "unknown pixels 'round'; known: trunc, nearest"),
        (lambda: sampler(bounded="no"), TypeError, "bounded must be True or False, got 'no'"),
        (lambda: sampler(image_shape=()), ValueError, r"must be \(C, H, W\), or \(C, ...\) of data .*, got \(\)"),
        (lambda: sample(bounded=False, pixels="trunc"), ValueError, "pixels='trunc' are made of data in"),
        (lambda: sample(bounded=0), TypeError, "bounded must be True or False, got 0"),
        (lambda: Denoiser(far, bounded=None), TypeError, "bounded must be True or False, got None"),
        (lambda: ImageData(torch.full((2, 1, 4, 4), 2.0)), ValueError, "of latents, .* say bounded=False"),
        (lambda: numbers(torch.tensor([[1.0, torch.nan]])), ValueError, "images must be finite numbers, .* nan"),
        (lambda: numbers(torch.zeros(3)), ValueError, r"images must be \[N, C, ...\], got \[3\]"),
        (lambda: numbers(torch.zeros(3, 2).byte()), ValueError, "images must be float32 where bounded=False, got"),
        (lambda: numbers(torch.zeros(3, 2), flip=True), ValueError, r"flip mirrors images .*, and these are \[3, 2\]"),
        (lambda: ImageData(torch.zeros(3, 1, 2, 2), bounded=1), TypeError, "bounded must be True or False, got 1"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def sampler(**options):
    return Sampler(far, **{"image_shape": (4, 8, 8), **options})


def sample(**options):
    return samplers.sample(far, torch.zeros(1, 2), **options)


def numbers(images, **options):
    return ImageData(images, bounded=False, **options)
