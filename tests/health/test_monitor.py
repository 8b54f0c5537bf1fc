"""Who is missing when a collective fails: real processes that are killed, stopped, or stuck."""

import multiprocessing
import re

import pytest
import torch.distributed as dist

from dsmim.cluster.placement import free_port
from tests.conftest import patience
from tests.health.rank_worker import LIMIT, rank_main

SILENT = "rank 0 on HOST has given no sign of life for N s, last at: waiting for data, step 3."
PROCESSES = multiprocessing.get_context("forkserver")  # forks a process that has imported torch and done nothing else
PROCESSES.set_forkserver_preload(["tests.health.rank_worker"])


def run_ranks(out, what: str, victim: int, ranks: int = 2, agent: bool = False) -> dict[int, str]:
    """Run ranks until all but the victim have ended; check their exit status; return what each of them printed.

    agent: the store is in a process outside the ranks, as with torchrun.
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
            processes[rank].join(patience(120))
            assert processes[rank].exitcode == 70, (out / f"{rank}.err").read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    if agent:
        del store
    return {rank: _without_gloo((out / f"{rank}.out").read_text()) for rank in others}


def _without_gloo(printed: str) -> str:
    """Older gloo prints lines of its own on the standard output."""
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith("[Gloo]"))


@pytest.mark.parametrize(
    ("what", "victim", "agent", "soon", "verdict"),
    [
        ("kill", 1, False, True, SILENT.replace("0", "1")),
        ("stop", 1, True, False, SILENT.replace("0", "1")),
        ("kill", 0, True, True, SILENT),
        ("leave", 1, False, True, "rank 1 on HOST has left, at: waiting for data, step 3; see its own message"),
        ("kill", 0, False, True, "rank 0's process, which keeps the rendezvous (127.0.0.1:N), is gone"),
        ("stop", 0, False, False, "rank 0's process, which keeps the rendezvous (127.0.0.1:N), does not answer"),
    ],
)
def test_the_missing_rank_is_named(tmp_path, what, victim, agent, soon, verdict):
    for output in run_ranks(tmp_path, what, victim, agent=agent).values():
        seconds, lost, text = output.split(maxsplit=2)
        assert lost == "True"
        # The timeout was set after the start, in a group that was made without one (gloo's default: 30 min).
        assert float(seconds) < LIMIT + patience(1.5) and (soon or float(seconds) > LIMIT - 0.5)
        assert re.match(re.escape(verdict).replace("HOST", r"\S+").replace("N", r"\d+"), text), text


def test_a_rank_that_waits_for_data_is_named_and_ends_too(tmp_path):
    for text in run_ranks(tmp_path, "wait", 1, ranks=3).values():
        assert "rank 1 on" in text and "has been at: waiting for data, step 3 for" in text
        assert "; the 2 others are at: training, step 3" in text
    own = (tmp_path / "1.err").read_text()
    assert "no progress for" in own and "in _fail" in own  # its own watchdog, with the stack
