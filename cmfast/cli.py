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

from cmfast import __version__, cli_train
from cmfast.cli_common import Said, device_of, file_path, folder_of, for_users, integer, integers, numbers, override

if TYPE_CHECKING:  # the command line starts without torch

    from cmfast.denoiser import Denoiser
    from cmfast.engine import Sampler

DTYPES = ("float32", "bfloat16", "float16")
#: What --cuda-graph says, as `Sampler` takes it.
GRAPHS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 with a message and no traceback if an argument or a file is wrong."""
    _make_writable()
    arguments = _parser().parse_args(argv)
    if not getattr(arguments, "rivals", False):  # who are measured as they come
        _wait_briefly()
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except Said:
        return 2
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            return 0
        message = for_users(error)
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


def _wait_briefly() -> None:
    """Have GNU's OpenMP, which PyTorch's threads are, ask 10,000 times whether another is ready, half a millisecond,
    and then sleep. By default it asks 300,000 times: where two threads have come to one core, as others use the cores,
    too, each of a network's hundred loops then takes what a scheduler gives a process at once."""
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"


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
    cli_train.add_options(commands.add_parser("train", help="run a training recipe"))
    _add_quality(commands.add_parser("quality", help="measure how good the digits of a model are"))
    _add_bench(commands.add_parser("bench", help="times beside plain PyTorch, torch.compile, the original, diffusers"))
    info = commands.add_parser("info", help="versions, devices, and which path each operation takes here, and why")
    info.set_defaults(run=_info)
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from cmfast.benchmarks import bench

    bench.add_options(parser)
    parser.set_defaults(rivals=True)


def _info(arguments: argparse.Namespace) -> None:
    from cmfast.info import report

    print(report())


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=file_path, help="a .pt or .safetensors checkpoint or a diffusers folder; default: bundled"
    )
    parser.add_argument("--preconditioning", choices=("consistency", "edm"),
                        help="default: what the checkpoint says, or its name")  # fmt: skip
    parser.add_argument("--sampler", default="multistep",
                        help="multistep (default), onestep, heun, euler, dpm, ancestral or progdist")  # fmt: skip
    parser.add_argument("--steps", type=int, help="network calls, or levels of an ODE solver; default: 1, or 18")
    parser.add_argument("--ts", type=integers, help="indices of a grid of levels instead, such as 0,22,39")
    parser.add_argument("--num-scales", type=int, help="levels of that grid (default: 40)")
    parser.add_argument("--sigmas", type=numbers,
                        help="noise levels instead, such as 80,1.382; of an ODE solver down to 0")  # fmt: skip
    # Two names, since torchrun takes `--num` for a beginning of its own --numa-binding.
    parser.add_argument("--num", "--num-images", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument("--classes", type=integers, help="such as 3 or 0,1,2, in turn; default: drawn from the seed")
    parser.add_argument("--seed", type=integer, default=0, help="of noise and classes (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per network call (default: 64)")
    parser.add_argument("--device", help="cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="what the network computes in; default: as the checkpoint")
    parser.add_argument("--compile", choices=("auto", "off", "whole", "regional"), default="auto", help="torch.compile")
    parser.add_argument("--cuda-graph", choices=tuple(GRAPHS), default="auto", help="on: fail where there is none")
    parser.add_argument(
        "--out", type=file_path, default="samples.png", help="FILE.png or FILE.npz (default: samples.png)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=override,
        dest="overrides",
        metavar="NAME=VALUE",
        help="model option that the checkpoint lacks, such as num_head_channels=64, or has otherwise",
    )
    parser.add_argument("--option", action="append", default=[], type=override, dest="options", metavar="NAME=VALUE",
                        help="of the sampler, such as s_churn=10 or clip_denoised=False")  # fmt: skip
    parser.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    from cmfast import images, sharding
    from cmfast.ranks import ranks

    if arguments.num < 1:
        raise ValueError(f"--num must be 1 or more, got {arguments.num}")
    if arguments.num_scales is not None and arguments.ts is None:
        raise ValueError("--num-scales is of the grid that --ts are indices of: give --ts, or leave it out")
    num, seed, classes = arguments.num, arguments.seed, arguments.classes
    if classes is not None:
        classes = [classes[i % len(classes)] for i in range(num)]
    with ranks() as group:
        path = group.together(lambda: images.check_output(arguments.out))
        sampler = group.together(lambda: _sampler(arguments, group.local_rank if group.size > 1 else None))
        group.together(lambda: _check_kind(path, sampler))
        labels = group.together(lambda: sampler.labels(num, seed=seed, classes=classes))
        start = time.perf_counter()
        bar = sys.stderr.isatty()
        pixels = sharding.sample(sampler, num, group, labels=labels, seed=seed, progress=bar)
        seconds = time.perf_counter() - start
        if pixels is None:
            return
        save = images.save if sampler.pixels else images.save_arrays
        save(path, pixels, labels)
    by = f" by {group.size} processes" if group.size > 1 else ""
    print(f"{path}: {num} images in {seconds:.2f} s{by} ({num / seconds:.1f} images/s)")


def _check_kind(path: Path, sampler: Sampler) -> None:
    """ValueError where a picture is asked for, and what the sampler makes is none."""
    if sampler.pixels is None and path.suffix.lower() != ".npz":
        why = "these are no pixels" if sampler.bounded else "the model's data have no range (bounded=False)"
        raise ValueError(f"{path}: there is no picture, as {why}: give --out FILE.npz, which gets float32 numbers")


def _sampler(arguments: argparse.Namespace, local_rank: int | None) -> Sampler:
    """The Sampler that the arguments describe; local_rank: of this process on its machine, if there are several."""
    import torch

    from cmfast.engine import Sampler

    model = _load(arguments, local_rank)
    given = {name: getattr(arguments, name) for name in ("steps", "ts", "sigmas", "num_scales")}
    levels = {name: value for name, value in given.items() if value is not None}
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
        return checkpoint.load(arguments.model, device=device_of(arguments.device, local_rank), **options).eval()
    except TypeError as error:  # what --set gives is not for this model
        raise ValueError(str(error)) from error


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=file_path, default="out", help="folder for the pictures, made if need be (default: out)"
    )
    parser.add_argument("--seed", type=integer, default=0, help="of noise (default: 0)")
    parser.set_defaults(run=_demo, model=None, device=None)


def _demo(arguments: argparse.Namespace) -> None:
    from cmfast import images
    from cmfast.engine import Sampler

    folder = folder_of(arguments.out)
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


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=file_path, help="a checkpoint of MNIST digits; default: the bundled one")
    parser.add_argument("--teacher", type=file_path, help="its teacher, to compare with 18 Heun steps")
    parser.add_argument("--num", type=int, default=1000, help="images per measurement (default: 1000)")
    parser.add_argument("--seed", type=integer, default=0, help="of noise (default: 0)")
    parser.set_defaults(run=_quality, device=None)


def _quality(arguments: argparse.Namespace) -> None:
    from cmfast import checkpoint, quality

    model = _load(arguments)
    teacher = checkpoint.load_teacher(arguments.teacher).to(model.device).eval() if arguments.teacher else None
    print(quality.report(model, teacher, num=arguments.num, seed=arguments.seed))
