"""The records of one index: where each sample is, its key and its class number; and which of them are in use."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field

import numpy as np

from dsmim.shards.sample_format import DEFAULT, NO_LABEL, SampleFormat
from dsmim.shards.scan import Sample
from dsmim.shards.tar import BLOCK, Link


@dataclass(frozen=True)
class Rows:
    """Which of a shard's samples are in use: a range of the row numbers in the file of a subset (subset.py)."""

    file: str
    begin: int
    end: int
    digest: str
    """Digest of the whole subset."""


@dataclass(frozen=True)
class Table:
    """The samples of one shard, or those of a subset, in the order of the tar."""

    blocks: np.ndarray
    """(samples, 2) uint32: offset and length in blocks of 512 bytes."""
    keys: list[str]
    labels: np.ndarray
    """(samples,) int32: class numbers; NO_LABEL where there is none."""
    links: dict[int, tuple[Link, ...]] = field(default_factory=dict)
    """Row → the members that are hard links to others of the tar."""
    stored: dict[str, str] = field(default_factory=dict)
    """SampleFormat.stored of the tar's index."""

    def place(self, row: int) -> tuple[int, int]:
        """Return offset and length of a sample in bytes."""
        offset, length = self.blocks[row].tolist()
        return offset * BLOCK, length * BLOCK

    def whole(self, row: int) -> tuple[int, int, tuple[Link, ...]]:
        """Return offset and length in bytes, and the linked members: what read_sample takes."""
        return *self.place(row), self.links.get(row, ())

    def take(self, rows: np.ndarray) -> Table:
        """Return the table of the given rows alone."""
        links = {new: self.links[row] for new, row in enumerate(rows.tolist()) if row in self.links}
        return Table(self.blocks[rows], [self.keys[row] for row in rows], self.labels[rows], links, self.stored)


def read_rows(rows: Rows) -> np.ndarray:
    """Read the row numbers, (end - begin,). Raises ValueError when the subset has changed since it was opened."""
    from safetensors import SafetensorError, safe_open

    if rows.begin == rows.end:  # safetensors refuses an empty slice
        return np.zeros(0, np.uint32)
    try:
        with safe_open(rows.file, "np") as file:
            if file.metadata()["digest"] == rows.digest:
                return file.get_slice("rows")[rows.begin : rows.end]
    except (OSError, SafetensorError):
        pass
    raise ValueError(f"{rows.file}: changed since it was opened; start again")


def pack_extra(samples: list[Sample], form: SampleFormat) -> bytes:
    """Return what few tars need: how their samples were read, and hard links. Nothing for all others."""
    links = {row: sample.links for row, sample in enumerate(samples) if sample.links}
    about = ({"format": form.stored()} if form != DEFAULT else {}) | ({"links": links} if links else {})
    return zlib.compress(json.dumps(about).encode(), 9) if about else b""


def read_extra(data: bytes) -> tuple[dict[int, tuple[Link, ...]], dict[str, str]]:
    """Return the links by row, and SampleFormat.stored, of what pack_extra wrote."""
    about = json.loads(zlib.decompress(data)) if data else {}
    links = {int(row): tuple(Link(*link) for link in of) for row, of in about.get("links", {}).items()}
    return links, about.get("format", {})


def labels_and_extra(data: bytes) -> tuple[np.ndarray, bytes]:
    """Return the labels, (samples,) int32, and what follows them, from the end of a sidecar."""
    unpack = zlib.decompressobj()
    return np.frombuffer(unpack.decompress(data), "<i4"), unpack.unused_data


def renumbered(labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """Return each label's place in `classes`; NO_LABEL for labels that are not in it."""
    places = np.full(max(classes) + 2, NO_LABEL, np.int32)  # the last one: for NO_LABEL, which is -1
    places[list(classes)] = np.arange(len(classes))
    return places[np.where(labels <= max(classes), labels, NO_LABEL)]
