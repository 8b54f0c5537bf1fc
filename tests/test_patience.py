"""The deadlines of conftest's runners."""

import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.conftest import PATIENCE, patience, run


def test_the_factor_multiplies(monkeypatch):
    monkeypatch.delenv(PATIENCE, raising=False)
    assert patience(3) == 3
    monkeypatch.setenv(PATIENCE, "2.5")
    assert patience(3) == 7.5


@pytest.mark.parametrize("text", ["", "many", "0.5", "-2", "nan", "inf"])
def test_a_wrong_factor_is_an_error(monkeypatch, text):
    monkeypatch.setenv(PATIENCE, text)
    with pytest.raises(pytest.UsageError, match=f"{PATIENCE}='{text}': give a number of at least 1"):
        patience(3)


def test_output_is_progress(monkeypatch):
    """A command that takes five times its deadline in all, and prints on the way."""
    monkeypatch.delenv(PATIENCE, raising=False)
    code = "import time\nfor i in range(10): print(i, flush=True); time.sleep(1)"
    begun = time.monotonic()
    assert run(sys.executable, "-c", code, silence=2).stdout.split() == [str(i) for i in range(10)]
    assert time.monotonic() - begun > 10


def test_a_silent_command_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.delenv(PATIENCE, raising=False)
    script = f"echo before; sleep 60 & echo $! >{tmp_path}/child; wait"
    with pytest.raises(pytest.fail.Exception, match="printed nothing for 1 s and was killed; before:\nbefore"):
        run("bash", "-c", script, silence=1)
    assert_killed(int((tmp_path / "child").read_text()))


def test_a_command_that_has_ended_is_not_outlived_by_its_children(monkeypatch, tmp_path):
    """The child has the command's pipe, so its output has no end."""
    monkeypatch.delenv(PATIENCE, raising=False)
    with pytest.raises(pytest.fail.Exception, match="printed nothing for 1 s and was killed; before:\nbefore"):
        run("bash", "-c", f"echo before; sleep 60 & echo $! >{tmp_path}/child", silence=1)
    assert_killed(int((tmp_path / "child").read_text()))


def test_output_that_is_not_utf_8():
    done = run("bash", "-c", r"printf 'a\xffb'; printf '\xfe' >&2")
    assert (done.stdout, done.stderr) == ("a\ufffdb", "\ufffd")


def assert_killed(number: int) -> None:
    """The kernel may need a moment to end a killed process, and its new parent one to collect it."""
    deadline = time.monotonic() + patience(5)
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {number} lives"
            time.sleep(0.05)
