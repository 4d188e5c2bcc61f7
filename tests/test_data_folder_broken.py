"""Folders whose images cannot be read, or are not those that a run began with."""

import gzip
import itertools
import os
import shutil
import warnings
from contextlib import closing

import pytest
import torch
from PIL import Image

from cmfast.data import decode, open_data
from cmfast.data.folder import LISTING
from cmfast.data.stream import Draw
from tests.folder_utils import write, write_folder
from tests.test_data import equal, pixels, take

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def broken(folder, tmp_path):
    """The same with two that cannot be read: cat/04 shows by its header, cat/10 when it is decoded."""
    for source in folder.rglob("*.png"):
        target = tmp_path / source.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "cat/04.png").write_text("no image")
    (tmp_path / "cat/10.png").write_bytes((folder / "cat/10.png").read_bytes()[:-60])
    return tmp_path


def test_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no images: no file in it ends in .png, .jpg"):
        open_data(tmp_path)


def test_what_is_no_image_is_named(broken):
    with pytest.raises(ValueError, match=r"1 of 23 files .*: cat/04.png \(not an image\); remove .* skip_unreadable"):
        open_data(broken)
    for name in range(1, 13, 2):
        (broken / f"dog/{name:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 of 23 files .* dog/07.png \(not an image\), \.\.\.; remove"):
        open_data(broken)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_ends_the_run_by_name(broken, folder, workers):
    (broken / "cat/04.png").write_bytes((folder / "cat/04.png").read_bytes())
    batches = open_data(broken).batches(6, seed=0, workers=workers)
    with pytest.raises(ValueError, match="^.*cat/10.png cannot be read: .*with skip_unreadable=True") as caught:
        list(itertools.islice(batches, 4))
    assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_in_place(broken, folder, workers):
    """By the next file; the others come when they would have, and a resume changes nothing."""
    with pytest.warns(UserWarning, match="1 of 23 files .* cat/04.png .* are skipped"):
        opened = open_data(broken, skip_unreadable=True)
    assert opened.fingerprint.startswith("23 images") and list(opened.unreadable) == ["cat/04.png"]
    with pytest.warns(UserWarning, match="cat/10.png cannot be read: .* it and others like it are skipped") as caught:
        batches = take(opened, 12, 6, workers=workers)
    assert sum(warning.category is UserWarning for warning in caught) == 1
    assert list(opened.unreadable) == ["cat/04.png", "cat/10.png"]
    replaced = 0
    for batch, expected in zip(batches, take(open_data(folder), 12, 6)):
        assert torch.equal(batch.labels, expected.labels)
        for image, other in zip(batch.images, expected.images):
            if not torch.equal(image, other):
                replaced += 1
                was = next(i for i in range(23) if torch.equal(other, pixels(3, 8, 8, seed=i)))
                assert was in (4, 10) and torch.equal(image, pixels(3, 8, 8, seed=was + 2))
    assert replaced >= 6  # two in each of three epochs
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what is known is not warned of again
        assert equal(batches[5:], take(opened, 7, 6, workers=workers, start_step=5))


def test_the_label_of_a_replacement(broken):
    """The last cat gone, the first dog stands in for it, and is called a dog."""
    (broken / "cat/22.png").write_bytes(b"")
    with pytest.warns(UserWarning):
        batches = take(open_data(broken, skip_unreadable=True), 1, 23)
    dogs = (batches[0].images == pixels(3, 8, 8, seed=1)).flatten(1).all(1)
    assert dogs.sum() == 2 and batches[0].labels[dogs].tolist() == [1, 1]


def test_nothing_that_can_be_read(tmp_path, folder):
    whole = (folder / "cat/00.png").read_bytes()
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(whole[:-60])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of its 2 images can be read; .*.png: "):
        take(open_data(tmp_path, skip_unreadable=True), 1)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 2 files"):
        open_data(tmp_path, skip_unreadable=True)


