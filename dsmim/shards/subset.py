"""Subsets of a data set: a text file of keys, and beside it `LIST.rows`, which says where their samples are.

All samples are put into one order that depends on the seed and their keys alone; a subset is its beginning. So a
fraction p of N samples has exactly floor(N·p) samples. For one seed every larger subset contains every smaller one,
and how the samples are spread over shards changes nothing.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsmim.shards.atomic import remove_leftovers, write_atomically
from dsmim.shards.index import ShardIndex, fingerprint
from dsmim.shards.names import plain_key
from dsmim.shards.parallel import parallel
from dsmim.shards.sample_format import NO_LABEL
from dsmim.shards.sidecar import shard_name
from dsmim.shards.table import Rows

SUFFIX = ".rows"


def choose(
    shards: list[ShardIndex], fraction: Fraction, seed: int, balanced: bool, workers: int
) -> tuple[list[np.ndarray], bool]:
    """Draw floor(N · fraction) of N samples at random. Return their rows per shard, and whether every key is unique.

    balanced: draw equally many of every class, as far as a class has them: the counts of classes that are not used up
    differ by at most one. Raises ValueError when a sample then has no class, or the fraction gives no sample.
    """
    parts = parallel(partial(_hashes, seed=seed), shards, workers, "subset")
    order = np.concatenate([hashes for hashes, _ in parts])
    wanted = int(len(order) * fraction)
    if not wanted:
        raise ValueError(f"--fraction {float(fraction):g} of {len(order)} samples is none")
    if balanced:
        labels = np.concatenate([labels for _, labels in parts])
        if (missing := labels == NO_LABEL).any():
            raise ValueError(f"--balanced: {missing.sum()} of {len(labels)} samples have no class number (KEY.cls)")
        chosen = np.lexsort((order, _places_in_class(order, labels)))[:wanted]
    else:
        chosen = np.argsort(order, kind="stable")[:wanted]
    return _by_shard(np.sort(chosen), shards), len(np.unique(order)) == len(order)


def find(shards: list[ShardIndex], lines: Iterable[str]) -> list[np.ndarray]:
    """Return per shard the rows of the samples that the lines name: a key, or a key, a tab and the shard's name or
    path.

    Raises ValueError for keys that are in no shard, or in several shards and without a shard's name.
    """
    wanted = set(lines)
    if not wanted:
        raise ValueError("the list of keys is empty")
    # in this process, because every worker would get the whole list
    found = parallel(partial(_find_in_shard, wanted=wanted), shards, 1, "subset")
    seen: dict[str, str] = {}
    for shard, (_, names) in zip(shards, found, strict=True):
        for name in names:
            if name in seen:
                raise ValueError(f"key {name!r} is in {seen[name]} and in {shard.tar}: add a tab and the shard's name")
            seen[name] = shard.tar
    if missing := sorted(wanted - seen.keys())[:3]:
        raise ValueError(f"{len(wanted) - len(seen)} of {len(wanted)} keys are not in the shards, such as {missing}")
    return [rows for rows, _ in found]


def write_list(path: Path, shards: list[ShardIndex], rows: list[np.ndarray], unique: bool) -> None:
    """Write the list of keys; unless every key is unique, each with a tab and its shard's name.

    Raises ValueError when a key contains a line break.
    """
    text = "".join(f"{line}\n" for line in _lines(shards, rows, unique))
    if text.count("\n") != sum(map(len, rows)):
        raise ValueError(f"{path}: some keys contain line breaks, which a list of lines cannot hold")
    write_atomically(path, text.encode("utf-8", "surrogateescape"))


def read_list(path: Path) -> list[str]:
    """Return the lines of a list, without the './' that other tools keep. Raises OSError if it is missing."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    return [plain_key(line) for line in text.replace("\r\n", "\n").split("\n") if line]


