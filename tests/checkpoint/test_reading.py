"""Finding checkpoints on disk, and what is wrong with damaged ones."""

import errno
import json
from pathlib import Path

import pytest

from dsmim.checkpoint import reading
from dsmim.checkpoint.reading import STATE_FORMAT, candidates, check_files, locate, name_of, read_state, set_aside
from dsmim.engine.digest import file_entry
from tests.conftest import run, tiny_recipe


def checkpoint(folder: Path, step: int, data: bytes = b"weights") -> Path:
    """A whole checkpoint of two files."""
    path = folder / "checkpoints" / name_of(step)
    path.mkdir(parents=True)
    (path / "weights.pt").write_bytes(data)
    (path / "state.json").write_text(json.dumps({"format": STATE_FORMAT, "step": step}))
    files = {file.name: file_entry(file) for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    return path


def test_the_newest_valid_checkpoint_is_located(tmp_path):
    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert candidates(tmp_path / "checkpoints") == [new, old]
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == locate(new) == new
    (new / "weights.pt").write_bytes(b"weightz")
    assert locate(tmp_path) == old
    with pytest.raises(ValueError, match=r"step_00000010: weights\.pt is damaged"):
        locate(new)
    (old / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds no valid checkpoint\n  step_00000010: .*\n  step_00000009: manifest\.json is"
    ):
        locate(tmp_path)


def test_what_is_no_folder_is_told(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    for name, said in (
        ("nope", "no such file or directory; give a run directory"),
        ("weights.safetensors", "is a file"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: {said}"):
            locate(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda file: file.unlink(), "weights.pt is missing"),
        (lambda file: file.write_bytes(b"weight"), "weights.pt has 6 bytes instead of 7"),
        (lambda file: file.write_bytes(b"Weights"), "weights.pt is damaged (its digest differs)"),
    ],
)
def test_each_kind_of_damage_is_named(tmp_path, damage, fault):
    path = checkpoint(tmp_path, 1)
    assert check_files(path) is None
    damage(path / "weights.pt")
    assert check_files(path) == fault
    shares = [check_files(path, rank, 2) for rank in range(2)]  # each file is checked by one rank
    assert sorted(shares, key=str) == [None, fault]


def test_newer_checkpoints_are_set_aside(tmp_path):
    kept, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    for _ in range(2):  # also when an older damaged one has the name already
        set_aside(tmp_path / "checkpoints", newer_than=2)
        assert candidates(tmp_path / "checkpoints") == [kept]
        assert newer.with_name("step_00000003.damaged").is_dir()
        checkpoint(tmp_path, 3)


def test_a_number_of_damaged_ones_is_kept(tmp_path):
    said = []
    for step in (7, 5, 6):  # the order in which they were set aside counts, not that of their steps
        checkpoint(tmp_path, step)
        said += set_aside(tmp_path / "checkpoints", newer_than=4)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000005.damaged", "step_00000006.damaged"]
    assert said[-2:] == [
        "step_00000006 is now step_00000006.damaged",
        "step_00000007.damaged is removed: the last 2 damaged checkpoints are kept",
    ]


FAILING = """
import errno, os, sys
from pathlib import Path

real = Path.open

def open_or_fail(path, *arguments, **options):
    if path.name == failing[0] and failing[1]:
        failing[1] -= 1
        raise OSError(failing[2], os.strerror(failing[2]), str(path))
    return real(path, *arguments, **options)

Path.open = open_or_fail
"""


def fail(monkeypatch, name: str, times: int, error: int) -> list:
    """Let a file fail to open so many times, as on a network whose file server restarts."""
    monkeypatch.setattr(reading, "_WAITS", (0, 0, 0))
    monkeypatch.setattr(Path, "open", Path.open)  # restored at the end
    values = {"failing": [name, times, error]}
    exec(FAILING, values)
    return values["failing"]


@pytest.mark.parametrize("name", ["weights.pt", "manifest.json"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_file_that_can_be_read_a_little_later_is_not_damaged(tmp_path, monkeypatch, name, error):
    path = checkpoint(tmp_path, 5)
    failing = fail(monkeypatch, name, 3, error)
    assert check_files(path) is None and failing[1] == 0
    failing[1] = 4
    with pytest.raises(ValueError, match=f"{name} cannot be read .*tried 4 times.*nothing was changed"):
        locate(tmp_path)
    assert locate(tmp_path) == path


START = """
from dsmim.checkpoint import reading
from dsmim.train import fit
from dsmim.recipe.reading import load_recipe

reading._WAITS, failing = (0,), ["weights.pt", 99, errno.EIO]
fit(load_recipe(sys.argv[1]), sys.argv[2])
"""


def test_a_start_that_cannot_read_a_checkpoint_renames_nothing(tmp_path, shards):
    old, new = checkpoint(tmp_path, 5), checkpoint(tmp_path, 6)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny_recipe(shards)))  # JSON is YAML
    done = run(
        "python", "-c", "failing = ['', 0, 0]" + FAILING + START, tmp_path / "recipe.yaml", tmp_path, check=False
    )
    assert "step_00000006: weights.pt cannot be read (Input/output error; tried 2 times" in done.stderr
    assert candidates(tmp_path / "checkpoints") == [new, old] and not (tmp_path / "lock").exists()


def test_the_state_of_another_format_is_refused(tmp_path):
    path = checkpoint(tmp_path, 4)
    assert read_state(path)["step"] == 4
    (path / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="written in format 99, this dsmim reads 1"):
        read_state(path)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint of dsmim"):
        read_state(path)
