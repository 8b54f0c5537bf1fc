"""Every row of ENDINGS: what a command prints, its exit status, and how its process ends.

main runs in its own process, with a stand-in for what the command would call, which raises. Three lines of standard
output show how the process ended: "finalized" by MPI's Finalize, "waited" by before_exit, "interpreter" by the
interpreter's shutdown, which os._exit skips.
"""

import subprocess
import sys
from types import NoneType

import pytest
import yaml

from dsmim.cli.ending import ENDINGS
from dsmim.health.outcome import LostPeer, NoProgress
from tests.conftest import environment, patience, tiny_recipe

PROGRAM = """
import atexit, sys
from types import SimpleNamespace
from dsmim.cli.main import main
from dsmim.health.outcome import FAILED, LOST, LostPeer, NoProgress, Stopped
from dsmim.recipe.errors import RecipeError

result, *words = sys.argv[1:]

def body(*_):
    value = eval(result)
    if isinstance(value, BaseException):
        raise value
    return value

def show(text):
    return lambda: print(text, flush=True)

atexit.register(show("interpreter"))
sys.modules["mpi4py.MPI"] = SimpleNamespace(Finalize=show("finalized"))
sys.modules["dsmim.train"] = SimpleNamespace(fit=body)
sys.modules["dsmim.evaluate"] = SimpleNamespace(evaluate=body)
sys.modules["dsmim.samples"] = SimpleNamespace(sample_keys=body)
sys.exit(main(words))
"""

TRAIN, EVALUATE, SAMPLES = ["train", "r.yaml"], ["evaluate", "run"], ["samples", "r.yaml", "--steps", "0:1"]
FINALIZED, AT_ONCE, RETURNED = ["finalized"], [], ["interpreter"]
ONE, SILENT = "dsmim: error: told\n", ""
RECIPE = "dsmim: error: recipe r: 1 problem:\n  told\n"
LOST = 'LostPeer("told", LOST, show("waited"))'

CASES = [
    # cause, what the command's work gives, words, rank, standard error, status, how the process ended
    (NoneType, "True", TRAIN, "0", SILENT, 0, FINALIZED),
    (NoneType, "False", TRAIN, "0", SILENT, 75, FINALIZED),
    (NoneType, "{}", EVALUATE, "1", SILENT, 0, FINALIZED),
    (NoneType, "[]", SAMPLES, "0", SILENT, 0, RETURNED),
    (BrokenPipeError, "BrokenPipeError()", TRAIN, "0", SILENT, 1, AT_ONCE),
    (BrokenPipeError, "BrokenPipeError()", EVALUATE, "0", SILENT, 1, AT_ONCE),
    (BrokenPipeError, "BrokenPipeError()", SAMPLES, "0", SILENT, 0, []),  # its output is closed
    (KeyboardInterrupt, "KeyboardInterrupt()", TRAIN, "0", SILENT, 130, FINALIZED),
    (KeyboardInterrupt, "KeyboardInterrupt()", SAMPLES, "0", SILENT, 130, RETURNED),
    (ValueError, 'ValueError("told")', TRAIN, "0", ONE, 1, AT_ONCE),
    (ValueError, 'ValueError("told")', TRAIN, "1", ONE, 1, AT_ONCE),
    (ValueError, 'ValueError("told")', SAMPLES, "0", ONE, 1, RETURNED),
    (ValueError, 'Stopped("told")', TRAIN, "0", ONE, 1, AT_ONCE),
    (ValueError, 'Stopped("told")', TRAIN, "1", SILENT, 1, AT_ONCE),
    (NoProgress, 'NoProgress("told")', TRAIN, "0", ONE, 76, FINALIZED),
    (NoProgress, 'NoProgress("told")', TRAIN, "1", SILENT, 76, FINALIZED),
    (ValueError, 'RecipeError("r", ["told"])', TRAIN, "0", RECIPE, 1, AT_ONCE),
    (ValueError, 'RecipeError("r", ["told"])', TRAIN, "1", SILENT, 1, AT_ONCE),
    (ValueError, 'RecipeError("r", ["told"])', SAMPLES, "0", RECIPE, 1, RETURNED),
    (OSError, 'OSError("told")', EVALUATE, "1", ONE, 1, AT_ONCE),
    (OSError, 'OSError("told")', SAMPLES, "0", ONE, 1, RETURNED),
    (LostPeer, LOST, TRAIN, "1", ONE, 70, ["waited"]),
    (LostPeer, LOST.replace("LOST,", "FAILED,"), EVALUATE, "0", ONE, 1, ["waited"]),
    (Exception, "1 / 0", TRAIN, "1", "Traceback", 1, AT_ONCE),
    (Exception, "1 / 0", EVALUATE, "0", "Traceback", 1, AT_ONCE),
    (Exception, "1 / 0", SAMPLES, "0", "Traceback", 1, RETURNED),
]


def run_main(folder, words, rank="0", redirection=""):
    """Run PROGRAM by a shell, which may close its output: `>&-`."""
    (folder / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(folder)))
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment(RANK=rank), timeout=patience(60),
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "words", "rank", "error", "status", "ended"),
    [case[1:] for case in CASES],
    ids=[f"{case[2][0]}-{case[1]}-rank{case[3]}" for case in CASES],
)
def test_every_ending(tmp_path, result, words, rank, error, status, ended):
    done = run_main(tmp_path, [result, *words], rank)
    assert (done.returncode, done.stdout.split()) == (status, ["{}"] * (result == "{}" and rank == "0") + ended)
    if error == "Traceback":
        assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    else:
        assert done.stderr == error


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_changes_no_status_and_adds_no_error(tmp_path, redirection):
    for result, words, status in (("True", TRAIN, 0), ("False", TRAIN, 75), ("BrokenPipeError()", SAMPLES, 0),
                                  ("BrokenPipeError()", TRAIN, 1)):  # fmt: skip
        done = run_main(tmp_path, [result, *words], redirection=redirection)
        assert (done.returncode, done.stderr) == (status, ""), result
    done = run_main(tmp_path, ['ValueError("told")', *TRAIN], redirection=redirection)
    assert (done.returncode, done.stderr) == (1, ONE if redirection == ">&-" else "")


def test_every_row_has_a_case_for_both_kinds_of_commands():
    for row in ENDINGS:
        commands = {case[2][0] for case in CASES if case[0] is row.cause}
        assert commands & {"train", "evaluate"}, row
        assert "samples" in commands or row.cause in (LostPeer, NoProgress), row  # only ranks have peers and steps
