"""Folders of images: what is read from which files, labels, workers, and files that are no images."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cmfast.data import FolderData, ImageData, decode, open_data
from cmfast.data.folder import LISTING
from tests.folder_utils import write, write_folder
from tests.test_data import equal, pixels, take

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


def test_what_a_folder_holds(tmp_path):
    """Files by their suffix, in the order of their names, through subfolders and links; nothing hidden."""
    names = ["Z.PNG", "a.png", "b/c.png", "b/d/e.bmp", "link/f.png"]
    for i, name in enumerate(names[:4]):
        write(tmp_path / "data" / name, pixels(3, 4, 6, seed=i))
    write(tmp_path / "elsewhere/f.png", pixels(3, 4, 6, seed=4))
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/link")
    for name in (".hidden.png", ".git/g.png"):
        write(tmp_path / "data" / name, pixels(3, 2, 2))
    (tmp_path / "data/notes.txt").write_text("no image")
    opened = open_data(tmp_path / "data")
    assert len(opened) == 5 and opened.image_shape == (3, 4, 6) and opened.num_classes is None
    (batch,) = take(opened, 1, 5)
    assert batch.labels is None and batch.images.dtype == torch.uint8 and batch.index.tolist() == list(range(5))
    (rows,) = take(ImageData(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)), 1, 5)
    order = rows.images.flatten()
    assert torch.equal(batch.images, torch.stack([pixels(3, 4, 6, seed=int(i)) for i in order]))


def test_paths_as_text(folder, tmp_path):
    """As `open_data` takes them."""
    (tmp_path / LISTING).write_bytes(open_data(folder).listing)
    opened = FolderData(str(folder), run=str(tmp_path))
    assert opened.fingerprint == open_data(folder).fingerprint and equal(take(opened, 2), take(open_data(folder), 2))


def test_numbers_of_numpy(folder):
    """A fingerprint is that of the same numbers in Python, by which a run knows its data again."""
    opened = open_data(folder, image_size=np.int64(4), channels=np.int64(1))
    assert opened.fingerprint == open_data(folder, image_size=4, channels=1).fingerprint


def test_suffixes(tmp_path):
    for suffix in decode.SUFFIXES:
        write(tmp_path / f"image{suffix}", pixels(3, 4, 4))
    assert len(open_data(tmp_path)) == 6


RGBA = Image.fromarray(pixels(9, 7, 4).numpy())
KINDS = {
    "RGB": (RGBA.convert("RGB"), "png", {}),
    "grey": (RGBA.getchannel(0), "png", {}),
    "alpha": (RGBA, "png", {}),
    "grey alpha": (Image.merge("LA", (RGBA.getchannel(0), RGBA.getchannel(3))), "png", {}),
    "palette": (RGBA.convert("RGB").quantize(16), "png", {"transparency": 3}),
    "black and white": (RGBA.getchannel(0).convert("1"), "png", {}),
    "16 bits": (Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000), "png", {}),
    "WebP": (RGBA, "webp", {"lossless": True}),
    "WebP of two frames": (RGBA, "webp", {"lossless": True, "save_all": True, "append_images": [RGBA.rotate(180)]}),
    "BMP": (RGBA.convert("RGB"), "bmp", {}),
    "GIF": (RGBA.convert("RGB").quantize(16), "gif", {"transparency": 3, "save_all": True, "append_images": [RGBA]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_decoders_read_the_same(tmp_path, kind):
    """RGB, without transparency, the high byte of 16 bits, the first frame."""
    image, suffix, options = KINDS[kind]
    path = tmp_path / f"image.{suffix}"
    write(path, image, **options)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if kind == "16 bits":
        expected = (torch.arange(63).view(1, 9, 7) * 1000 // 256).to(torch.uint8).expand(3, -1, -1)
    read = decode.decode(path, "Pillow")
    assert read.shape == (3, 9, 7) and read.dtype == torch.uint8 and torch.equal(read, expected)
    assert decode.size_of(path) == (9, 7)
    pytest.importorskip("torchvision")
    assert torch.equal(decode.decode(path, "torchvision"), read)


def test_without_torchvision(folder, monkeypatch):
    pytest.importorskip("torchvision")
    before = open_data(folder)
    expected = take(before, 3)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    without = open_data(folder)
    assert "read by torchvision" in before.fingerprint and "read by Pillow" in without.fingerprint
    assert equal(take(without, 3), expected)


def test_who_decodes(tmp_path, monkeypatch):
    """JPEG alone is torchvision's, where it is there."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(decode, "_by_pillow", lambda path: None)
    for suffix, by, pillow in (("jpg", "Pillow", True), ("jpg", "torchvision", False), ("png", "torchvision", True)):
        write(tmp_path / f"a.{suffix}", pixels(3, 4, 4))
        assert (decode.decode(tmp_path / f"a.{suffix}", by) is None) == pillow


