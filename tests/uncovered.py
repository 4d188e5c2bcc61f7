"""The lines that no test ran, from a coverage report as JSON, each with why: `make coverage`.

Exit status 1 where less than LEAST of the lines ran, or a function has such lines and is not in REASONS.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path

LEAST = 95.0
#: Why lines of a function ran in no test: by "file: function", in patterns as of files' names.
REASONS: dict[str, str] = {}


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
