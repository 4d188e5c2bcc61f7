"""The command line: `python -m cmfast sample | demo | train | quality | bench | info`, also as `cmfast`."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast import __version__

if TYPE_CHECKING:  # the command line starts without torch
    import torch

    from cmfast.denoiser import Denoiser
    from cmfast.engine import Sampler

DTYPES = ("float32", "bfloat16", "float16")
#: What --cuda-graph says, as `Sampler` takes it.
GRAPHS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with a message and no traceback if an argument or a file is wrong."""
    _make_writable()
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 0
        message = _for_users(error)
        if message is None:
            raise
        if _speaks(error):
            print(f"cmfast: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmfast: interrupted", file=sys.stderr)
        return 130


def _make_writable() -> None:
    """Output goes to nowhere where there is none, as under cron, and has \\xe9 for a letter that its encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _unread() -> bool:
    """Whether nobody reads the output any more, as of `| head`. What is left of it then goes nowhere: Python would say
    at its end that it cannot be written. Another pipe that broke is an error."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except (OSError, ValueError, AttributeError):  # no file at all, or Windows
        return False
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _for_users(error: Exception) -> str | None:
    """What an error says, where it is no fault of cmfast's own: an argument, a file, what is missing on this machine,
    or memory that ran out."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    from cmfast.data.folder import worker_gone
    from cmfast.errors import Unavailable
    from cmfast.memory import out_of_memory
    from cmfast.ranks import RankError

    if isinstance(error, (RankError, Unavailable)):
        return str(error)
    if not out_of_memory(error):
        return worker_gone(error)
    said = str(error) or type(error).__name__
    # `Sampler` names the batch that fits.
    return said if "does not fit into" in said else f"memory ran out; a smaller batch or microbatch takes less: {said}"


def _speaks(error: Exception) -> bool:
    """Of the processes that torchrun starts, the first one; but it may be what is gone."""
    from cmfast.ranks import Lost

    return os.environ.get("RANK", "0") == "0" or isinstance(error, Lost)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cmfast", description="Consistency models: sample, train.")
    parser.add_argument("--version", action="version", version=f"cmfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_sample(commands.add_parser("sample", help="images from a model, as a PNG grid or .npz"))
    _add_demo(commands.add_parser("demo", help="digits from the bundled model in one step and in two"))
    _add_train(commands.add_parser("train", help="run a training recipe"))
    _add_quality(commands.add_parser("quality", help="measure how good the digits of a model are"))
    _add_bench(commands.add_parser("bench", help="times beside plain PyTorch, torch.compile, the original, diffusers"))
    info = commands.add_parser("info", help="versions, devices, and which path each operation takes here, and why")
    info.set_defaults(run=_info)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from cmfast.benchmarks import bench

    bench.add_options(parser)


def _info(arguments: argparse.Namespace) -> None:
    from cmfast.info import report

    print(report())


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=_path, help="a .pt or .safetensors checkpoint or a diffusers folder; default: bundled"
    )
    parser.add_argument("--preconditioning", choices=("consistency", "edm"), help="of a checkpoint that does not say")
    parser.add_argument("--sampler", default="multistep",
                        help="multistep (default), onestep, heun, euler, dpm, ancestral or progdist")  # fmt: skip
    parser.add_argument("--steps", type=int, help="network calls, or levels of an ODE solver; default: 1, or 18")
    parser.add_argument("--ts", type=_integers, help="indices of a grid of levels instead, such as 0,22,39")
    parser.add_argument("--num-scales", type=int, default=40, help="levels of that grid (default: 40)")
    parser.add_argument("--sigmas", type=_numbers, help="noise levels instead, such as 80,1.382")
    # Two names, since torchrun takes `--num` for a beginning of its own --numa-binding.
    parser.add_argument("--num", "--num-images", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument("--classes", type=_integers, help="such as 3 or 0,1,2, in turn; default: drawn from the seed")
    parser.add_argument("--seed", type=_integer, default=0, help="of noise and classes (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per network call (default: 64)")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="what the network computes in; default: as the checkpoint")
    parser.add_argument("--compile", choices=("auto", "off", "whole", "regional"), default="auto", help="torch.compile")
    parser.add_argument("--cuda-graph", choices=tuple(GRAPHS), default="auto", help="on: fail where there is none")
    parser.add_argument("--out", type=_path, default="samples.png", help="FILE.png or FILE.npz (default: samples.png)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_override,
        dest="overrides",
        metavar="NAME=VALUE",
        help="model option that the checkpoint does not hold, such as num_head_channels=64",
    )
    parser.add_argument("--option", action="append", default=[], type=_override, dest="options", metavar="NAME=VALUE",
                        help="of the sampler, such as s_churn=10 or clip_denoised=False")  # fmt: skip
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    from cmfast import images, sharding
    from cmfast.ranks import ranks

    if arguments.num < 1:
        raise ValueError(f"--num must be 1 or more, got {arguments.num}")
    num, seed, classes = arguments.num, arguments.seed, arguments.classes
    if classes is not None:
        classes = [classes[i % len(classes)] for i in range(num)]
    with ranks() as group:
        path = group.together(lambda: images.check_output(arguments.out))
        sampler = group.together(lambda: _sampler(arguments, group.local_rank if group.size > 1 else None))
        labels = group.together(lambda: sampler.labels(num, seed=seed, classes=classes))
        start = time.perf_counter()
        bar = sys.stderr.isatty()
        pixels = sharding.sample(sampler, num, group, labels=labels, seed=seed, progress=bar)
        seconds = time.perf_counter() - start
        if pixels is None:
            return
        images.save(path, pixels, labels)
    by = f" by {group.size} processes" if group.size > 1 else ""
    print(f"{path}: {num} images in {seconds:.2f} s{by} ({num / seconds:.1f} images/s)")


def _sampler(arguments: argparse.Namespace, local_rank: int | None) -> Sampler:
    """The Sampler that the arguments describe; local_rank: of this process on its machine, if there are several."""
    import torch

    from cmfast.engine import Sampler

    model = _load(arguments, local_rank)
    levels = {name: getattr(arguments, name) for name in ("steps", "ts", "sigmas", "num_scales")}
    how = {"compile": arguments.compile, "cuda_graph": GRAPHS[arguments.cuda_graph], "sampler": arguments.sampler}
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        return Sampler(
            model, min(arguments.batch_size, arguments.num), dtype=dtype, **levels, **how, **dict(arguments.options)
        )
    except TypeError as error:  # what --option gives is none of this sampler's
        raise ValueError(str(error)) from error


def _load(arguments: argparse.Namespace, local_rank: int | None = None) -> Denoiser:
    """The model that --model names, or the bundled one, on the device asked for."""
    from cmfast import checkpoint

    options = dict(getattr(arguments, "overrides", []))
    known = ("preconditioning", *checkpoint.SCHEDULE_KEYWORDS, *checkpoint.NETWORK_KEYWORDS)
    for name in options:
        if name not in known:
            raise ValueError(f"--set knows no {name}; known: {', '.join(known)}")
    if getattr(arguments, "preconditioning", None):
        options["preconditioning"] = arguments.preconditioning
    try:
        return checkpoint.load(arguments.model, device=_device(arguments.device, local_rank), **options).eval()
    except TypeError as error:  # what --set gives is not for this model
        raise ValueError(str(error)) from error


def _device(name: str | None, local_rank: int | None = None) -> torch.device:
    """The torch.device of that name; a GPU if there is one and no name. Each of several processes takes its own GPU."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name!r}") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda, cuda:N or cpu, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to run on the CPU")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} of them here, from cuda:0 on")
    if device.type != "cuda" or device.index is not None or local_rank is None:
        return device
    if local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"there is no GPU for process {local_rank} of this machine: torchrun --nproc-per-node {found}")
    return torch.device("cuda", local_rank)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=_path, default="out", help="folder for the pictures, made if need be (default: out)"
    )
    parser.add_argument("--seed", type=_integer, default=0, help="of noise (default: 0)")
    parser.set_defaults(run=_demo, model=None, device=None)


