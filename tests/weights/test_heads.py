"""What happens to the classification head of foreign weights is the user's choice."""

import math

import pytest
import torch
from timm.data import ImageNetInfo

from dsmim.weights.match import match
from tests.weights.weight_files import (
    in_memory,
    nano,
    nano_simmim,
    timm_swin,
)


def features_and_head(classes, head):
    """Return (file, model) with the same network; the model has another number of classes."""
    state = timm_swin(num_classes=0).state_dict() | {"head.fc.weight": head[:, None] + torch.arange(256.0)}
    return in_memory(state | {"head.fc.bias": head.clone()}), nano(num_classes=classes)


def test_the_head_is_a_choice(tmp_path):
    weights, model = features_and_head(3, torch.arange(5.0))
    with pytest.raises(ValueError, match=r"head of 5 classes, the model one of 3; say.*model\.weights_head=keep, drop"):
        match(model, weights)
    with pytest.raises(ValueError, match="use drop for a fresh head"):
        match(model, weights, "keep")
    report, state = match(model, weights, "drop")
    assert report.fresh == ["head.fc.bias", "head.fc.weight"] and "head.fc.weight" not in state
    assert report.dropped["head.fc.bias"] == "model.weights_head=drop"
    (tmp_path / "map.txt").write_text("4\n0\n2\n")
    report, state = match(model, weights, str(tmp_path / "map.txt"))
    assert state["head.fc.bias"].tolist() == [4, 0, 2] and state["head.fc.weight"][:, 0].tolist() == [4, 0, 2]
    assert "3 of 5 rows picked" in report.changed["head.fc.weight"] and report.fresh == []
    for text, message in [
        ("4\n0\n", "2 row numbers"),
        ("4\n0\n5\n", "'5' is not a row"),
        ("4\n-1\n0\n", "'-1' is not a row"),
    ]:
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            match(model, weights, str(tmp_path / "map.txt"))
    with pytest.raises(ValueError, match="must be one of keep, drop, imagenet22k"):
        match(model, weights, "kepp")


def test_no_choice_is_needed_where_there_is_no_head():
    weights, model = features_and_head(3, torch.arange(5.0))
    report, _ = match(nano(num_classes=0), weights)
    assert report.dropped == dict.fromkeys(("head.fc.weight", "head.fc.bias"), "the model has no head")
    report, _ = match(nano_simmim(), weights)
    assert report.fresh == ["decoder.0.bias", "decoder.0.weight", "mask_token"]
    headless = in_memory({k: v for k, v in weights.tensors.items() if "head" not in k})
    assert match(model, headless)[0].fresh == ["head.fc.bias", "head.fc.weight"]
    with pytest.raises(ValueError, match="test has no head"):
        match(model, headless, "keep")
    with pytest.raises(ValueError, match="the model has no head"):
        match(nano_simmim(), weights, "imagenet22k")


@pytest.mark.parametrize(("choice", "rows", "found"), [("imagenet22k", 21841, 999), ("imagenet22k-ms", 21842, 1000)])
def test_rows_of_imagenet_1k_in_a_head_of_imagenet_22k(choice, rows, found):
    weights, model = features_and_head(1000, torch.arange(float(rows)))
    report, state = match(model, weights, choice)
    theirs = ImageNetInfo(choice.replace("imagenet22k", "imagenet-22k")).label_names()
    ours, bias = ImageNetInfo("imagenet-1k").label_names(), state["head.fc.bias"]
    same = [theirs[int(row)] == synset for row, synset in zip(bias, ours, strict=True)]
    assert sum(same) == found and torch.equal(state["head.fc.weight"][:, 0], bias)
    assert f"{found} of {rows} rows picked" in str(report)
    if found == 999:  # ImageNet-22K has no teddy bear
        assert ours[same.index(False)] == "n04399382" and "n04399382" in str(report)
        others = torch.cat([bias[: same.index(False)], bias[same.index(False) + 1 :]])
        assert math.isclose(bias[same.index(False)].item(), others.mean().item(), rel_tol=1e-5)
    with pytest.raises(ValueError, match=f"needs a head of {rows} classes, test has one of 30"):
        match(model, features_and_head(1000, torch.arange(30.0))[0], choice)
    with pytest.raises(ValueError, match="the model has 7"):
        match(nano(num_classes=7), weights, choice)
