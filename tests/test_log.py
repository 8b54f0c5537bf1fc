"""metrics.jsonl of a run that was interrupted."""

import json

import pytest

from dsmim.log import Log


@pytest.mark.parametrize("validation_due", [False, True])
def test_lines_after_the_checkpoint_are_removed(tmp_path, validation_due):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}, {"step": 2, "val_loss": 0.8, "val_samples": 3}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 0.7}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 2, "los')  # cut short by the kill
    log = Log(tmp_path, True, 2, 4, False, validation_due)
    log.validation(2, {"loss": 0.8, "samples": 3})
    log.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == (lines if validation_due else [*lines, lines[-1]])
