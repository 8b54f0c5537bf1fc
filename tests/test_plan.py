"""When a run saves."""

from types import SimpleNamespace

import pytest

from dsmim.plan import plan
from dsmim.recipe.reading import parse_recipe
from tests.conftest import tiny_recipe

ANY_TASK = SimpleNamespace(check_micro_batch=lambda size: None)


@pytest.mark.parametrize(
    ("keep_every", "kept"), [(None, []), ({"epochs": 2}, [14, 28]), ({"steps": 5}, [5, 10, 15, 20, 25, 30])]
)
def test_what_is_to_be_kept_is_saved(tmp_path, keep_every, kept):
    """An epoch of 53 samples has 6.6 steps, and counts as 7; two have 13.25, and count as 14."""
    tree = tiny_recipe(tmp_path, schedule={"duration": {"steps": 33}})
    tree["checkpoint"] = {"every": {"steps": 4}, "keep_every": keep_every}
    found = plan(parse_recipe(tree, "t"), ANY_TASK, 53, 1, None)
    saved = [step for step in range(1, 34) if found.saving(step)]
    assert saved == sorted({4, 8, 12, 16, 20, 24, 28, 32, 33, *kept})
    assert [step for step in saved if found.keep_every and step % found.keep_every == 0] == kept
