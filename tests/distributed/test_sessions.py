"""Ranks that train several times in the same processes, under a launcher."""

import json

import pytest
import torch.distributed as dist

from dsmim.engine.runtime import start
from tests.conftest import tiny_recipe, two_ranks
from tests.distributed.runs import metrics

SESSIONS = """
import json, sys
from pathlib import Path
from dsmim.evaluate import evaluate
from dsmim.recipe.reading import parse_recipe
from dsmim.train import fit

folder, recipe = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
for name, seed in [("first", 0), ("second", 0), ("third", 1)]:
    assert fit(parse_recipe(recipe | {"seed": seed}, "tiny"), folder / name)
    evaluate(folder / name, [])
try:
    fit(parse_recipe(recipe | {"seed": 2}, "tiny"), str(folder / "first"))
    raise SystemExit("another recipe was accepted")
except ValueError as error:
    assert "seed" in str(error), error
assert fit(parse_recipe(recipe, "tiny"), folder / "fourth")
"""


def test_ranks_of_one_launch_train_again(tmp_path, shards):
    """torchrun's store outlives the process group: the next group must not read what the last one left there."""
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(shards)))
    (tmp_path / "sessions.py").write_text(SESSIONS)
    two_ranks(tmp_path / "sessions.py", tmp_path, tmp_path / "recipe.json")
    runs = {name: metrics(tmp_path / name) for name in ("first", "second", "third", "fourth")}
    assert runs["first"] == runs["second"] == runs["fourth"] != runs["third"]
    assert [len(lines) for lines in runs.values()] == [8] * 4  # 6 steps, 2 validations


def test_a_process_group_of_the_user_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="already"):
            start()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
