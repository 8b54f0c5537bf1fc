"""A forked child that never starts is forked again; workers end with the process that started them."""

import os
import subprocess
import sys

from tests.conftest import environment, run
from tests.shards.servers import wait_for

LOADER = """
import os, signal, sys

forks, lost = 0, int(sys.argv[1])

def count():
    global forks
    forks += 1

def hang():  # where CPython's own deadlock is: in os.fork, before it returns to the child
    if forks <= lost:
        os.kill(os.getpid(), signal.SIGSTOP)

os.register_at_fork(before=count, after_in_child=hang)

from torch.utils.data import DataLoader
from dsmim.shards import forking

forking.PATIENCE = float(sys.argv[2])
loader = DataLoader(range(40, 46), batch_size=None, num_workers=2, multiprocessing_context=forking.ForkContext())
print(list(loader), forks)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child left")
"""


def test_lost_children_are_replaced_and_batches_come_in_order():
    done = run("python", "-c", LOADER, 3, 5)  # 5 s: on a busy machine every other child reports in that time
    assert done.stdout == "[40, 41, 42, 43, 44, 45] 5\nno child left\n"  # of 2 workers, one forked four times
    assert done.stderr.count("did not start; forked again") == 3


def test_a_machine_on_which_no_child_starts_is_an_error():
    done = run("python", "-c", LOADER, 99, 1, check=False)
    assert done.returncode == 1 and "OSError: no data worker started in 5 forks" in done.stderr


def test_nothing_is_printed_when_every_child_starts():
    done = run("python", "-c", LOADER, 0, 60)
    assert done.stdout.startswith("[40, 41, 42, 43, 44, 45] 2\n") and not done.stderr


POOL = """
import sys, time
from pathlib import Path
from dsmim.shards.parallel import parallel

def work(path):
    Path(path).touch()
    time.sleep(600)

if __name__ == "__main__":
    parallel(work, [f"{sys.argv[1]}/{number}" for number in range(4)], 2, "sleep")
"""


def test_workers_of_a_killed_command_end_with_it(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    (tmp_path / "begun").mkdir()
    words = [sys.executable, str(tmp_path / "pool.py"), str(tmp_path / "begun")]
    process = subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list((tmp_path / "begun").iterdir())) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(process.pid))


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


LEFT = """
import signal, time
from dsmim.shards.forking import ForkContext

def work():
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("ready", flush=True)
    while True:
        time.sleep(60)

process = ForkContext().Process(target=work, daemon=True)
process.start()
time.sleep(1)
"""


def test_a_program_ends_although_a_worker_ignores_sigterm():
    assert run("python", "-c", LEFT).stdout == "ready\n"
