"""Files that are there whole or not at all: what a killed writer leaves goes, what a living one writes stays."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsmim.shards.atomic import partial_file, remove_leftovers, write_atomically
from dsmim.shards.index import read_index
from dsmim.shards.locks import locked
from tests.conftest import dsmim, environment, image_bytes, make_shards

WRITE = """
import sys
from pathlib import Path
from dsmim.shards.atomic import partial_file

with partial_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half of it")
    print(partial, flush=True)
    sys.stdin.read()
"""


class Writer:
    """A process in the middle of writing `path`; use as a context manager."""

    def __init__(self, path: Path):
        pipe = subprocess.PIPE
        words = [sys.executable, "-c", WRITE, str(path)]
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment(), text=True)
        self.partial = Path(self.process.stdout.readline().strip())
        assert self.partial.read_bytes() == b"half of it"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def partials(folder: Path) -> set[Path]:
    return set(folder.rglob("*partial*"))


COMMANDS = {
    "build": (
        ["build", "images", "out", "--per-shard", "2"],
        ["out/data-000001.tar", "out/data-000007.tar.dsmi", "out/data.build.json"],
    ),
    "index --force": (["index", "tars", "--force"], ["tars/train-000.tar.dsmi", "tars/other.tar.dsmi"]),
    "index elsewhere": (["index", "tars", "--index-dir", "index"], ["index/train-000.tar.01234567.dsmi"]),
    "subset": (["subset", "tars", "half.txt", "--fraction", "0.5"], ["half.txt", "half.txt.rows"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_removes_what_killed_writers_left_and_nothing_of_living_ones(tmp_path, command):
    words, files = COMMANDS[command]
    make_shards(tmp_path / "tars", [3, 3])
    for folder in ("images", "out", "index"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(image_bytes(number))
    for file in files:
        with Writer(tmp_path / file):
            pass
    assert len(partials(tmp_path)) == len(files)
    with Writer(tmp_path / files[0]) as living:
        dsmim("shards", *words, cwd=tmp_path)
        assert partials(tmp_path) == {living.partial}
        assert living.partial.read_bytes() == b"half of it"


def test_a_writer_that_is_stopped_by_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), partial_file(tmp_path / "a"):
        raise RuntimeError
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"a folder is there")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(f".{tmp_path.name}*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"), partial_file(tmp_path / "file/a"):
        pass


def test_files_of_others_stay(tmp_path):
    names = (".a.partial", ".a.tar.123", "a.0123abcd.dsmim-partial", ".a.0123abcd.dsmim-partial.txt")
    for name in names:
        (tmp_path / name).write_text("mine")
    with Writer(tmp_path / "a"):
        pass
    assert len(list(tmp_path.iterdir())) == len(names) + 1
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    remove_leftovers(tmp_path / "missing")


def test_a_partial_file_of_another_host_is_removed_a_day_after_its_last_change(tmp_path, monkeypatch):
    """Its lock may look free while the writer lives: locks can be local to a node."""
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: f"not-{here}")
    with partial_file(tmp_path / "a") as foreign:
        foreign.write_bytes(b"half of it")
        foreign.rename(tmp_path / "kept")
    (tmp_path / "kept").rename(foreign)  # its lock is free now
    monkeypatch.undo()
    for age, left in ((0, {foreign}), (86400 - 600, {foreign}), (86400 + 600, set())):
        os.utime(foreign, (time.time() - age,) * 2)
        remove_leftovers(tmp_path)
        assert partials(tmp_path) == left


def test_an_old_file_whose_lock_is_held_stays(tmp_path):
    for host in ("0000", None):  # another host's, seen through shared locks; this host's
        with Writer(tmp_path / "a") as living:
            partial = living.partial
            if host:
                partial = partial.rename(tmp_path / f".a.{host}abcd.dsmim-partial")
            os.utime(partial, (0, 0))
            remove_leftovers(tmp_path)
            assert partials(tmp_path) == {partial}
        partial.unlink()


def test_a_partial_name_is_24_bytes_longer_and_the_same_digits_stand_for_the_host(tmp_path):
    name = "a" * (255 - 24)
    with partial_file(tmp_path / name) as one, partial_file(tmp_path / name) as other:
        digits = [re.fullmatch(rf"\.{name}\.([0-9a-f]{{8}})\.dsmim-partial", path.name)[1] for path in (one, other)]
        assert len(os.fsencode(one.name)) == 255
    assert digits[0] != digits[1] and digits[0][:4] == digits[1][:4]


def test_a_name_that_is_taken_is_not_used_again(tmp_path, monkeypatch):
    """Neither another writer's nor that of a link, whose target must not be written."""
    tokens = iter(["0001", "0001", "0002", "0003"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    with partial_file(tmp_path / "a") as first:
        link = first.with_name(first.name.replace("0001.", "0002."))
        link.symlink_to(tmp_path / "target")
        with partial_file(tmp_path / "a") as second:
            assert second.name == first.name.replace("0001.", "0003.")
    assert list(tmp_path.iterdir()) == [link]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for number, target in enumerate(("missing", "mine")):
        link = tmp_path / f".x.1234567{number}.dsmim-partial"
        link.symlink_to(tmp_path / target)
        os.utime(link, (0, 0), follow_symlinks=False)
        remove_leftovers(tmp_path)
        assert link.is_symlink() and not (tmp_path / "missing").exists()
        with pytest.raises(OSError, match="symbolic links"), locked(link):
            pass
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "missing").exists()


def test_a_partial_file_that_was_renamed_before_it_is_opened_is_not_created_again(tmp_path, monkeypatch):
    """On a file system without locks nothing would remove it."""
    listed = os.listdir

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def list_and_rename(folder: Path) -> list[str]:
        names = listed(folder)
        killed.partial.rename(tmp_path / "a")
        return names

    with Writer(tmp_path / "a") as killed:
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "listdir", list_and_rename)
    remove_leftovers(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EACCES", "EIO"])
def test_only_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch, name):
    number = getattr(errno, name)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught, locked(tmp_path / "lock"):
        pass
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "lock")
    assert ("has no locks" in str(caught.value)) == (name not in ("EACCES", "EIO"))


