"""Where the index of a shard is: a file beside the tar, or in a folder of indexes."""

from __future__ import annotations

import hashlib
import os
import shlex
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from dsmim.shards.remote import is_remote

SUFFIX = ".dsmi"


def shard_name(tar: str) -> str:
    """Return the name of the shard's file; of a URL without its query, which changes with every signature."""
    return _folder_and_name(tar)[1]


def index_file(tar: str, index_dir: str | Path | None = None) -> str:
    """Return the path of a tar's sidecar: beside the tar, or in index_dir.

    In index_dir its name includes a digest of the tar's folder, since train/000.tar and val/000.tar may share one
    index_dir. Raises ValueError for a remote tar without index_dir.
    """
    if not index_dir:
        if is_remote(tar):
            raise ValueError(
                f"{tar}: the indexes of remote shards are kept in a local folder: data.index_dir=DIR in a recipe, "
                f"--index-dir DIR for the shards commands; run: dsmim shards index {shlex.quote(tar)} --index-dir DIR"
            )
        return tar + SUFFIX
    folder, name = _folder_and_name(tar)
    return os.path.join(index_dir, f"{name}.{_folder_mark(folder)}{SUFFIX}")  # noqa: PTH118 - as above


def _folder_and_name(tar: str) -> tuple[str, str]:
    if tar.startswith("pipe:"):
        return tar, "pipe"
    if is_remote(tar):
        folder, _, name = urlsplit(tar)._replace(query="", fragment="").geturl().rpartition("/")
        return folder, name  # without the query, which changes with every signature
    folder, name = os.path.split(tar)
    return _resolved(folder), name


@lru_cache(maxsize=256)
def _resolved(folder: str) -> str:
    return str(Path(folder).resolve())


@lru_cache(maxsize=256)
def _folder_mark(folder: str) -> str:
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
