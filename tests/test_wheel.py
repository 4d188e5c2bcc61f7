"""The wheel, and the wheel of the sdist, installed in an empty environment and used from another folder: `make wheel`.

What cmfast needs comes from the environment that runs the tests, by a .pth file: a line of one adds a folder, and does
not run the .pth files in it, so that an editable cmfast there stays out.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import cmfast
from tests.test_layout import MODULES, OPTIONAL, ROOT, build, extract, repository_files

pytestmark = pytest.mark.slow
#: Tests that need no file of the checkout.
PORTABLE = ("test_schedules.py", "test_noise.py", "test_denoiser.py", "test_samplers.py", "test_rates.py", "toy.py")


class Environment:
    """A virtual environment without pip, whose packages are installed by ours."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "environment", with_pip=False)
        self.home = folder / "elsewhere"
        self.home.mkdir()
        self.bin = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        (self.site,) = (folder / "environment").glob("lib/python*/site-packages")
        (self.site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(self, *command: str, **more: str) -> str:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMFAST_BACKEND", "TRITON_INTERPRET")}
        done = subprocess.run(command, cwd=self.home, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def python(self, *arguments: str, **more: str) -> str:
        return self.run(str(self.bin / "python"), *arguments, **more)

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--disable-pip-version-check"]
        subprocess.run([*command, *arguments], check=True, capture_output=True, cwd=self.home)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-deps", "--no-index", str(wheel))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """By where they were built from."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheels")
    checkout = folder / "source"
    for path in repository_files():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, checkout / path)
    sdist = build("sdist", checkout, folder / "sdist")
    found = {"sdist": build("wheel", extract(sdist, folder), folder / "from_sdist")}
    found["checkout"] = build("wheel", checkout, folder / "from_checkout")
    return found


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def installed(request, wheels, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp(request.param))
    environment.install(wheels[request.param])
    return environment


def test_the_wheels_are_the_same(wheels):
    contents = []
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0].keys() == contents[1].keys()
    assert not [name for name in contents[0] if contents[0][name] != contents[1][name]]
    names = {name.split("/")[0] for name in contents[0]}
    assert names == {"cmfast", f"cmfast-{cmfast.__version__}.dist-info"}
    top = contents[0][f"cmfast-{cmfast.__version__}.dist-info/top_level.txt"].decode().split()
    assert top == ["cmfast"]


def test_it_is_this_one(installed):
    where = Path(installed.python("-c", "import cmfast; print(cmfast.__file__)").strip())
    assert where.is_relative_to(installed.site)
    assert installed.run(str(installed.bin / "cmfast"), "--version").strip() == f"cmfast {cmfast.__version__}"


def test_every_module_imports(installed):
    names = [name for name in MODULES if not name.endswith("__main__")]
    code = f"""
import importlib
for name in {names!r}:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in {OPTIONAL!r}:
            raise
    else:
        assert module.__file__.startswith({str(installed.site)!r}), module.__file__
"""
    assert len(names) > 150
    installed.python("-c", code)


def test_commands(installed):
    assert f"cmfast {cmfast.__version__}" in installed.python("-m", "cmfast", "info")
    said = installed.python("-m", "cmfast", "sample", "--num", "4", "--steps", "2", "--out", "digits.png")
    assert "4 images" in said and (installed.home / "digits.png").stat().st_size > 500
    installed.python("-m", "cmfast", "demo", "--out", "demo")
    assert len(list((installed.home / "demo").glob("*.png"))) == 2
    listed = installed.python("-m", "cmfast", "bench", "--list")
    assert {"sampling", "training", "kernels"} <= {line.split()[0] for line in listed.splitlines() if line}


def test_its_own_tests(installed):
    """Those that need no checkout, on what is installed."""
    folder = installed.home / "tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in PORTABLE:
        shutil.copyfile(ROOT / "tests" / name, folder / name)
    shutil.copyfile(ROOT / "pyproject.toml", installed.home / "pyproject.toml")
    said = installed.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert re.search(r"^\d{2,} passed", said.splitlines()[-1]), said


@pytest.mark.parametrize("installed", ["sdist"], indirect=True)  # one is enough of what takes a minute
def test_types(installed):
    """A user's program: what is right passes, and every wrong call is an error of its kind in its line."""
    pytest.importorskip("mypy")
    program = (ROOT / "tests" / "typed_user.py").read_text(encoding="utf-8")
    expected = {
        number: match[1]
        for number, line in enumerate(program.splitlines(), 1)
        if (match := re.search(r"# type: ignore\[([a-z-]+)\]", line))
    }
    (installed.home / "typed_user.py").write_text(re.sub(r"# type: ignore\[[a-z-]+\]  ", "", program))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--python-executable"]
    done = subprocess.run(
        [*command, str(installed.bin / "python"), "typed_user.py"],
        cwd=installed.home, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "", "MYPYPATH": ""},
    )  # fmt: skip
    found = re.findall(r"^typed_user.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.M)
    assert len(expected) > 10 and {int(line): code for line, code in found} == expected, done.stdout + done.stderr


def fake_kernels(folder: Path) -> Path:
    """A wheel like that of Hugging Face's `kernels`: a package of that name."""
    path = folder / "kernels-0.1-py3-none-any.whl"
    info = "kernels-0.1.dist-info"
    files = {
        "kernels/__init__.py": "def get_kernel(name): return name\n",
        "kernels/layer.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/top_level.txt": "kernels\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path


@pytest.mark.parametrize("first", ["kernels", "cmfast"])
def test_beside_hugging_faces_kernels(first, wheels, tmp_path):
    """Both can be imported whichever came first, own no file together, and either leaves the other behind."""
    environment = Environment(tmp_path)
    both = [fake_kernels(tmp_path), wheels["checkout"]]
    for wheel in both if first == "kernels" else both[::-1]:
        environment.install(wheel)
    code = """
from importlib.metadata import distribution
import kernels, cmfast.kernels.common, cmfast.benchmarks.suites
assert kernels.get_kernel("x") == "x" and "cmfast" not in kernels.__file__
owned = [{str(file) for file in distribution(name).files} for name in ("kernels", "cmfast")]
assert owned[0] and owned[1] and not owned[0] & owned[1]
try:
    import diffusers
except ModuleNotFoundError as error:
    assert error.name == "diffusers"
"""
    environment.python("-c", code)
    environment.pip("uninstall", "--yes", first)
    other = {"kernels": "cmfast.ops", "cmfast": "kernels"}[first]
    environment.python("-c", f"import {other}, importlib.util; assert not importlib.util.find_spec('{first}')")