def test_removing_never_takes_a_file_from_a_writer_at_any_moment(tmp_path):
    """Two processes remove leftovers without a pause while this one writes: from creating to renaming."""
    fork = multiprocessing.get_context("fork")
    removers = [fork.Process(target=_remove_for_ever, args=(tmp_path,)) for _ in range(2)]
    for process in removers:
        process.start()
    try:
        for number in range(200):
            write_atomically(tmp_path / f"{number % 20}", b"%d" % number)
            assert (tmp_path / f"{number % 20}").read_bytes() == b"%d" % number
        assert all(process.is_alive() for process in removers)
    finally:
        for process in removers:
            process.kill()
            process.join()
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 20


def test_a_partial_file_that_is_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    """The one moment at which it looks like a leftover to another process."""
    flock, calls = fcntl.flock, []

    def late_flock(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (partial,) = partials(tmp_path)
            partial.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    with partial_file(tmp_path / "a") as partial:
        remove_leftovers(tmp_path)
        assert partials(tmp_path) == {partial}


def _remove_for_ever(folder: Path) -> None:
    while True:
        remove_leftovers(folder)


def test_a_forked_child_of_a_killed_writer_keeps_no_leftover(tmp_path):
    (ready, report), (hold, release) = os.pipe(), os.pipe()
    if (writer := os.fork()) == 0:
        os.close(release)
        with partial_file(tmp_path / "a"):
            if (child := os.fork()) == 0:
                os.read(hold, 1)  # until the test ends
                os._exit(0)
            os.write(report, b"%d" % child)
            signal.pause()
    child = int(os.read(ready, 20))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    os.kill(child, 0)  # raises unless it still lives
    for descriptor in (ready, report, hold, release):
        os.close(descriptor)


def test_without_locks_files_are_written_leftovers_stay_and_a_build_is_refused(tmp_path, monkeypatch):
    """As on Lustre mounted without -o flock, which no test can mount."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    from dsmim.packing.sources import read_sources
    from dsmim.packing.writer import build_shards

    tar = make_shards(tmp_path / "tars", [3])[0]
    with Writer(tmp_path / "tars/a") as killed:
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    remove_leftovers(tmp_path / "tars")
    assert killed.partial.exists()
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and not partials(tmp_path) - {killed.partial}
    assert read_index(tar).samples == 3
    with pytest.raises(OSError, match=r"no locks .*-o flock.*\.build\.lock"):
        build_shards({"data": read_sources(str(tmp_path / "tars"))[0]}, tmp_path / "out", [])
