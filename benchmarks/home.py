"""Where the package lies."""

from __future__ import annotations

from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[1]
#: Of a checkout the root; None where the package is installed.
CHECKOUT = _ABOVE if (_ABOVE / "pyproject.toml").is_file() else None
#: What a new process must search to find the same package.
HOME = CHECKOUT or Path(__file__).resolve().parents[2]
