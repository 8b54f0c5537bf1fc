"""`dsmim shards build`: write images as WebDataset tars with their indexes.

`build_shards` takes the lists of sources.py, plans which images go into which shard, and writes the missing shards in
worker processes, original bytes or shrunk. `OUT/NAME.build.json` records the plan. When it is killed, every file under
a final name is whole; the same command again writes what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from dsmim.packing.sources import FileSource, Source
from dsmim.recipe.data import MAX_PIXELS
from dsmim.shards.atomic import partial_file, remove_leftovers, write_atomically
from dsmim.shards.classes import CLASSES, write_classes
from dsmim.shards.extensions import is_image
from dsmim.shards.index import ShardIndex, describe_tar, read_index, write_sidecar
from dsmim.shards.locks import locked
from dsmim.shards.parallel import parallel
from dsmim.shards.pixels import TooManyPixels, open_rgb, pillow_limit
from dsmim.shards.sidecar import index_file

BUILD_MAX_PIXELS = 2 * MAX_PIXELS
"""Pixels of an image that is decoded to be packed. More than a run decodes, because shrinking makes it smaller; above
it Pillow's own limit is an error."""


@dataclass(frozen=True)
class WriteOptions:
    """How images are written."""

    per_shard: int = 1000
    short_side: int | None = None
    """Pixels. Larger images are shrunk to it (bicubic, antialiased) and stored as PNG if they were PNG, else as JPEG;
    None keeps the original bytes."""
    quality: int = 90
    """Quality of those JPEGs on Pillow's scale, 1 to 100. FFCV's published ImageNet recipes store 90."""
    skip_undecodable: bool = False
    """Leave out images that cannot be decoded; otherwise, when shrinking, the first one is an error."""
    max_pixels: int = BUILD_MAX_PIXELS
    """An image with more pixels counts as undecodable."""


@dataclass(frozen=True)
class BuildResult:
    """The shards of a build, and what it left out."""

    shards: list[ShardIndex]
    left_out: list[str]
    """One line per undecodable image that is not in the shards written now."""
    written: int
    """Number of shards written now; the others existed already."""
    renewed: list[str] = field(default_factory=list)
    """Names of those shards that existed, but whose images have changed since."""


@dataclass(frozen=True)
class _Job:
    path: Path
    sources: list[Source]
    options: WriteOptions


@dataclass(frozen=True)
class _Plan:
    """What one part of a build is made of."""

    file: Path
    about: dict[str, Any]
    """What must be equal where a build is continued."""
    jobs: list[_Job]
    stamps: list[str] | None
    """For each shard, the digest of its images' stamps when it was begun; None when they are not known."""


