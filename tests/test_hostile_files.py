"""Files that are broken or made to do harm: each a clear error, nothing in them runs, and no memory goes to them."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.hostile import KINDS, OPENERS
from tests.hostile.files import BOMB, Payload

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

#: What opening a bomb may add to the memory of a process, in bytes. Each becomes two gigabytes, or any number.
ROOM = 300 * 2**20
BOMBS = [name for name, kind in KINDS.items() if kind.bomb]
ALONE = """
import json, resource, sys, time
from pathlib import Path
from tests.hostile import KINDS, OPENERS
kinds = json.loads(sys.argv[1])
statm = Path("/proc/self/statm")
if statm.exists():  # so that what is not refused fills this process, and not the machine
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
resource.setrlimit(resource.RLIMIT_CPU, (60, resource.getrlimit(resource.RLIMIT_CPU)[1]))  # and what never ends, ends
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for number, name in enumerate(kinds):
    folder = Path(sys.argv[2], str(number))
    (folder / "images").mkdir(parents=True)
    path = KINDS[name].make(folder, folder / "ran")
    before, start = peak(), time.perf_counter()
    try:
        said = repr(OPENERS[name.split(":")[0]](path))[:80], "nothing"
    except BaseException as error:
        said = str(error), type(error).__name__, isinstance(error, KINDS[name].error)
    print(json.dumps([name, said, peak() - before, time.perf_counter() - start]), flush=True)
    for large in folder.rglob("*"):
        if large.is_file() and large.stat().st_size > 2**28:
            large.unlink()
"""


@pytest.fixture
def an_end():
    """To what waits for ever, as on a pipe."""

    def late(number, frame):
        raise AssertionError("no end after a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def prepared(tmp_path, name):
    """The path of what was made, and of the canary."""
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    (tmp_path / "images").mkdir()
    return KINDS[name].make(tmp_path, tmp_path / "ran"), tmp_path / "ran"


@pytest.mark.parametrize("name", [name for name in KINDS if name not in BOMBS])
def test_refused_and_not_run(tmp_path, name, an_end):
    path, canary = prepared(tmp_path, name)
    with pytest.raises(KINDS[name].error) as caught:
        OPENERS[name.split(":")[0]](path)
    said = str(caught.value)
    assert re.search(KINDS[name].said, said), said
    assert isinstance(caught.value, (ValueError, OSError)), "the command line shows a traceback"
    assert path.name in said or path.parent.name in said or name.startswith("yaml"), f"no name in: {said}"
    assert not canary.exists()
    assert len(said) < 1500, said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What became of each bomb, in a process of its own: (what was said, bytes, seconds)."""
    pytest.importorskip("resource")
    there = importlib.util.find_spec("diffusers")
    names = [name for name in BOMBS if there or not name.startswith("diffusers")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, json.dumps(names), str(tmp_path_factory.mktemp("bombs"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}, done.stderr[-2000:]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_memory(alone, name):
    found, stderr = alone
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    assert name in found, stderr
    (said, kind, *right), grown, seconds = found[name]
    assert right == [True] and re.search(KINDS[name].said, said), (kind, said)
    assert grown < ROOM < BOMB // 4 and seconds < 20, (grown, seconds)


def test_how_many(capsys):
    """Fifty and more; and what would run does, where it is unpickled."""
    counts = Counter(name.split(":")[0] for name in KINDS)
    with capsys.disabled():
        print(f"\n{len(KINDS)} kinds of broken and hostile files ({len(BOMBS)} bombs):", dict(counts))
    assert len(KINDS) >= 50 and set(counts) == set(OPENERS)


def test_the_canary(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


def test_a_sound_file_of_each_kind_opens(tmp_path):
    """What the broken ones are made from is not refused."""
    import cmfast
    from tests.checkpoint_utils import ASKED
    from tests.hostile import checkpoints, data, runs

    assert cmfast.load(checkpoints.saved(tmp_path), **ASKED)
    assert cmfast.load(checkpoints.described(lambda settings: settings)(tmp_path, tmp_path))
    assert OPENERS["run"](runs.rewritten(runs.STATE, lambda state: state)(tmp_path, tmp_path)).done == 2
    path = checkpoints.archive(tmp_path / "good.npz", {"x.npy": data.npy(), "y.npy": data.npy("<i8", (4,), bytes(32))})
    assert OPENERS["npz"](path)
    for name, content in {"x.png": data.image(), "x.jpg": data.JPEG, "x.webp": data.WEBP, "x.gif": data.GIF}.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        Path(folder, name).write_bytes(content)
        assert OPENERS["images"](folder / name)
    (tmp_path / "good.yaml").write_text("recipe: ct\noptions: &o {steps: 3}\ndata: {flip: true}\n")
    assert OPENERS["yaml"](tmp_path / "good.yaml")["options"]["steps"] == 3
