"""Folders of images, decoded as they are needed, by worker processes if wanted."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import signal
import warnings
from collections.abc import Iterator
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


class FolderData(Dataset):
    """The images in a folder and its subfolders, in the order of their names, as uint8.

    Files count by their suffix, `decode.SUFFIXES`; what starts with a dot is passed over. Links are followed, to files
    and to folders, also out of this one: data sets are put together that way.
    path is the folder; image_size, channels, flip, labelled: as of `open_data`.

    classes     the names of the labels, sorted, or None. Labels are the subfolders, if every image is in one and, for
                `labelled=None`, there are two or more; without subfolders and with `labelled=True`, what stands before
                the first "_" of every file's name, as in openai's data sets
    unreadable  file -> why it cannot be read, of those found so far

    With `skip_unreadable`, the next file that can be read stands in for one that cannot. What comes at a position then
    still follows from the files alone, and a run that such a file ended resumes in the same order without it.

    Raises: ValueError: no images, none of one size, no labels, or files that are no images, which it names; a folder
        that cannot be read; a link that leads back to a folder that it lies in. OSError, from its batches: a worker
        was killed.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_size: int | None = None,
        channels: int | None = None,
        flip: bool = False,
        labelled: bool | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.path, self.flip, self.skip_unreadable = path, flip, skip_unreadable
        self.unreadable: dict[str, str] = {}
        self._warned = False
        names = _images_in(path, skip_unreadable)
        if not names:
            raise ValueError(f"{path} holds no images: no file in it ends in {', '.join(decode.SUFFIXES)}")
        self.classes, labels = _find_labels(path, names, labelled)
        height, width = self._check_headers(names, one_size=image_size is None)
        shape = (channels or 3, image_size or height, image_size or width)
        self._reader = _Reader(path, names, labels, shape, image_size, skip_unreadable)
        self._digest = _digest(path, names)

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

    def _check_headers(self, names: list[str], *, one_size: bool) -> tuple[int, int]:
        """(height, width) of the first image, or of all. What is no image shows before a run and not in it."""
        first, size = "", (0, 0)
        for name in names:
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
            named = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:NAMED]]
            rest = ", ..." if len(self.unreadable) > NAMED else ""
            message = (
                f"{len(self.unreadable)} of {len(names)} files in {self.path} are no images: {', '.join(named)}{rest}"
            )
            if not self.skip_unreadable or not first:
                raise ValueError(f"{message}; remove them, or skip them with skip_unreadable=True")
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
                self._note(unreadable)
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if (message := worker_gone(error)) is None:
                raise
            raise OSError(message) from error
        finally:
            atexit.unregister(end)
            end()

    def _note(self, unreadable: list[tuple[str, str]]) -> None:
        """Raises: ValueError: files that cannot be read, and may not be skipped or are all there is."""
        for name, reason in unreadable:
            known = name in self.unreadable
            self.unreadable[name] = reason
            if not self.skip_unreadable:
                raise ValueError(
                    f"{self.path / name} cannot be read: {reason}; with skip_unreadable=True, which changes the order "
                    "of no other image, training goes on without such files"
                )
            if len(self.unreadable) == len(self):
                raise ValueError(f"{self.path}: none of its {len(self)} images can be read; {name}: {reason}")
            if not known and not self._warned:
                self._warned = True
                message = f"{self.path / name} cannot be read: {reason}; it and others like it are skipped"
                warnings.warn(message, stacklevel=3)


class _Reader(torch.utils.data.Dataset[Any]):
    """Draws to batches: what each worker process holds a copy of."""

    def __init__(
        self,
        path: Path,
        names: list[str],
        labels: list[int] | None,
        shape: tuple[int, int, int],
        image_size: int | None,
        skip_unreadable: bool,
    ) -> None:
        # One array: a list of a million strings would be copied into every worker as it counts its references.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = None if labels is None else torch.tensor(labels, device="cpu")
        self.path, self.shape, self.image_size = path, shape, image_size
        self.tries = len(names) if skip_unreadable else 1
        self.decoder = decode.decoder()

    def __getitem__(self, draw: Any) -> tuple[Batch, list[tuple[str, str]]]:
        """The batch, and (file, why) of those that could not be read."""
        unreadable: list[tuple[str, str]] = []
        images, rows = zip(*(self._readable(row, unreadable) for row in draw.rows.tolist()))
        flips = None if draw.flips is None else torch.from_numpy(draw.flips)
        labels = None if self.labels is None else self.labels[list(rows)]
        return Batch(mirrored(torch.stack(images), flips), labels, torch.from_numpy(draw.index)), unreadable

    def _readable(self, row: int, unreadable: list[tuple[str, str]]) -> tuple[Tensor, int]:
        """The image of a row, or of the next that can be read, and its row."""
        for at in range(row, row + self.tries):
            at %= len(self.names)
            name = os.fsdecode(self.names[at])
            try:
                image = fit(decode.decode(self.path / name, self.decoder), self.image_size, self.shape[0])
                if image.shape != self.shape:
                    raise ValueError(f"it is {list(image.shape)}, the others {list(self.shape)}")
                return image, at
            except Exception as error:
                # As a value: an error that a worker raises comes with its traceback in the message.
                unreadable.append((name, decode.reason(error)))
        return torch.zeros(self.shape, dtype=torch.uint8, device="cpu"), row


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


def _digest(path: Path, names: list[str]) -> str:
    """Of the names and sizes of files."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (path / name).stat().st_size
        except OSError:  # a link to nothing
            size = -1
        digest.update(os.fsencode(f"{name}\0{size}\0"))
    return digest.hexdigest()[:16]
