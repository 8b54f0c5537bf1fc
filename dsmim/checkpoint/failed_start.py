"""Takes back what a start has made in a run directory, if it fails before it has written anything of value."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MADE = {"lock", "recipe.yaml", "metrics.jsonl", "tensorboard"}
"""What a start makes before it trains."""


@dataclass(frozen=True)
class Before:
    """What there was before a start."""

    path: Path
    names: frozenset[str]
    """What was in the run directory."""
    missing: tuple[Path, ...]
    """The run directory and those of its parents that did not exist, the deepest first."""

    @classmethod
    def of(cls, path: Path) -> Before:
        """Look at a run directory, which need not exist."""
        missing = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        return cls(path, frozenset(() if missing else os.listdir(path)), missing)  # noqa: PTH208 - names only

    def restore(self) -> None:
        """Remove the files of a start that has written neither a figure nor a checkpoint, and the folders it made.

        To be called by the process that holds the directory's lock. Errors are ignored: the start has failed already.
        """
        with suppress(OSError):
            made = [path for path in self.path.iterdir() if path.name not in self.names]
            metrics = self.path / "metrics.jsonl"
            if {path.name for path in made} <= _MADE and not (metrics.exists() and metrics.stat().st_size):
                for path in made:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                for folder in self.missing:  # the first that is not empty ends it
                    folder.rmdir()
