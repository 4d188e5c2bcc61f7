"""`python -m cmfast.compat.openai SCRIPT.py ...`: run a script written for openai's package `cm`, unmodified."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from cmfast.compat.openai import _shim


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cmfast.compat.openai",
        description="Run a script as `python SCRIPT.py ARGS...` does, with its imports from `cm` answered by cmfast. "
        "With several GPUs: torchrun --nproc-per-node N -m cmfast.compat.openai SCRIPT.py ARGS...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="another default of KarrasDenoiser, such as loss_norm=l2; arguments that the script passes go first; "
        "may be repeated",
    )
    parser.add_argument("script", metavar="SCRIPT.py")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.script):
        parser.error(f"no such script: {options.script}")

    from cmfast.ranks import end_group  # after the checks above, which so answer at once

    try:
        _shim.install(options.settings)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = [options.script, *options.args]
    if not getattr(sys.flags, "safe_path", False):
        start, sys.path[0] = sys.path[0], os.path.dirname(os.path.realpath(options.script))
        if start == _shim.ROOT:
            sys.path.append(start)  # a checkout that was found as the current folder
    _shim.serve_spawned(options.settings)
    runpy.run_path(options.script, run_name="__main__")
    end_group()


if __name__ == "__main__":
    main()