def _demo(arguments: argparse.Namespace) -> None:
    from cmfast import images
    from cmfast.engine import Sampler

    folder = _folder(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    model = _load(arguments)
    classes = [i % 10 for i in range(64)]
    for steps in (1, 2):
        sampler = Sampler(model, 64, steps=steps)
        sampler.sample(64, classes=classes)  # the first call pays for warming up
        start = time.perf_counter()
        pixels = sampler.sample(64, seed=arguments.seed, classes=classes)
        seconds = time.perf_counter() - start
        path = images.save(folder / f"digits_{steps}step.png", pixels, columns=8)
        print(f"{path}: 64 images in {steps} step{'s'[: steps - 1]}, {64 / seconds:.0f} images/s on {model.device}")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="cd, ct, pd, ict, ect or edm; mnist trains the bundled model in four stages")
    parser.add_argument("--data", type=_path, help="a folder of images, a .npz file, or mnist")
    parser.add_argument("--out", type=_path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--config", type=_path,
                        help="a YAML file of settings, such as a run's config.yaml; arguments here win")  # fmt: skip
    parser.add_argument("--teacher", type=_path, help="the checkpoint of a diffusion model to distil (cd, pd)")
    parser.add_argument("--init", type=_path, help="a checkpoint to start from; default: the teacher, or new weights")
    parser.add_argument("--network", help="new weights: tiny, small (default), imagenet64, lsun256")
    for name, kind, text in (
        ("steps", int, "optimizer steps (default: the paper's, hundreds of thousands)"),
        ("batch_size", int, "images per step, of all processes together (default: 64)"),
        ("microbatch", int, "images per forward pass"),
        ("learning_rate", float, "default: the paper's"),
        ("averages", _words, "rates of averaged weights, such as 0.999,power:0.05 or halflife:500000,batch=64"),
        ("dtype", str, "float32 (default), bfloat16 or float16"),
        ("seed", _integer, "of everything random (default: 0)"),
        ("save_interval", int, "steps between checkpoints (default: 1000)"),
        ("log_interval", int, "steps between readings of the loss (default: 10)"),
        ("sample_interval", int, "steps between pictures (default: none)"),
        ("keep", int, "checkpoints to keep (default: 3)"),
        ("workers", int, "processes that decode images (default: 0)"),
        ("parallel", str, "several processes: ddp (default) or fsdp"),
        ("on_nan", str, "stop (default) or skip"),
    ):
        flags = [f"--{name.replace('_', '-')}"]
        parser.add_argument(*flags, type=kind, help=text, dest=f"options.{name}", metavar=name.upper())
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
    parser.add_argument("--set", action="append", default=[], type=_override, dest="overrides", metavar="NAME=VALUE",
                        help="any other setting, such as objective.start_scales=18 or options.warmup=100")  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", default=None, help="write TensorBoard files too")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU if there is one")
    for name in ("edm", "shape", "cd", "guided"):
        parser.add_argument(f"--{name}-steps", type=int, help=f"recipe mnist: steps of its stage `{name}`")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    from cmfast.training import Stopped

    digits = arguments.recipe == "mnist"
    try:
        (_train_mnist if digits else _train_recipe)(arguments)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped.text}; the same command goes on{'' if digits else ' with --resume'}")


