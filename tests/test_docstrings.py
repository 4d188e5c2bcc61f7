"""Every public name says what it is, what its arguments are, and what it raises.

Public is what the modules in `PUBLIC` name in `__all__`, or else define without an underscore, with the methods of
classes. A docstring that says `as in`, `as of` or `see` another by its name has what is said there.
"""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import cmfast

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (
    "cmfast", "cmfast.checkpoint", "cmfast.compat.diffusers", "cmfast.curricula", "cmfast.data", "cmfast.denoiser",
    "cmfast.distances", "cmfast.dropout", "cmfast.editing", "cmfast.ema", "cmfast.engine", "cmfast.exact",
    "cmfast.fast", "cmfast.images", "cmfast.losses", "cmfast.noise", "cmfast.objectives", "cmfast.ops", "cmfast.optim",
    "cmfast.perceptual", "cmfast.precondition", "cmfast.quality", "cmfast.rates", "cmfast.reference", "cmfast.samplers",
    "cmfast.schedules", "cmfast.training", "cmfast.unet", "cmfast.unet_blocks",
)  # fmt: skip
#: Modules of the original's names: what they have, and its arguments, is the original's. They say what they are alone.
ORIGINAL = tuple(
    f"cmfast.compat.openai.{path.stem}"
    for path in sorted((ROOT / "cmfast" / "compat" / "openai").glob("*.py"))
    if not path.stem.startswith("_")
)
#: Arguments that mean the same wherever they stand, beside those of the table in docs/mathematics.md.
EVIDENT = {
    "model": "a Denoiser, or D(x, sigma[, labels])",
    "network": "F(x, timesteps[, labels])",
    "x": "a noisy batch [B, C, H, W]",
    "device": "where tensors are made",
    "seed": "of everything random",
    "args": "what the function around has", "kwargs": "what the function around has",
    "options": "what the function around has",
    "step": "the number of a training step", "stage": "of a training run",
}  # fmt: skip
#: name -> why its docstring need not list what it raises.
SILENT: dict[str, str] = {}
_TABLE = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8").split("\n\n")[2]
VOCABULARY = set(re.findall(r"`(\w+)`", _TABLE)) | EVIDENT.keys()
REFERRED = re.compile(r"(?:\b[Aa]s(?: in| of)?|\b[Ss]ee|\band)\s+`([\w.]+)`")


def public_of(module: ModuleType) -> dict[str, object]:
    """Functions and classes that a module offers, by name; those of __all__ from wherever they are."""
    listed = getattr(module, "__all__", None)
    names = listed or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isroutine(value) or inspect.isclass(value))
        and (listed or getattr(value, "__module__", None) == module.__name__)
    }


def members(name: str, cls: type) -> dict[str, object]:
    """The methods and properties that a class defines itself."""
    found = {}
    for key, value in vars(cls).items():
        if key.startswith("_"):
            continue
        value = getattr(value, "__func__", value)  # of a class or static method
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "func", value)  # of a cached property
        if inspect.isfunction(value) and value.__module__.startswith("cmfast"):
            found[f"{name}.{key}"] = value
    return found


