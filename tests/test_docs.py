"""The pages say what is so: names exist, calls fit signatures, links lead somewhere, excerpts are in their files."""

import ast
import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

import cmfast
from cmfast import objectives, recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(f"docs/{name}.md" for name in ("mathematics", "migration", "kernels", "performance", "running"))
PAGES += ("docs/reference.md", "CHANGELOG.md")
LINKED = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINKED.append(ROOT / "benchmarks" / "README.md")

#: Modules that pages call by their own name. `cm` is the original's package, here `cmfast.compat.openai`.
SHORT = ("ops", "losses", "reference", "samplers", "schedules", "ema", "rates", "optim", "perceptual", "objectives")
NAME = re.compile(rf"(?<![\w./-])(?:cmfast|cm|{'|'.join(SHORT)})(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./])(?:cmfast|kernels|tests|benchmarks|docs)/[\w./]+\.\w+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language="python"):
    return [body for kind, body in FENCE.findall(text) if kind == language]


def spans(text):
    """What stands between single backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def resolve(name):
    """What a dotted name stands for; None for a name of cmfast.compat.diffusers, whose import loads diffusers.

    Raises: AttributeError, ImportError: there is no such thing.
    """
    first, *rest = name.split(".")
    rest = ["compat", "openai", *rest] if first == "cm" else rest if first == "cmfast" else [first, *rest]
    value = cmfast
    for part in rest:
        if getattr(value, "__name__", "") == "cmfast.compat.diffusers" and part in value.__all__:
            return None
        try:
            value = getattr(value, part)
        except AttributeError:
            if not inspect.ismodule(value):
                raise
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


def missing(names):
    """A line for each name that stands for nothing."""
    found = []
    for name in sorted(set(names)):
        try:
            resolve(name)
        except (AttributeError, ImportError) as error:
            found.append(f"{name}: {error}")
    return found


def faults_of_names(text):
    return missing(name for span in spans(text) for name in NAME.findall(span))


def faults_of_paths(text):
    return [path for span in spans(text) for path in PATH.findall(span) if not (ROOT / path).exists()]


def faults_of_links(where, text):
    """Links to files that are not there, and to headings that this page does not have."""
    outside = FENCE.sub("", text)
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in outside.splitlines()
        if line.startswith("#")
    }
    found = []
    for link in LINK.findall(outside):
        path, _, heading = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        if path and not (where.parent / path).exists():
            found.append(f"{link}: no such file")
        elif not path and heading not in headings:
            found.append(f"{link}: no such heading")
    return found


def faults_of_code(text):
    """Of what does not compile."""
    found = []
    for block in blocks(text):
        try:
            compile(block, "block", "exec")
        except SyntaxError as error:
            found.append(f"{error}: {block.splitlines()[(error.lineno or 1) - 1]}")
    return found


def faults_of_excerpts(text):
    """Each block names its file in its first line, and stands there as it is."""
    found = []
    for block in blocks(text):
        first, _, excerpt = block.partition("\n")
        file = ROOT / first.removeprefix("# ")
        if not file.is_file() or excerpt not in file.read_text(encoding="utf-8"):
            found.append(f"not in {first}: {excerpt[:60]}")
    return found


def bound(tree):
    """Names that a block imports, and those of instances that it makes -> the dotted name of what they stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.asname or alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            made = dotted(node.value.func, names)
            if made and not missing([made]) and inspect.isclass(resolve(made)):
                names[node.targets[0].id] = made
    return {name: value for name, value in names.items() if value.split(".")[0] == "cmfast"}


def dotted(function, names):
    """The dotted name of a function that a call calls, if it is one of ours."""
    first, _, rest = ast.unparse(function).partition(".")
    if first not in names or "(" in rest or names[first].split(".")[0] != "cmfast":
        return None
    return f"{names[first]}.{rest}" if rest else names[first]


def misfit(call, name):
    """Why a call does not fit the signature of what it names; None if it does. `...` stands for further arguments."""
    function = resolve(name)
    if function is None:
        return None
    partial = any(isinstance(a, ast.Starred) or ast.unparse(a) == "..." for a in call.args)
    partial |= any(keyword.arg is None for keyword in call.keywords)
    owner = resolve(name.rpartition(".")[0])
    arguments = [None] * (sum(not isinstance(a, ast.Starred) and ast.unparse(a) != "..." for a in call.args))
    if inspect.isclass(owner) and not inspect.ismethod(function):
        arguments.insert(0, None)
    bind = inspect.signature(function).bind_partial if partial else inspect.signature(function).bind
    try:
        bind(*arguments, **{keyword.arg: None for keyword in call.keywords if keyword.arg})
    except TypeError as error:
        return f"{ast.unparse(call)}: {error}"
    return None


def faults_of_calls(text):
    """Of calls of ours, in blocks and between backticks: names that do not exist, arguments that they do not take."""
    found = []
    for block in blocks(text):
        tree = ast.parse(block)
        names = bound(tree)
        found += missing(names.values())
        calls = [(node, dotted(node.func, names)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found += missing(name for _, name in calls if name)
        found += [misfit(call, name) for call, name in calls if name and not missing([name])]
    for span in spans(text):
        # `lr=` without a value stands for any.
        if re.match(NAME.pattern + r"\(", span) and not span.startswith("cm."):
            tree = ast.parse(re.sub(r"=(?=[,)])", "=None", span), mode="eval")
            names = {first: f"cmfast.{first}" for first in SHORT} | {"cmfast": "cmfast"}
            calls = [(node, dotted(node.func, names)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            found += [misfit(call, name) for call, name in calls if name and not missing([name])]
    return [fault for fault in found if fault]


@pytest.mark.parametrize("name", PAGES)
def test_names_are_there(name):
    assert NAME.search(page(name))
    assert not faults_of_names(page(name))


@pytest.mark.parametrize("name", PAGES)
def test_files_are_there(name):
    assert not faults_of_paths(page(name))


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not faults_of_links(path, path.read_text(encoding="utf-8"))


def test_code_compiles():
    text = page("docs/migration.md")
    assert blocks(text) and not faults_of_code(text)


@pytest.mark.parametrize("name", ["docs/migration.md", "docs/performance.md"])
def test_calls_fit(name):
    assert not faults_of_calls(page(name))


def test_excerpts_are_those_of_the_files():
    text = page("docs/kernels.md")
    assert blocks(text) and not faults_of_excerpts(text)


IMPORT = "```python\nfrom cmfast import ema, ops\n"


@pytest.mark.parametrize(
    "check, text, fault",
    [
        (faults_of_names, "`cmfast.ops.denoize(x)`", "denoize"),
        (faults_of_names, "`ops.denoize`", "denoize"),
        (faults_of_names, "`cmfast.nowhere.x`", "nowhere"),
        (faults_of_names, "`cm.karras_diffusion.karras_samples`", "karras_samples"),
        (faults_of_names, "`cmfast.compat.diffusers.accelerated`", "accelerated"),
        (faults_of_names, "`torch.ops.nowhere`, `x.cmfast.y`, `my/ops.py`, cmfast.nowhere", None),
        (faults_of_names, "```\n`cmfast.nowhere.x`\n```", None),
        (faults_of_paths, "`kernels/nowhere.py`", "kernels/nowhere.py"),
        (faults_of_paths, "`kernels/common.py`, `scripts/nowhere.py`", None),
        (faults_of_code, "```python\nx = = 1\n```", "x = = 1"),
        (faults_of_code, "```\nx = = 1\n```", None),
        (faults_of_excerpts, "```python\n# kernels/common.py\n    row, plane, bloc\n```", "not in # kernels/common.py"),
        (faults_of_excerpts, "```python\n# kernels/nowhere.py\n\n```", "not in # kernels/nowhere.py"),
        (faults_of_calls, IMPORT + "ops.denoise(f, x, sigma, clipp=True)\n```", "clipp"),
        (faults_of_calls, IMPORT + "ops.denoise(f, x)\n```", "missing a required argument"),
        (faults_of_calls, IMPORT + "ops.denoize(f, x)\n```", "denoize"),
        (faults_of_calls, IMPORT + "a = ema.Averages(m, [1])\na.update(1)\n```", "update"),
        (faults_of_calls, IMPORT + "a = ema.Averages(m, [1])\na.module(1, 2, 3)\n```", "too many positional"),
        (faults_of_calls, IMPORT + "ops.denoise(*x, clip=True)\nops.denoise(f, x, **y)\nother.denoise()\n```", None),
        (faults_of_calls, "```python\nfrom cmfast.ops import denoize\n```", "denoize"),
        (faults_of_calls, "`cmfast.ops.scalings(sigma, boundery=0.0)`", "boundery"),
        (faults_of_calls, "`cmfast.Sampler(model, ..., steps=)`, `losses.distance(x, ...)`", None),
    ],
)
def test_the_checks_themselves(check, text, fault):
    found = check(text)
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("[a](nowhere.md)", "nowhere.md: no such file"),
        ("# A b/c_d\n[a](#a-b)", "#a-b: no such heading"),
        ("# A b/c_d\n[a](#a-bc_d), [b](https://x.y/z), ![c](tests/test_docs.py), [d](README.md#any)", None),
        ("```\n[a](nowhere.md)\n```", None),
    ],
)
def test_the_check_of_links_itself(text, fault):
    assert faults_of_links(ROOT / "README.md", text) == ([] if fault is None else [fault])


#: A number with what it counts: times, shares, rates, sizes.
MEASURED = re.compile(r"(?<![\w.])\d[\d.,]*\s*(?:ms|µs|s|%|x|×|GB|MB|images|times|percent|per cent)(?![\w-])")


def faults_of_numbers(text):
    """Numbers of a performance page that no file of results makes, and rows of what is derived that are not those of
    benchmarks/README.md."""
    ours = re.sub(r"<!-- benchmarks: \w+ -->.*?<!-- /benchmarks -->", "", FENCE.sub("", text), flags=re.S)
    derived = re.search(r"^Derived, not measured:(?:.+\n)+\n((?:\|.*\n)+)", ours, re.M)
    rows = derived[1].splitlines() if derived else []
    known = page("benchmarks/README.md").splitlines()
    found = [f"not in benchmarks/README.md: {row}" for row in rows if row not in known]
    rest = ours.replace(derived[1], "") if derived else ours
    return found + MEASURED.findall(rest)


def test_defaults_of_recipes_are_those_of_the_code():
    row = re.compile(r'^\| `(\w+)` \| ([\d,]+) \| (\S+?)(, falling to 0)? \| ([\d.]+) \| (\w+) \| `--(\w+) (\w+)', re.M)
    rows = {name: rest for name, *rest in row.findall(page("README.md"))}
    assert rows.keys() == recipes.PRESETS.keys()
    for name, (steps, rate, falling, average, loss, option, value) in rows.items():
        preset, objective = recipes.PRESETS[name], objectives.OBJECTIVES[name]
        sampled = objective().sampling(objective().stage(preset["steps"] - 1))
        assert str(sampled.get(option)) == value, name
        assert int(steps.replace(",", "")) == preset["steps"] and float(rate) == preset["learning_rate"], name
        assert bool(falling) == ("decay" in preset) and average == preset["averages"][0], name
        assert loss == getattr(objective, "loss_norm", loss), name


def test_the_reference_is_that_of_the_code():
    """`make docs` writes it; what is public is described."""
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["page"]()
    assert page("docs/reference.md") == made
    assert not re.findall(r"^.*\|  \|$", made, re.M)


def test_numbers_of_performance_are_those_of_the_results():
    text = page("docs/performance.md")
    assert text.count("<!-- benchmarks: ") >= 6 and "Derived, not measured:" in text
    assert not faults_of_numbers(text)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("It takes 12.5 ms.", "12.5 ms"),
        ("That is 3x as fast", "3x"),
        ("half, 50% of it", "50%"),
        ("<!-- benchmarks: a -->\n12 ms\n<!-- /benchmarks -->\nwords 3x3, 224x224, `steps=2`, 2n", None),
        ("Derived, not measured: x\n\n| a | 1 ms |\n", "not in benchmarks/README.md: | a | 1 ms |"),
    ],
)
def test_the_check_of_numbers_itself(text, fault):
    assert faults_of_numbers(text) == ([] if fault is None else [fault])


def test_the_changelog_is_of_this_version():
    """Its newest entry is what is here, each entry has a date or is not released yet, and README leads to it."""
    entries = re.findall(r"^## \[([\w.]+)\] - (.+)$", page("CHANGELOG.md"), re.M)
    assert entries and entries[0][0] == cmfast.__version__
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|Unreleased", date) for _, date in entries)
    assert {"CHANGELOG.md", "docs/performance.md"} <= set(LINK.findall(page("README.md")))


def test_draw_numbers_are_shared_out():
    """Each use has words of its own, and stands in the table."""
    text = (ROOT / "docs/mathematics.md").read_text()
    numbers: dict[str, str] = {}
    for path in sorted((ROOT / "cmfast").rglob("*.py")):
        for name, number in re.findall(r"^(\w*DRAW) = (\w+)", path.read_text(), re.M):
            assert numbers.setdefault(number, name) == name, f"{number} is {numbers[number]} and {name}"
            assert re.search(rf"^\| {number}\b.*`cmfast\.[a-z.]*{name}`", text, re.M), f"{name} is not in the table"
    assert len(numbers) >= 6
