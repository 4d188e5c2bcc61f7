"""The repository keeps its shape: downward imports, a lean import, public names, what a wheel holds."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import resolve_name
from pathlib import Path

import pytest

import cmfast

ROOT = Path(__file__).resolve().parents[1]

# A module imports from its own line and from the lines above it. Packages stand for all their modules.
LEVELS = [
    {"kernels", "reference", "tolerances", "errors"},
    {"ops", "native", "whole"},
    {"precondition", "schedules", "noise", "unet", "unet_blocks", "unet_config", "images", "untrusted", "rates", "ema"}
    | {"optim", "levels", "watch", "dropout", "curricula", "perceptual", "perceptual_cpu"},
    {"denoiser", "distances", "losses", "objectives", "samplers", "editing", "fast", "exact"},
    {"ranks", "transfer", "memory", "networks", "graphs", "runner", "engine", "checkpoint", "training", "data"},
    {"sharding", "digits", "recipes", "quality", "info", "compat", "benchmarks", "__main__"}
    | {"cli", "cli_common", "cli_train"},
]
LEVEL = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# The two at the bottom import these, themselves and the standard library.
BOTTOM = {"reference": {"torch", "numpy"}, "kernels": {"torch", "triton"}}

# Upward imports allowed inside a function: (from, to).
LAZY_EXCEPTIONS = {("checkpoint", "compat.diffusers")}

# Import name -> extra. A module that needs one of these may fail to import where it is missing.
OPTIONAL = {"lpips", "torchvision", "diffusers", "mlxtend", "matplotlib", "triton"}


def module_name(path: Path) -> str:
    """
    >>> module_name(Path("cmfast/ops/__init__.py")), module_name(Path("cmfast/unet.py"))
    ('cmfast.ops', 'cmfast.unet')
    """
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path.relative_to(ROOT)): path
    for folder, _, files in sorted(os.walk(ROOT / "cmfast", followlinks=True))
    for path in sorted(Path(folder, file) for file in files)
    if path.suffix == ".py"
}


def imports(source: str, package: str):
    """Yield (line, in_function, absolute dotted name) of every import outside `if TYPE_CHECKING:`."""

    def visit(node, in_function):
        if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            children = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, in_function, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, in_function, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, in_function, resolve_name(node.args[0].value, package)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, in_function)

    yield from visit(ast.parse(source), False)


def faults(name: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of the module called `name`, one line per fault."""
    unit = name.split(".")[1]
    if unit not in LEVEL:
        return [f"{name}: give {unit!r} a level in LEVELS (tests/test_layout.py)"]
    found = []
    for line, in_function, target in imports(source, name if is_package else name.rpartition(".")[0]):
        top, _, rest = target.partition(".")
        where = f"{name}:{line} imports {target}"
        if top != "cmfast":
            allowed = BOTTOM.get(unit)
            if allowed is not None and top not in allowed and top not in sys.stdlib_module_names:
                found.append(f"{where}; {unit} may import only {', '.join(sorted(allowed))}")
            continue
        if rest == "__version__":
            continue
        other = cmfast._HOME.get(rest, rest.split(".")[0])
        if other not in LEVEL:
            reason = "name the module it needs" if not rest else f"{other!r} has no level in LEVELS"
            found.append(f"{where}; {reason}")
        elif in_function and any(unit == a and f"{rest}.".startswith(f"{b}.") for a, b in LAZY_EXCEPTIONS):
            continue
        elif LEVEL[other] > LEVEL[unit]:
            found.append(f"{where}; {other} stands above {unit}")
        elif unit in BOTTOM and other != unit:
            found.append(f"{where}; {unit} imports no other part of cmfast")
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cmfast"])
def test_imports_go_downward(name):
    path = MODULES[name]
    assert not faults(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")


@pytest.mark.parametrize(
    "name, source, fault",
    [
        ("cmfast.ops.a", "from cmfast.samplers import sample", "samplers stands above ops"),
        ("cmfast.ops.a", "from cmfast import samplers", "samplers stands above ops"),
        ("cmfast.ops.a", "from .. import samplers", "samplers stands above ops"),
        ("cmfast.ops.a", "from cmfast import sample", "samplers stands above ops"),
        ("cmfast.ops.a", "def f():\n    import cmfast.engine", "engine stands above ops"),
        ("cmfast.ops.a", "import importlib\nimportlib.import_module('cmfast.cli')", "cli stands above ops"),
        ("cmfast.ops.a", "import cmfast", "name the module it needs"),
        ("cmfast.ops.a", "from cmfast import nowhere", "no level"),
        ("cmfast.nowhere", "", "give 'nowhere' a level"),
        ("cmfast.reference.a", "from cmfast.kernels import b", "no other part"),
        ("cmfast.reference.a", "import scipy", "only numpy, torch"),
        ("cmfast.checkpoint", "from cmfast.compat.diffusers import unet", "compat stands above checkpoint"),
        ("cmfast.checkpoint", "def f():\n    from cmfast.compat import openai", "compat stands above"),
        ("cmfast.unet", "if TYPE_CHECKING:\n    pass\nelse:\n    import cmfast.losses", "stands above"),
        ("cmfast.checkpoint", "def f():\n    from cmfast.compat.diffusers import unet", None),
        ("cmfast.ops.a", "from cmfast import __version__, reference", None),
        ("cmfast.ops.a", "from ..kernels import b\nfrom .c import d\nimport numpy", None),
        ("cmfast.reference.a", "import math\nimport torch.nn.functional as F\nfrom .b import c", None),
        ("cmfast.unet", "if TYPE_CHECKING:\n    from cmfast.losses import loss", None),
    ],
)
def test_the_check_itself(name, source, fault):
    found = faults(name, source)
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in OPTIONAL:
            raise
        pytest.skip(f"{missing} is not installed")


@pytest.mark.parametrize("name", cmfast.__all__)
def test_public_name_resolves(name):
    assert getattr(cmfast, name) is not None
    assert name in dir(cmfast)


def test_unknown_name_suggests_close_ones():
    with pytest.raises(AttributeError, match="Did you mean: .*Denoiser"):
        cmfast.Denoizer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'zzz'$"):
        cmfast.zzz  # noqa: B018


def run_python(code: str) -> dict:
    """Run `code` in a fresh interpreter and return the JSON it prints last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_test_file_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tests" / "test_broken.py").write_text("from os import nothing\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot import name 'nothing'" in done.stdout, done.stdout


def test_import_costs_nothing():
    code = """
import json, sys, time
start = time.perf_counter()
import cmfast
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""
    runs = [run_python(code) for _ in range(3)]  # the best of three: the machine may be busy
    heavy = OPTIONAL | {"torch", "numpy", "PIL", "safetensors", "tqdm"}
    assert not heavy & set(runs[0]["modules"])
    assert min(run["seconds"] for run in runs) < 0.1


def test_public_names_load_no_extras():
    code = """
import json, sys
import torch
before = set(sys.modules)
import cmfast
for name in cmfast.__all__:
    getattr(cmfast, name)
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"new": new, "cuda": torch.cuda.is_initialized()}))
"""
    result = run_python(code)
    assert not OPTIONAL & set(result["new"])
    assert not result["cuda"]


def repository_files() -> list[Path]:
    """Files that are tracked, or would be; skips the test outside a git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = (Path(name) for name in sorted(set(listed.split("\0")) - {""}))
    return [path for path in paths if (ROOT / path).is_file()]


def test_no_file_mentions_a_path_of_some_machine():
    # Data too: a pickle or a PNG can hold the path of the machine that wrote it.
    pattern = re.compile(rb"(?<![\w.~/-])/(work|root|home|Users)/\w[^\s'\"]*")
    found = [
        f"{path}: {match.group().decode(errors='replace')[:80]}"
        for path in repository_files()
        for match in pattern.finditer((ROOT / path).read_bytes())
    ]
    assert not found


def build(kind: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel of a source tree, with the build backend that pip would use."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return built


def extract(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def test_wheel_from_sdist(tmp_path):
    """checkout -> sdist -> wheel. tests/test_wheel.py installs them."""
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    for path in repository_files():
        if path.parts[0] != "tests":
            target = checkout / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / path).read_bytes())

    sdist = build("sdist", checkout, tmp_path)
    wheel = build("wheel", extract(sdist, tmp_path), tmp_path)

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"cmfast", f"cmfast-{cmfast.__version__}.dist-info"}
    assets = {path.as_posix() for path in repository_files() if path.parts[:2] == ("cmfast", "assets")}
    modules = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    assert assets
    native = {f"cmfast/native/{path.name}" for path in (ROOT / "cmfast/native").glob("*.[ch]")}
    assert len(native) >= 4 and assets | modules | native | {"cmfast/py.typed"} <= names
