"""The cache of remote shards on a node, shared by real processes that are forked and killed."""

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from dsmim.shards.cache import ShardCache
from tests.conftest import environment
from tests.shards.servers import wait_for

SIZE = 200_000
QUICK = {"first_wait": 0.01, "timeout": 5.0}
fork = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10 * SIZE, **QUICK)


def put(server, number: int, *plan) -> tuple[str, int, str]:
    """Put a shard on the server; return its URL, size and digest."""
    data = random.Random(number).randbytes(SIZE)
    return server.add(f"/{number}.tar", data, *plan), SIZE, hashlib.sha256(data).hexdigest()


def contents(descriptor: int) -> str:
    """Return the digest of what a descriptor reads, and close it."""
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def held(cache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.tar")}


def open_all(cache, shards) -> None:
    for shard in shards:
        assert contents(cache.open(*shard)) == shard[2]


def in_processes(count: int, target, *args) -> None:
    run_processes([fork.Process(target=target, args=args) for _ in range(count)])


def run_processes(processes, count=lambda: 0) -> int:
    """Run processes at the same time, and check that they succeed; return the largest value of `count` during that."""
    most = 0
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        most = max(most, count())
        time.sleep(0.005)
    assert {process.exitcode for process in processes} == {0}
    return most


def test_one_download_then_from_disk(server, cache):
    shard = put(server, 0, 500)
    open_all(cache, [shard, shard])
    open_all(pickle.loads(pickle.dumps(cache)), [shard])
    assert server.gets["/0.tar"] == 2 and not list(cache.folder.glob("*.part"))


def test_processes_share_one_download(server, cache):
    shards = [put(server, number, "slow") for number in range(3)]
    in_processes(6, open_all, cache, shards)
    assert dict(server.gets) == {f"/{number}.tar": 1 for number in range(3)}


def test_contents_that_are_not_what_was_indexed(server, cache):
    url, size, digest = put(server, 0)
    server.files["/0.tar"] = bytes(SIZE)
    with pytest.raises(ValueError, match=rf"{url}: contents differ .*SHA-256.* dsmim shards index --force {url} --ind"):
        cache.open(url, size, digest)
    server.files["/0.tar"] = b"short"
    with pytest.raises(ValueError, match=f"5 bytes instead of {SIZE}"):
        cache.open(url, size, digest)
    assert server.gets["/0.tar"] == 4 and not held(cache) and not list(cache.folder.glob("*.part"))
    put(server, 0)
    open_all(cache, [(url, size, digest)])


def test_a_stale_copy_is_downloaded_again(server, cache):
    shard = put(server, 0)
    server.plans["/0.tar"] = ["stale"]
    open_all(cache, [shard])
    assert server.gets["/0.tar"] == 2


def test_a_damaged_file_of_another_size_is_not_used(server, cache):
    shard = put(server, 0)
    open_all(cache, [shard])
    (cache.folder / f"{shard[2]}.tar").write_bytes(b"x")
    open_all(cache, [shard])
    assert server.gets["/0.tar"] == 2


def test_the_bound_evicts_the_least_recently_used(server, tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE + 10, **QUICK)
    (tmp_path / "mine.tar").write_bytes(bytes(9 * SIZE))  # a file of the user: neither counted nor evicted
    shards = [put(server, number) for number in range(4)]
    first = cache.open(*shards[0])
    for number in (1, 2, 1, 3):
        time.sleep(0.02)  # more than the kernel's clock tick
        open_all(cache, [shards[number]])
    assert held(cache) == {shards[number][2] for number in (1, 2, 3)} | {"mine"}
    assert contents(first) == shards[0][2]  # evicted, and still readable
    time.sleep(0.02)
    open_all(cache, [shards[0]])
    assert held(cache) == {shards[number][2] for number in (1, 3, 0)} | {"mine"}


def test_many_processes_keep_the_bound(server, tmp_path):
    """Downloads in progress count too: with space for two shards, four processes wait for each other."""
    cache = ShardCache(tmp_path, 2 * SIZE, **QUICK)
    shards = [put(server, number, "slow") for number in range(4)]
    processes = [fork.Process(target=open_all, args=(cache, [shard])) for shard in shards]
    most = run_processes(processes, lambda: sum(path.suffix in (".tar", ".part") for path in tmp_path.iterdir()))
    assert most == 2 and len(held(cache)) == 2


def test_too_large_for_the_bound(server, tmp_path):
    with pytest.raises(ValueError, match=rf"/0.tar: has {SIZE} bytes.*data.cache_gb"):
        ShardCache(tmp_path, SIZE - 1).open(*put(server, 0))


def test_too_large_for_the_disk(server, tmp_path):
    url, _, digest = put(server, 0)
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot hold {url} .*free.*data.cache_dir"):
        ShardCache(tmp_path, 2**60).open(url, 2**59, digest)
    assert not server.gets


def test_the_disk_fills_while_writing(server, cache):
    """A limit on the size of files takes the place of a full disk."""
    in_processes(1, _write_too_much, cache, put(server, 0))
    assert not held(cache) and not list(cache.folder.glob("*.part"))


def _write_too_much(cache, shard):
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    with pytest.raises(ValueError, match=rf"{cache.folder}: cannot hold {shard[0]} \(File too large\).*data.cache_dir"):
        cache.open(*shard)


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/file/cache: cannot be created")):
        ShardCache(tmp_path / "file" / "cache", 1)


def test_prefetch(server, cache):
    shards = [put(server, 0, 404), *(put(server, number) for number in (1, 2))]
    cache.prefetch(shards)  # returns at once; the first one fails silently
    wait_for(lambda: len(held(cache)) == 2)
    open_all(cache, shards)
    assert dict(server.gets) == {"/0.tar": 2, "/1.tar": 1, "/2.tar": 1}


def test_a_new_list_replaces_what_is_pending(server, cache):
    shards = [put(server, number, "slow") for number in range(4)]
    cache.prefetch(shards[:3])
    wait_for(lambda: server.gets["/0.tar"])
    cache.prefetch(shards[3:])
    wait_for(lambda: shards[3][2] in held(cache))
    assert set(server.gets) == {"/0.tar", "/3.tar"}


def test_prefetch_evicts_no_shard_of_its_own_list(server, tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE, **QUICK)
    old, *shards = (put(server, number) for number in range(4))
    open_all(cache, [old])
    cache.prefetch(shards)
    wait_for(lambda: held(cache) == {shards[0][2], shards[1][2]})
    time.sleep(0.1)
    assert not server.gets["/3.tar"] and held(cache) == {shards[0][2], shards[1][2]}


def test_processes_that_prefetch_the_same_list_share_the_work(server, cache):
    shards = [put(server, number, "slow") for number in range(6)]
    processes = [fork.Process(target=_prefetch_and_wait, args=(cache, shards)) for _ in range(2)]
    assert run_processes(processes, lambda: len(list(cache.folder.glob("*.part")))) == 2  # both downloaded
    assert dict(server.gets) == {f"/{number}.tar": 1 for number in range(6)}


def _prefetch_and_wait(cache, shards):
    cache.prefetch(shards)
    wait_for(lambda: len(held(cache)) == len(shards))


def test_a_child_forked_during_a_prefetch_has_its_own_thread(server, cache):
    shards = [put(server, number, "slow") for number in range(3)]
    cache.prefetch(shards[:1])
    wait_for(lambda: server.gets["/0.tar"])
    in_processes(2, open_all, cache, shards[:1])  # they wait for the parent's download
    in_processes(2, _prefetch_and_wait, cache, shards)
    assert dict(server.gets) == {f"/{number}.tar": 1 for number in range(3)}


BEGIN = """
import os, sys, time
from dsmim.shards.cache import ShardCache
folder, url, size, digest, do = sys.argv[1:]
cache = ShardCache(folder, 10**9)
if do == "open":
    cache.open(url, int(size), digest)
cache.prefetch([(url, int(size), digest)])
while not list(cache.folder.glob("*.part")):
    time.sleep(0.01)
time.sleep(0.2)  # well into the download
if do == "fork" and os.fork() == 0:
    time.sleep(600)
if do == "fork":
    print("forked", flush=True)
    time.sleep(600)
"""


def begin(cache, shard, do: str) -> subprocess.Popen:
    """Start a process, in its own process group, that begins to download a shard."""
    words = [sys.executable, "-c", BEGIN, str(cache.folder), *map(str, shard), do]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, env=environment(), start_new_session=True, text=True)