def _train_recipe(arguments: argparse.Namespace) -> None:
    from cmfast import recipes
    from cmfast.ranks import RankError, ranks
    from cmfast.training import NaNLoss

    settings = _train_settings(arguments)
    out = _folder(arguments.out or f"runs/{settings.get('recipe')}")
    device = _device(arguments.device, int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else None)
    with ranks(tensors_on=device.type) as group:
        try:
            run = recipes.trainer(
                settings, out, device=device, group=group, resume=arguments.resume,
                tensorboard=bool(arguments.tensorboard),
            )  # fmt: skip
            run.run(progress=sys.stderr.isatty())
        except Exception as error:
            # Here alone: the others only see that this process is gone. A NaN all of them see, and a RankError.
            if group.rank and _for_users(error) is not None and not isinstance(error, (NaNLoss, RankError)):
                print(f"cmfast: error: rank {group.rank}: {_for_users(error)}", file=sys.stderr)
            raise
        if group.rank == 0:
            print(out / "model.safetensors")


def _train_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Those of the file, or of the run that is resumed, under those of the command line."""
    from cmfast.training import config

    if stages := [_flag(name) for name in _MNIST_STEPS if getattr(arguments, name) is not None]:
        raise ValueError(f"{', '.join(stages)}: only recipe mnist has these stages; leave it out, or give --steps")
    if arguments.network is not None and arguments.init is not None:
        raise ValueError("--network makes new weights, and --init names others: leave one of them out")
    settings: dict[str, object] = {}
    if arguments.resume:
        if arguments.out is None and arguments.recipe is None:
            raise ValueError("--resume needs --out, the folder of the run")
        out = Path(arguments.out or f"runs/{arguments.recipe}")
        saved = out / "config.yaml"
        if not saved.is_file():
            raise FileNotFoundError(f"there is no run to resume in {out}: no {saved}{_without_settings(out)}")
        settings = config.read(saved)
    if arguments.config:
        settings |= config.read(arguments.config)
    given = {name: value for name, value in vars(arguments).items() if "." in name and value is not None}
    for name in ("recipe", "network", "dropout"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    for name in ("data", "teacher", "init"):
        if getattr(arguments, name) is not None:
            given[f"paths.{name}"] = getattr(arguments, name)
    for name, value in [*given.items(), *arguments.overrides]:
        outer, dot, inner = name.partition(".")
        if not dot:
            settings[name] = value
        elif isinstance(part := settings.setdefault(outer, {}), dict):  # else `recipes.complete` says what is wrong
            part[inner] = value
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


def _train_mnist(arguments: argparse.Namespace) -> None:
    from cmfast import digits

    if others := _beside_mnist(arguments):
        raise ValueError(f"recipe mnist has its own settings: leave out {', '.join(others)}")
    given = {name: value for name in _MNIST_STEPS if (value := getattr(arguments, name)) is not None}
    seed = getattr(arguments, "options.seed") or 0
    out = _folder(arguments.out or "runs/mnist")
    for path in digits.train_mnist(out, seed=seed, device=_device(arguments.device), **given):
        print(path)


_MNIST_STEPS = ("edm_steps", "shape_steps", "cd_steps", "guided_steps")


def _beside_mnist(arguments: argparse.Namespace) -> list[str]:
    """What was given that the digits' recipe does not take, as on the command line."""
    takes = {*_MNIST_STEPS, "command", "run", "recipe", "out", "resume", "device", "options.seed"}
    given = [name for name, value in vars(arguments).items() if name not in takes and value is not None and value != []]
    return [_flag(name) for name in given]


