"""Foreign weights at other resolutions: positions are resampled as the authors do it."""

import pytest
import torch
from torch.nn import functional as F

from dsmim.models.vit import DeiT3
from dsmim.weights.files import warm_start
from dsmim.weights.match import match
from tests.weights.weight_files import (
    TINY,
    VIT,
    assert_same,
    beit_as_pretrained,
    deit_as_published,
    in_memory,
    nano_deit,
    saved,
    started,
    timm_beit,
    timm_deit,
    timm_vit,
)


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


def test_positions_must_be_a_square():
    state = deit_as_published(timm_deit(num_classes=0))
    with pytest.raises(ValueError, match="pos_embed has 15 positions, not a square map"):
        match(nano_deit(0), in_memory(state | {"pos_embed": torch.zeros(1, 15, 96)}))
    with pytest.raises(ValueError, match="2 slots for tokens outside the map, the model 0"):
        match(nano_deit(0), in_memory(state | {"pos_embed": torch.zeros(1, 18, 96)}))
    beit = timm_beit().state_dict()
    name = "blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"table has 50 rows, which does not fit a square window"):
        match(timm_beit(), in_memory(beit | {name: torch.zeros(50, 2)}), "keep")
