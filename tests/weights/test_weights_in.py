"""Foreign weights in: the same logits as an independent network, at other resolutions too, and with a chosen head."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.models.vision_transformer import ParallelThingsBlock
from torch.nn import functional as F

from dsmim.models import SimMIM, create_model
from dsmim.models.vit import DeiT3
from dsmim.weights.files import warm_start
from dsmim.weights.match import match
from tests.conftest import tiny_recipe
from tests.weights.weight_files import (
    TINY,
    VIT,
    beit_as_pretrained,
    deit_as_published,
    images,
    nano,
    nano_deit,
    nano_simmim,
    run_directory,
    saved,
    scrambled,
    shadow,
    started,
    swin_as_published,
    swin_as_simmim,
    timm_beit,
    timm_deit,
    timm_swin,
    timm_vit,
)

STEP = dict(rtol=1e-4, atol=1e-4)


@torch.no_grad()
def assert_same(ours, theirs, size=64):
    expected = theirs(images(size))
    assert expected.std() > 1e-3  # or the comparison says nothing
    torch.testing.assert_close(ours(images(size)), expected, **STEP)


# --- one test per layout ---------------------------------------------------------------------------------------------


def test_the_authors_simmim_release(tmp_path):
    theirs = timm_swin(num_classes=0)
    state = swin_as_simmim(theirs)
    path = saved(tmp_path / "simmim.pth", state, epoch=7, optimizer={"state": {}})
    report, ours = started(nano(num_classes=0), path)
    assert_same(ours, theirs)
    reasons = list(report.dropped.values())
    assert reasons.count("only for masked image modelling") == 3
    assert reasons.count("computed, not learnt") == 2 * 6  # blocks; at 64 pixels none is shifted
    assert {"args", "epoch", "optimizer"} <= set(report.dropped) and "the authors' SimMIM release" in str(report)
    report, whole = started(nano_simmim(), path)
    assert report.fresh == [] and torch.equal(whole.mask_token, state["encoder.mask_token"])
    assert torch.equal(whole.decoder[0].weight, state["decoder.0.weight"])
    assert_same(whole.encoder, theirs)


def test_swin_v2_as_microsoft_publishes_it(tmp_path):
    theirs = timm_swin()
    wrapped = {f"module._orig_mod.{key}": value for key, value in swin_as_published(theirs).items()}
    report, ours = started(nano(), saved(tmp_path / "swin.pth", wrapped), "keep")
    assert_same(ours, theirs)
    assert report.fresh == [] and "microsoft/Swin-Transformer" in report.layout and report.notes == []


def test_swin_v2_of_timm_as_safetensors(tmp_path):
    theirs = timm_swin()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    report, ours = started(nano(), tmp_path / "model.safetensors", "keep")
    assert_same(ours, theirs)
    assert "does not tell its windows" in str(report)


@pytest.mark.parametrize("parallel", [False, True])
def test_deit3_as_facebook_publishes_it(tmp_path, parallel):
    theirs = timm_deit(parallel)
    state = deit_as_published(theirs)
    assert ("blocks.0.gamma_1_1" in state) == ("blocks.3.mlp1.fc2.bias" in state) == parallel
    assert "blocks.0.gamma_2" in state and len(state) == len(theirs.state_dict())
    path = saved(tmp_path / "deit.pth", state)
    options = {"block_fn": ParallelThingsBlock} if parallel else {}
    report, ours = started(DeiT3(0.0, 16, img_size=64, num_classes=5, **VIT, **options), path, "keep")
    assert_same(ours, theirs)
    assert report.fresh == [] and report.dropped == {"args": "an entry beside the weights"}
    assert_same(started(timm_deit(parallel), path, "keep")[1], theirs)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_mae_into_a_vit_of_timm(tmp_path, pool):
    theirs = timm_vit(global_pool=pool, fc_norm=False)  # MAE's norm stands before its pooling
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    masked = {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    masked |= {"decoder_embed.weight": torch.zeros(32, 64), "decoder_blocks.0.norm1.weight": torch.zeros(32)}
    path = saved(tmp_path / "mae.pth", state | masked)
    report, ours = started(timm_vit(global_pool=pool, num_classes=5), path)
    reasons = list(report.dropped.values())
    assert reasons.count("only for masked image modelling") == 4
    if pool == "token":
        ours.head.load_state_dict(theirs.head.state_dict())
        assert_same(ours, theirs)
        assert report.fresh == ["head.bias", "head.weight"]
    else:
        assert reasons.count("the model pools first and then norms (fc_norm)") == 2
        assert report.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
        with torch.no_grad():
            before_norm = theirs.blocks(theirs._pos_embed(theirs.patch_embed(images())))
            assert torch.equal(ours.forward_features(images()), before_norm)


def test_beit_with_one_table_into_a_model_with_one_per_block(tmp_path):
    theirs = timm_beit()
    with torch.no_grad():
        theirs.blocks[1].attn.relative_position_bias_table.copy_(theirs.blocks[0].attn.relative_position_bias_table)
    path = saved(tmp_path / "beit.pth", beit_as_pretrained(theirs))
    report, ours = started(timm_beit(), path)
    assert "shared table copied to 2 blocks" in str(report) and "rel_pos_bias.relative_position_index" in report.dropped
    assert report.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    for module in ("fc_norm", "head"):
        ours.get_submodule(module).load_state_dict(theirs.get_submodule(module).state_dict())
    assert_same(ours, theirs)
    finetuned = theirs.state_dict() | {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    report, ours = started(timm_beit(), saved(tmp_path / "finetuned.pth", finetuned), "keep")
    assert report.fresh == [] and report.layout == "BEiT"
    assert_same(ours, theirs)


def test_any_network_of_timm_with_its_buffers(tmp_path):
    theirs = timm.create_model("resnet10t", num_classes=5)
    theirs.bn1.running_mean += 1
    theirs = scrambled(theirs)
    ours = timm.create_model("resnet10t", num_classes=5)
    _, state = warm_start(ours, saved(tmp_path / "resnet.pth", theirs.state_dict()), "keep")
    ours.load_state_dict(state)
    assert_same(ours.eval(), theirs)


def test_a_run_of_ours_tells_its_windows(tmp_path):
    model = scrambled(SimMIM(create_model("swinv2_nano", img_size=64, window_size=4)))
    recipe = tiny_recipe(tmp_path, model={"name": "swinv2_nano", "img_size": 64, "window_size": 4})
    run = run_directory(tmp_path / "run", recipe, model)
    report, ours = started(nano(num_classes=0), run)
    assert_same(ours, model.encoder)
    assert len(report.dropped) == 3 and report.notes == []
    with pytest.raises(ValueError, match=r"set model\.pretrained_window_sizes=\[4,4,4,2\]"):
        warm_start(nano(img_size=96, window_size=6), run)
    assert warm_start(nano_simmim(), run / "checkpoints" / "step_00000007")[0].fresh == []


# --- other resolutions -----------------------------------------------------------------------------------------------


def test_window_may_change_while_coordinates_stay(tmp_path):
    path = saved(tmp_path / "simmim.pth", swin_as_simmim(timm_swin(num_classes=0)))
    theirs = timm_swin(num_classes=0, img_size=96, window_size=6, pretrained_window_sizes=(4, 4, 4, 2))
    larger = nano(num_classes=0, img_size=96, window_size=6, pretrained_window_sizes=(4, 4, 4, 2))
    report, ours = started(larger, path)
    assert_same(ours, theirs, 96)
    assert report.changed == {"attention windows": "[4,4,4,2] → [6,6,6,3], coordinates unchanged"}
    again = saved(tmp_path / "fine.pth", swin_as_published(theirs))  # a window that is not its coordinates'
    assert "[6,6,6,3] → [4,4,4,2]" in str(warm_start(nano(pretrained_window_sizes=(4, 4, 4, 2)), again)[0])
    with pytest.raises(ValueError, match=r"learnt with windows \[4,4,4,2\].*by \[6,6,6,3\].*sizes=\[4,4,4,2\]"):
        warm_start(nano(img_size=96, window_size=6), path)
    with pytest.raises(ValueError, match=r"the network's option pretrained_window_sizes=\[4,4,4,2\]"):
        warm_start(timm_swin(num_classes=0, img_size=96, window_size=6), path)


def test_positions_are_resampled_as_deit_does(tmp_path):
    theirs = timm_deit()
    path = saved(tmp_path / "deit.pth", deit_as_published(theirs))
    report, state = warm_start(nano_deit(img_size=96), path, "drop")
    square = theirs.pos_embed.detach().reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(state["pos_embed"], expected)
    assert report.changed == {"pos_embed": "resampled 4×4 → 6×6"} and "pos_embed: resampled" in str(report)
    smaller = warm_start(nano_deit(img_size=48), path, "drop")[1]["pos_embed"]
    expected = F.interpolate(square, (3, 3), mode="bicubic", antialias=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(smaller, expected)


def test_160_pixels_of_patch_14(tmp_path):
    theirs = timm_deit(patch_size=14, img_size=160)
    path = saved(tmp_path / "deit.pth", deit_as_published(theirs))
    assert_same(started(DeiT3(0.0, 14, img_size=160, num_classes=5, **VIT), path, "keep")[1], theirs, 160)
    report, _ = warm_start(DeiT3(0.0, 14, img_size=224, num_classes=5, **VIT), path, "keep")
    assert report.changed == {"pos_embed": "resampled 11×11 → 16×16"}


def test_the_class_tokens_position_is_folded_into_it_and_back(tmp_path):
    theirs = timm_vit(init_values=1e-4)
    path = saved(tmp_path / "vit.pth", theirs.state_dict())
    report, ours = started(DeiT3(0.0, 16, img_size=64, num_classes=5, **TINY), path, "keep")
    assert list(report.changed) == ["cls_token"]
    assert_same(ours, theirs)
    back = saved(tmp_path / "deit.pth", ours.state_dict())
    report, again = started(timm_vit(init_values=1e-4), back, "keep")
    assert list(report.changed) == ["cls_token"]
    assert not again.pos_embed[:, :1].any()
    assert_same(again, theirs)
    larger, state = warm_start(timm_vit(img_size=96), saved(tmp_path / "plain.pth", timm_vit().state_dict()), "keep")
    assert larger.changed == {"pos_embed": "resampled 4×4 → 6×6"} and state["pos_embed"].shape == (1, 37, 64)
    assert torch.equal(state["pos_embed"][:, :1], timm_vit().pos_embed[:, :1])


def test_tables_of_relative_positions_are_resampled(tmp_path):
    theirs = timm_beit()
    path = saved(tmp_path / "beit.pth", beit_as_pretrained(theirs))
    report, state = warm_start(timm_beit(img_size=96), path)
    table, old = state["blocks.1.attn.relative_position_bias_table"], theirs.blocks[0].attn.relative_position_bias_table
    assert table.shape == (11 * 11 + 3, 2) and torch.equal(table[-3:], old[-3:])
    assert torch.allclose(table[60], old[24], atol=1e-5)  # distance 0 stays
    assert "resampled window 4 → 6×6" in str(report)


# --- heads -----------------------------------------------------------------------------------------------------------


def features_and_head(classes, head):
    """(file, model) that share a network; the model has another number of classes."""
    state = timm_swin(num_classes=0).state_dict() | {"head.fc.weight": head[:, None] + torch.arange(256.0)}
    return shadow(state | {"head.fc.bias": head.clone()}), nano(num_classes=classes)


def test_the_head_is_a_choice(tmp_path):
    weights, model = features_and_head(3, torch.arange(5.0))
    with pytest.raises(ValueError, match=r"head of 5 classes, the model one of 3; say.*model\.weights_head=keep, drop"):
        match(model, weights)
    with pytest.raises(ValueError, match="say drop for a fresh head"):
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
        ("4\n0\n5\n", "'5' is no row"),
        ("4\n-1\n0\n", "'-1' is no row"),
    ]:
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            match(model, weights, str(tmp_path / "map.txt"))
    with pytest.raises(ValueError, match="none of keep, drop, imagenet22k"):
        match(model, weights, "kepp")


def test_no_choice_is_needed_where_there_is_no_head():
    weights, model = features_and_head(3, torch.arange(5.0))
    report, _ = match(nano(num_classes=0), weights)
    assert report.dropped == dict.fromkeys(("head.fc.weight", "head.fc.bias"), "the model has no head")
    report, _ = match(nano_simmim(), weights)
    assert report.fresh == ["decoder.0.bias", "decoder.0.weight", "mask_token"]
    headless = shadow({k: v for k, v in weights.tensors.items() if "head" not in k})
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
    with pytest.raises(ValueError, match=f"wants a head of {rows} classes, test has one of 30"):
        match(model, features_and_head(1000, torch.arange(30.0))[0], choice)
    with pytest.raises(ValueError, match="the model has 7"):
        match(nano(num_classes=7), weights, choice)