def collect(modules: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in modules:
        try:
            module = importlib.import_module(name)
            values = public_of(module)
        except ImportError:  # an extra that is not installed
            continue
        for value in values.values():
            if not getattr(value, "__module__", "").startswith("cmfast"):
                continue
            # Where it is defined: a name that several modules offer is looked at once.
            where = f"{value.__module__}.{value.__qualname__}"
            found[where] = value
            if inspect.isclass(value):
                found.update(members(where, value))
    return found


NAMES = collect(PUBLIC)
OPENAI = collect(ORIGINAL)


def own_doc(name: str, value: object) -> str:
    """Its docstring, or that of the method of a base class of ours that it overrides."""
    text = getattr(value, "__doc__", None) or ""
    if text or "." not in name:
        return text
    owner, _, method = name.rpartition(".")
    cls = {**NAMES, **OPENAI}.get(owner)
    for base in inspect.getmro(cls)[1:] if inspect.isclass(cls) else ():
        text = getattr(vars(base).get(method), "__doc__", None) or ""
        if text and base.__module__.startswith("cmfast"):
            return text
    return ""


def said(name: str, value: object, depth: int = 2) -> str:
    """Its docstring with those it refers to; of a class its bases' of ours; of the reference the operation's as
    well."""
    text = own_doc(name, value)
    if inspect.isclass(value):
        text += "\n".join(c.__doc__ or "" for c in inspect.getmro(value)[1:] if c.__module__.startswith("cmfast"))
    if name.startswith("cmfast.reference.") and hasattr(cmfast.ops, getattr(value, "__name__", "")):
        text += said(f"cmfast.ops.{value.__name__}", getattr(cmfast.ops, value.__name__))
    if depth:
        for match in REFERRED.finditer(text):
            other = match[1]
            for key, found in NAMES.items():
                if key != name and key.endswith(f".{other}"):
                    text += said(key, found, depth - 1)
    return text


def arguments(value: object) -> list[str]:
    if inspect.isclass(value):
        init = value.__init__
        if not inspect.isfunction(init) or not init.__module__.startswith("cmfast"):
            return []
        value = init
    skipped = {"self", "cls", "_"}
    return [name for name in inspect.signature(value).parameters if name not in skipped and not name.startswith("_")]


def raised(value: object) -> list[str]:
    """What its own body raises; of a class what __init__ and __post_init__ do."""
    if inspect.isclass(value):
        bodies = [vars(value)[m] for m in ("__init__", "__post_init__") if inspect.isfunction(vars(value).get(m))]
        return [name for body in bodies if body.__module__.startswith("cmfast") for name in raised(body)]
    try:
        source = inspect.getsource(inspect.unwrap(value))
    except (OSError, TypeError):  # made by a dataclass or a named tuple
        return []
    found = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(child, ast.Raise) and child.exc is not None:
                found.append(ast.unparse(child.exc).split("(")[0].split(".")[-1])
            visit(child)

    visit(ast.parse(textwrap.dedent(source)).body[0])
    return [name for name in found if name != "NotImplementedError" and name[0].isupper()]


def faults(name: str, value: object) -> list[str]:
    text = own_doc(name, value)
    if len(text.strip()) < 5:
        return [f"{name}: no docstring"]
    whole = said(name, value)
    words = set(re.findall(r"\w+", whole))
    missing = [argument for argument in arguments(value) if argument not in VOCABULARY | words]
    found = [f"{name}: nothing of {', '.join(missing)}"] if missing else []
    errors = raised(value)
    if errors and "Raises:" not in whole and not all(error in whole for error in errors) and name not in SILENT:
        found.append(f"{name}: raises {', '.join(sorted(set(errors)))}, and has no Raises:")
    return found


def test_what_is_public():
    assert len(NAMES) > 200 and len(OPENAI) > 80
    for name in ("engine.Sampler.sample", "ops.precondition.denoise", "checkpoint.load", "training.step.TrainStep"):
        assert f"cmfast.{name}" in NAMES
    assert {"sigma_data", "x_start", "rho"} <= VOCABULARY and "clip" not in VOCABULARY


@pytest.mark.parametrize("module", sorted({name.split(".")[1] for name in NAMES}))
def test_docstrings(module):
    found = [f for name, value in NAMES.items() if name.split(".")[1] == module for f in faults(name, value)]
    assert not found, "\n".join(found)


def test_docstrings_of_the_originals_names():
    assert not [name for name, value in OPENAI.items() if len(own_doc(name, value).strip()) < 5]


#: Where users begin: each has an example that runs (`--doctest-modules` runs them).
EXAMPLES = (
    "cmfast.engine.Sampler", "cmfast.engine.Sampler.denoise", "cmfast.fast.optimize", "cmfast.checkpoint.load",
    "cmfast.checkpoint.save", "cmfast.samplers.sample", "cmfast.samplers.sample_onestep",
    "cmfast.samplers.sample_multistep", "cmfast.samplers.sample_euler", "cmfast.samplers.sample_heun",
    "cmfast.denoiser.Denoiser", "cmfast.training.step.TrainStep", "cmfast.training.loop.Trainer",
    "cmfast.data.open_data", "cmfast.losses.denoising_loss", "cmfast.losses.consistency_loss", "cmfast.ema.Averages",
    "cmfast.optim.RAdam", "cmfast.perceptual.LPIPS", "cmfast.precondition.Preconditioner", "cmfast.unet.UNetModel",
)  # fmt: skip


@pytest.mark.parametrize("name", [*EXAMPLES, *(n for n in NAMES if re.fullmatch(r"cmfast\.ops\.[a-z_]+\.[a-z]\w+", n))])
def test_examples(name):
    if NAMES[name].__module__.split(".")[-1].startswith("_"):
        return
    assert ">>> " in NAMES[name].__doc__, name


class Bad:
    """Words."""

    def __init__(self, clip, x_start):
        pass


def bad(a, sigma):
    """One of a."""
    raise ValueError(a)


def good(a, sigma):
    """One of a.

    Raises: ValueError: always.
    """
    raise ValueError(a)


@pytest.mark.parametrize("value, fault", [
    (lambda: None, "no docstring"), (bad, "raises ValueError"), (good, None), (Bad.__init__, "no docstring"),
])  # fmt: skip
def test_the_check_itself(value, fault):
    found = faults("somewhere", value)
    assert len(found) == (fault is not None) and (fault is None or fault in found[0]), found


def test_the_check_of_arguments_itself():
    def function(clip, x_start):
        """Words."""

    assert faults("somewhere", function) == ["somewhere: nothing of clip"]
