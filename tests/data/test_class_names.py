"""Where the names of classes are looked for."""

import json

import pytest

from dsmim.data.class_names import class_names
from dsmim.recipe import Data


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """The same list in two folders; no shards."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classes.json").write_text('["cat", "dog"]')
    return tmp_path


@pytest.mark.parametrize("train", ["a/t-*.tar", "{a,b}/t-{000..003}.tar", "*/t-0.tar", "a", ["b/x.tar", "a/y.tar"]])
def test_beside_the_training_shards(lists, train):
    assert class_names(Data(train=train), 2) == ["cat", "dog"]


def test_beside_the_validation_shards_if_training_has_none(lists):
    data = Data(train="http://host/t.tar", val="b/v.tar")
    assert class_names(data, 2) == ["cat", "dog"]
    assert class_names(Data(train="none/t.tar"), 2) == class_names(Data(), 2) == []


def test_a_list_that_is_given_counts_alone(lists):
    (given := lists / "other.json").write_text(json.dumps({"ant": 1, "bee": 0, "fly": 2}))
    assert class_names(Data(train="a/t.tar"), 3, given) == ["bee", "ant", "fly"]
    with pytest.raises(ValueError, match=r"other\.json: lists 3 classes, the model has 2; give the list"):
        class_names(Data(train="a/t.tar"), 2, given)


def test_two_different_lists(lists):
    (lists / "b/classes.json").write_text('["dog", "cat"]')
    with pytest.raises(ValueError, match=r"b/classes\.json and a/classes\.json list other classes; give one of them"):
        class_names(Data(train=["a/t.tar", "b/t.tar"]), 2)


def test_of_the_classes_in_use(lists):
    (lists / "a/classes.json").write_text('["ant", "bee", "cat", "dog"]')
    assert class_names(Data(train="a/t.tar", classes=["dog", 1]), 2) == ["dog", "bee"]
    (lists / "used.txt").write_text("cat\nant\nbee\n")
    assert class_names(Data(train="a/t.tar", classes="used.txt"), 3) == ["cat", "ant", "bee"]
