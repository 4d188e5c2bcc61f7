"""C that is compiled on the user's machine: once, for nobody else to write to, and what is said where it cannot be."""

import ctypes
import importlib
import itertools
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from cmfast import native
from cmfast.errors import Unavailable
from cmfast.native import winograd

SOURCE = "int omp_get_thread_num(void);\nint answer(void) {{ return {} + omp_get_thread_num(); }}\n"
needs_compiler = pytest.mark.skipif(winograd.refusal() is not None, reason=f"C: {winograd.refusal()}")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file, an empty folder for what is compiled, and a compiler that was not asked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CMFAST_NATIVE", raising=False)
    monkeypatch.setenv("CC", os.environ.get("CC") or "gcc")
    path = tmp_path / "some.c"
    path.write_text(SOURCE.format(42))
    return path


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run."""
    every, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: every.append(command) or run(command, **options))
    return every


def load(source):
    """As in a new process."""
    return native._library.__wrapped__(None, source.parent)


def no_home():
    raise RuntimeError("Could not determine home directory.")


def no_room(path):
    raise OSError(28, "No space left on device")


@needs_compiler
def test_compiled_once(source, commands):
    """And again when the source changes."""
    assert load(source).answer() == 42 and len(commands) == 2
    assert load(source).answer() == 42 and len(commands) == 2
    source.write_text(SOURCE.format(43))
    assert load(source).answer() == 43 and len(commands) == 4
    kept = source.parent / "cache" / "cmfast"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700 and all(each.suffix == ".so" for each in kept.iterdir())


@needs_compiler
def test_all_files_of_a_folder(source, commands):
    """Which are compiled at the same time, and again when what they share changes."""
    shared = source.parent / "shared.h"
    shared.write_text("enum { ONE = 1 };\n")
    (source.parent / "other.c").write_text('#include "shared.h"\nint other(void) { return ONE; }\n')
    made = load(source)
    assert (made.answer(), made.other()) == (42, 1) and len(commands) == 3
    shared.write_text("enum { ONE = 2 };\n")
    assert load(source).other() == 2


@needs_compiler
def test_a_file_that_was_cut_off(source, commands):
    code = f"from pathlib import Path; from cmfast import native; native.library(folder=Path({str(source.parent)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    (made,) = (source.parent / "cache" / "cmfast").iterdir()
    made.write_bytes(made.read_bytes()[:100])
    commands.clear()
    assert load(source).answer() == 42 and len(commands) == 2
    assert load(source).answer() == 42 and len(commands) == 2


@needs_compiler
@pytest.mark.parametrize("kind", ["others may write", "others may put another there", "a file", "no home"])
def test_nothing_is_kept_where_it_is_not_safe(source, commands, kind, monkeypatch):
    """What others could put there would be run."""
    folder = source.parent / "cache" / "cmfast"
    if kind == "others may write":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    elif kind == "others may put another there":
        folder.mkdir(parents=True)
        folder.parent.chmod(0o777)
    elif kind == "a file":
        folder.parent.mkdir()
        folder.write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", no_home)
    for calls in (2, 4):
        assert load(source).answer() == 42 and len(commands) == calls
    assert not folder.is_dir() or not list(folder.iterdir())


@needs_compiler
def test_the_threads_are_those_of_pytorch(source):
    """No second OpenMP, whose threads would wait for work beside them: the library asks for none of its own."""
    load(source)
    (made,) = (source.parent / "cache" / "cmfast").iterdir()
    content = made.read_bytes()
    assert b"omp_get_thread_num" in content and b"libgomp" not in content and b"libomp" not in content


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"CMFAST_NATIVE": "0"}, "CMFAST_NATIVE=0 is set"),
        ({"CC": "", "PATH": "/nowhere"}, "there is no C compiler, gcc: install one, or name it in CC"),
        ({"CC": "mycc -m64", "PATH": "/nowhere"}, "there is no C compiler, mycc nor gcc: install"),
        ({"CC": "/bin/false", "PATH": "/nowhere"}, r"C of cmfast could not be compiled here \(/bin/false: "),
    ],
    ids=["off", "none", "another", "fails"],
)
def test_why_not(source, environment, message, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=message):
        load(source)


@needs_compiler
def test_another_compiler_where_the_first_fails(source, monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    assert load(source).answer() == 42


@needs_compiler
def test_where_nothing_can_be_kept(source, monkeypatch):
    """For want of room, say: it serves all the same."""
    monkeypatch.setattr(native.whole, "written_whole", no_room)
    assert load(source).answer() == 42


@needs_compiler
def test_threads_compile_once(source, commands):
    """The first of them: the others wait."""
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: native.library(folder=source.parent), range(4)))
    assert len(commands) == 2 and len(set(map(id, made))) == 1


class Named(torch.Tensor):
    """A subclass that changes nothing."""


def test_what_lies_in_memory():
    x, dtypes = torch.ones(2, 3), (torch.float32,)
    assert native.lies_here(x, dtypes) and native.lies_here(torch.nn.Parameter(x), dtypes)
    with torch.inference_mode():
        assert native.lies_here(torch.ones(2), dtypes) and native.lies_here(x[0], dtypes)
    for other in (
        torch._efficientzerotensor((2, 3)), torch._neg_view(x), x.to_sparse(), x.to_mkldnn(), x.double(), x.to("meta"),
        torch._to_functional_tensor(x), TwoTensor(x, x), x.as_subclass(Named),
    ):  # fmt: skip
        assert not native.lies_here(other, dtypes)
    said = []
    for transform in (torch.func.vmap, torch.func.functionalize):
        transform(lambda row: said.append(native.lies_here(row, dtypes)) or row)(x)
    assert said == [False, False]


def test_what_lies_in_memory_is_asked_before_a_mode():
    """Whatever mode is there when it is asked first."""
    native._plain.cache_clear()
    try:
        with FakeTensorMode(), torch.inference_mode():
            assert len(native._plain()) == 2
        assert native.lies_here(torch.ones(2), (torch.float32,))
    finally:
        native._plain.cache_clear()


def no_thread(self):
    raise RuntimeError("can't start new thread")


@needs_compiler
def test_where_no_thread_can_be_begun(source, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(Unavailable, match="can't start new thread"):
        load(source)


@needs_compiler
def test_a_fork_while_another_thread_compiles(source):
    """Its lock is none of the child's."""
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with native._one_at_a_time:
            inside.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        child = os.fork()
        if not child:
            os._exit(0 if native._one_at_a_time.acquire(timeout=20) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        thread.join()


@needs_compiler
def test_a_fault_in_the_source_is_named(source):
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(Unavailable, match=r"could not be compiled here \(gcc: .*some\.c.*nothing"):
        load(source)


@needs_compiler
def test_a_second_openmp_is_refused(source):
    """A function that no library here has, as those of another compiler's OpenMP."""
    source.write_text("int __kmpc_of_another(void); int answer(void) { return __kmpc_of_another(); }")
    with pytest.raises(Unavailable, match="undefined symbol: __kmpc_of_another"):
        load(source)


@pytest.mark.parametrize("system, cpu", [("Darwin", "AVX2"), ("Linux", "DEFAULT")])
def test_other_machines(source, system, cpu, monkeypatch):
    monkeypatch.setattr(native.platform, "system", lambda: system)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    with pytest.raises(Unavailable, match="it is for"):
        load(source)


@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(native.__file__).parent.glob("*.c"))])
def test_each_part_can_be_imported_first(name):
    subprocess.run([sys.executable, "-c", f"import cmfast.native.{name}"], check=True)


