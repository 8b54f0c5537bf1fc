"""What the text of an override means, and that no file allows commands."""

import json

import pytest
import yaml

from dsmim.recipe.errors import RecipeError
from dsmim.recipe.override_values import read_value
from dsmim.recipe.reading import load_recipe
from tests.conftest import dsmim, image_bytes, tiny_recipe, write_tar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[a-{0..3}.tar,b-{x,y}.tar]", ["a-{0..3}.tar", "b-{x,y}.tar"]),
        ("[a-{0..3}.tar, b.tar]", ["a-{0..3}.tar", "b.tar"]),
        ('["one,two.tar", b.tar]', ["one,two.tar", "b.tar"]),
        ("one,two.tar", "one,two.tar"),
        ("{x,y}/t-*.tar", "{x,y}/t-*.tar"),
        ("set #1/t.tar", "set #1/t.tar"),
        ("my data [v2]/t-*.tar", "my data [v2]/t-*.tar"),
        ("2024", "2024"),
        ("[2024, b]", ["2024", "b"]),
        ("*.tar", "*.tar"),
        ("'*.tar'", "*.tar"),
        ("~/t.tar", "~/t.tar"),
        (
            "pipe:curl -H 'Authorization: Bearer x' http://h/{0..2}",
            "pipe:curl -H 'Authorization: Bearer x' http://h/{0..2}",
        ),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_paths_are_taken_as_they_are(text, value):
    assert read_value("data.train", text) == value


def test_other_values_are_yaml():
    assert read_value("batch.global_batch", "64") == 64
    assert read_value("schedule.duration", "{steps: 3}") == {"steps": 3}


def test_no_file_allows_commands(tmp_path):
    tree = tiny_recipe(tmp_path)
    tree["data"]["allow_pipe"] = True
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    for overrides in ([], ["data.allow_pipe=true"]):
        with pytest.raises(RecipeError, match=r"a file cannot allow commands.*data\.allow_pipe=true on"):
            load_recipe(str(tmp_path / "r.yaml"), overrides)
    tree["data"]["allow_pipe"] = False
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    allowed = load_recipe(str(tmp_path / "r.yaml"), ["data.allow_pipe=true"])
    assert allowed.data.allow_pipe and yaml.safe_load(allowed.to_yaml())["data"]["allow_pipe"] is False


def test_a_resume_and_an_evaluation_need_the_permission_again(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"s{n}.png", image_bytes(n)) for n in range(8)])
    pipe = f"pipe:cat {tmp_path}/t.tar"
    dsmim("shards", "index", pipe, "--index-dir", tmp_path / "i", "--allow-pipe")
    tree = tiny_recipe(tmp_path)
    tree["data"] |= {"train": pipe, "val": pipe, "index_dir": str(tmp_path / "i"), "cache_dir": str(tmp_path / "c")}
    tree["schedule"]["duration"] = {"steps": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    words = ["train", tmp_path / "r.yaml", "--run-dir", tmp_path / "run"]
    refused = dsmim(*words, check=False)
    assert refused.returncode == 1 and "allow it with data.allow_pipe=true on the command line" in refused.stderr
    dsmim(*words, "data.allow_pipe=true")
    for again in (words, ["evaluate", tmp_path / "run"], ["train", tmp_path / "run/recipe.yaml", *words[2:]]):
        refused = dsmim(*again, check=False)
        assert refused.returncode == 1 and "allow it with data.allow_pipe=true" in refused.stderr, again
    measured = dsmim("evaluate", tmp_path / "run", "data.allow_pipe=true")
    assert json.loads(measured.stdout)["samples"] == 8
