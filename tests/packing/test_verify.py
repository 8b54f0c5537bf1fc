"""`dsmim shards verify`: the problems that it reports, and its report file."""

import json
import os
from pathlib import Path

import pytest

from dsmim.packing.verify import verify_all, verify_shard
from dsmim.shards.sidecar import index_file
from tests.conftest import dsmim, image_bytes, make_shards, write_tar


def test_verify_names_problems_and_shards(tmp_path):
    paths = make_shards(tmp_path, [3, 3, 3])
    assert dsmim("shards", "verify", tmp_path, "--decode").stdout.endswith("all shards are as indexed\n")
    data = bytearray(paths[1].read_bytes())
    data[600] ^= 1
    stamp = Path(index_file(str(paths[1]))).stat().st_mtime_ns
    paths[1].write_bytes(data)
    os.utime(paths[1], ns=(stamp, stamp))
    Path(index_file(str(paths[2]))).unlink()
    done = dsmim("shards", "verify", tmp_path, check=False)
    assert done.returncode == 1 and done.stdout.endswith("2 problems\n")
    assert f"{paths[1]}: contents differ" in done.stdout and f"{paths[2]}: has no index" in done.stdout


def test_verify_decodes(tmp_path):
    write_tar(tmp_path / "t.tar", [("good.png", image_bytes(0)), ("bad.png", b"no image")])
    dsmim("shards", "index", tmp_path)
    assert dsmim("shards", "verify", tmp_path, check=False).returncode == 0
    done = dsmim("shards", "verify", tmp_path, "--decode", check=False)
    assert done.returncode == 1 and "bad.png cannot be decoded" in done.stdout and "1 problems" in done.stdout


def test_verify_finds_structural_damage_without_an_index(tmp_path):
    path = make_shards(tmp_path, [4])[0]
    broken = tmp_path / "broken.tar"
    broken.write_bytes(path.read_bytes()[:3000])
    problems = verify_shard(str(broken)).problems
    assert len(problems) == 2 and "has no index" in problems[0] and "cut short" in problems[1]


def test_shards_in_the_report_are_not_checked_again(tmp_path):
    paths = [str(path) for path in make_shards(tmp_path, [2, 2])]
    report = tmp_path / "report.jsonl"
    assert verify_all(paths, None, 1, False, report).problems == []
    os.utime(paths[1])  # touched: checked again
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["shard"] for line in lines] == paths
    report.write_text(json.dumps(lines[0] | {"problems": ["as reported"]}) + "\n" + json.dumps(lines[1]) + "\n")
    assert verify_all(paths, None, 1, False, report).problems[0] == "as reported"
    assert len(report.read_text().splitlines()) == 3
    assert "as reported" not in verify_all(paths, None, 1, True, report).problems  # not decoded then
    lines = report.read_bytes()
    report.write_bytes(lines + b'{"shard": "cut of')  # the command was killed while it wrote
    verify_all(paths, None, 1, False, report)
    assert report.read_bytes() == lines  # nothing was checked again
    Path(f"{paths[0]}.dsmi").unlink()
    assert "has no index" in verify_all(paths, None, 1, False, report).problems[0]
    report.write_text("no report\n")
    with pytest.raises(ValueError, match="is no report of dsmim shards verify"):
        verify_all(paths, None, 1, False, report)
