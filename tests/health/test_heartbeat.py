"""Who is missing when a collective breaks: real processes that are killed, stopped, stuck; and the watchdog."""

import multiprocessing
import os
import re
import signal
import time

import pytest
import torch.distributed as dist

from dsmim.cluster.placement import Placement, free_port
from dsmim.health.blame import BROKEN, ENDED, JUDGED, WORKING, Entry, blame
from dsmim.health.board import Board
from dsmim.health.heartbeat import Heartbeat, is_lost_peer
from tests.health.beat_worker import INTERVAL, LIMIT, rank_main, watched_main

PROCESSES = multiprocessing.get_context("forkserver")  # forked where torch is imported and nothing else has happened
PROCESSES.set_forkserver_preload(["tests.health.beat_worker"])


def play(out, what: str, victim: int, ranks: int = 2, agent: bool = False) -> dict[int, str]:
    """Let ranks run until the others have ended; gives what each of those printed, and checks their exit status.

    agent: the store is held outside of the ranks, as by torchrun.
    """
    port = free_port()
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if agent:
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    processes = [
        PROCESSES.Process(target=rank_main, args=(out, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, what, victim))
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    others = [rank for rank in range(ranks) if rank != victim]
    try:
        for rank in others:
            processes[rank].join(120)
            assert processes[rank].exitcode == 70, (out / f"{rank}.err").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    if agent:
        del store
    return {rank: (out / f"{rank}.out").read_text() for rank in others}


@pytest.mark.parametrize(
    ("what", "victim", "agent", "soon", "verdict"),
    [
        ("kill", 1, False, True, "rank 1 on HOST gives no sign of life since N s, last at: waiting for data, step 3."),
        ("stop", 1, True, False, "rank 1 on HOST gives no sign of life since N s, last at: waiting for data, step 3."),
        ("kill", 0, True, True, "rank 0 on HOST gives no sign of life since N s, last at: waiting for data, step 3."),
        ("leave", 1, False, True, "rank 1 on HOST has left, at: waiting for data, step 3; see what it said itself"),
        ("kill", 0, False, True, "rank 0's process, which keeps the rendezvous (127.0.0.1:N), is gone"),
        ("stop", 0, False, False, "rank 0's process, which keeps the rendezvous (127.0.0.1:N), does not answer"),
    ],
)
def test_the_missing_rank_is_named(tmp_path, what, victim, agent, soon, verdict):
    for said in play(tmp_path, what, victim, agent=agent).values():
        seconds, lost, told = said.split(maxsplit=2)
        assert lost == "True"
        # With the timeout that was set after the start, of a group that was made without one (gloo's default: 30 min).
        assert float(seconds) < LIMIT + 1.5 and (soon or float(seconds) > LIMIT - 0.5)
        assert re.match(re.escape(verdict).replace("HOST", r"\S+").replace("N", r"\d+"), told), told


def test_a_rank_that_waits_for_data_is_named_and_ends_too(tmp_path):
    said = play(tmp_path, "wait", 1, ranks=3)
    for told in said.values():
        assert "rank 1 on" in told and "has been at: waiting for data, step 3 for" in told
        assert "; the 2 others are at: training, step 3" in told
    own = (tmp_path / "1.err").read_text()
    assert "no progress for" in own and "in _suffer" in own  # its own watchdog, with the stack


def entries(*states: tuple[int, str, str, int], step: int = 5) -> list[Entry]:
    """(count, state, phase, moves) of each rank."""
    return [Entry(c, 1000.0, f"node{r}", step, phase, 9.0, m, s) for r, (c, s, phase, m) in enumerate(states)]


def test_blame_in_a_large_world():
    first = entries(*[(1, WORKING, "training", 40)] * 512)
    second = entries(*[(3, BROKEN, "training", 40)] * 512)
    dead = list(second)
    for rank in range(8, 16):
        dead[rank] = first[rank]
    told = blame(first, dead, own=0, now=1010.0)
    assert told.startswith("rank 8 on node8 gives no sign of life since 10 s") and "and 4 more. It was killed" in told
    dead[3] = None
    assert blame(first, dead, 0, 1010.0).startswith("rank 3 never gave a sign of life; rank 8")
    assert "every rank is alive and at: training, step 5" in blame(first, second, 0, 1010.0)
    late = list(second)
    late[7] = entries(*[(2, WORKING, "waiting for data", 39)] * 8)[7]
    assert blame(first, late, 0, 1010.0) == (
        "rank 7 on node7 has been at: waiting for data, step 5 for 9 s; the 511 others are at: training, step 5"
    )
    inside = list(second)
    inside[9] = entries(*[(2, WORKING, "training", 40)] * 10)[9]
    assert blame(first, inside, 0, 1010.0) == "rank 9 on node9 did not meet the others, all being at: training, step 5"


def test_who_has_left_because_of_another_is_not_blamed():
    first = entries((1, BROKEN, "training", 4), (5, BROKEN, "training", 4), (7, WORKING, "training", 3))
    second = entries((2, BROKEN, "training", 4), (5, JUDGED, "training", 4), (7, WORKING, "training", 3))
    assert blame(first, second, 0, 1010.0).startswith("rank 2 on node2 gives no sign of life")
    came = entries((2, BROKEN, "training", 4), (5, JUDGED, "training", 4), (8, BROKEN, "training", 4))
    assert (
        blame(first, came, 2, 1010.0) == "rank 1 on node1 gave up waiting before this rank came, at: training, step 5"
    )
    ended = entries((2, BROKEN, "training", 4), (5, JUDGED, "training", 4), (8, ENDED, "saving", 3))
    assert blame(first, ended, 0, 1010.0) == "rank 2 on node2 has left, at: saving, step 5; see what it said itself"


def test_a_store_with_many_ranks_is_read_at_once():
    place = Placement("srun", 0, 512, 0, 8, "127.0.0.1", free_port())
    store = dist.TCPStore(place.master_addr, place.master_port, is_master=True, wait_for_workers=False)
    board = Board(place, patience=10)
    said = entries(*[(1, WORKING, "training", 40)] * 512)
    for rank in range(511):
        assert board.publish(rank, said[rank])
    begun = time.monotonic()
    assert board.read() == [*said[:511], None]
    assert board.publish(511, said[511]) and board.read() == said
    assert time.monotonic() - begun < 3  # 0.05 s on an idle machine
    del store
    time.sleep(0.2)
    assert not board.publish(0, said[0])
    with pytest.raises(ConnectionError):
        board.read()


@pytest.mark.parametrize("what", ["stuck", "stopped"])
def test_the_watchdog_ends_a_stuck_process_and_spares_a_stopped_one(tmp_path, what):
    process = PROCESSES.Process(target=watched_main, args=(tmp_path, what))
    process.start()
    if what == "stopped":
        while not (tmp_path / "err").exists():
            time.sleep(0.02)
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(process.pid, signal.SIGCONT)
    process.join(30)
    said = (tmp_path / "err").read_text()
    assert process.exitcode == (70 if what == "stuck" else 0), said
    if what == "stuck":
        assert "no progress for" in said and "at: waiting for data, step 7; it ends here" in said
        assert "most recent call first" in said and "in watched_main" in said


def test_what_is_called_with_every_beat_cannot_silence_it(capsys):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("no such process")

    beat = Heartbeat(Placement("single process", 0, 1, 0, 1, "127.0.0.1", 1), 60, fail, interval=INTERVAL / 10)
    time.sleep(INTERVAL)
    assert beat._beating.is_alive()
    beat.close()
    assert not beat._beating.is_alive() and len(calls) == 1
    assert capsys.readouterr().err == "rank 0: OSError: no such process; not tried again\n"
    assert beat.diagnose() == "there is no other rank"


def test_errors_that_are_nobodys_absence():
    assert is_lost_peer(dist.DistBackendError("NCCL error")) and is_lost_peer(dist.DistNetworkError("x"))
    assert is_lost_peer(dist.DistStoreError("x"))
    for error in (
        ValueError("Connection closed by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n… Connection reset by peer"),
        ConnectionResetError("Connection reset by peer"),
    ):
        assert not is_lost_peer(error)