def test_off_in_a_process_of_its_own():
    """By the variable: the network computes, and `info` says why not."""
    code = "from cmfast import info, native; print(native.winograd.refusal()); print(info.report())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "CMFAST_NATIVE": "0"}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.startswith("CMFAST_NATIVE=0 is set\n")
    assert "3x3 convolutions on a CPU: PyTorch's (CMFAST_NATIVE=0 is set)" in done.stdout


KINDS = {"double": ctypes.c_double, "float": ctypes.c_float, "unsigned long": ctypes.c_ulong, "long": ctypes.c_long,
         "unsigned": ctypes.c_uint, "int": ctypes.c_int, "void": None}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", [path.stem for path in sorted(Path(native.__file__).parent.glob("*.c"))])
def test_functions_are_as_in_c(name, monkeypatch):
    """What they are told of their arguments and results: C does not check it."""
    declared, function = {}, native.function

    def note(library, name, *arguments, result=None):
        declared[name] = [*arguments, result]
        return function(library, name, *arguments, result=result)

    monkeypatch.setattr(native, "function", note)
    module = importlib.import_module(f"cmfast.native.{name}")
    module.functions.__wrapped__(None)
    text = Path(module.__file__).with_suffix(".c").read_text(encoding="utf-8")
    found = {}
    for result, called, listed in re.findall(rf"^(\w+) ({name}_\w+)\(([^)]*)\)", text, re.M):
        arguments = [] if listed == "void" else listed.split(",")
        kinds = [
            ctypes.c_void_p if "*" in each else KINDS[each.rpartition(" ")[0].removeprefix("const ").strip()]
            for each in map(str.strip, arguments)
        ]
        found[called] = [*kinds, KINDS[result]]
    assert declared == found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_the_compiler_warns_of_nothing():
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sources = sorted(Path(native.__file__).parent.glob("*.c"))
    assert len(sources) > 1
    for source, cpu in itertools.product(sources, native.FLAGS.values()):
        command = ["gcc", *native.COMPILE, *cpu, *flags, str(source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
