"""Folders of images, decoded as they are needed, by worker processes if wanted."""

from __future__ import annotations

import atexit
import functools
import gzip
import hashlib
import os
import signal
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from cmfast.data import decode
from cmfast.data.pixels import fit
from cmfast.data.stream import Batch, Dataset, Draw, mirrored

#: So many files are named in an error or a warning.
NAMED = 5
#: In the folder of a run: the names and sizes of the images that it began with (`FolderData.listing`).
LISTING = "images.gz"
#: Bytes of a path, and of a size after it, at the most; and of a listing.
_LONGEST, _LARGEST = 4096 + 24, 2**30
#: After so many files in a row that cannot be read, one looks whether the folder is still there; after so many more, no
#: other is tried: each takes a moment, and a million of them hours.
_LOOK, _MOST = 32, 1000


class FolderData(Dataset):
    """The images in a folder and its subfolders, in the order of their names, as uint8.

    Files count by their suffix, `decode.SUFFIXES`; what starts with a dot is passed over. Links are followed, to files
    and to folders, also out of this one: data sets are put together that way.
    path is the folder; image_size, channels, flip, labelled, run: as of `open_data`.

    classes     the names of the labels, sorted, or None. Labels are the subfolders, if every image is in one and, for
                `labelled=None`, there are two or more; without subfolders and with `labelled=True`, what stands before
                the first "_" of every file's name, as in openai's data sets
    unreadable  file -> why it cannot be read, of those found so far

    With `skip_unreadable`, the next file that can be read stands in for one that cannot. What comes at a position then
    still follows from the files alone, and a run that such a file ended resumes in the same order without it.

    With the `run` that they belong to, its images are those that it began with: one that is gone since, or of another
    size, is a file that cannot be read. Where there are new ones, or most are gone, these are other images.

    Raises: ValueError: no images, none of one size, no labels, or files that are no images, which it names; a folder
        that cannot be read; a link that leads back to a folder that it lies in; from its batches, a file that cannot be
        read, or with `skip_unreadable` 1,000 in a row. OSError, from its batches: a worker was killed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        flip: bool = False,
        labelled: bool | None = None,
        skip_unreadable: bool = False,
        run: str | Path | None = None,
    ) -> None:
        path = Path(path)
        self.path, self.flip, self.skip_unreadable = path, flip, skip_unreadable
        self._warned = False
        found = {name: _size(path / name) for name in _images_in(path, skip_unreadable)}
        if not found:
            raise ValueError(f"{path} holds no images: no file in it ends in {', '.join(decode.SUFFIXES)}")
        began = None if run is None else _began_with(Path(run) / LISTING, found)
        files = began or found
        self.unreadable = {name: _change(found.get(name)) for name in files if files[name] != found.get(name)}
        names = list(files)
        self.classes, labels = _find_labels(path, names, labelled)
        height, width = self._check_headers(names, one_size=image_size is None, resumed=began is not None)
        # Python's own, since NumPy's would stand in the fingerprint by their type.
        shape = int(channels or 3), int(image_size or height), int(image_size or width)
        left_out = [name in self.unreadable for name in names]
        self._reader = _Reader(path, names, labels, shape, image_size, left_out, skip_unreadable)
        listing = _listing(files)
        self._digest = hashlib.sha256(listing).hexdigest()[:16]
        self._listing = gzip.compress(listing, 6, mtime=0)

    def __len__(self) -> int:
        return len(self._reader.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self._reader.shape

    @property
    def num_classes(self) -> int | None:
        """Labels are below it; None without labels."""
        return None if self.classes is None else len(self.classes)

    @property
    def fingerprint(self) -> str:
        """Tells these images from others, in one line that can be read."""
        labels = "without labels" if self.classes is None else f"of {self.num_classes} classes"
        decoder = self._reader.decoder
        return f"{len(self)} images uint8 {list(self.image_shape)} {labels}, read by {decoder}, {self._digest}"

    @property
    def listing(self) -> bytes:
        """Names and sizes of the files, as gzip: what a run keeps of them."""
        return self._listing

    def _check_headers(self, names: list[str], *, one_size: bool, resumed: bool) -> tuple[int, int]:
        """(height, width) of the first image, or of all. What is no image shows before a run and not in it."""
        first, size = "", (0, 0)
        for name in names:
            if name in self.unreadable:  # not what it was
                continue
            try:
                this = decode.size_of(self.path / name)
            except Exception as error:  # decoders raise whatever a broken file leads them to
                self.unreadable[name] = decode.reason(error)
                continue
            if not first:
                first, size = name, this
            elif one_size and this != size:
                raise ValueError(
                    f"{self.path} holds images of several sizes: {first} is {size[1]} x {size[0]}, {name} is "
                    f"{this[1]} x {this[0]}; give image_size, to which each is cropped and resized"
                )
        if self.unreadable:
            several = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:NAMED]]
            named = ", ".join(several) + (", ..." if len(self.unreadable) > NAMED else "")
            of = f"{len(self.unreadable)} of {len(names)}"
            message, mend = f"{of} files in {self.path} are no images: {named}", "remove them"
            if resumed:
                message = f"{of} files in {self.path} are no images, or not those of this run: {named}"
                mend = "put them there as they were"
            if not self.skip_unreadable or not first:
                raise ValueError(f"{message}; {mend}, or skip them with skip_unreadable=True")
            warnings.warn(f"{message}; they are skipped", stacklevel=4)
        return size

    def _read(self, draws: Iterator[Draw], workers: int, pin_memory: bool) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            self._reader,
            batch_size=None,  # a draw is a batch already
            sampler=map(_by_value, draws),
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=_pass_over_one_sigterm,
            pin_memory=pin_memory,
            # A loader draws a seed for its workers, which need none: not from the generator that training draws from.
            generator=torch.Generator(),
        )
        batches: Any = iter(loader)
        # Not when it is collected, since the traceback of an error keeps it. And multiprocessing, which at exit waits
        # for workers without end, sends them the one signal that they pass over.
        end = functools.partial(_end_workers, batches, os.getpid())
        atexit.register(end)
        try:
            for batch, unreadable in batches:
                self._note(unreadable, tried=batch if isinstance(batch, int) else 0)
                assert not isinstance(batch, int)  # which is an error
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if (message := worker_gone(error)) is None:
                raise
            raise OSError(message) from error
        finally:
            atexit.unregister(end)
            end()

    def _note(self, unreadable: list[tuple[str, str]], tried: int) -> None:
        """tried: so many in a row, and none can be read.

        Raises: ValueError: files that cannot be read, and may not be skipped or are too many.
        """
        for name, reason in unreadable:
            known = name in self.unreadable
            self.unreadable[name] = reason
            if not self.skip_unreadable:
                raise ValueError(
                    f"{self.path / name} cannot be read: {reason}; with skip_unreadable=True, which changes the order "
                    "of no other image, training goes on without such files"
                )
            if not known and not self._warned:
                self._warned = True
                message = f"{self.path / name} cannot be read: {reason}; it and others like it are skipped"
                warnings.warn(message, stacklevel=3)
        if tried:
            name, reason = unreadable[-1]
            if len(self.unreadable) == len(self):
                raise ValueError(f"{self.path}: none of its {len(self)} images can be read; {name}: {reason}")
            raise ValueError(f"{self.path}: none of {tried} images in a row can be read; {name}: {reason}")


class _Reader(torch.utils.data.Dataset[Any]):
    """Draws to batches: what each worker process holds a copy of."""

    def __init__(
        self,
        path: Path,
        names: list[str],
        labels: list[int] | None,
        shape: tuple[int, int, int],
        image_size: int | None,
        left_out: list[bool],
        skip_unreadable: bool,
    ) -> None:
        # One array: a list of a million strings would be copied into every worker as it counts its references.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = None if labels is None else torch.tensor(labels, device="cpu")
        self.path, self.shape, self.image_size = path, shape, image_size
        # Those that cannot be read as the data are opened: not tried again, and none of those in a row.
        self.left_out = np.array(left_out)
        self.tries = len(names) if skip_unreadable else 1
        self.decoder = decode.decoder()

    def __getitem__(self, draw: Any) -> tuple[Batch | int, list[tuple[str, str]]]:
        """The batch, or of how many images in a row none can be read; and (file, why) of each of those."""
        unreadable: dict[str, str] = {}
        images, rows = [], []
        for row in draw.rows.tolist():
            image, at = self._readable(row, unreadable)
            if image is None:
                return at, list(unreadable.items())
            images.append(image)
            rows.append(at)
        flips = None if draw.flips is None else torch.from_numpy(draw.flips)
        labels = None if self.labels is None else self.labels[rows]
        batch = Batch(mirrored(torch.stack(images), flips), labels, torch.from_numpy(draw.index))
        return batch, list(unreadable.items())

    def _readable(self, row: int, unreadable: dict[str, str]) -> tuple[Tensor | None, int]:
        """The image of a row, or of the next that can be read, and its row; or None, and how many were tried."""
        tried = 0
        for at in range(row, row + self.tries):
            at %= len(self.names)
            if self.left_out[at]:
                continue
            name = os.fsdecode(self.names[at])
            if name not in unreadable:  # of an image before it in the batch
                try:
                    image = fit(decode.decode(self.path / name, self.decoder), self.image_size, self.shape[0])
                    if image.shape != self.shape:
                        raise ValueError(f"it is {list(image.shape)}, the others {list(self.shape)}")
                    return image, at
                except Exception as error:
                    # As a value: an error that a worker raises comes with its traceback in the message.
                    unreadable[name] = decode.reason(error)
            tried += 1
            if tried == _MOST or tried % _LOOK == 0 and self._is_gone():
                break
        return None, tried

    def _is_gone(self) -> bool:
        """Whether nothing is left of the folder; where a disk was unmounted, an empty one is."""
        try:
            with os.scandir(self.path) as entries:
                return next(entries, None) is None
        except OSError:
            return True


def _by_value(draw: Draw) -> Any:
    """A draw of arrays, which go to a worker in the message itself: tensors would go through shared memory."""
    arrays: Any = (None if part is None else part.numpy() for part in draw)
    return Draw(*arrays)


def _pass_over_one_sigterm(worker: int) -> None:
    """In a worker: where a whole job is told to end, it goes on, so that the run ends after its step and not within.

    The run itself ends a worker by a message; by a signal only one that does not answer, and at exit again.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end_workers(batches: Any, owner: int) -> None:
    """Of a loader's iterator, in the process `owner` and not in one that was forked from it."""
    if os.getpid() != owner or not hasattr(batches, "_workers"):  # without, this process reads
        return
    batches._shutdown_workers()  # by a message, for which it waits some seconds
    for worker in batches._workers:
        worker.kill()
        worker.join()


