"""Size and SHA-256 of files, as manifests hold them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

FileEntry = dict[str, Any]
"""What a manifest says of one file: bytes, sha256."""


class HashingFile:
    """A file that computes the digest of what is written to it. It digests what should be written, not what can be read
    back.

    An OSError is kept until `finish`: raised inside torch's writer, it would become an error about file positions.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and digest; after an error only count, so that the writer continues to its end."""
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
                self.bytes += len(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: `finish` flushes."""
        pass

    def finish(self, sync: bool = True) -> FileEntry:
        """Flush the file, with `sync` to disk, and return its entry. Raises the OSError of a write that failed."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        if sync:
            os.fsync(self.file.fileno())
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


def sha256(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Return the manifest's entry of an existing file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