def test_a_killed_download_blocks_nothing_and_its_part_is_removed(server, cache):
    shard, other = put(server, 0, "stall", "stall"), put(server, 1)
    for _ in range(2):
        process = begin(cache, shard, "open")
        wait_for(lambda: any(part.stat().st_size for part in cache.folder.glob(f"*.{SIZE}.part")))
        process.kill()
        process.communicate()
        assert not held(cache)
        open_all(cache, [other])  # removes the part of the killed process
        assert not list(cache.folder.glob("*.part")) and held(cache) == {other[2]}
        (cache.folder / f"{other[2]}.tar").unlink()
    server.plans["/0.tar"] = []
    open_all(cache, [shard])


def test_a_forked_child_holds_no_lock_of_a_killed_parent(server, cache):
    process = begin(cache, put(server, 0, "stall"), "fork")
    try:
        assert process.stdout.readline() == "forked\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        open_all(cache, [put(server, 0)])
        os.killpg(process.pid, 0)  # raises unless the child still lives
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_end_of_a_program_does_not_wait_for_the_prefetch(server, cache):
    process = begin(cache, put(server, 0, "stall"), "prefetch")
    assert process.communicate() == ("", "") and process.returncode == 0
    assert list(cache.folder.glob("*.part"))  # a download that ends, also by an error, removes its part


def test_files_of_others_stay(server, cache):
    names = ("movie.part", "holiday.mp4.part", "a.tar", "b.1.part")
    for name in names:
        (cache.folder / name).write_bytes(b"mine")
    open_all(cache, [put(server, number) for number in range(12)])  # two more than it holds
    assert all((cache.folder / name).read_bytes() == b"mine" for name in names)
    assert not (cache.folder / "movie.lock").exists()
