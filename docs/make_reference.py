"""Writes docs/reference.md from docstrings, settings and the command line: `make docs`. A test compares them.

    python docs/make_reference.py
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import cmfast
from cmfast import cli, cli_train, recipes
from cmfast.objectives import OBJECTIVES
from cmfast.training import TrainOptions

PAGE = Path(__file__).with_name("reference.md")

HEAD = """# Reference

Every public name with the first sentence of its docstring, every setting of a run, every command.
`help(cmfast.Sampler)` and so on say the rest: arguments, shapes, dtypes, errors, the paper's equation. `make docs`
writes this page.

- [At hand after `import cmfast`](#at-hand-after-import-cmfast)
- [Modules](#modules)
- [Settings of a run](#settings-of-a-run)
- [Commands](#commands)
- [Environment](#environment)
"""
#: By what a user comes for. `cmfast.compat` has pages of its own.
MODULES = {
    "Models and files": ("checkpoint", "unet", "fast", "images"),
    "Sampling": ("samplers", "schedules", "noise", "editing"),
    "Training": ("training", "recipes", "data", "objectives", "curricula", "rates", "digits"),
    "Parts of a training loop": ("losses", "perceptual", "optim", "ema", "dropout"),
    "Operations": ("ops", "reference"),
    "What is known exactly": ("exact",),
}
#: What other modules of cmfast take from these, and nobody else has a use for.
INTERNAL = {
    "checkpoint": ("write_tensors", "meta_network", "read_pickle"),
    "images": ("check_output",),
    "samplers": ("check_options", "least_sigma", "noise_range", "overwritten"),
    "noise": ("take",),
    "training": ("Pending",),
    "recipes": ("of_any_length",),
    "ema": ("unwrap", "local", "places", "held"),
    "dropout": ("at", "current", "kept", "counts"),
}
#: Settings that neither a flag nor a docstring describes.
OTHERS = {
    "network": "new weights, not beside `--init` or `--teacher`: a name, or the arguments of `cmfast.UNetModel` that "
    "data do not say",
    "paths.lpips_trunk": "a file with the weights of LPIPS's trunk, as torchvision names them; default: downloaded",
    "paths.lpips_head": "a file with LPIPS's linear weights; default: those of the package `lpips`",
    "data.bounded": "false: a .npz of latents, or other floats [N, C, ...] of any values; default: as the model to "
    "start from says, or true",
    "data.labelled": "whether labels are used; default: as the model to start from has classes, else if there are any",
    "data.channels": "1 or 3: what images are converted to; default: as they are; a folder: 3",
    "lpips.net": "LPIPS's trunk: vgg, alex or squeeze",
    "lpips.pretrained": "whether the trunk has been trained",
}
ENVIRONMENT = {
    "CMFAST_BACKEND": "`auto`, `triton` or `reference`, as `cmfast.backend` takes it, for a whole process",
    "CMFAST_NATIVE": "0: no C is compiled for a CPU, and PyTorch's operations serve",
    "OMP_NUM_THREADS": "PyTorch's threads on a CPU",
    "GOMP_SPINCOUNT": "how long these threads wait for each other before they sleep; commands but `bench` set 10000",
    "TRITON_INTERPRET": "1: with `CMFAST_BACKEND=triton` kernels run in Triton's interpreter, on a CPU, slowly",
    "TORCH_COMPILE_DISABLE": "1: nothing is compiled by `torch.compile`",
    "TORCHDYNAMO_DISABLE": "1: as `TORCH_COMPILE_DISABLE`",
    "OPENAI_LOGDIR": "where the stand-in for openai's `cm.logger` writes, beside others of the original's",
}


def sentence(text: str) -> str:
    """The first of a docstring; a cell of a table."""
    first = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"\.(?= [A-Z`]|$)", first)[0].rstrip(":").replace("|", "\\|")


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + " --- |" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def public(module: ModuleType) -> list[str]:
    """Functions and classes of a module, for its users."""
    internal = INTERNAL.get(module.__name__.removeprefix("cmfast."), ())
    names = getattr(module, "__all__", None)
    mine = [name for name in vars(module) if not name.startswith("_")]
    found = []
    for name in names or mine:
        value = getattr(module, name)
        # Of Python 3.10, `Callable[...]` is a class, too.
        a_class = inspect.isclass(value) and get_origin(value) is None
        if not (a_class or inspect.isfunction(value)) or name in internal:
            continue
        if names or value.__module__ == module.__name__:
            found.append(name)
    return found


def modules() -> Iterator[str]:
    for title, names in MODULES.items():
        yield f"### {title}"
        for name in names:
            module = getattr(cmfast, name)
            yield f"**`cmfast.{name}`**: {sentence(module.__doc__ or '')}."
            if name == "reference":
                yield "The names of `cmfast.ops`, without checks."
                continue
            rows = [(f"`{each}`", sentence(getattr(module, each).__doc__ or "")) for each in public(module)]
            yield table("name | what it is", rows)


def flags() -> dict[str, tuple[str, str]]:
    """The flag and the help of each setting that has one."""
    parser = argparse.ArgumentParser()
    cli_train.add_options(parser)
    return {
        action.dest: (action.option_strings[0], (action.help or "").partition(" (default")[0])
        for action in parser._actions
    }


def described(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields, in lines of a name and a text."""
    return dict(re.findall(r"^ *(\w+) {2,}(.+)$", kind.__doc__ or "", re.M))


def default(field: Any) -> str:
    return "the recipe's" if field.default is dataclasses.MISSING else f"`{field.default}`"


def settings() -> Iterator[str]:
    flag = flags()

    def row(name: str, value: str, text: str) -> tuple[str, ...]:
        given = flag.get(name) or flag.get(name.removeprefix("paths.")) or ("", "")
        return f"`{name}`", f"`{given[0]}`" if given[0] else "", value, text or given[1] or OTHERS[name]

    rows = []
    for group, value in recipes.SETTINGS.items():
        if group not in ("objective", "options"):
            values = value.items() if isinstance(value, dict) else [("", value)]
            rows += [row(f"{group}.{name}".strip("."), f"`{each}`", OTHERS.get(f"{group}.{name}".strip("."), ""))
                     for name, each in values]  # fmt: skip
    yield (
        "A run's `config.yaml` has all of them, and `--config` takes such a file; `--set NAME=VALUE` any of them, and "
        "a flag those that have one. From Python they are `cmfast.recipes.trainer({...}, out)`."
    )
    yield table("setting | flag | default | what it is", rows)
    yield (
        "`options`, from Python `cmfast.training.TrainOptions`; recipes have steps, rates and averages of their own, "
        "`pd` a decay:"
    )
    texts, fields = described(TrainOptions), dataclasses.fields(TrainOptions)
    rows = [row(f"options.{field.name}", default(field), texts[field.name]) for field in fields]
    yield table("setting | flag | default | what it is", rows)
    yield (
        "`objective`, by recipe; the docstring of the class has what they mean. Curricula are those of a run of as "
        "many steps, here the recipe's, and the model to start from says its own noise levels:"
    )
    rows = []
    for recipe, kind in OBJECTIVES.items():
        values = recipes.complete({"recipe": recipe})["objective"].items()
        rows.append((f"`{recipe}`", f"`cmfast.objectives.{kind.__name__}`", ", ".join(f"`{k}={v}`" for k, v in values)))
    yield table("recipe | class | settings and defaults", rows)


def commands() -> Iterator[str]:
    parser = cli._parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in subparsers._choices_actions}
    yield table("command | what it does", [(f"`python -m cmfast {name}`", text) for name, text in helps.items()])
    yield "`cmfast` is short for `python -m cmfast`, and `cmfast --version` says which it is."
    yield "What `train` takes beside settings, and all that the others take:"
    groups = recipes.SETTINGS.values()
    settings = {*recipes.SETTINGS, *(name for group in groups if isinstance(group, dict) for name in group)}
    rows = []
    for name, command in subparsers.choices.items():
        for action in command._actions:
            setting = name == "train" and (action.dest in settings or "." in action.dest)
            if action.dest != "help" and not setting:
                choices = f" ({', '.join(action.choices)})" if action.choices else ""
                said = (action.help or "").replace("|", "\\|") + choices
                rows.append((f"`{name}`", f"`{', '.join(action.option_strings)}`", said))
    yield table("command | flag | what it is", rows)


def page() -> str:
    """The whole text."""
    names = [name for name in cmfast.__all__ if not isinstance(getattr(cmfast, name), ModuleType)]
    parts = [
        HEAD.rstrip(),
        "## At hand after `import cmfast`",
        table("name | what it is", [(f"`cmfast.{n}`", sentence(getattr(cmfast, n).__doc__ or "")) for n in names]),
        "## Modules",
        "`import cmfast` is enough: they load when they are used. [migration.md](migration.md) has "
        "`cmfast.compat.openai` and `cmfast.compat.diffusers`.",
        *modules(),
        "## Settings of a run",
        *settings(),
        "## Commands",
        *commands(),
        "## Environment",
        table("variable | what it does", [(f"`{name}`", text) for name, text in ENVIRONMENT.items()]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
