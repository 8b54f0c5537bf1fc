"""Size and SHA-256 of files: what manifests hold."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

Entry = dict[str, Any]
"""Of one file: bytes, sha256."""


class Hashed:
    """A file that digests what goes through it. What was meant to be written is digested, not what can be read back.

    A refusal is kept for `end`: raised within torch's writer it would come out as a complaint about positions.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                self.file.write(data)
                self.digest.update(data)
                self.bytes += len(data)
            except OSError as error:
                self.problem = error
        return len(data)

    def flush(self) -> None:
        pass

    def end(self, sync: bool = True) -> Entry:
        """Bring the file to the system, with sync to disk. Raises OSError when it does not go there."""
        if self.problem is not None:
            raise self.problem
        self.file.flush()
        if sync:
            os.fsync(self.file.fileno())
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> Entry:
    """What a manifest says of a file that is there."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
