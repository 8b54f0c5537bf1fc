"""Foreign weights, one test per layout: the same logits as an independent network."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from dsmim.models import SimMIM, create_model
from dsmim.models.vit import DeiT3, ParallelThingsBlock
from dsmim.weights.files import warm_start
from tests.conftest import tiny_recipe
from tests.weights.weight_files import (
    VIT,
    assert_same,
    beit_as_pretrained,
    deit_as_published,
    images,
    nano,
    nano_simmim,
    run_directory,
    saved,
    scrambled,
    started,
    swin_as_published,
    swin_as_simmim,
    timm_beit,
    timm_deit,
    timm_swin,
    timm_vit,
)


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
    assert "does not name its windows" in str(report)


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
    theirs = timm_vit(global_pool=pool, fc_norm=False)  # MAE's norm is before its pooling
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
        assert reasons.count("the model pools before its last norm (fc_norm)") == 2
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


def test_a_run_of_dsmim_names_its_windows(tmp_path):
    model = scrambled(SimMIM(create_model("swinv2_nano", img_size=64, window_size=4)))
    recipe = tiny_recipe(tmp_path, model={"name": "swinv2_nano", "img_size": 64, "window_size": 4})
    run = run_directory(tmp_path / "run", recipe, model)
    report, ours = started(nano(num_classes=0), run)
    assert_same(ours, model.encoder)
    assert len(report.dropped) == 3 and report.notes == []
    with pytest.raises(ValueError, match=r"set model\.pretrained_window_sizes=\[4,4,4,2\]"):
        warm_start(nano(img_size=96, window_size=6), run)
    assert warm_start(nano_simmim(), run / "checkpoints" / "step_00000007")[0].fresh == []
