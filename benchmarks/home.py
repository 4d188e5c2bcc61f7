"""Where the package lies."""

from __future__ import annotations

from pathlib import Path

#: Of a checkout the root; None where the package is installed.
CHECKOUT: Path | None = Path(__file__).resolve().parents[1]
if not (CHECKOUT / "pyproject.toml").is_file():
    CHECKOUT = None
#: What a new process must search to find the same package.
HOME = CHECKOUT or Path(__file__).resolve().parents[2]
