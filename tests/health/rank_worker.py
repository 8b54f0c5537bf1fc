"""Ranks that train nothing, for test_monitor and test_watchdog. At step 3 something happens to the victim."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dsmim.cluster.placement import detect
from dsmim.health.collectives import is_lost_peer, set_timeout
from dsmim.health.monitor import RankMonitor
from tests.conftest import patience

LIMIT = patience(2)  # seconds that ranks wait for one another
INTERVAL = patience(0.4)
ALONE = patience(1.5)  # seconds without progress after which a lone process ends


def rank_main(out: Path, env: dict[str, str], what: str, victim: int) -> None:
    """Be one rank, in a separate process. Its output goes to files in `out`."""
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{env['RANK']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    status = _train(what, victim)
    sys.stdout.flush()
    os._exit(status)


def _train(what: str, victim: int) -> int:
    place = detect(os.environ)
    dist.init_process_group("gloo")
    second = dist.new_group()  # as DeepSpeed makes them, with torch's default timeout
    dist.barrier(group=second)
    monitor = RankMonitor(place, LIMIT, interval=INTERVAL, grace=1 if what == "wait" else 60)
    set_timeout(LIMIT)
    for step in range(5):
        monitor.phase("waiting for data", step)
        if (step, place.rank) == (3, victim):
            _fail(what, monitor)
        monitor.phase("training", step)
        begun = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=second)
        except RuntimeError as error:
            print(f"{time.monotonic() - begun:.1f}", is_lost_peer(error), monitor.diagnose(), flush=True)
            monitor.close()
            return 70
        time.sleep(INTERVAL / 4)
    monitor.close()
    dist.destroy_process_group()
    return 0


def _fail(what: str, monitor: RankMonitor) -> None:
    time.sleep(2 * INTERVAL)  # so that the others have seen its phase
    if what in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
    elif what == "wait":
        signal.pause()
    elif what == "leave":
        monitor.close()
        os._exit(1)


def watched_main(out: Path, what: str) -> None:
    """Be a lone process whose main thread is stuck; or one that is stopped (SIGSTOP) for long and continues."""
    os.dup2(os.open(out / "err", os.O_WRONLY | os.O_CREAT), 2)
    monitor = RankMonitor(detect({}), limit_seconds=3600, interval=0.2, grace=0.2)
    monitor.phase("waiting for data", 7)
    monitor.limit = ALONE
    if what == "stuck":
        signal.pause()
    stopped = 0.0
    while stopped < ALONE:  # until it has been stopped
        stopped = _pass_phase(monitor)
    for _ in range(4):
        _pass_phase(monitor)
    os._exit(0)


def _pass_phase(monitor: RankMonitor) -> float:
    """Be in one phase for 0.4 seconds or as long as the process is stopped; return the seconds."""
    monitor.phase("training", 7)
    begun = time.monotonic()
    time.sleep(0.4)
    return time.monotonic() - begun
