"""`dsmim shards build`: an image folder or a table of path,label becomes WebDataset tars with their indexes."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import webdataset
from PIL import Image

from dsmim.data.index import ShardIndex, is_image, write_index
from dsmim.data.order import permutation
from dsmim.data.parallel import parallel
from dsmim.data.pixels import open_rgb


@dataclass(frozen=True)
class Source:
    """One image on disk."""

    path: Path
    key: str
    label: int | None = None


def read_sources(source: Path, root: Path | None = None) -> tuple[list[Source], list[str]]:
    """The images of a folder or of a CSV/TSV table, and the class names when labels are words.

    A folder of folders is labelled by its first level, classes sorted by name; a flat folder has no labels. A table
    has the columns path and, if labelled, label: a number, or a name. Paths are relative to `root`, by default the
    table's own folder. Raises ValueError naming what is wrong.
    """
    sources, classes = _from_folder(source) if source.is_dir() else _from_table(source, root or source.parent)
    if not sources:
        raise ValueError(f"{source}: no images found")
    keys: dict[str, Path] = {}
    for item in sources:
        if item.key in keys:
            raise ValueError(f"{item.path} and {keys[item.key]} would share the key {item.key!r}; rename one")
        keys[item.key] = item.path
    return sources, classes


def split_sources(sources: list[Source], splits: dict[str, float], seed: int) -> dict[str, list[Source]]:
    """Shuffle, then cut into the named shares: floor(n × share) each, the last takes the rest of its share.

    Without splits there is one part, "data". Raises ValueError when the shares add up to more than 1.
    """
    if sum(splits.values()) > 1 + 1e-9:
        raise ValueError(f"--split: the shares add up to {sum(splits.values()):g}, more than 1")
    mixed = [sources[i] for i in permutation(len(sources), seed, "build")]
    parts, begin, reached = {}, 0, 0.0
    for name, share in (splits or {"data": 1.0}).items():
        reached += share
        end = int(len(mixed) * reached + 1e-9)
        if begin == end:
            raise ValueError(f"--split: {name}={share:g} of {len(mixed)} images is none")
        parts[name], begin = mixed[begin:end], end
    return parts


def build(
    parts: dict[str, list[Source]],
    out: Path,
    classes: list[str],
    per_shard: int = 1000,
    workers: int = 1,
    short_side: int | None = None,
) -> list[ShardIndex]:
    """Write `out/NAME-000000.tar …` and their indexes for every part; each appears under its name when whole.

    short_side: shrink larger images to this many pixels, stored as PNG if they were PNG, else JPEG of quality 95;
    None keeps the original bytes. Raises ValueError when a shard of that name is there already.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name, sources in parts.items():
        if there := sorted(out.glob(f"{name}-*.tar")):
            raise ValueError(f"{there[0]}: is there already; remove it or build into another folder")
        chunks = [sources[i : i + per_shard] for i in range(0, len(sources), per_shard)]
        jobs += [(out / f"{name}-{number:06d}.tar", chunk) for number, chunk in enumerate(chunks)]
    if classes:
        (out / "classes.json").write_text(json.dumps(classes, indent=0) + "\n")
    return parallel(partial(_write_shard, short_side=short_side), jobs, workers, "build")


def _write_shard(job: tuple[Path, list[Source]], short_side: int | None) -> ShardIndex:
    path, sources = job
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            # mtime, owner: constants, so that the same images give the same bytes
            writer = webdataset.TarWriter(file, mtime=0, user="dsmim", group="dsmim", encoder=False)
            for source in sources:
                writer.write(_sample(source, short_side))
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return write_index(path)


def _sample(source: Source, short_side: int | None) -> dict:
    extension = source.path.suffix.lower().lstrip(".")
    try:
        data = source.path.read_bytes()
    except OSError as error:
        raise ValueError(f"{source.path}: {error.strerror}") from None
    if short_side:
        data, extension = _shrink(source.path, data, extension, short_side)
    sample = {"__key__": source.key, extension: data}
    return sample if source.label is None else sample | {"cls": str(source.label).encode()}


def _shrink(path: Path, data: bytes, extension: str, short_side: int) -> tuple[bytes, str]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey, factor = image.mode == "L", short_side / min(image.size)
            size = tuple(max(short_side, round(side * factor)) for side in image.size)
        if factor >= 1:
            return data, extension
        small = open_rgb(data).resize(size, Image.Resampling.BICUBIC).convert("L" if grey else "RGB")
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded: {error}") from None
    buffer = io.BytesIO()
    if extension == "png":
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "png" if extension == "png" else "jpg"


def _key(relative: Path) -> str:
    """The path without its extension; WebDataset ends a key at the first dot, so that further dots become '_'."""
    return str(relative.with_suffix("")).replace(".", "_")


def _from_folder(folder: Path) -> tuple[list[Source], list[str]]:
    paths = sorted(path for path in folder.rglob("*") if is_image(path.suffix.lower().lstrip(".")) and path.is_file())
    relatives = [path.relative_to(folder) for path in paths]
    top = {len(relative.parts) == 1 for relative in relatives}
    if top == {True, False}:
        raise ValueError(f"{folder}: holds images beside class folders; move them into one, or give a table")
    classes = sorted({relative.parts[0] for relative in relatives}) if top == {False} else []
    labels = {name: number for number, name in enumerate(classes)}
    sources = [Source(path, _key(rel), labels.get(rel.parts[0])) for path, rel in zip(paths, relatives, strict=True)]
    return sources, classes


def _from_table(table: Path, root: Path) -> tuple[list[Source], list[str]]:
    try:
        text = table.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: is neither a folder nor a readable table ({error})") from None
    rows = [row for row in csv.reader(text.splitlines(), delimiter="\t" if table.suffix == ".tsv" else ",") if row]
    rows = rows[1:] if rows and rows[0][0] == "path" else rows  # the heading line is optional
    widths = {len(row) for row in rows}
    if not widths <= {1} and not widths <= {2}:
        number = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]) or len(row) > 2)
        raise ValueError(f"{table}: row {number + 1} ({rows[number]}) should have the columns path or path,label")
    words = [row[1].strip() for row in rows if len(row) == 2]
    numeric = bool(words) and words[0].isdigit()
    if odd := [number for number, word in enumerate(words) if not word or word.isdigit() != numeric]:
        what = "a number from 0" if numeric else "a name"
        raise ValueError(f"{table}: row {odd[0] + 1} has the label {words[odd[0]]!r} where the first one is {what}")
    classes = [] if numeric else sorted(set(words))
    labels = {word: int(word) if numeric else classes.index(word) for word in set(words)}
    sources = [Source(root / row[0], _key(Path(row[0])), labels[row[1].strip()] if words else None) for row in rows]
    return [_checked(source, table) for source in sources], classes


def _checked(source: Source, table: Path) -> Source:
    if not source.path.is_file():
        raise ValueError(f"{table}: no such file: {source.path}")
    if not is_image(source.path.suffix.lower().lstrip(".")):
        raise ValueError(f"{table}: {source.path} has no image extension")
    return replace(source, key=source.key.lstrip("/"))
