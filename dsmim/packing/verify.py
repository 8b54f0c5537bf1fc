"""`dsmim shards verify`: compare shards with their indexes, and report what is wrong and where."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dsmim.recipe.data import MAX_PIXELS
from dsmim.shards.extensions import is_image
from dsmim.shards.index import describe_tar, read_index, stored_format
from dsmim.shards.opening import expand, local_copy
from dsmim.shards.parallel import parallel
from dsmim.shards.remote import is_remote
from dsmim.shards.sample_format import NO_LABEL, SampleFormat
from dsmim.shards.scan import Sample
from dsmim.shards.sidecar import index_file
from dsmim.shards.table import Table
from dsmim.shards.tally import Tally
from dsmim.shards.tar import read_sample


class Verified(NamedTuple):
    """What was found in shards."""

    problems: list[str]
    """One line per problem."""
    left_out: Tally
    """Files that belong to no sample, by extension or reason. They are no problem in themselves."""


def verify_all(
    patterns: list[str],
    index_dir: str | None,
    workers: int,
    decode_images: bool,
    report: Path | None = None,
    allow_pipe: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Verified:
    """Check all shards.

    report: a file of JSON lines, one per shard, which grows as shards are done. A shard in it is not checked again as
    long as size and time of shard and index are the same. Raises ValueError when the file is no such report.
    """
    shards = expand(patterns, allow_pipe=allow_pipe)
    known = _read_report(report, decode_images, max_pixels) if report and report.exists() else {}
    known = {tar: line for tar, line in known.items() if line["stamp"] == _stamp(tar, index_dir) and not is_remote(tar)}
    left = [tar for tar in shards if tar not in known]
    work = partial(
        _verify_and_report, index_dir=index_dir, decode_images=decode_images, report=report, max_pixels=max_pixels
    )
    found = dict(zip(left, parallel(work, left, workers, "verify"), strict=True))
    results = [found[tar] if tar in found else _reported(known[tar]) for tar in shards]
    whole = Verified([line for result in results for line in result.problems], Tally())
    for result in results:
        whole.left_out.add(result.left_out)
    return whole


def verify_shard(
    tar: str, index_dir: str | None = None, decode_images: bool = False, max_pixels: int = MAX_PIXELS
) -> Verified:
    """Check one shard: tar structure, index, digest, labels, with decode_images every image.

    max_pixels: an image with more counts as undecodable.
    """
    problems, left_out = [], Tally()
    try:
        index = read_index(tar, index_dir)
    except (ValueError, OSError) as error:
        index, problems = None, [str(error)]
    try:
        with local_copy(tar) as path:
            described = describe_tar(path, tar, SampleFormat(image_key=stored_format(tar, index_dir).get("image_key")))
            samples, left_out = described.contents.samples, described.contents.left_out
            if index and described.sha256 != index.sha256:
                problems.append(f"{tar}: contents differ from what was indexed ({index_file(tar, index_dir)})")
            problems += _unlabelled(tar, index.table() if index else None, samples)
            if decode_images:
                with path.open("rb") as file:
                    problems += [line for sample in samples for line in _undecodable(tar, file, sample, max_pixels)]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return Verified(problems, left_out)


def _unlabelled(tar: str, table: Table | None, samples: list[Sample]) -> list[str]:
    """Report labels that only a part of the samples has; a shard without labels is for pre-training. They are those of
    the index, which may come from elsewhere than KEY.cls."""
    rows = zip(table.keys, table.labels, strict=True) if table else ((s.key, s.label) for s in samples)
    missing = [key for key, label in rows if label == NO_LABEL]
    total = len(table.keys) if table else len(samples)
    if not missing or len(missing) == total:
        return []
    return [f"{tar}: {len(missing)} of {total} samples have no class number (KEY.cls), the first {missing[0]}"]


def _undecodable(tar: str, file: Any, sample: Sample, max_pixels: int) -> list[str]:
    from dsmim.data.decode import Undecodable, decode, pixel_limit  # imports torch, which only this check needs

    key, members = read_sample(file, sample.offset, sample.length, sample.links)
    problems = []
    for extension, data in members.items():
        if is_image(extension):
            try:
                with pixel_limit(max_pixels):
                    decode(data)
            except Undecodable as error:
                problems.append(f"{tar}: {key}.{extension} cannot be decoded: {error}")
    return problems


def _verify_and_report(
    tar: str, index_dir: str | None, decode_images: bool, report: Path | None, max_pixels: int
) -> Verified:
    stamp = _stamp(tar, index_dir)
    result = verify_shard(tar, index_dir, decode_images, max_pixels)
    if report:
        line = {"shard": tar, "stamp": stamp, "decoded": decode_images, "max_pixels": max_pixels, **result._asdict()}
        with report.open("ab", buffering=0) as file:  # one write per line, so that processes do not mix theirs
            file.write(json.dumps(line).encode() + b"\n")
    return result


def _reported(line: dict[str, Any]) -> Verified:
    """Return the result that a report keeps; those of older versions did not count what was left out."""
    return Verified(line["problems"], Tally({kind: tuple(value) for kind, value in line.get("left_out", {}).items()}))


def _read_report(report: Path, decode_images: bool, max_pixels: int) -> dict[str, dict]:
    """Return shard → its line; a check without decoding, or with another limit, does not count where decoding is asked
    for."""
    whole, _, cut = report.read_bytes().rpartition(b"\n")
    if cut:  # the command was killed while it wrote
        os.truncate(report, len(whole) + 1 if whole else 0)
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        fits = {line["shard"]: line["decoded"] and line.get("max_pixels", MAX_PIXELS) == max_pixels for line in lines}
        return {line["shard"]: line for line in lines if fits[line["shard"]] or not decode_images}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{report}: is no report of dsmim shards verify; name another file") from None


def _stamp(tar: str, index_dir: str | None) -> list[int]:
    """Return sizes and times of a shard and its index, of those that are local (remote shards are always checked)."""
    files = [Path(file) for file in (tar, index_file(tar, index_dir))]
    stats = [file.stat() for file in files if file.exists()]
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]
