"""Broken and hostile files, a module for each kind of file; `files.KINDS` has all once these are imported."""

from tests.hostile import checkpoints, data, diffusers, runs, settings
from tests.hostile.files import KINDS, OPENERS, Kind

__all__ = ["KINDS", "OPENERS", "Kind", "checkpoints", "data", "diffusers", "runs", "settings"]