def worker_gone(error: Exception) -> str | None:
    """What to say of an error by which torch's loader tells that a worker ended, wherever the run was: it comes by a
    signal. None: another error."""
    said = str(error).strip() or type(error).__name__
    if not isinstance(error, ConnectionError | EOFError) and not said.startswith("DataLoader worker"):
        return None
    return f"a process that decodes images is gone, as when memory runs out; --resume goes on with the run: {said}"


def _unchanged(item: Any) -> Any:
    return item


def _images_in(path: Path, skip_unreadable: bool) -> list[str]:
    """The images below a folder, by their paths in it. Raises: ValueError: a folder that cannot be read."""
    names = []
    unreadable: list[OSError] = []
    for folder, subfolders, files in os.walk(path, onerror=unreadable.append, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            _check_link(path, Path(folder, name))
        inside = Path(folder).relative_to(path)
        images = (name for name in files if name.lower().endswith(decode.SUFFIXES) and not name.startswith("."))
        names += [(inside / name).as_posix() for name in images]
    for error in unreadable:
        message = f"the folder {error.filename} cannot be read: {error.strerror}"
        if not skip_unreadable:
            raise ValueError(f"{message}; with skip_unreadable=True its images are left out, and a class that it is")
        warnings.warn(f"{message}; its images are left out", stacklevel=4)
    return sorted(names)


def _check_link(top: Path, folder: Path) -> None:
    """Raises: ValueError: a link to a folder that it lies in, through which its images would come again and again."""
    if not folder.is_symlink():
        return
    above = [folder.parent, *folder.parent.parents]
    if any(folder.samefile(each) for each in above[: above.index(top) + 1]):
        raise ValueError(f"{folder} is a link to {os.path.realpath(folder)}, in which it lies itself: remove it")


def _find_labels(path: Path, names: list[str], labelled: bool | None) -> tuple[list[str] | None, list[int] | None]:
    """(names of the classes, label of each image), or (None, None)."""
    if labelled is False:
        return None, None
    folders = [name.split("/")[0] for name in names if "/" in name]
    prefixes = [name.split("_")[0] for name in names if "_" in name[1:]]
    if len(folders) == len(names) and (labelled or len(set(folders)) > 1):
        found = folders
    elif labelled and not folders and len(prefixes) == len(names):
        found = prefixes
    elif labelled:
        without = next(name for name in names if "/" not in name and (folders or "_" not in name[1:]))
        raise ValueError(
            f"labelled=True, and {path} has no labels: they are the names of its subfolders, if all images are in one, "
            f"or without subfolders what stands before the first _ in the names of all files; {without} has none"
        )
    else:
        return None, None
    classes = sorted(set(found))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] for name in found]


