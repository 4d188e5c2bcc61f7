"""C for CPUs, for what PyTorch's operations cannot do at its speed: compiled when first used, once on each machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from cmfast import whole
from cmfast.errors import Unavailable
from cmfast.reference._common import recorded, traced, watched

__all__ = ["recorded", "traced", "watched"]  # asked by all that is C

#: What a compiler may use, by what PyTorch calls the CPU; of others nothing was measured.
FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
#: Without -fopenmp at the end: the threads are those of PyTorch, whose OpenMP is there already, and no second one.
#: Nor with loops written out for each value of what stays the same in them, which takes longer than all the rest.
COMPILE = ("-O3", "-fno-unswitch-loops", "-fno-math-errno", "-std=gnu11", "-fPIC", "-fopenmp", "-c")
LINK = ("-shared",)
#: Classes whose tensors may be what lies in memory.
_CLASSES = (torch.Tensor, torch.nn.Parameter)
_one_at_a_time = threading.RLock()


def library(cpu: str | None = None, folder: Path = Path(__file__).parent) -> ctypes.CDLL:
    """The functions of a folder's C files, compiled for a CPU by its name in `FLAGS`; None: this one.

    What is compiled is kept in the user's folder for such things, ~/.cache/cmfast, or for this process alone where that
    cannot be written to, or others may write to it.

    Raises: Unavailable: there is no compiler, or none whose OpenMP is PyTorch's; or this CPU is not known.
    """
    with _one_at_a_time:
        return _library(cpu, folder)


@functools.cache
def _library(cpu: str | None, folder: Path) -> ctypes.CDLL:
    cpu = cpu or torch.backends.cpu.get_cpu_capability()
    if os.environ.get("CMFAST_NATIVE") == "0":
        raise Unavailable("CMFAST_NATIVE=0 is set")
    if platform.system() != "Linux":
        raise Unavailable(f"it is for Linux, and this is {platform.system()}")
    if cpu not in FLAGS:
        raise Unavailable(f"it is for CPUs with {' or '.join(FLAGS)}, and PyTorch says {cpu} of this one")
    named = os.environ.get("CC", "").split()
    compilers = [each for each in (named, ["gcc"], ["cc"]) if each and shutil.which(each[0])]
    if not compilers:
        tried = "gcc" if not named else f"{named[0]} nor gcc"
        raise Unavailable(f"there is no C compiler, {tried}: install one, or name it in CC")
    reasons: list[str] = []
    for compiler in compilers:
        try:
            return _loaded(folder, [*compiler, *COMPILE, *FLAGS[cpu]], [*compiler, *LINK])
        except subprocess.CalledProcessError as error:
            said = next((line for line in error.stderr.splitlines() if "error" in line), str(error))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no process, or no thread, can be begun
            said = str(error)
        reasons.append(f"{compiler[0]}: {said}")
    raise Unavailable(f"the C of cmfast could not be compiled here ({'; '.join(reasons)})")


def function(library: ctypes.CDLL, name: str, *arguments: Any, result: Any = None) -> Any:
    """One of a library's, which is told the kinds of its arguments and of its result."""
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, result
    return found


def refusal(functions: Callable[[], Any]) -> str | None:
    """Why functions that `library` loads cannot be had here; None if they can."""
    try:
        functions()
    except Unavailable as error:
        return str(error)
    return None


def lies_here(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether the numbers of a tensor are what lies in memory, of these dtypes, on the CPU."""
    return lie_here((x,), dtypes)


def lie_here(tensors: Iterable[torch.Tensor], dtypes: tuple[torch.dtype, ...]) -> bool:
    """The same of each of them."""
    plain, keys_of = _plain(), torch._C._dispatch_keys
    for x in tensors:
        if x.dtype not in dtypes or type(x) not in _CLASSES or keys_of(x).raw_repr() not in plain:
            return False
    return True


@functools.cache
def _plain() -> frozenset[int]:
    """What PyTorch dispatches by of tensors on the CPU, made in inference mode or not, where there is nothing more to
    them: neither a sign or a layout of their own, nor whatever wraps them in a transform."""
    with _disable_current_modes():
        found = []
        for mode in (False, True):
            with torch.inference_mode(mode):
                found.append(torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr())
        return frozenset(found)


#: Memory formats by numbers of dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: torch.Tensor) -> bool:
    """Whether a batch of images or volumes lies so."""
    return x.ndim in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])


def threads(work: int, least: int) -> int:
    """How many threads do so much work: all, or one where there is less than pays for waiting for the others. Numbers
    in between would have OpenMP end threads and begin others."""
    return torch.get_num_threads() if work >= least else 1


def _loaded(sources: Path, to_object: list[str], to_library: list[str]) -> ctypes.CDLL:
    """By these two commands, all files at the same time; or from the folder where it was kept."""
    files = [(path.name, path.read_bytes()) for path in sorted(sources.glob("*.[ch]"))]
    content = repr((files, to_object, to_library))
    name, folder = f"native-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so", _folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # it is not there, or was cut off
            return ctypes.CDLL(os.fspath(folder / name))
    options: dict[str, Any] = {
        "check": True, "capture_output": True, "timeout": 120, "encoding": "utf-8", "errors": "replace",
        "env": {**os.environ, "LC_ALL": "C"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        named = [path for path, _ in files if path.endswith(".c")]
        made, linked = [os.path.join(place, f"{path}.o") for path in named], os.path.join(place, name)
        commands = [[*to_object, os.fspath(sources / path), "-o", to] for path, to in zip(named, made, strict=True)]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(lambda command: subprocess.run(command, **options), commands))
        subprocess.run([*to_library, *made, "-o", linked], **options)
        kept = None if folder is None else folder / name
        if kept is not None:
            with contextlib.suppress(OSError):  # no room, or nothing may be run from there
                with whole.written_whole(kept) as file:
                    shutil.copyfile(linked, file)
                return ctypes.CDLL(os.fspath(kept))
        try:
            return ctypes.CDLL(linked)  # which outlives its file
        except OSError:  # of another compiler's OpenMP
            if kept is not None:
                kept.unlink(missing_ok=True)
            raise


def _after_fork() -> None:
    """In a child, where the thread that compiles is none."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _folder() -> Path | None:
    """Where what is compiled is kept; None where others could put there what is then run, or it cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmfast"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        for each in (folder, *folder.parents):
            found = each.stat()
            others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            # In /tmp, which is sticky, nobody can put another folder in the place of one's own.
            kept_apart = each != folder and found.st_mode & stat.S_ISVTX
            if found.st_uid not in (0, os.geteuid()) or (others and not kept_apart):
                return None
        return folder
    return None
