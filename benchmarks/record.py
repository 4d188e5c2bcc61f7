"""The JSON file of a run, whole whenever it is written: a run that is stopped leaves what it measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from cmfast.benchmarks.environment import environment
from cmfast.whole import write_text


class Record:
    """`result`, and where it is kept: FOLDER/KIND-DEVICE.json. `fields` are what the result has beside its rows."""

    def __init__(self, kind: str, folder: Path, device: torch.device, command: str, **fields: Any) -> None:
        self.result: dict[str, Any] = {
            "schema": 2,
            "suite": kind,
            "environment": environment(device) | {"command": command},
            "truncated": False,
            "not_started": [],
            **fields,
            "failures": [],
            "rows": [],
        }
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.result["environment"]["device"]).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{kind}-{name}.json"

    def write(self) -> None:
        """Put the result as it is now in the place of the file."""
        write_text(self.path, json.dumps(self.result, indent=1) + "\n")
