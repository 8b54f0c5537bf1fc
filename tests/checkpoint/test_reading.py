"""Finding checkpoints on disk, and what is wrong with damaged ones."""

import json
from pathlib import Path

import pytest

from dsmim.checkpoint.reading import STATE_FORMAT, candidates, check_files, locate, name_of, read_state, set_aside
from dsmim.engine.digest import file_entry


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
    with pytest.raises(ValueError, match=r"holds no valid checkpoint\n  step_00000010: .*\n  step_00000009: cannot be"):
        locate(tmp_path)


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


def test_the_state_of_another_format_is_refused(tmp_path):
    path = checkpoint(tmp_path, 4)
    assert read_state(path)["step"] == 4
    (path / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="written in format 99, this dsmim reads 1"):
        read_state(path)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint of dsmim"):
        read_state(path)
