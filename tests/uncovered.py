"""The lines that no test ran, from a coverage report as JSON, each with why: `make coverage`.

Exit status 1 where less than LEAST of the lines ran, or a function has such lines and is not in REASONS.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path

LEAST = 95.0
_GPU = "for tensors on a GPU: tests marked for one run it"
_ABSENT = "for a library or a system that is not this one"
_CHILD = "in a process that is killed, or forked and left by os._exit: nothing is written of it"
_ELSE = "after every error that is known: no file or call is known that comes here"
#: Why lines of a function ran in no test: by "file: function", in patterns as of files' names.
REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("cmfast/cli.py: _device", "cmfast/compat/openai/dist_util.py: *", "cmfast/data/stream.py: Batch.pin_memory",
         "cmfast/dropout.py: Pairing._restore", "cmfast/engine.py: Sampler.__init__",
         "cmfast/engine.py: _default_generator", "cmfast/fast/weights.py: _current_stream",
         "cmfast/fast/weights.py: _recorded", "cmfast/graphs.py: *", "cmfast/info.py: _devices",
         "cmfast/memory.py: _fits", "cmfast/noise.py: _IndexedGenerator._on", "cmfast/ops/_check.py: integer",
         "cmfast/ops/_dispatch.py: *", "cmfast/ops/draw.py: _check_levels", "cmfast/ranks.py: ranks",
         "cmfast/training/loop.py: memory", "cmfast/training/state.py: State._generators",
         "cmfast/training/state.py: State._restore", "cmfast/training/step.py: Pending.*", "cmfast/transfer.py: *",
         "kernels/launch.py: *", "kernels/pointers.py: *"),
        _GPU,
    ),
    **dict.fromkeys(
        ("cmfast/compat/openai/logger.py: TensorBoardOutputFormat.*", "cmfast/data/arrays.py: mnist",
         "cmfast/data/npz.py: _memory", "cmfast/info.py: _versions", "cmfast/networks.py: _fast",
         "cmfast/training/checkpoints.py: _flush", "cmfast/training/lock.py: module",
         "cmfast/training/loop.py: _board_writer", "cmfast/training/loop.py: Trainer._report",
         "cmfast/training/pictures.py: plot_losses"),
        _ABSENT,
    ),
    **dict.fromkeys(
        ("cmfast/data/folder.py: _pass_over_one_sigterm", "cmfast/runner.py: Runner.check_process",
         "cmfast/runner.py: _after_fork", "cmfast/training/lock.py: _let_go"),
        _CHILD,
    ),
    **dict.fromkeys(
        ("cmfast/checkpoint.py: read_pickle", "cmfast/fast/__init__.py: refusal",
         "cmfast/fast/diffusers.py: *", "cmfast/training/config.py: make"),
        _ELSE,
    ),
    **dict.fromkeys(
        ("cmfast/ops/_autograd.py: reference_grads", "cmfast/native/losses.py: _*backward", "kernels/losses.py: *_bwd"),
        "autograd asks for no gradient that nothing needs",
    ),
    **dict.fromkeys(
        ("cmfast/images.py: check_output", "cmfast/perceptual.py: _read_file", "cmfast/data/arrays.py: read_npz"),
        "no permission: root, whom tests may run as, has every one",
    ),
    "cmfast/perceptual.py: _download": "torchvision's download worked: tests load nothing from the network",
}  # fmt: skip


def reason(where: str) -> str | None:
    """The first reason whose pattern fits."""
    return next((why for pattern, why in REASONS.items() if fnmatch.fnmatch(where, pattern)), None)


def main(path: str) -> int:
    report = json.loads(Path(path).read_text())
    unnamed = 0
    for file, found in sorted(report["files"].items()):
        for name, function in found["functions"].items():
            if not function["missing_lines"]:
                continue
            where = f"{file}: {name or 'module'}"
            why = reason(where)
            unnamed += why is None
            lines = ", ".join(map(str, function["missing_lines"]))
            print(f"{where}, line {lines}: {why or 'NO REASON IS GIVEN'}")
    totals = report["totals"]
    print(f"{totals['percent_covered']:.2f}% of {totals['num_statements']} lines ran, at least {LEAST:g}% should; "
          f"{totals['missing_lines']} did not, in {unnamed} functions without a reason")
    return int(totals["percent_covered"] < LEAST or unnamed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