def write_rows(path: Path, shards: list[ShardIndex], rows: list[np.ndarray]) -> None:
    """Write what a run reads: beside the list at `path`, the rows of its keys in exactly these shards."""
    counts, flat = np.array([len(part) for part in rows], np.uint32), np.concatenate(rows).astype(np.uint32)
    about = {"data": fingerprint(shards), "list_bytes": str(path.stat().st_size)}
    about["digest"] = hashlib.sha256(counts.tobytes() + flat.tobytes()).hexdigest()
    remove_leftovers(path.parent)
    write_atomically(Path(f"{path}{SUFFIX}"), save({"counts": counts, "rows": flat}, about))


def apply_subset(shards: list[ShardIndex], path: str) -> list[ShardIndex]:
    """Return the shards reduced to the subset's samples.

    Raises ValueError when the list, or its rows for exactly these shards, is missing or out of date.
    """
    fix = f"run: dsmim shards subset SHARDS {shlex.quote(path)}"
    listed, rows_file = Path(path), Path(f"{path}{SUFFIX}")
    if not listed.is_file():
        raise ValueError(f"data.subset: no such file: {path}; {fix} --fraction P")
    if not rows_file.is_file():
        raise ValueError(f"data.subset: {path} is a list whose keys have not been found in the shards yet; {fix}")
    try:
        with safe_open(rows_file, "np") as file:
            about, counts = file.metadata(), file.get_tensor("counts")
    except SafetensorError:
        raise ValueError(f"data.subset: {rows_file} is damaged; {fix}") from None
    if about["list_bytes"] != str(listed.stat().st_size) or listed.stat().st_mtime_ns > rows_file.stat().st_mtime_ns:
        raise ValueError(f"data.subset: {path} has changed since its keys were found in the shards; {fix}")
    if about["data"] != fingerprint(shards):
        raise ValueError(f"data.subset: {path} was made for other shards than data.train names; {fix}")
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    begins = [0, *ends[:-1]]
    return [
        replace(shard, samples=end - begin, rows=Rows(str(rows_file), begin, end, about["digest"]))
        for shard, begin, end in zip(shards, begins, ends, strict=True)
    ]


def _hashes(shard: ShardIndex, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return per sample 64 bits that decide its place in the order, and its label."""
    table = shard.table()
    digests = (hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "surrogateescape"), digest_size=8) for key in table.keys)
    return np.frombuffer(b"".join(digest.digest() for digest in digests), "<u8"), table.labels


def _by_shard(samples: np.ndarray, shards: list[ShardIndex]) -> list[np.ndarray]:
    """Convert ascending sample numbers of the whole data set to rows per shard."""
    ends = np.cumsum([shard.samples for shard in shards])
    parts = np.split(samples, np.searchsorted(samples, ends[:-1]))
    return [part - begin for part, begin in zip(parts, [0, *ends[:-1]], strict=True)]


def _places_in_class(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each sample's place within its class, from 0."""
    sequence = np.lexsort((order, labels))
    ordered = labels[sequence]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(begins, len(labels)))
    places = np.empty(len(labels), np.int64)
    places[sequence] = np.arange(len(labels)) - np.repeat(begins, lengths)
    return places


def _find_in_shard(shard: ShardIndex, wanted: set[str]) -> tuple[np.ndarray, list[str]]:
    """Return the wanted rows of a shard, and for each the line that names it."""
    marks, pairs = ("", f"\t{shard_name(shard.tar)}", f"\t{shard.tar}"), []
    for row, key in enumerate(shard.table().keys):
        pairs += [(row, key + mark) for mark in marks if key + mark in wanted][:1]
    return np.array([row for row, _ in pairs], np.int64), [line for _, line in pairs]


def _lines(shards: list[ShardIndex], rows: list[np.ndarray], unique: bool) -> Iterator[str]:
    names = [shard_name(shard.tar) for shard in shards]
    names = names if len(set(names)) == len(names) else [shard.tar for shard in shards]
    for shard, part, name in zip(shards, rows, names, strict=True):
        keys, mark = shard.table().keys, "" if unique else f"\t{name}"
        yield from (keys[row] + mark for row in part)
