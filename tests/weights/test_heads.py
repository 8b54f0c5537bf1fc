"""What happens to the classification head of foreign weights is the user's choice."""

import math

import pytest
import torch
from timm.data import ImageNetInfo

from dsmim.models import create_model
from dsmim.weights import heads
from dsmim.weights.match import match
from tests.weights.weight_files import (
    in_memory,
    nano,
    nano_deit,
    nano_simmim,
    swin_as_published,
    timm_deit,
    timm_swin,
    timm_vit,
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
        match(nano_simmim(), weights, "imagenet22k-goog")


# Lines of data/map22kto1k.txt in microsoft/Swin-Transformer: class of ImageNet-1K → row
MAP = {
    0: 359,
    100: 1577,
    500: 5676,
    717: 9204,
    718: 9212,
    719: 9221,
    800: 10487,
    849: 11137,
    851: 11168,
    900: 11771,
    999: 21817,
}


def listed(name):
    return ImageNetInfo(name).label_names()


def rows_of(choice, rows):
    """Return, for each class of ImageNet-1K, the row that its head came from, and the report."""
    weights, model = features_and_head(1000, torch.arange(float(rows)))
    report, state = match(model, weights, choice)
    assert torch.equal(state["head.fc.weight"][:, 0], state["head.fc.bias"]) and report.fresh == []
    return state["head.fc.bias"].tolist(), str(report)


ORDERS = [
    ("imagenet22k-fall2011", 21841, "imagenet-22k"),
    ("imagenet22k-goog", 21841, "imagenet-21k-goog"),
    ("imagenet22k-goog", 21843, "imagenet-21k-goog"),
    ("imagenet22k-ms", 21842, "imagenet-22k-ms"),
]


@pytest.mark.parametrize(("choice", "rows", "order"), ORDERS)
def test_every_class_of_imagenet_1k_gets_its_row_by_timms_lists(choice, rows, order):
    picked, report = rows_of(choice, rows)
    theirs, ours = listed(order), listed("imagenet-1k")
    wrong = [k for k in range(1000) if ours[k] != "n04399382" and theirs[int(picked[k])] != ours[k]]
    assert wrong == [] and (ours[850] == "n04399382") and ("n04399382" in theirs) == (choice == "imagenet22k-ms")
    if choice == "imagenet22k-ms":
        assert picked == list(range(1000)) and "1000 of 21842 rows picked" in report
    elif choice == "imagenet22k-goog":  # data/map22kto1k.txt of microsoft/Swin-Transformer: line 851 is 5564
        assert picked[850] == 5564 and theirs[5564] == "n03013580"
        assert "n04399382 has no row and starts as row 5564 (n03013580), as its authors chose" in report
    else:
        assert math.isclose(picked[850], sum(picked[:850] + picked[851:]) / 999, rel_tol=1e-5)
        assert (
            f"999 of {rows} rows picked (imagenet22k-fall2011), n04399382 has no row and starts as their mean" in report
        )


def test_the_two_orders_of_21841_classes_differ_from_class_718_on():
    goog, fall = (rows_of(f"imagenet22k-{name}", 21841)[0] for name in ("goog", "fall2011"))
    different = [k for k in range(1000) if goog[k] != fall[k]]
    assert len(different) == 282 and different[0] == 718
    assert [goog[k] for k in MAP] == list(MAP.values())


def test_a_head_of_21841_rows_has_the_classes_with_images():
    """Google's list has 21843 classes. Two have no images, and the last two have their rows."""
    classes = heads._row_of(heads.MAPPED["imagenet22k-goog"], 21841)
    assert sorted(classes) == sorted(listed("imagenet-22k")) and sorted(classes.values()) == list(range(21841))


def test_the_order_is_not_guessed():
    weights, model = features_and_head(1000, torch.arange(21841.0))
    both = r"imagenet22k-goog \(microsoft/Swin-Transformer.*imagenet22k-fall2011 \(folders sorted"
    with pytest.raises(ValueError, match=f"weights_head=imagenet22k: says not which order of the classes; .*{both}"):
        match(model, weights, "imagenet22k")
    published = swin_as_published(timm_swin(num_classes=21841))
    for choice in (None, "imagenet22k"):
        with pytest.raises(ValueError, match=rf"{both}.*whose layout test has, are imagenet22k-goog$"):
            match(model, in_memory(published), choice)
    deit = timm_deit(num_classes=21841)
    with pytest.raises(ValueError, match=f"{both}[^.]*$"):  # nothing tells who trained it
        match(nano_deit(1000), in_memory(deit.state_dict()), "imagenet22k")
    with pytest.raises(ValueError, match=r"needs a head of 21842 classes, test has one of 21841; choose by .*goog"):
        match(model, weights, "imagenet22k-ms")
    for choice, rows, _ in ORDERS:
        with pytest.raises(ValueError, match=f"needs a head of .*{rows}.*classes, test has one of 30; choose.*-ms"):
            match(model, features_and_head(1000, torch.arange(30.0))[0], choice)
    with pytest.raises(ValueError, match="the model has 7"):
        match(nano(num_classes=7), weights, "imagenet22k-goog")


def mae(options=None):
    """A pre-trained file of MAE, and a network of timm with a new head for it."""
    state = {key: value for key, value in timm_vit(fc_norm=False).state_dict().items() if not key.startswith("head.")}
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    model = create_model("timm:vit_base_patch16_224", img_size=64, num_classes=500, options=sizes, **(options or {}))
    return in_memory(state | {"decoder_embed.weight": torch.zeros(32, 64)}), model


def test_a_new_head_on_mae_starts_as_its_authors_start_it():
    weights, model = mae()
    report, state = match(model, weights)
    assert state["head.weight"].std().item() == pytest.approx(2e-5, rel=0.02) and not state["head.bias"].any()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)  # match changes no model
    assert report.fresh == ["head.bias", "head.weight"] and "the new head has deviation 2e-05" in str(report)
    weights, model = mae({"head_init_std": 0.01})
    report, state = match(model, weights)
    assert "head.weight" not in state and "deviation" not in str(report)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    plain = in_memory({key: value for key, value in weights.tensors.items() if "decoder" not in key})
    assert "head.weight" not in match(mae()[1], plain)[1]  # not known to be MAE's
