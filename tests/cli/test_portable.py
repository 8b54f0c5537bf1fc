"""Commands on systems and terminals that lack what Linux with UTF-8 has."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment, patience

LINUX_ALONE = """
import os, select, signal, sys
import psutil

missing_on_macos = {
    os: ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "pidfd_open", "memfd_create",
         "eventfd", "splice", "copy_file_range", "getrandom", "pipe2", "O_DIRECT", "O_TMPFILE", "O_PATH",
         "getresuid", "setresuid", "setns", "unshare", "sched_setscheduler", "RWF_NOWAIT"),
    signal: ("pidfd_send_signal", "SIGPWR", "SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"),
    select: ("epoll",),
    psutil: ("RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "sensors_temperatures"),
    psutil.Process: ("rlimit", "cpu_affinity", "ionice", "cpu_num", "io_counters"),
}
removed = [(place, name) for place, names in missing_on_macos.items() for name in names if hasattr(place, name)]
for place, name in removed:
    delattr(place, name)
assert sys.platform != "linux" or len(removed) > 20, removed
"""
COMMANDS = (
    LINUX_ALONE
    + """
from dsmim.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
)
MODULES = (
    LINUX_ALONE
    + """
import pkgutil, importlib
import dsmim

names = [found.name for found in pkgutil.walk_packages(dsmim.__path__, "dsmim.") if not found.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)

from dsmim.cluster.placement import detect
from dsmim.engine.runtime import start, stop
from dsmim.health.host import HostMonitor, merge

warnings = []
monitor = HostMonitor(detect({}), warnings.append, low_memory=1.0)
monitor.warn_if_low()
assert "open files" not in str(warnings) and len(warnings) == 1, warnings
assert 0 < merge([monitor.sample()])["host_memory_left"] <= 1
os.environ.pop("OMP_NUM_THREADS", None)
runtime = start()
stop()
print(len(names), "modules")
"""
)


def run_python(program: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, cwd=ROOT, env=environment(**env),
        timeout=patience(120), check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [("--version",), ("recipes",), ("shards", "build", "--help")])
def test_commands_without_what_linux_alone_has(words):
    done = run_python(COMMANDS, *words)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_all_modules_and_the_figures_of_the_host_without_what_linux_alone_has():
    done = run_python(MODULES)
    assert done.returncode == 0 and int(done.stdout.split()[-2]) > 90, (done.stdout, done.stderr.decode())


def subcommands() -> list[tuple[str, ...]]:
    shards = [("shards", name) for name in ("build", "index", "verify", "subset")]
    return [(), ("shards",), *shards, *((name,) for name in ("samples", "train", "evaluate", "knn", "submit", "export",
                                                             "recipes"))]  # fmt: skip


HELP = r"""
import sys
from dsmim.cli.main import main

for words in eval(sys.argv[1]):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, words
print("arrow \u2192 times \u00d7 key \udce9")
sys.exit(main(["recipes", "demo_finetune", "no=\u2192"]))
"""


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"arrow \\u2192 times \\xd7 key \xe9\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"arrow \\u2192 times \xd7 key \xe9\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"arrow \\u2192 times \\xd7 key \xe9\n"),
        ({"LC_ALL": "C.UTF-8"}, "arrow \u2192 times \xd7 key ".encode() + b"\xe9\n"),
    ],
    ids=["ascii", "latin-1", "C locale", "utf-8"],
)
def test_every_help_and_message_can_be_printed_in_any_encoding(env, shown):
    done = run_python(HELP, repr(subcommands()), **env)
    assert done.stdout.endswith(shown), (done.stdout[-300:], done.stderr)
    assert done.returncode == 1 and b"no: unknown key" in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.count(b"usage: dsmim") == len(subcommands())
