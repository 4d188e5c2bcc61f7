"""`cm.logger`: messages and tables of numbers, to the terminal and to files."""

from __future__ import annotations

import csv
import datetime
import json
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class KVWriter:
    """A format that tables of numbers are written to."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a table of numbers."""
        raise NotImplementedError


class SeqWriter:
    """A format that messages are written to."""

    def writeseq(self, seq: Iterable[str]) -> None:
        """Write the parts of a message."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Messages as lines, numbers as a table, to a path or an open file."""

    def __init__(self, filename_or_file: str | TextIO) -> None:
        self.own_file = isinstance(filename_or_file, str)
        self.file = open(filename_or_file, "w") if isinstance(filename_or_file, str) else filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a table of two columns."""
        cells = [(_short(str(k)), _short(f"{float(v):<8.3g}" if _is_number(v) else str(v))) for k, v in kvs.items()]
        if not cells:
            return
        key_width, value_width = (max(len(row[column]) for row in cells) for column in (0, 1))
        rule = "-" * (key_width + value_width + 7)
        rows = [f"| {k:<{key_width}} | {v:<{value_width}} |" for k, v in sorted(cells, key=lambda row: row[0].lower())]
        self.file.write("\n".join([rule, *rows, rule]) + "\n")
        self.file.flush()

    def writeseq(self, seq: Iterable[str]) -> None:
        """Write a line."""
        self.file.write(" ".join(seq) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file, if this opened it."""
        if self.own_file:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object a line."""

    def __init__(self, filename: str) -> None:
        self.file = open(filename, "w")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a line."""
        self.file.write(json.dumps({k: float(v) if hasattr(v, "dtype") else v for k, v in kvs.items()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A row for each table; a key that is new becomes a column, and rows before it are left empty there."""

    def __init__(self, filename: str) -> None:
        self.file = open(filename, "w+", newline="")
        self.keys: list[str] = []

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a row."""
        rows: list[Mapping[str, Any]] = [kvs]
        new = sorted(kvs.keys() - set(self.keys))
        if new:
            self.file.seek(0)
            rows = [*csv.DictReader(self.file), kvs]
            self.keys += new
            self.file.seek(0)
            self.file.truncate()
        writer = csv.DictWriter(self.file, self.keys, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoardOutputFormat(KVWriter):
    """Scalars for TensorBoard, one step a table."""

    def __init__(self, dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the log format 'tensorboard' needs the package tensorboard: pip install it") from error
        self.writer, self.step = SummaryWriter(dir), 1

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a step."""
        for key, value in kvs.items():
            self.writer.add_scalar(key, float(value), self.step)
        self.writer.flush()
        self.step += 1

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")


def _short(text: str, longest: int = 30) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


# Format name -> (what writes it, name of its file without the log's suffix, ending).
_FILES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "log": (HumanOutputFormat, "log", ".txt"),
    "csv": (CSVOutputFormat, "progress", ".csv"),
    "json": (JSONOutputFormat, "progress", ".json"),
    "tensorboard": (TensorBoardOutputFormat, "tb", ""),
}


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """`stdout`, `log`, `csv`, `json` or `tensorboard`, the last four in files of the folder `ev_dir`."""
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format not in _FILES:
        raise ValueError(f"unknown log format {format!r}; known: {', '.join(['stdout', *_FILES])}")
    kind, name, ending = _FILES[format]
    os.makedirs(ev_dir, exist_ok=True)
    return kind(os.path.join(ev_dir, f"{name}{log_suffix}{ending}"))


class Logger:
    """Values of this iteration, and the formats that they and messages are written to.

    comm: if not None, `dumpkvs` averages over the ranks of torch.distributed (those of a process group, if it is
    one): every rank must call it, and rank 0 writes and returns the averages, the others nothing.
    """

    DEFAULT: Logger | None = None  #: made on first use
    CURRENT: Logger | None = None  #: what the functions of this module go to

    def __init__(self, dir: str | None, output_formats: Sequence[Any], comm: Any = None) -> None:
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key: str, val: Any) -> None:
        """Note a value of this iteration; the last one counts."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        """Note a value of this iteration; the mean counts."""
        count = self.name2cnt[key] = self.name2cnt[key] + 1
        self.name2val[key] = (self.name2val[key] * (count - 1) + val) / count

    def dumpkvs(self) -> dict[str, Any]:
        """Write the values of this iteration, forget them and return them."""
        values = dict(self.name2val)
        if self.comm is not None:
            values = mpi_weighted_mean(self.comm, {k: (v, self.name2cnt.get(k, 1)) for k, v in values.items()})
        if values:
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writekvs(values)
        self.name2val.clear()
        self.name2cnt.clear()
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message, its parts separated by spaces."""
        if self.level <= level:
            for output in self.output_formats:
                if isinstance(output, SeqWriter):
                    output.writeseq(map(str, args))

    def set_level(self, level: int) -> None:
        """Messages below `level` are dropped."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """See the class."""
        self.comm = comm

    def get_dir(self) -> str | None:
        """The folder of the files; None without."""
        return self.dir

    def close(self) -> None:
        """Close the formats."""
        for output in self.output_formats:
            output.close()


def mpi_weighted_mean(comm: Any, local_name2valcount: dict[str, tuple[Any, int]]) -> dict[str, float]:
    """Means of (value, count) weighted by counts, on rank 0; nothing on the others. No MPI, see `Logger`."""
    group = comm if isinstance(comm, dist.ProcessGroup) else None
    everyone: list[Any] = [local_name2valcount]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, local_name2valcount, group)
        if dist.get_rank(group) != 0:
            return {}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for name, (value, count) in (item for rank in everyone for item in rank.items()):
        if not _is_number(value):
            warnings.warn(f"{name}={value!r} is no number: it is left out of the averages over ranks", stacklevel=4)
            continue
        sums[name] += float(value) * count
        counts[name] += count
    return {name: sums[name] / counts[name] for name in sums}


def get_current() -> Logger:
    """The current logger; made with the defaults of `configure` if there is none."""
    if Logger.CURRENT is None:
        Logger.DEFAULT = configure()
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def get_rank_without_mpi_import() -> int:
    """From the environment: a log may be opened before a process group is."""
    return int(next((os.environ[k] for k in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK") if k in os.environ), 0))


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = ""
) -> Logger:
    """Make a logger and use it from now on.

    Args:
        dir: folder of its files; default: $OPENAI_LOGDIR, or a new one for temporary files.
        format_strs: see `make_output_format`; default: $OPENAI_LOG_FORMAT or stdout, log and csv, on ranks above 0
            $OPENAI_LOG_FORMAT_MPI or log.
        comm: see `Logger`; log_suffix: of file names, before which ranks above 0 put their own.
    """
    now = datetime.datetime.now()
    dir = dir or os.getenv("OPENAI_LOGDIR") or str(Path(tempfile.gettempdir(), f"openai-{now:%Y-%m-%d-%H-%M-%S-%f}"))
    dir = os.path.expanduser(dir)
    os.makedirs(dir, exist_ok=True)
    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03}"
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT_MPI", "log") if rank else ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = os.getenv(variable, default).split(",")
    formats = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir, formats, comm)
    if formats:
        log(f"Logging to {dir}")
    return Logger.CURRENT


def reset() -> None:
    """Close the current logger and go back to the default one."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("Reset logger")


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure`, until the end of the `with` block."""
    before = Logger.CURRENT
    logger = configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        logger.close()
        Logger.CURRENT = before


def logkv(key: str, val: Any) -> None:
    """Note a value of this iteration; the last one counts."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Note a value of this iteration; the mean counts."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """`logkv` of every entry."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Write the values of this iteration, forget them and return them."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values of this iteration so far."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write a message, its parts separated by spaces."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """`log` at level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """`log` at level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Messages below `level` are dropped."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """See `Logger`."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the current logger's files."""
    return get_current().get_dir()


record_tabular, dump_tabular = logkv, dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that the `with` block takes to the value `wait_{scopename}`."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.time() - start


def profile(n: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `profile_kv(n)` around every call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
