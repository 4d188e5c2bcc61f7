"""cm.image_datasets and cm.resample: folders of images, shards, samplers of timesteps and noise levels."""

import itertools
import random
import types

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.compat.openai import image_datasets, resample
from cmfast.compat.openai.image_datasets import ImageDataset, center_crop_arr, load_data, random_crop_arr

DIFFUSION = types.SimpleNamespace(num_timesteps=4)


@pytest.fixture
def folder(tmp_path):
    """Five images of several sizes and kinds, one of them in a folder below, and a file that is none."""
    for name, size, mode in (
        ("cat_1.png", (9, 8), "RGB"),
        ("dog_2.PNG", (8, 8), "L"),
        ("ant_3.jpeg", (20, 40), "RGB"),
        ("more/cat_4.gif", (8, 8), "P"),
        ("zebra_5.jpg", (16, 16), "RGB"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        value = int(name.split("_")[1][0])
        Image.new("RGB", size, (40 * value,) * 3).convert(mode).save(tmp_path / name)
    (tmp_path / "notes_6.txt").write_text("no image")
    return tmp_path


def values(images):
    return [round((image.mean().item() + 1) * 127.5 / 40) for image in images]


# Images


def test_batches_in_order_and_without_end(folder):
    data = load_data(data_dir=str(folder), batch_size=2, image_size=8, class_cond=True, deterministic=True)
    batches = [next(data) for _ in range(3)]
    for images, cond in batches:
        assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and images.abs().max() <= 1
        assert cond["y"].dtype == torch.int64
    # ant_3, cat_1, dog_2, more/cat_4; zebra_5 fills no batch.
    assert [values(images) for images, _ in batches] == [[3, 1], [2, 4], [3, 1]]
    assert [cond["y"].tolist() for _, cond in batches] == [[0, 1], [2, 1], [0, 1]]


def test_shuffled_unconditional_and_of_this_rank(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(image_datasets.dist_util.dist, "is_initialized", lambda: False)
    torch.manual_seed(0)
    images, cond = next(load_data(data_dir=str(folder), batch_size=2, image_size=8))
    assert sorted(values(images)) == [1, 4] and not cond


def test_crops_and_flips(folder):
    ramp = np.tile(np.arange(40, dtype=np.uint8), (20, 1))[..., None].repeat(3, 2)
    image = Image.fromarray(ramp)
    middle = center_crop_arr(image, 20)
    assert np.array_equal(middle, ramp[:, 10:30])
    # By halves with a box filter first: of stripes nothing is left.
    stripes = Image.fromarray(np.tile(np.array([0, 200], dtype=np.uint8), (40, 20))[..., None].repeat(3, 2))
    assert np.unique(center_crop_arr(stripes, 16)).tolist() == [100]
    random.seed(0)
    crops = [random_crop_arr(image, 16) for _ in range(20)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert (
        len({crop[0, 0, 0] for crop in crops}) > 5 and len({int(crop[0].max() - crop[0].min()) for crop in crops}) > 1
    )
    image.save(folder / "ramp.png")
    plain, flipped = (ImageDataset(20, [str(folder / "ramp.png")], random_flip=flip) for flip in (False, True))
    expected = np.transpose(middle, (2, 0, 1)) / np.float32(127.5) - 1
    np.testing.assert_allclose(plain[0][0], expected, atol=1e-6)
    seen = {tuple(flipped[0][0][0, 0]) for _ in range(20)}
    assert seen == {tuple(plain[0][0][0, 0]), tuple(plain[0][0][0, 0, ::-1])}
    cropped = ImageDataset(20, [str(folder / "ramp.png")], random_crop=True, random_flip=False)
    assert len({cropped[0][0][0, 0, 0] for _ in range(20)}) > 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data_dir": ""}, "data_dir is missing"),
        ({"data_dir": "nowhere"}, "data_dir is no folder: nowhere"),
        ({"empty": True}, "no images in .*files that end in jpg, jpeg, png, gif"),
        ({"batch_size": 6}, "batch_size is 6, and there are 5 images in"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ranks": 3, "batch_size": 2, "RANK": 2}, "batch_size is 2, and there are 5 images in .*, 1 for each rank"),
        ({"unlabelled": True, "class_cond": True}, "before an underscore, such as dog_17.png: .*photo.png"),
    ],
)
def test_errors_before_the_first_batch(folder, options, message, monkeypatch):
    monkeypatch.setattr(image_datasets.dist_util.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(options.pop("ranks", 1)))
    monkeypatch.setenv("RANK", str(options.pop("RANK", 0)))
    if options.pop("unlabelled", False):
        (folder / "cat_1.png").rename(folder / "photo.png")
    if options.pop("empty", False):
        (folder / "empty").mkdir()
        options["data_dir"] = str(folder / "empty")
    with pytest.raises(ValueError, match=message):
        load_data(**{"data_dir": str(folder), "batch_size": 1, "image_size": 8, **options})


def test_an_unreadable_image_is_named(folder):
    (folder / "cat_1.png").write_bytes((folder / "cat_1.png").read_bytes()[:40])
    data = load_data(data_dir=str(folder), batch_size=2, image_size=8, deterministic=True)
    with pytest.raises(ValueError, match="cannot read the image .*cat_1.png"):
        next(data)


# Samplers


def test_samplers_by_name():
    kinds = {
        "uniform": resample.UniformSampler,
        "loss-second-moment": resample.LossSecondMomentResampler,
        "lognormal": resample.LogNormalSampler,
    }
    for name, kind in kinds.items():
        assert type(resample.create_named_schedule_sampler(name, DIFFUSION)) is kind
    with pytest.raises(NotImplementedError, match="'normal'; known: uniform, loss-second-moment, lognormal"):
        resample.create_named_schedule_sampler("normal", DIFFUSION)


class Skewed(resample.ScheduleSampler):
    def weights(self):
        return np.array([1.0, 3.0, 0.5, 3.5])


def test_importance_sampling_keeps_the_mean():
    np.random.seed(0)
    t, weights = Skewed().sample(1000, "cpu")
    np.random.seed(0)
    drawn = np.random.choice(4, size=(1000,), p=np.array([1.0, 3.0, 0.5, 3.5]) / 8)
    assert t.dtype == torch.int64 and torch.equal(t, torch.from_numpy(drawn))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([2.0, 2 / 3, 4.0, 4 / 7])[t])
    t, weights = resample.UniformSampler(DIFFUSION).sample(5, "cpu")
    assert weights.tolist() == [1.0] * 5


def test_losses_shape_the_distribution():
    sampler = resample.LossSecondMomentResampler(DIFFUSION, history_per_term=2, uniform_prob=0.1)
    for ts, losses in (([0, 1, 2], [9.0, 3.0, 0.0]), ([0, 0, 1, 2, 3], [1.0, 1.0, 3.0, 0.0, 4.0])):
        sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))
        assert sampler.weights().tolist() == [1.0] * 4
    sampler.update_with_local_losses(torch.tensor([3]), torch.tensor([2.0]))
    # 9 has left the history of 0; root mean squares 1, 3, 0, sqrt(10).
    shares = np.array([1, 3, 0, 10**0.5])
    np.testing.assert_allclose(sampler.weights(), 0.9 * shares / shares.sum() + 0.025)


