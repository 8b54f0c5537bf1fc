"""Ranks that train nothing, for test_heartbeat: the victim suffers something at step 3, the others tell what of."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dsmim.cluster.placement import detect
from dsmim.health.heartbeat import Heartbeat, is_lost_peer, set_timeout

LIMIT = 2.0  # seconds
INTERVAL = 0.4


def rank_main(out: Path, env: dict[str, str], what: str, victim: int) -> None:
    """One rank, in a process of its own: its output goes to files in `out`, its exit status is the process's."""
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
    beat = Heartbeat(place, LIMIT, interval=INTERVAL, grace=1 if what == "wait" else 60)
    set_timeout(LIMIT)
    for step in range(5):
        beat.phase("waiting for data", step)
        if (step, place.rank) == (3, victim):
            _suffer(what, beat)
        beat.phase("training", step)
        begun = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=second)
        except RuntimeError as error:
            print(f"{time.monotonic() - begun:.1f}", is_lost_peer(error), beat.diagnose(error), flush=True)
            beat.close()
            return 70
        time.sleep(INTERVAL / 4)
    beat.close()
    dist.destroy_process_group()
    return 0


def _suffer(what: str, beat: Heartbeat) -> None:
    time.sleep(2 * INTERVAL)  # so that the others know where it is
    if what in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
    elif what == "wait":
        time.sleep(60)
    elif what == "leave":
        beat.close()
        os._exit(1)


def watched_main(out: Path, what: str) -> None:
    """A lone process whose main thread is stuck; or one that is stopped for long and goes on."""
    os.dup2(os.open(out / "err", os.O_WRONLY | os.O_CREAT), 2)
    beat = Heartbeat(detect({}), limit_seconds=3600, interval=0.2, grace=0.2)
    beat.phase("waiting for data", 7)
    beat.limit = 1.5
    if what == "stuck":
        time.sleep(60)
    for _ in range(4):
        beat.phase("training", 7)
        time.sleep(0.4)
    os._exit(0)