def _size(path: Path) -> int:
    """Bytes of a file; -1 of a link to nothing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _listing(files: Mapping[str, int]) -> bytes:
    """The names and sizes of files, each ended by a zero."""
    return b"".join(os.fsencode(f"{name}\0{size}\0") for name, size in files.items())


def _began_with(listing: Path, found: Mapping[str, int]) -> dict[str, int] | None:
    """The files that a run began with, by its listing, where `found` are the same: no new ones, and half of them or
    more as they were. None: these are others, or there is no such listing, as of older runs: the fingerprint tells."""
    try:
        # Not what blocks, or becomes as large as a memory: no more than twice as many files as there are.
        if not listing.is_file():
            return None
        with gzip.open(listing) as file:
            content = file.read(min(2 * len(found) * _LONGEST, _LARGEST))
        if content.count(b"\0") > 4 * len(found):
            return None
        parts = content.split(b"\0")
        files = {os.fsdecode(name): int(size) for name, size in zip(parts[:-1:2], parts[1::2])}
    except (OSError, EOFError, zlib.error, ValueError):  # damaged
        return None
    kept = sum(found.get(name) == size for name, size in files.items())
    return files if found.keys() <= files.keys() and 2 * kept >= len(files) else None


def _change(size: int | None) -> str:
    """Why a file, of this size now, is not what it was; None: there is no such file."""
    return "it is of another size than when the run began" if size is not None and size >= 0 else "it is gone"