def test_lognormal_levels():
    torch.manual_seed(0)
    sigmas, weights = resample.LogNormalSampler(-1.0, 0.5).sample(6, "cpu")
    torch.manual_seed(0)
    torch.testing.assert_close(sigmas, torch.exp(-1.0 + 0.5 * torch.randn(6)))
    assert weights.tolist() == [1.0] * 6


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
def test_even_lognormal_levels_are_finite(monkeypatch, drawn):
    """Whatever torch draws, the least and the most included: rounded to float32, the last of 2048 was infinity."""
    monkeypatch.setattr(torch, "rand", lambda size: torch.full((size,), drawn))
    levels, _ = resample.LogNormalSampler(even=True).sample(2048, "cpu")
    assert levels.isfinite().all() and levels.min() > 0


def test_even_lognormal_levels_of_all_ranks(monkeypatch):
    norm = pytest.importorskip("scipy.stats").norm
    monkeypatch.setattr(resample.dist_util.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(resample.LogNormalSampler(even=True).sample(8, "cpu")[0])
    levels = torch.cat(parts)
    assert levels.dtype == torch.float32
    shares = norm.cdf(levels.log().numpy(), loc=-1.2, scale=1.2)
    assert np.floor(shares * 16).tolist() == list(range(16))
    assert all(a < b for a, b in itertools.pairwise(levels.tolist()))
