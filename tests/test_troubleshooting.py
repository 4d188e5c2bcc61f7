"""docs/troubleshooting.md quotes what the code says, and leaves out nothing that a user of the main parts may meet."""

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "troubleshooting.md"
#: In a quote and in a template: an inserted value.
VALUE = "…"
#: Whose ValueErrors and RuntimeErrors, subclasses included, and warnings must all be there.
COVERED = [
    *(ROOT / "cmfast" / name for name in ("checkpoint.py", "untrusted.py", "engine.py", "graphs.py")),
    *sorted((ROOT / "cmfast" / "training").glob("*.py")),
    *sorted((ROOT / "cmfast" / "data").glob("*.py")),
]
#: (module, template) -> why nobody need look it up.
INTERNAL = {
    ("checkpoint.py", "…: …"): "puts the path before another message",
    ("training/config.py", "…: …"): "puts the group of settings before a message of Python's",
    ("data/arrays.py", "…: …"): "puts the path before another message",
    ("training/state.py", "there is no … in …"): "a reason why a checkpoint is damaged",
    ("training/state.py", "… in … is …, expected …"): "a reason why a checkpoint is damaged",
    ("training/state.py", "… of parameter … is …, not …"): "a reason why a checkpoint is damaged",
}
#: Those that are neither built in nor defined in cmfast.
OTHERS = {"OutOfMemoryError": "RuntimeError"}


def template(node: ast.AST) -> str | None:
    """The text of a string expression, with … for each value put into it; None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side) for side in (node.left, node.right)]
        return None if parts == [None, None] else "".join(VALUE if part is None else part for part in parts)
    return None


def templates(node: ast.AST) -> list[str]:
    """Those of all strings within, docstrings aside."""
    text = template(node)
    if text is not None:
        return [text]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    return [text for child in ast.iter_child_nodes(node) for text in templates(child)]


def modules() -> dict[Path, ast.Module]:
    paths = [path for path in (ROOT / "cmfast").rglob("*.py") if not {"kernels", "benchmarks"} & set(path.parts)]
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}


MODULES = modules()
BASES = OTHERS | {
    node.name: ast.unparse(node.bases[0])
    for tree in MODULES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and node.bases
}


def quotes(text: str) -> list[str]:
    """The code spans in the first cells of the tables, the heads aside."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [line[1:].split(" | ")[0] for line in rows if not re.match(r"\| (---|message|reason) \|", line)]
    return [span for cell in cells for _, span in re.findall(r"(`+)(.+?)\1(?!`)", cell)]


QUOTES = quotes(DOC.read_text(encoding="utf-8"))
TEXTS = [text for tree in MODULES.values() for text in templates(tree)]


def is_error(name: str) -> bool:
    """Whether a class is a ValueError or a RuntimeError."""
    name = name.split(".")[-1]
    if name in BASES:
        return is_error(BASES[name])
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, ValueError | RuntimeError)


def messages(tree: ast.Module) -> list[tuple[int, list[str]]]:
    """(line, templates) of each error of those kinds that is raised, and of each warning. Of a name in the message what
    it was given in that function, and of a function that makes the message its strings, count as well."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[int, list[str]] = {}
    for function in filter(lambda node: isinstance(node, ast.FunctionDef), ast.walk(tree)):
        for node in ast.walk(function):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if name != "warnings.warn" and not (isinstance(node, ast.Raise) and is_error(name)):
                continue
            said = found.setdefault(call.lineno, [])
            said += templates(call)
            names = {part.id for part in ast.walk(call) if isinstance(part, ast.Name)}
            for other in ast.walk(function):
                if isinstance(other, ast.Assign) and names & {ast.unparse(target) for target in other.targets}:
                    said += templates(other.value)
            for made in names & functions.keys():
                said += templates(functions[made])
    return list(found.items())


def constant(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def test_quotes_are_what_the_code_says():
    assert not [quote for quote in QUOTES if not any(quote in text for text in TEXTS)]


def test_quotes_are_distinctive():
    assert len(QUOTES) > 100 and len(set(QUOTES)) == len(QUOTES)
    assert not [quote for quote in QUOTES if len(constant(quote)) < 4]


@pytest.mark.parametrize("path", COVERED, ids=lambda path: path.relative_to(ROOT / "cmfast").as_posix())
def test_every_message_is_there(path):
    name = path.relative_to(ROOT / "cmfast").as_posix()
    missing = [
        f"{name}:{line} {said[0] if said else ''}"
        for line, said in messages(MODULES[path])
        if not any(quote in text for quote in QUOTES for text in said)
        and not any((name, text) in INTERNAL for text in said)
    ]
    assert not missing


def test_what_is_internal_exists():
    found = {(path.relative_to(ROOT / "cmfast").as_posix(), text) for path in COVERED
             for _, said in messages(MODULES[path]) for text in said}  # fmt: skip
    assert not INTERNAL.keys() - found


SOURCE = '''
"""Docstring of a module."""
class Odd(ValueError): ...
def make(x):
    """Docstring."""
    return f"made of {x}"
def function(x):
    why = f"since {x}" if x else "for nothing"
    if x > 2:
        raise Odd(f"no {x}: {why}")
    if x > 1:
        raise Odd(make(x))
    if x:
        warnings.warn("well " + why)
    raise KeyError("unseen")
'''


def test_how_messages_are_found(monkeypatch):
    tree = ast.parse(SOURCE)
    monkeypatch.setitem(BASES, "Odd", "ValueError")
    assert [said for _, said in messages(tree)] == [
        ["no …: …", "since …", "for nothing"], ["made of …"], ["well …", "since …", "for nothing"]
    ]  # fmt: skip
    assert not [text for text in templates(tree) if "Docstring" in text]


def test_which_spans_are_quotes():
    rows = ["| message | b |", "| --- | --- |", "| `a …`<br>``b `c` `` | `d` |", "| x `e` | `f` |"]
    assert quotes("\n".join(rows)) == ["a …", "b `c` ", "e"]