def test_sizes_and_channels(tmp_path):
    write(tmp_path / "a.png", pixels(3, 4, 6))
    write(tmp_path / "b.png", pixels(3, 8, 5))
    with pytest.raises(ValueError, match="several sizes: a.png is 6 x 4, b.png is 5 x 8; give image_size"):
        open_data(tmp_path)
    opened = open_data(tmp_path, image_size=4, channels=1)
    assert opened.image_shape == (1, 4, 4) and take(opened, 1)[0].images.shape == (3, 1, 4, 4)
    square = pixels(3, 4, 6)[:, :, 1:5]
    one = next(open_data(tmp_path, image_size=4).batches(2, seed=0)).images
    assert (one == square).flatten(1).all(1).sum() == 1


def test_labels(tmp_path, folder):
    opened = open_data(folder)
    assert opened.classes == ["cat", "dog"] and opened.num_classes == 2
    for batch in take(opened, 4, 6):
        for image, label in zip(batch.images, batch.labels):
            (number,) = (i for i in range(23) if torch.equal(image, pixels(3, 8, 8, seed=i)))
            assert label == number % 2
    assert open_data(folder, labelled=False).num_classes is None
    assert take(open_data(folder, labelled=False), 1)[0].labels is None
    # One subfolder is no reason to believe in labels; nor are names, which must be asked for.
    for i, name in enumerate(["one/x_1.png", "one/y_2.png"]):
        write(tmp_path / name, pixels(3, 4, 4, seed=i))
    assert open_data(tmp_path).num_classes is None and open_data(tmp_path, labelled=True).classes == ["one"]
    assert open_data(tmp_path / "one").num_classes is None
    by_name = open_data(tmp_path / "one", labelled=True)
    assert by_name.classes == ["x", "y"] and sorted(take(by_name, 1, 2)[0].labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "names, without",
    [(["a_1.png", "b.png"], "b.png"), (["a_1.png", "_b.png"], "_b.png"), (["a/b_1.png", "c_2.png"], "c_2.png")],
    ids=str,
)
def test_no_labels(tmp_path, names, without):
    for name in names:
        write(tmp_path / name, pixels(3, 4, 4))
    assert open_data(tmp_path).num_classes is None
    with pytest.raises(ValueError, match=f"labelled=True, and .* names of its subfolders.* first _ .*; {without} has"):
        open_data(tmp_path, labelled=True)


def test_a_fingerprint_tells_folders_apart(tmp_path):
    found = set()
    for name, colour in (("a/1.png", 0), ("b/2.png", 0), ("b/2.png", 9), ("b/3.png", 9)):
        write(tmp_path / name, pixels(3, 4, 4) if colour else Image.new("RGB", (4, 4)))
        opened = open_data(tmp_path)
        found.add(opened.fingerprint)
        assert opened.fingerprint == open_data(tmp_path).fingerprint
    assert len(found) == 4 and "3 images uint8 [3, 4, 4] of 2 classes" in opened.fingerprint
    assert opened.fingerprint != open_data(tmp_path, image_size=2).fingerprint


def test_workers_ranks_and_resumes_change_nothing(folder):
    opened = open_data(folder, flip=True)
    expected = take(opened, 12, 6)
    state = torch.get_rng_state()
    for workers in (1, 2):
        assert equal(expected, take(opened, 12, 6, workers=workers))
    assert equal(expected[7:], take(opened, 5, 6, workers=2, start_step=7))
    ranks = [take(opened, 12, 3, rank=rank, world_size=2) for rank in (0, 1)]
    assert equal(expected, [type(a)(*map(torch.cat, zip(a, b))) for a, b in zip(*ranks)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(expected, take(open_data(folder), 12, 6))


def test_workers_that_are_spawned(folder):
    """What a worker gets can be sent to a process that shares nothing; nor has it the handler of a run for SIGTERM, and
    does not end by the first."""
    opened = open_data(folder, flip=True)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = opened.batches(3, seed=5, workers=1)
        found = [next(batches)]
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        found += itertools.islice(batches, 7)  # more than it makes ahead
        assert equal(take(opened, 8), found)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_end_with_the_iterator(folder):
    before = set(multiprocessing.active_children())
    batches = open_data(folder).batches(3, seed=0, workers=1)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 1
    batches.close()
    assert set(multiprocessing.active_children()) == before
    batches = open_data(folder).batches(3, seed=0, workers=1)
    next(batches)
    del batches
    assert set(multiprocessing.active_children()) == before


KILLED = """
import multiprocessing, os, signal, sys, time
from cmfast.data import open_data
batches = open_data(sys.argv[1]).batches(3, seed=0, workers=2)
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
if sys.argv[2] == "elsewhere":
    time.sleep(60)  # which the loader's handler ends
try:
    for _ in batches:
        pass
except OSError as error:
    kept = error  # and its traceback the iterator
    sys.exit(str(error))
"""


@pytest.mark.parametrize("where", ["reading", "elsewhere"])
def test_a_worker_that_is_killed_ends_the_run(folder, where):
    """And nothing waits for the other, wherever the main process is when it hears of it."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and re.search("process that decodes images is gone|DataLoader worker", said)


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="the folder .*cat cannot be read: Permission denied; with skip_unreadable"):
        open_data(folder)
    with pytest.warns(UserWarning, match="the folder .*cat cannot be read: .*; its images are left out") as caught:
        assert len(open_data(folder, skip_unreadable=True)) == 11
    assert caught[0].filename == __file__