def build_shards(
    parts: dict[str, list[Source]],
    out: Path,
    classes: list[str],
    options: WriteOptions = WriteOptions(),
    workers: int = 1,
) -> BuildResult:
    """Write `out/NAME-000000.tar …` and their indexes for every part; each file gets its name when it is complete.

    Shards that an earlier run of the same build has finished are kept, unless one of their images has changed: then
    they are written again. Raises ValueError when the name has shards of another build, or another process builds into
    `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".build.lock", wait=False) as alone:
        if not alone:
            raise ValueError(f"{out}: another dsmim shards build is writing there; wait for its end")
        remove_leftovers(out)
        plans = [_plan(out, name, sources, options) for name, sources in parts.items()]
        if classes:
            write_classes(out / CLASSES, classes)
        renewed = [path.name for plan in plans for path in _start(plan)]
        jobs = [job for plan in plans for job in plan.jobs]
        left = [job for job in jobs if not _is_whole(job.path)]
        left_out = parallel(_write_shard, left, workers, "build")
    shards = [read_index(job.path) for job in jobs if job.path.exists()]
    return BuildResult(shards, [line for lines in left_out for line in lines], len(left), renewed)


def _plan(out: Path, name: str, sources: list[Source], options: WriteOptions) -> _Plan:
    """Return the plan of one part, after checking that existing shards are of the same build."""
    plan = asdict(options) | {"images": len(sources), "sources": _digest(map(repr, sources))}
    plan["quality"] = options.quality if options.short_side else None  # original bytes are not encoded again
    if options.max_pixels == BUILD_MAX_PIXELS or not options.skip_undecodable:
        del plan["max_pixels"]  # it changes no shard, only whether the build fails: a larger one continues it
    file = out / f"{name}.build.json"
    before = json.loads(file.read_text()) if file.exists() else None
    stamps = before.pop("stamps", None) if before else None
    files, own = sorted(out.iterdir()), re.escape(name) + r"-\d{6,}\.tar"
    if before != plan and (there := [path for path in files if re.fullmatch(own, path.name)]):
        differ = [key for key in plan | (before or {}) if before and before.get(key) != plan.get(key)]
        why = f"from a build that differs in {', '.join(differ)}" if before else "not from dsmim shards build"
        raise ValueError(f"{there[0]}: exists already, {why}; remove it or build into another folder")
    chunks = [sources[i : i + options.per_shard] for i in range(0, len(sources), options.per_shard)]
    jobs = [_Job(out / f"{name}-{number:06d}.tar", chunk, options) for number, chunk in enumerate(chunks)]
    return _Plan(file, plan, jobs, stamps if before == plan else None)


def _start(plan: _Plan) -> list[Path]:
    """Record the plan, and mark the shards whose images have changed as to be written again: by removing their indexes,
    so that a killed build is continued rightly. Return these shards."""
    stamps = [_digest(str(source.stamp) for source in job.sources) for job in plan.jobs]
    before = plan.stamps or [None] * len(stamps)
    changed = [job.path for job, old, new in zip(plan.jobs, before, stamps, strict=True) if _has_changed(job, old, new)]
    for path in changed:
        Path(index_file(str(path))).unlink(missing_ok=True)
    write_atomically(plan.file, (json.dumps(plan.about | {"stamps": stamps}, indent=1) + "\n").encode())
    return changed


def _has_changed(job: _Job, old: str | None, new: str) -> bool:
    """Return whether images of a finished shard have changed. The plan of an older version has no stamps: then a shard
    has changed whose image files are newer than itself."""
    if old is not None or not job.path.exists():
        return job.path.exists() and old != new
    written = job.path.stat().st_mtime_ns
    return any(source.stamp[1] > written for source in job.sources if isinstance(source, FileSource) and source.stamp)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        read_index(path)
    except (ValueError, OSError):
        return False
    return True


def _write_shard(job: _Job) -> list[str]:
    """Write one shard with its index; return what was left out. If all was left out, no file is written."""
    with partial_file(job.path) as partial:
        with partial.open("wb") as file:
            # constant time and owner, so that the same images give the same bytes
            constants = {"mtime": 0, "user": "dsmim", "group": "dsmim"}
            with webdataset.TarWriter(file, encoder=False, keep_meta=True, **constants) as writer:
                left_out = [line for source in job.sources if (line := _write_sample(writer, source, job.options))]
            file.flush()
            os.fsync(file.fileno())
        if len(left_out) < len(job.sources):
            described = describe_tar(partial, str(job.path))
            partial.replace(job.path)
            write_sidecar(str(job.path), index_file(str(job.path)), *described)
        else:
            job.path.unlink(missing_ok=True)  # with what the images were before they changed
    return left_out


def _write_sample(writer: webdataset.TarWriter, source: Source, options: WriteOptions) -> str | None:
    """Write one sample, or return why it was left out."""
    try:
        writer.write({"__key__": source.key, **_prepared(source, options)})
    except _LeftOut as error:
        return str(error)
    return None


class _LeftOut(Exception):
    """An image is left out; the text says why."""


def _prepared(source: Source, options: WriteOptions) -> dict[str, bytes]:
    """Return the members of a sample as they are written."""
    members = source.members()
    if not options.short_side and not options.skip_undecodable:
        return members
    prepared = {}
    for extension, data in members.items():
        try:
            if is_image(extension):
                with pillow_limit(options.max_pixels):
                    data, extension = _checked_image(data, extension, options)
        except Exception as error:  # Pillow's plug-ins may raise anything for damaged files
            larger = ": give a larger --max-pixels if you trust the file" if isinstance(error, TooManyPixels) else ""
            name, why = f"{source.key}.{extension}", f"{error}{larger}"
            if options.skip_undecodable:
                raise _LeftOut(f"{name}: {why}") from None
            raise ValueError(f"{name}: cannot be decoded: {why}; see --skip-undecodable") from None
        if extension in prepared:
            raise ValueError(f"{source.key}: contains two images that would both become {source.key}.{extension}")
        prepared[extension] = data
    return prepared


def _checked_image(data: bytes, extension: str, options: WriteOptions) -> tuple[bytes, str]:
    """Return the image as it is stored, and its extension. Raises what Pillow raises for bytes that are no image."""
    image = open_rgb(data)
    if not options.short_side or min(image.size) <= options.short_side:
        return data, extension
    with Image.open(io.BytesIO(data)) as original:
        grey = original.mode == "L"
    factor = options.short_side / min(image.size)
    size = tuple(max(options.short_side, round(side * factor)) for side in image.size)
    small = image.resize(size, Image.Resampling.BICUBIC).convert("L" if grey else "RGB")
    buffer = io.BytesIO()
    if extension == "png":
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue(), "png" if extension == "png" else "jpg"
