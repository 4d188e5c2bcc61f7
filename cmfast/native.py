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
from pathlib import Path
from typing import Any

import torch

from cmfast.errors import Unavailable

#: What a compiler may use, by what PyTorch calls the CPU; of others nothing was measured.
FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
#: Without -fopenmp at the end: the threads are those of PyTorch, whose OpenMP is there already, and no second one.
COMPILE, LINK = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-c"), ("-shared",)


@functools.cache
def library(source: Path, cpu: str | None = None) -> ctypes.CDLL:
    """The functions of a C file, compiled for a CPU by its name in `FLAGS`; None: this one.

    What is compiled is kept in the user's folder for such things, ~/.cache/cmfast, or for this process alone where that
    cannot be written to, or others may write to it.

    Raises: Unavailable: there is no compiler, or none whose OpenMP is PyTorch's; or this CPU is not known.
    """
    cpu = cpu or torch.backends.cpu.get_cpu_capability()
    if os.environ.get("CMFAST_NATIVE") == "0":
        raise Unavailable("CMFAST_NATIVE=0 is set")
    if platform.system() != "Linux":
        raise Unavailable(f"it is for Linux, and this is {platform.system()}")
    if cpu not in FLAGS:
        raise Unavailable(f"it is for CPUs with {' or '.join(FLAGS)}, and PyTorch says {cpu} of this one")
    named = os.environ.get("CC", "").split()
    compilers = [each for each in ([named] if named else [["gcc"], ["cc"]]) if shutil.which(each[0])]
    if not compilers:
        raise Unavailable("there is no C compiler: install gcc, or name one in CC")
    reasons: list[str] = []
    for compiler in compilers:
        try:
            return _loaded(source, [*compiler, *COMPILE, *FLAGS[cpu]], [*compiler, *LINK])
        except subprocess.CalledProcessError as error:
            said = next((line for line in error.stderr.splitlines() if "error" in line), str(error))
        except (OSError, subprocess.SubprocessError) as error:
            said = str(error)
        reasons.append(f"{compiler[0]}: {said}")
    raise Unavailable(f"{source.name} could not be compiled here ({'; '.join(reasons)})")


def _loaded(source: Path, compile: list[str], link: list[str]) -> ctypes.CDLL:
    code = source.read_bytes()
    name = f"{source.stem}-{hashlib.sha256(repr((code, compile, link)).encode()).hexdigest()[:16]}.so"
    folder = _folder()
    if folder is not None and (folder / name).is_file():
        with contextlib.suppress(OSError):  # it was cut off
            return ctypes.CDLL(os.fspath(folder / name))
    options: dict[str, Any] = {"check": True, "capture_output": True, "timeout": 120, "encoding": "utf-8"}
    options |= {"errors": "replace", "env": {**os.environ, "LC_ALL": "C"}}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, linked = os.path.join(place, "made.o"), os.path.join(place, name)
        for command in ([*compile, os.fspath(source), "-o", made], [*link, made, "-o", linked]):
            subprocess.run(command, **options)
        functions = ctypes.CDLL(linked)  # which outlives its file
        if folder is not None:
            # Whole, as another process may be about to load it.
            os.replace(linked, folder / name)
        return functions


def _folder() -> Path | None:
    """Where what is compiled is kept; None where others could put there what is then run, or it cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmfast"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.geteuid() and not others and os.access(folder, os.W_OK):
            return folder
    return None
