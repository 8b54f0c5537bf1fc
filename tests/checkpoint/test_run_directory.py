"""What a resume compares besides the recipe."""

import pytest

from dsmim.checkpoint.run_directory import changes_of
from dsmim.recipe.reading import parse_recipe
from tests.conftest import tiny_recipe

IDENTITY = {"data_fingerprint": "f", "decoder": "d"}


@pytest.mark.parametrize(("repeats", "noticed"), [(1, 0), (3, 1)])
def test_a_run_whose_repeats_came_in_a_row_is_noticed(tmp_path, repeats, noticed):
    recipe = parse_recipe(tiny_recipe(tmp_path, data={"repeats": repeats}), "recipe")
    now = IDENTITY | ({"repeats_order": "apart"} if repeats > 1 else {})
    older = IDENTITY | {"recipe": recipe.model_dump(mode="json")}
    found = changes_of(older, recipe, now)
    assert len(found) == noticed
    assert not noticed or found[0].startswith(
        "data.repeats: the repeats of a sample came in a row when the run was started"
    )
    assert changes_of(older | now, recipe, now) == []


@pytest.mark.parametrize(("name", "given", "noticed"), [("timm:vit_tiny_patch16_224", {}, 0),
                                                        ("timm:vit_tiny_patch16_224", {"model_no_decay": True}, 1),
                                                        ("deit3_nano_patch16", {}, 0)])  # fmt: skip
def test_an_older_run_of_a_timm_network_keeps_its_weight_decay(tmp_path, name, given, noticed):
    changes = {"task": {"name": "classify", "num_classes": 3}, "model": {"name": name, "img_size": 32}}
    recipe = parse_recipe(tiny_recipe(tmp_path, optim={"lr": 1e-3} | given, **changes), "recipe")
    stored = recipe.model_dump(mode="json")
    del stored["optim"]["model_no_decay"]
    found = changes_of(IDENTITY | {"recipe": stored}, recipe, IDENTITY)
    assert found == ["optim.model_no_decay: False → True"] * noticed