def test_a_file_that_changes(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", pixels(3, 4, 4))
    opened = open_data(tmp_path)
    write(tmp_path / "b.png", pixels(3, 4, 5))
    with pytest.raises(ValueError, match=r"b.png cannot be read: it is \[3, 4, 5\], the others \[3, 4, 4\]"):
        take(opened, 1)


def test_a_png_is_pillows(tmp_path, monkeypatch):
    """torchvision ends the process over some that are damaged, which no test can look at from within."""
    torchvision = pytest.importorskip("torchvision.io")

    def fail(*arguments):
        raise AssertionError("torchvision")

    monkeypatch.setattr(torchvision, "decode_image", fail)
    write(tmp_path / "a.png", pixels(3, 4, 4))
    assert torch.equal(decode.decode(tmp_path / "a.png", "torchvision"), pixels(3, 4, 4))
    write(tmp_path / "a.jpg", pixels(3, 4, 4))
    with pytest.raises(AssertionError, match="torchvision"):
        decode.decode(tmp_path / "a.jpg", "torchvision")


@pytest.mark.parametrize("by", ["torchvision", "Pillow"])
def test_a_bomb_that_comes_later(tmp_path, by, monkeypatch):
    """In place of an image that was looked at: the header is read again before it is decoded."""
    pytest.importorskip(by if by == "torchvision" else "PIL")
    write(tmp_path / "a.jpg", pixels(3, 4, 4))
    opened = open_data(tmp_path)
    opened._reader.decoder = by
    write(tmp_path / "a.jpg", pixels(3, 40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="a.jpg cannot be read: .*1600 pixels. exceeds limit of 200 pixels"):
        take(opened, 1, 1)


def test_a_fingerprint_with_a_link_to_nothing(tmp_path):
    write(tmp_path / "b.png", pixels(3, 4, 4))
    without = open_data(tmp_path).fingerprint
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match="a.png .a link to nothing.; they are skipped"):
        assert open_data(tmp_path, skip_unreadable=True).fingerprint != without


@pytest.fixture
def begun(folder, tmp_path):
    """(a folder of images, its data, and the folder of a run that began with them)."""
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(folder, images)
    run.mkdir()
    opened = open_data(images, skip_unreadable=True)
    (run / LISTING).write_bytes(opened.listing)
    return images, opened, run


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [None, 0, 60, 100])
def test_a_file_that_a_run_lost(begun, size, workers):
    """It is left out where it was, as it would have been without an interruption; and without leave to, it is named."""
    images, opened, run = begun
    for name in ("cat/02.png", "dog/21.png"):
        if size is None:
            (images / name).unlink()
        else:
            os.truncate(images / name, size)
    with pytest.warns(UserWarning):
        expected = take(opened, 9, 6)
    reason = "it is gone" if size is None else "it is of another size than when the run began"
    message = f"2 of 23 files .* are no images, or not those of this run: cat/02.png .{reason}., dog/21.png .*"
    with pytest.raises(ValueError, match=message + "; put them there as they were, or skip them with skip_unreadable"):
        open_data(images, run=run)
    with pytest.warns(UserWarning, match=message + "; they are skipped"):
        resumed = open_data(images, run=run, skip_unreadable=True)
    assert resumed.fingerprint == opened.fingerprint and resumed.listing == opened.listing
    assert len(resumed) == 23 and list(resumed.unreadable) == ["cat/02.png", "dog/21.png"]
    assert equal(take(resumed, 5, 6, start_step=4, workers=workers), expected[4:])


def longer(path):
    """An image that can be read, of more bytes than any other."""
    write(path, pixels(3, 8, 8, seed=99))
    path.write_bytes(path.read_bytes() + bytes(99))


def test_another_image_in_the_place_of_one(begun):
    """However well it can be read, it is not of this run."""
    images, opened, run = begun
    longer(images / "cat/00.png")
    with pytest.warns(UserWarning, match="1 of 23 files .*cat/00.png .it is of another size"):
        resumed = open_data(images, run=run, skip_unreadable=True)
    assert resumed.image_shape == opened.image_shape and resumed.fingerprint == opened.fingerprint
    (batch,) = take(resumed, 1, 23)
    assert (batch.images == pixels(3, 8, 8, seed=2)).flatten(1).all(1).sum() == 2


