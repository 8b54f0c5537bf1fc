"""`dsmim shards build`: images become WebDataset tars with their indexes.

Killed at any moment it leaves whole shards, or nothing, under the final names; the same command again writes what is
missing. What it is about stands in `OUT/NAME.build.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import webdataset
from PIL import Image

from dsmim.packing.sources import Source
from dsmim.shards.atomic import partial_file, remove_leftovers, write_atomically
from dsmim.shards.index import ShardIndex, describe, index_file, read_index, write_sidecar
from dsmim.shards.locks import locked
from dsmim.shards.parallel import parallel
from dsmim.shards.pixels import open_rgb
from dsmim.shards.tar import is_image


@dataclass(frozen=True)
class Writing:
    """How images are written."""

    per_shard: int = 1000
    short_side: int | None = None
    """Pixels to which larger images are shrunk (bicubic, antialiased), stored as PNG if they were PNG, else as JPEG;
    None keeps the original bytes."""
    quality: int = 90
    """Of those JPEGs: Pillow's scale, 1 to 100. 90 is what FFCV's published ImageNet recipes store."""
    skip_undecodable: bool = False
    """Leave images out that cannot be decoded; otherwise, when shrinking, the first is an error."""


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    shards: list[ShardIndex]
    left_out: list[str]
    """One line per undecodable image left out of the shards written now."""
    written: int
    """Shards written now; the others were there already."""


@dataclass(frozen=True)
class _Job:
    path: Path
    sources: list[Source]
    writing: Writing


def build(
    parts: dict[str, list[Source]], out: Path, classes: list[str], writing: Writing = Writing(), workers: int = 1
) -> Built:
    """Write `out/NAME-000000.tar …` and their indexes for every part; each appears under its name when whole.

    Shards that an earlier run of the very same build has finished are kept. Raises ValueError when there are shards of
    another one under that name.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".build.lock", wait=False) as alone:
        if not alone:
            raise ValueError(f"{out}: another dsmim shards build is writing there; wait for its end")
        remove_leftovers(out)
        jobs = [job for name, sources in parts.items() for job in _plan(out, name, sources, writing)]
        if classes:
            _write_classes(out / "classes.json", classes)
        left = [job for job in jobs if not _is_whole(job.path)]
        left_out = parallel(_write_shard, left, workers, "build")
    shards = [read_index(job.path) for job in jobs if job.path.exists()]
    return Built(shards, [line for lines in left_out for line in lines], len(left))


def _write_classes(path: Path, classes: list[str]) -> None:
    """One list for all shards of the folder: another one's numbers would mean other classes."""
    if path.exists() and json.loads(path.read_text()) != classes:
        raise ValueError(
            f"{path}: lists other classes, with other numbers; build from a table of path,number or into another folder"
        )
    write_atomically(path, (json.dumps(classes, indent=0) + "\n").encode())


def _plan(out: Path, name: str, sources: list[Source], writing: Writing) -> list[_Job]:
    """The shards of one part, after checking that what is there already belongs to the same build."""
    plan = asdict(writing) | {"images": len(sources), "sources": _digest(sources)}
    plan["quality"] = writing.quality if writing.short_side else None  # original bytes have none of ours
    file = out / f"{name}.build.json"
    before = json.loads(file.read_text()) if file.exists() else None
    files, own = sorted(out.iterdir()), re.escape(name) + r"-\d{6,}\.tar"
    if before != plan and (there := [path for path in files if re.fullmatch(own, path.name)]):
        differ = [key for key in plan if before and before.get(key) != plan[key]]
        why = f"by a build that differs in {', '.join(differ)}" if before else "and not by dsmim shards build"
        raise ValueError(f"{there[0]}: is there already, {why}; remove it or build into another folder")
    write_atomically(file, (json.dumps(plan, indent=1) + "\n").encode())
    chunks = [sources[i : i + writing.per_shard] for i in range(0, len(sources), writing.per_shard)]
    return [_Job(out / f"{name}-{number:06d}.tar", chunk, writing) for number, chunk in enumerate(chunks)]


def _digest(sources: list[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(source).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        read_index(path)
    except (ValueError, OSError):
        return False
    return True


def _write_shard(job: _Job) -> list[str]:
    """What was left out of it; of a shard that nothing is left of, there is no file."""
    with partial_file(job.path) as partial:
        with partial.open("wb") as file:
            # mtime, owner: constants, so that the same images give the same bytes
            constants = {"mtime": 0, "user": "dsmim", "group": "dsmim"}
            with webdataset.TarWriter(file, encoder=False, keep_meta=True, **constants) as writer:
                left_out = [line for source in job.sources if (line := _write_sample(writer, source, job.writing))]
            file.flush()
            os.fsync(file.fileno())
        if len(left_out) < len(job.sources):
            described = describe(partial, str(job.path))
            partial.replace(job.path)
            write_sidecar(str(job.path), index_file(str(job.path)), *described)
    return left_out


def _write_sample(writer: webdataset.TarWriter, source: Source, writing: Writing) -> str | None:
    """Why it was left out, if it was."""
    try:
        writer.write({"__key__": source.key, **_prepared(source, writing)})
    except _Bad as error:
        return str(error)
    return None


class _Bad(Exception):
    """An image to be left out."""


def _prepared(source: Source, writing: Writing) -> dict[str, bytes]:
    """The members of a sample as they are written."""
    members = source.members()
    if not writing.short_side and not writing.skip_undecodable:
        return members
    prepared = {}
    for extension, data in members.items():
        try:
            if is_image(extension):
                data, extension = _checked_image(data, extension, writing)
        except Exception as error:  # Pillow's plug-ins raise what they like on rubbish
            if writing.skip_undecodable:
                raise _Bad(f"{source.key}.{extension}: {error}") from None
            raise ValueError(f"{source.key}.{extension}: cannot be decoded: {error}; see --skip-undecodable") from None
        if extension in prepared:
            raise ValueError(f"{source.key}: holds two images that would become {source.key}.{extension}")
        prepared[extension] = data
    return prepared


def _checked_image(data: bytes, extension: str, writing: Writing) -> tuple[bytes, str]:
    """The image as it is stored. Raises whatever Pillow raises for bytes that are none."""
    image = open_rgb(data)
    if not writing.short_side or min(image.size) <= writing.short_side:
        return data, extension
    with Image.open(io.BytesIO(data)) as original:
        grey = original.mode == "L"
    factor = writing.short_side / min(image.size)
    size = tuple(max(writing.short_side, round(side * factor)) for side in image.size)
    small = image.resize(size, Image.Resampling.BICUBIC).convert("L" if grey else "RGB")
    buffer = io.BytesIO()
    if extension == "png":
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=writing.quality)
    return buffer.getvalue(), "png" if extension == "png" else "jpg"
