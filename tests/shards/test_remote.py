"""Whole objects over http, s3 and pipes, from real servers on this machine that fail as planned."""

import io
import multiprocessing
import os
import random
import re
import sys
import threading
import time

import pytest

from dsmim.shards import remote
from tests.conftest import run

QUICK = {"first_wait": 0.01, "timeout": 5.0}
DATA = random.Random(0).randbytes(300_000)


def read(url: str, **options) -> bytes:
    file = io.BytesIO()
    remote.download(url, file, **(QUICK | options))
    return file.getvalue()


def test_is_remote():
    assert all(map(remote.is_remote, ("http://a/b.tar", "s3://b/k", "pipe:cat x", "HTTPS://a/b", "gs://b/k")))
    assert not any(map(remote.is_remote, ("/a/b.tar", "a:b.tar", "data/{000..003}.tar", "C:/x")))


@pytest.mark.parametrize("faults", [(500, 500), (429, 408), ("cut",), ("cut", 503, "cut")])
def test_transient_faults_are_retried(server, faults):
    url = server.add("/a.tar", DATA, *faults)
    assert read(url) == DATA and server.gets["/a.tar"] == len(faults) + 1


def test_a_longer_first_attempt_leaves_no_bytes(server, tmp_path):
    url = server.add("/a.tar", b"short")
    (tmp_path / "part").write_bytes(DATA)
    with (tmp_path / "part").open("r+b") as file:
        remote.download(url, file, **QUICK)
    assert (tmp_path / "part").read_bytes() == b"short"


@pytest.mark.parametrize("status", [404, 403, 410])
def test_permanent_faults_are_reported_at_once(server, status):
    url = server.add("/a.tar", DATA, status, status)
    with pytest.raises(ValueError, match=rf"{url}: .*{status}"):
        read(url)
    assert server.gets["/a.tar"] == 1


def test_always_cut_short(server):
    url = server.add("/a.tar", DATA, *["cut"] * 9)
    with pytest.raises(ValueError, match=rf"{url}: could not be read in 3 attempts; the last one: .*(payload|length)"):
        read(url, attempts=3)
    assert server.gets["/a.tar"] == 3


def test_a_stalled_transfer_is_retried(server):
    url = server.add("/a.tar", DATA, "stall")
    assert read(url, timeout=0.3) == DATA and server.gets["/a.tar"] == 2
    url = server.add("/b.tar", DATA, "stall", "stall")
    with pytest.raises(ValueError, match=r"2 attempts; the last one: no byte for 0.3 s"):
        read(url, timeout=0.3, attempts=2)


def test_no_server_answers(server):
    with pytest.raises(ValueError, match=r"127.0.0.1:9/a.tar: could not be read in 2 attempts; .*failed"):
        read("http://127.0.0.1:9/a.tar", attempts=2)


def test_errors_of_the_file_are_not_retried(server):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    url = server.add("/a.tar", DATA)
    with pytest.raises(OSError, match="No space left"):
        remote.download(url, Full(), **QUICK)
    assert server.gets["/a.tar"] == 1


def test_small_objects(server):
    url = server.add("/a.dsmi", b"index", 500)
    assert remote.fetch_small(url, 5, **QUICK) == b"index"
    assert remote.fetch_small(server.url("/none.dsmi"), **QUICK) is None
    assert remote.fetch_small("pipe:cat x.dsmi") is None
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        remote.fetch_small(url, 4, **QUICK)


def test_s3(bucket):
    bucket.put_object(Bucket="shards", Key="a/0.tar", Body=DATA)
    assert read("s3://shards/a/0.tar") == DATA
    assert remote.fetch_small("s3://shards/a/0.tar.dsmi", **QUICK) is None
    with pytest.raises(remote.Missing, match=r"s3://none/0.tar: does not exist"):
        read("s3://none/0.tar")


def test_s3_without_credentials_is_reported_at_once(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=r"s3://shards/0.tar: no credentials .*AWS_PROFILE"):
        read("s3://shards/0.tar", first_wait=60)