def test_a_class_that_a_run_lost(begun):
    """The others keep their numbers, and the network its classes."""
    images, opened, run = begun
    shutil.rmtree(images / "dog")
    with pytest.warns(UserWarning, match="11 of 23 files"):
        resumed = open_data(images, run=run, skip_unreadable=True)
    assert resumed.classes == ["cat", "dog"] and resumed.fingerprint == opened.fingerprint
    assert not take(resumed, 1, 23)[0].labels.any()
    with pytest.raises(ValueError, match="11 of 23 files"):
        open_data(images, run=run)


def test_other_images_than_a_run_has(begun):
    """New ones, or less than half of its own: the fingerprint is what the folder has now, which a run refuses."""
    images, opened, run = begun
    write(images / "cat/24.png", pixels(3, 8, 8, seed=24))
    (images / "cat/00.png").unlink()
    more = open_data(images, run=run)
    assert more.fingerprint == open_data(images).fingerprint != opened.fingerprint and len(more) == 23
    (images / "cat/24.png").unlink()
    for number in range(2, 23, 2):
        (images / f"cat/{number:02}.png").unlink()
    fewer = open_data(images, run=run, skip_unreadable=True)
    assert fewer.fingerprint.startswith("11 images") and not fewer.unreadable
    for number in range(0, 23, 2):
        longer(images / f"cat/{number:02}.png")
    others = open_data(images, run=run, skip_unreadable=True)
    assert others.fingerprint == open_data(images).fingerprint != opened.fingerprint and not others.unreadable


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:40],
        lambda content: content[:40] + b"xxxx" + content[44:],
        lambda content: gzip.compress(b"a.png"),
        lambda content: gzip.compress(b"cat/00.png\0many\0"),
        lambda content: gzip.compress(bytes(10**8)),
    ],
    ids=["empty", "a part", "changed", "no sizes", "no numbers", "a bomb"],
)
def test_a_listing_that_is_damaged(begun, damage):
    """Is none, as of older runs: the folder is as it is."""
    images, opened, run = begun
    (run / LISTING).write_bytes(damage(opened.listing))
    assert open_data(images, run=run).fingerprint == opened.fingerprint
    (run / LISTING).unlink()
    assert open_data(images, run=run).fingerprint == opened.fingerprint
    os.mkfifo(run / LISTING)
    assert open_data(images, run=run).fingerprint == opened.fingerprint


@pytest.fixture
def many(tmp_path):
    """2,000 images, read without warnings."""
    write(tmp_path / "images/0000.png", pixels(3, 4, 4))
    for number in range(1, 2000):
        os.link(tmp_path / "images/0000.png", tmp_path / f"images/{number:04}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_goes_away(many, left, workers):
    """Is seen after some tens of images, not after all of them for each of a batch; each is named once."""
    opened = open_data(many, skip_unreadable=True)
    batches = opened.batches(64, seed=0, workers=workers)
    next(batches)
    os.rename(many, many.with_name("elsewhere"))
    if left == "an empty folder":
        many.mkdir()
    message = r"images: none of 32 images in a row can be read; \d{4}.png: it is gone"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        for _ in zip(batches, range(9)):  # more than a worker makes ahead
            pass
    assert len(opened.unreadable) == 32


def test_too_many_in_a_row(many):
    """Of which the folder is there. Those that showed at the start are not among them, however many."""
    opened = open_data(many, skip_unreadable=True)
    for path in many.glob("0*.png"):
        path.unlink()
    names = [f"{number:04}.png" for number in range(1000)]
    (many / "x.png").touch()
    message = "none of 1000 images in a row can be read; 0999.png: it is gone"
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
        read_rows(opened, [1999, 0])
    assert list(opened.unreadable) == names
    for name in names:
        (many / name).touch()
    (many / "x.png").unlink()
    with pytest.warns(UserWarning, match="1000 of 2000 files"):
        opened = open_data(many, skip_unreadable=True)
    (many / "1000.png").unlink()
    with pytest.warns(UserWarning, match="1000.png cannot be read"):
        read_rows(opened, [1999, 0])
    assert len(opened.unreadable) == 1001


def read_rows(opened, rows):
    """The batch of some rows of a data set."""
    draw = Draw(torch.tensor(rows), torch.arange(len(rows)), None)
    with closing(opened._read(iter([draw]), 0, False)) as batches:
        return next(batches)