def _flag(name: str) -> str:
    """An argument as on the command line."""
    named = {"overrides": "--set", "data.labelled": "--unlabelled"}
    return named.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))


def _folder(path: str) -> Path:
    """Raises: NotADirectoryError: there is a file in the place of the folder to write to."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out: {folder} is a file; name a folder")
    return folder


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=_path, help="a checkpoint of MNIST digits; default: the bundled one")
    parser.add_argument("--teacher", type=_path, help="its teacher, to compare with 18 Heun steps")
    parser.add_argument("--num", type=int, default=1000, help="images per measurement (default: 1000)")
    parser.add_argument("--seed", type=_integer, default=0, help="of noise (default: 0)")
    parser.set_defaults(run=_quality, device=None)


def _quality(arguments: argparse.Namespace) -> None:
    from cmfast import checkpoint, quality

    model = _load(arguments)
    teacher = checkpoint.load(arguments.teacher).to(model.device).eval() if arguments.teacher else None
    print(quality.report(model, teacher, num=arguments.num, seed=arguments.seed))


def _path(text: str) -> str:
    """Of a file or folder. `~` is the home folder: a shell leaves it as it is in `--out=~/x`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")  # which would be the folder one is in
    return os.path.expanduser(text)


def _integer(text: str) -> int:
    """A whole number, as large as PyTorch takes them."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"expected a number of 64 bits, got {text}")
    return number


def _integers(text: str) -> list[int]:
    try:
        return [_integer(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        message = f"expected whole numbers of 64 bits with commas between them, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _words(text: str) -> tuple[str, ...]:
    """Rates of averages with commas between them; one may have arguments, `halflife:500000,batch=64`."""
    words: list[str] = []
    for part in text.split(","):
        if words and "=" in part:
            words[-1] += f",{part}"
        else:
            words.append(part)
    return tuple(words)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _override(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value read as Python would read a literal, or as `true` or `false`, else as text."""
    import ast

    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
