"""`python -m cmfast train`: its options, and settings from these and from files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cmfast.cli_common import Said, device_of, file_path, folder_of, for_users, integer, override, words


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="cd, ct, pd, ict, ect or edm; mnist trains the bundled model in four stages")
    parser.add_argument("--data", type=file_path, help="a folder of images, a .npz file, or mnist")
    parser.add_argument("--out", type=file_path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--config", type=file_path,
                        help="a YAML file of settings, such as a run's config.yaml; arguments here win")  # fmt: skip
    parser.add_argument("--teacher", type=file_path, help="the checkpoint of a diffusion model to distil (cd, pd)")
    parser.add_argument(
        "--init", type=file_path, help="a checkpoint to start from; default: the teacher, or new weights"
    )
    parser.add_argument("--network", help="new weights: tiny, small (default), imagenet64, lsun256")
    for name, kind, text in (
        ("steps", int, "optimizer steps (default: the paper's, hundreds of thousands)"),
        ("batch_size", int, "images per step, of all processes together (default: 64)"),
        ("microbatch", int, "images per forward pass"),
        ("learning_rate", float, "default: the paper's"),
        ("averages", words, "rates of averaged weights, such as 0.999,power:0.05 or halflife:500000,batch=64"),
        ("dtype", str, "float32 (default), bfloat16 or float16"),
        ("seed", integer, "of everything random (default: 0)"),
        ("save_interval", int, "steps between checkpoints (default: 1000)"),
        ("log_interval", int, "steps between readings of the loss (default: 10)"),
        ("sample_interval", int, "steps between pictures (default: none)"),
        ("keep", int, "checkpoints to keep (default: 3)"),
        ("workers", int, "processes that decode images (default: 0)"),
        ("parallel", str, "several processes: ddp (default) or fsdp"),
        ("on_nan", str, "stop (default) or skip"),
    ):
        parser.add_argument(_flag(name), type=kind, help=text, dest=f"options.{name}", metavar=name.upper())
    parser.add_argument("--checkpointing", action="store_true", default=None, dest="options.checkpointing",
                        help="less memory, a third more time")  # fmt: skip
    parser.add_argument("--loss-norm", dest="objective.loss_norm", metavar="NORM",
                        help="l1, l2, l2-32, huber or lpips (of cd, ct and pd the default)")  # fmt: skip
    parser.add_argument("--dropout", type=float, help="of the student")
    parser.add_argument("--image-size", type=int, dest="data.image_size", metavar="SIZE",
                        help="crop and resize images to it")  # fmt: skip
    parser.add_argument("--flip", action="store_true", default=None, dest="data.flip", help="mirror half of the images")
    parser.add_argument("--unlabelled", action="store_false", default=None, dest="data.labelled", help="ignore labels")
    parser.add_argument("--skip-unreadable", action="store_true", default=None, dest="data.skip_unreadable",
                        help="leave out files that are no images")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], type=override, dest="overrides", metavar="NAME=VALUE",
                        help="any other setting, such as objective.start_scales=18 or options.warmup=100")  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", default=None, help="write TensorBoard files too")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU if there is one")
    for name in ("edm", "shape", "cd", "guided"):
        parser.add_argument(f"--{name}-steps", type=int, help=f"recipe mnist: steps of its stage `{name}`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from cmfast.training import Stopped

    digits = arguments.recipe == "mnist"
    try:
        (_mnist if digits else _recipe)(arguments)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped.text}; the same command goes on{'' if digits else ' with --resume'}")


def _recipe(arguments: argparse.Namespace) -> None:
    from cmfast import recipes
    from cmfast.ranks import ranks
    from cmfast.training.stop import Stop

    settings = _settings(arguments)
    out = folder_of(arguments.out or f"runs/{settings.get('recipe')}")
    device = device_of(arguments.device, int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else None)
    # What torchrun starts again, after a process was lost, goes on where there is a checkpoint.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    with ranks(tensors_on=device.type) as group, ExitStack() as until_said, _said(group.rank):
        training = recipes.trainer(
            settings, out, device=device, group=group, resume=arguments.resume or (again and "auto"),
            tensorboard=bool(arguments.tensorboard),
        )  # fmt: skip
        # torchrun sends SIGTERM as soon as one process is gone, and this one may have yet to say so.
        until_said.enter_context(Stop(group))
        training.run(progress=sys.stderr.isatty())
    if group.rank == 0:
        print(out / "model.safetensors")


@contextmanager
def _said(rank: int) -> Iterator[None]:
    """What fails within is said at once, by the first process for all. Others say what it may not live to say, that a
    process is gone, and what it only sees as one that is gone: not a NaN, nor a RankError. Raises: Said: then."""
    from cmfast.ranks import Lost, RankError
    from cmfast.training import NaNLoss

    try:
        yield
    except Exception as error:
        message = for_users(error)
        if message is None:
            raise
        if not rank or isinstance(error, Lost):
            print(f"cmfast: error: {message}", file=sys.stderr)
        elif not isinstance(error, (NaNLoss, RankError)):
            print(f"cmfast: error: rank {rank}: {message}", file=sys.stderr)
        raise Said from error


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Those of the file, or of the run that is resumed, under those of the command line."""
    from cmfast import recipes
    from cmfast.training import config

    if stages := [_flag(name) for name in _MNIST_STEPS if getattr(arguments, name) is not None]:
        raise ValueError(f"{', '.join(stages)}: only recipe mnist has these stages; leave it out, or give --steps")
    settings: dict[str, object] = {}
    if arguments.resume:
        if arguments.out is None and arguments.recipe is None:
            raise ValueError("--resume needs --out, the folder of the run")
        out = Path(arguments.out or f"runs/{arguments.recipe}")
        saved = out / "config.yaml"
        if not saved.is_file():
            raise FileNotFoundError(f"there is no run to resume in {out}: no {saved}{_without_settings(out)}")
        settings = config.read(saved)
        if arguments.recipe not in (None, settings.get("recipe")):
            raise ValueError(
                f"--recipe {arguments.recipe}: the run in {out} is of {settings.get('recipe')}, as which it goes on: "
                "leave out --recipe, or begin another run in another folder"
            )
    if arguments.config:
        settings |= config.read(arguments.config)
    given = {name: value for name, value in vars(arguments).items() if "." in name and value is not None}
    for name in ("recipe", "network", "dropout"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    for name in ("data", "teacher", "init"):
        if getattr(arguments, name) is not None:
            given[f"paths.{name}"] = getattr(arguments, name)
    changes = [*given.items(), *arguments.overrides]
    if arguments.config and not arguments.resume and "options.steps" in dict(changes):
        settings = recipes.of_any_length(settings)
    for name, value in changes:
        outer, dot, inner = name.partition(".")
        if not dot:
            settings[name] = value
        elif isinstance(part := settings.setdefault(outer, {}), dict):  # else `recipes.complete` says what is wrong
            part[inner] = value
    if "network" in dict(changes):
        recipes.check_new_weights(settings.get("paths"))
    if settings.get("recipe") is None:
        raise ValueError("--recipe is missing: cd, ct, pd, ict, ect, edm or mnist")
    if settings["recipe"] == "mnist":
        raise ValueError("recipe mnist has its own settings and is in no file of them: train --recipe mnist")
    return settings


def _without_settings(out: Path) -> str:
    """What to do about a run's folder that holds no settings."""
    if (out / "edm" / "config.yaml").is_file():
        return f"; with --recipe mnist --out {out}, and without --resume, the digits' run in it goes on"
    if (out / "checkpoints").is_dir():
        return "; its checkpoints go on if this file says again what the run was given, as --config takes it"
    return ""


def _mnist(arguments: argparse.Namespace) -> None:
    from cmfast import digits

    if others := _beside_mnist(arguments):
        raise ValueError(f"recipe mnist has its own settings: leave out {', '.join(others)}")
    given = {name: value for name in _MNIST_STEPS if (value := getattr(arguments, name)) is not None}
    seed = getattr(arguments, "options.seed") or 0
    out = folder_of(arguments.out or "runs/mnist")
    for path in digits.train_mnist(out, seed=seed, device=device_of(arguments.device), **given):
        print(path)


_MNIST_STEPS = ("edm_steps", "shape_steps", "cd_steps", "guided_steps")


def _beside_mnist(arguments: argparse.Namespace) -> list[str]:
    """What was given that the digits' recipe does not take, as on the command line."""
    takes = {*_MNIST_STEPS, "run", "recipe", "out", "resume", "device", "options.seed"}
    given = [name for name, value in vars(arguments).items() if name not in takes and value is not None and value != []]
    return [_flag(name) for name in given]


def _flag(name: str) -> str:
    """An argument as on the command line."""
    named = {"overrides": "--set", "data.labelled": "--unlabelled"}
    return named.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))
