import numpy as np
import pytest
import torch
from PIL import Image

from cmfast import images

PIXELS = torch.randint(0, 256, (5, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_grid(tmp_path):
    path = images.save(tmp_path / "grid.png", PIXELS, columns=2)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (3 * 4 + 2 * 2, 2 * 6 + 2, 3)
    assert (picture[6:10, 8:14] == PIXELS[3].numpy()).all() and (picture[12:16, 8:] == 0).all()


def test_grey_grid(tmp_path):
    assert Image.open(images.save(tmp_path / "grid.png", PIXELS[..., :1])).mode == "L"


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_the_evaluator_takes(tmp_path, channels):
    labels = torch.arange(5)
    with np.load(images.save(tmp_path / "x.npz", PIXELS[..., :channels], labels)) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].shape == (5, 4, 6, 3) and arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == PIXELS[..., :channels].numpy()).all() and (arrays["arr_1"] == np.arange(5)).all()


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("x.jpg", ValueError, r"\.png or \.npz"),
        ("missing/x.png", FileNotFoundError, "does not exist"),
        ("folder.png", IsADirectoryError, "is a folder"),
    ],
)
def test_bad_output(tmp_path, name, error, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(error, match=message):
        images.check_output(tmp_path / name)


def test_output_through_a_link(tmp_path):
    """It is the file behind the link that is written."""
    link = tmp_path / "x.png"
    link.symlink_to(tmp_path / "missing" / "y.png")
    with pytest.raises(FileNotFoundError, match="missing: this folder does not exist"):
        images.check_output(link)
    (tmp_path / "missing").mkdir()
    assert images.save(link, PIXELS) == link and link.is_symlink() and (tmp_path / "missing" / "y.png").is_file()


def test_a_full_disk_says_what_was_written(tmp_path, monkeypatch):
    def full_disk(file, *arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="cannot write .*x.npz: No space left on device") as caught:
        images.save(tmp_path / "x.npz", PIXELS)
    assert caught.value.errno == 28


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = images.save(tmp_path / "x.npz", PIXELS)
    before = path.read_bytes()

    def full_disk(file, *arrays):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        images.save(path, PIXELS[:1])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_a_file_is_replaced_not_rewritten(tmp_path):
    """Who has the old file open keeps reading the old file."""
    path = images.save(tmp_path / "x.npz", PIXELS)
    with open(path, "rb") as old:
        before = path.read_bytes()
        images.save(path, PIXELS[:1])
        assert old.read() == before != path.read_bytes()


@pytest.mark.parametrize("labels", [[0, 1], torch.arange(6), 3, [[0]] * 5], ids=str)
def test_labels_of_other_images(tmp_path, labels):
    with pytest.raises(ValueError, match=r"labels must be \[N\] with N = 5, one for each of the images, got \["):
        images.save(tmp_path / "x.npz", PIXELS, labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns, error", [(0, ValueError), (-2, ValueError), (2.5, TypeError)])
def test_columns_that_are_none(columns, error):
    with pytest.raises(error, match=f"columns must be .*, got {columns}"):
        images.grid(PIXELS, columns=columns)


def test_a_gap_that_is_none():
    assert images.grid(PIXELS, gap=0).shape == (8, 18, 3)
    with pytest.raises(ValueError, match="gap must be 0 or more, got -3"):
        images.grid(PIXELS, gap=-3)


def test_no_images():
    with pytest.raises(ValueError, match="1 or more"):
        images.grid(PIXELS[:0])


def test_arrays_and_lists(tmp_path):
    with np.load(images.save(tmp_path / "x.npz", PIXELS.numpy(), [0, 1, 2, 3, 4])) as arrays:
        assert (arrays["arr_0"] == PIXELS.numpy()).all() and (arrays["arr_1"] == np.arange(5)).all()
    assert (images.grid(PIXELS.numpy()) == images.grid(PIXELS)).all()


@pytest.mark.parametrize(
    "wrong, got",
    [
        (PIXELS / 255, r"float32 \[5, 4, 6, 3\]"),
        (PIXELS.numpy() / 255, r"float64 \[5, 4, 6, 3\]"),
        (PIXELS.bfloat16(), r"bfloat16 \[5, 4, 6, 3\]"),
        (PIXELS.long(), r"int64 \[5, 4, 6, 3\]"),
        (PIXELS.permute(0, 3, 1, 2), r"uint8 \[5, 3, 4, 6\]"),
        (PIXELS[0], r"uint8 \[4, 6, 3\]"),
    ],
)
def test_what_are_no_pixels(tmp_path, wrong, got):
    message = rf"images must be uint8 \[N, H, W, C\] .* got {got}: ops.to_uint8"
    for name in ("x.png", "x.npz"):
        with pytest.raises(ValueError, match=message):
            images.save(tmp_path / name, wrong)
    with pytest.raises(ValueError, match=message):
        images.grid(wrong)
