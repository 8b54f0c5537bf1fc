"""A child that the fork itself has lost is forked again."""

from tests.conftest import run

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

forking.PATIENCE = 2.0
loader = DataLoader(range(40, 46), batch_size=None, num_workers=2, multiprocessing_context=forking.ForkContext())
print(list(loader), forks)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child left")
"""


def test_lost_children_are_replaced_and_batches_come_in_order():
    done = run("python", "-c", LOADER, 3)
    assert done.stdout == "[40, 41, 42, 43, 44, 45] 5\nno child left\n"  # of 2 workers, one forked four times
    assert done.stderr.count("did not start; forked again") == 3


def test_a_machine_on_which_no_child_starts_is_an_error():
    done = run("python", "-c", LOADER, 99, check=False)
    assert done.returncode == 1 and "OSError: no data worker came to life in 5 forks" in done.stderr


def test_nothing_is_said_when_nothing_is_wrong():
    done = run("python", "-c", LOADER, 0)
    assert done.stdout.startswith("[40, 41, 42, 43, 44, 45] 2\n") and not done.stderr
