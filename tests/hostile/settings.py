"""Files of settings."""

from __future__ import annotations

import os
from pathlib import Path

from cmfast import recipes
from cmfast.training import config
from tests.hostile.files import kind, opens, written

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
for what, text, said in [
    ("a command", "recipe: !!python/object/apply:os.mkdir ['CANARY']", "is no YAML"),
    ("a module", "recipe: !!python/module:os", "is no YAML"),
    ("an object", "recipe: !!python/object/new:os.system ['mkdir CANARY']", "is no YAML"),
    ("a text", "hello", "must hold `name: value` lines, got str"),
    ("a list", "[1, 2]", "got list"),
    ("nothing", "", "got NoneType"),
    ("a bracket", "a: [", "is no YAML"),
    ("a tab", "a:\n\tb: 1", "is no YAML"),
    ("a zero byte", "a: \0", "is no YAML"),
    ("an anchor in itself", "a: &a [*a]", "is no YAML|know no a"),
    ("deep brackets", "a: " + "[" * 20_000, "is no YAML"),
    ("a number of 50,000 digits", "steps: " + "9" * 50_000, "is no YAML"),
    ("a day that there is not", "steps: 2020-13-45", "is no YAML"),
    ("a list for a name", "? [a]\n: b", "is no YAML"),
    ("a group that is a value", "recipe: ct\npaths: images/", "paths is a group of settings"),
    ("a group that is nothing", "recipe: ct\noptions:", "options is a group of settings"),
    ("a group that is a list", "recipe: ct\nobjective: [1]", "objective is a group of settings"),
    ("an unknown name", "recipe: ct\nspeed: 11", "settings know no speed"),
    ("an unknown recipe", "recipe: [ct]", "unknown recipe"),
    ("steps that are text", "recipe: ct\noptions: {steps: many}", "options: "),
    ("a path that is a number", "recipe: ct\npaths: {data: 5}", "data must be a str, got 5"),
    ("a size that is text", "recipe: ct\ndata: {image_size: large}", "image_size must be a int, got 'large'"),
    ("a network that is a number", "recipe: ct\nnetwork: 5", "unknown network 5"),
]:
    kind(f"yaml: {what}", said)(
        lambda folder, canary, text=text: written("bad.yaml", text.replace("CANARY", str(canary)).encode())(
            folder, canary
        )
    )
kind("yaml: no text", "is no YAML")(written("bad.yaml", b"recipe: \xff\xfe"))
kind("yaml: a million laughs", "aliases stand for more than", bomb=True)(written("bad.yaml", LAUGHS.encode()))
kind("yaml: a million merges", "aliases stand for more than", bomb=True)(written("bad.yaml", MERGES.encode()))
kind("yaml: a gigabyte", "has more than 100,000 bytes", bomb=True)(
    lambda folder, canary: [written("bad.yaml", b"a: 1\n")(folder, canary), os.truncate(folder / "bad.yaml", 2**30)][0]
)


@opens("yaml")
def read(path: Path) -> object:
    return recipes.complete(config.read(path))
