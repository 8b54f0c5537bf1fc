"""`dsmim shards verify`: compare shards with their indexes, and report what is wrong and where."""

from __future__ import annotations

import json
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dsmim.shards.extensions import is_image
from dsmim.shards.index import describe_tar, index_file, read_index
from dsmim.shards.opening import expand, local_copy
from dsmim.shards.parallel import parallel
from dsmim.shards.remote import is_remote
from dsmim.shards.tally import Tally
from dsmim.shards.tar import NO_LABEL, Sample, read_sample, split_member


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
) -> Verified:
    """Check all shards.

    report: a file of JSON lines, one per shard, which grows as shards are done. A shard in it is not checked again as
    long as size and time of shard and index are the same. Raises ValueError when the file is no such report.
    """
    shards = expand(patterns, allow_pipe=allow_pipe)
    known = _read_report(report, decode_images) if report and report.exists() else {}
    known = {tar: line for tar, line in known.items() if line["stamp"] == _stamp(tar, index_dir) and not is_remote(tar)}
    left = [tar for tar in shards if tar not in known]
    work = partial(_verify_and_report, index_dir=index_dir, decode_images=decode_images, report=report)
    found = dict(zip(left, parallel(work, left, workers, "verify"), strict=True))
    results = [found[tar] if tar in found else _reported(known[tar]) for tar in shards]
    whole = Verified([line for result in results for line in result.problems], Tally())
    for result in results:
        whole.left_out.add(result.left_out)
    return whole


def verify_shard(tar: str, index_dir: str | None = None, decode_images: bool = False) -> Verified:
    """Check one shard: tar structure, index, digest, labels, with decode_images every image."""
    problems, left_out = [], Tally()
    try:
        index = read_index(tar, index_dir)
    except (ValueError, OSError) as error:
        index, problems = None, [str(error)]
    try:
        with local_copy(tar) as path:
            samples, _, digest = describe_tar(path, tar)
            if index and digest != index.sha256:
                problems.append(f"{tar}: contents differ from what was indexed ({index_file(tar, index_dir)})")
            problems += _unlabelled(tar, samples)
            left_out = _left_out(path, samples)
            if decode_images:
                with path.open("rb") as file:
                    problems += [line for sample in samples for line in _undecodable(tar, file, sample)]
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return Verified(problems, left_out)


def _left_out(path: Path, samples: list[Sample]) -> Tally:
    """Count the files of a tar that belong to no sample."""
    keys, left_out = {sample.key for sample in samples}, Tally()
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            parts = split_member(member.name)
            if not member.isdir() and not (member.isfile() and parts and parts[0] in keys):
                left_out.count(_kind(member, parts), member.name)
            archive.members.clear()  # else tarfile keeps every header of the shard in memory
    return left_out


def _kind(member: tarfile.TarInfo, parts: tuple[str, str] | None) -> str:
    if not member.isfile():
        return "links and special files"
    hidden = member.name.rpartition("/")[2].startswith(".")
    return f".{parts[1]}" if parts else "hidden" if hidden else "without extension"


def _unlabelled(tar: str, samples: list[Sample]) -> list[str]:
    """Report labels that only a part of the samples has; a shard without labels is for pre-training."""
    missing = [sample.key for sample in samples if sample.label == NO_LABEL]
    if not missing or len(missing) == len(samples):
        return []
    return [f"{tar}: {len(missing)} of {len(samples)} samples have no class number (KEY.cls), the first {missing[0]}"]


def _undecodable(tar: str, file: Any, sample: Sample) -> list[str]:
    from dsmim.data.decode import Undecodable, decode  # imports torch, which only this check needs

    key, members = read_sample(file, sample.offset, sample.length)
    problems = []
    for extension, data in members.items():
        if is_image(extension):
            try:
                decode(data)
            except Undecodable as error:
                problems.append(f"{tar}: {key}.{extension} cannot be decoded: {error}")
    return problems


def _verify_and_report(tar: str, index_dir: str | None, decode_images: bool, report: Path | None) -> Verified:
    stamp = _stamp(tar, index_dir)
    result = verify_shard(tar, index_dir, decode_images)
    if report:
        line = {"shard": tar, "stamp": stamp, "decoded": decode_images, **result._asdict()}
        with report.open("ab", buffering=0) as file:  # one write per line, so that processes do not mix theirs
            file.write(json.dumps(line).encode() + b"\n")
    return result


def _reported(line: dict[str, Any]) -> Verified:
    """Return the result that a report keeps; those of older versions did not count what was left out."""
    return Verified(line["problems"], Tally({kind: tuple(value) for kind, value in line.get("left_out", {}).items()}))


def _read_report(report: Path, decode_images: bool) -> dict[str, dict]:
    """Return shard → its line; a check without decoding does not count where decoding is asked for."""
    whole, _, cut = report.read_bytes().rpartition(b"\n")
    if cut:  # the command was killed while it wrote
        os.truncate(report, len(whole) + 1 if whole else 0)
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        return {line["shard"]: line for line in lines if line["decoded"] or not decode_images}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{report}: is no report of dsmim shards verify; name another file") from None


def _stamp(tar: str, index_dir: str | None) -> list[int]:
    """Return sizes and times of a shard and its index, of those that are local (remote shards are always checked)."""
    files = [Path(file) for file in (tar, index_file(tar, index_dir))]
    stats = [file.stat() for file in files if file.exists()]
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]