@pytest.mark.parametrize("url", ["s3://shards", "http:///a.tar"])
def test_malformed_addresses_are_reported_at_once(bucket, url):
    with pytest.raises(ValueError, match=f"{url}: is no address of an object"):
        read(url, first_wait=60)


def test_a_transfer_draws_nothing_from_the_random_stream_of_training(server, bucket):
    bucket.put_object(Bucket="shards", Key="0.tar", Body=DATA)
    urls = server.add("/a.tar", DATA, 500, "cut"), "s3://shards/0.tar", "pipe:echo x"
    read(urls[0])
    server.plans["/a.tar"] += [500, "cut"]
    before = random.getstate()
    for url in urls:
        read(url)
    assert random.getstate() == before


def test_pipe(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    assert read(f"pipe:cat '{tmp_path}/a.tar' | cat") == DATA
    once = f"pipe:test -e {tmp_path}/mark || {{ touch {tmp_path}/mark; echo half; exit 3; }}; cat {tmp_path}/a.tar"
    assert read(once) == DATA
    with pytest.raises(ValueError, match=r"pipe:echo .*2 attempts; .*status 7: no such thing"):
        read("pipe:echo no such thing >&2; exit 7", attempts=2)


def test_a_stalled_command_is_killed_with_its_children(tmp_path):
    with pytest.raises(ValueError, match=r"no byte for 0.3 s"):
        read(f"pipe:sh -c 'echo $$ >{tmp_path}/pid; sleep 60' | cat", attempts=1, timeout=0.3)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(1200):  # init reaps an orphan soon after its end
            os.kill(pid, 0)
            time.sleep(0.05)


def test_check():
    for shard in ("http://a/b.tar", "https://a/b.tar", "s3://b/k.tar"):
        remote.check(shard, "data.train", allow_pipe=False)
    remote.check("pipe:cat x", "data.train", allow_pipe=True)
    with pytest.raises(ValueError, match=r"data.train: 'pipe:cat x' .*data.allow_pipe=true.*--allow-pipe"):
        remote.check("pipe:cat x", "data.train", allow_pipe=False)
    with pytest.raises(ValueError, match=r"data.val: 'ftp://a/b'.*https://.*s3://"):
        remote.check("ftp://a/b", "data.val", allow_pipe=True)


@pytest.mark.parametrize("package", ["fsspec", "s3fs"])
@pytest.mark.parametrize("call", ["check('s3://b/k', 'data.train', False)", "download('s3://b/k', io.BytesIO())"])
def test_the_extra_is_missing(package, call):
    code = f"import io, sys; sys.modules[{package!r}] = None; from dsmim.shards import remote; remote.{call}"
    done = run(sys.executable, "-c", code, check=False)
    assert re.search(r"s3://b/k.*: needs an extra package; run: pip install 'dsmim\[remote\]'\n$", done.stderr)


def test_in_a_forked_child_and_in_threads_after_the_parent_s_own_use(server, bucket, tmp_path):
    bucket.put_object(Bucket="shards", Key="0.tar", Body=DATA)
    (tmp_path / "a.tar").write_bytes(DATA)
    urls = server.add("/a.tar", DATA), "s3://shards/0.tar", f"pipe:cat {tmp_path}/a.tar"
    assert all(read(url) == DATA for url in urls)
    children = [
        multiprocessing.get_context("fork").Process(target=_read_in_threads, args=(urls, kind))
        for kind in ("child", "child", "grandchild")
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert all(read(url) == DATA for url in urls)  # the parent still works


def _read_in_threads(urls, kind):
    results = []
    threads = [threading.Thread(target=lambda url=url: results.append(read(url))) for url in urls * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [DATA] * 6
    if kind == "grandchild":
        child = multiprocessing.get_context("fork").Process(target=_read_in_threads, args=(urls, "child"))
        child.start()
        child.join()
        assert child.exitcode == 0
