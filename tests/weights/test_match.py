"""Foreign weights that do not fit the model: no key is lost, and every error names the fix."""

import pytest
import torch
from torch import nn

from dsmim.models import create_model
from dsmim.weights.files import warm_start
from dsmim.weights.match import complete, match
from tests.weights.weight_files import (
    beit_as_pretrained,
    deit_as_published,
    in_memory,
    nano,
    nano_deit,
    nano_simmim,
    saved,
    scrambled,
    swin_as_published,
    swin_as_simmim,
    timm_beit,
    timm_deit,
    timm_swin,
    timm_vit,
)

LAYOUTS = {
    "simmim": lambda: (swin_as_simmim(timm_swin(num_classes=0)), nano_simmim()),
    "swin": lambda: (swin_as_published(timm_swin(num_classes=0)), nano(num_classes=0)),
    "timm swin": lambda: (timm_swin(num_classes=0).state_dict(), nano(num_classes=0)),
    "deit": lambda: (deit_as_published(timm_deit(num_classes=0)), nano_deit(num_classes=0)),
    "deit x2": lambda: (deit_as_published(timm_deit(True, num_classes=0)), timm_deit(True, num_classes=0)),
    "mae": lambda: (timm_vit(num_classes=0).state_dict() | {"decoder_embed.weight": torch.zeros(1)}, timm_vit()),
    "beit": lambda: (beit_as_pretrained(timm_beit()), timm_beit()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_key_too_many_or_too_few_or_of_another_shape_is_an_error(layout):
    state, model = LAYOUTS[layout]()
    prefix = "encoder." if layout == "simmim" else ""
    name = next(key for key in state if key.endswith("norm1.weight"))
    report, fitting = match(model, in_memory(state))
    assert set(report.used) | set(report.dropped) == set(state)
    assert set(fitting) | set(report.fresh) == set(model.state_dict())
    assert all(tensor.shape == model.state_dict()[key].shape for key, tensor in fitting.items())
    for extra in ("strange", "blocks.0.strange", "layers.0.blocks.0.attn.strange", name + "2"):
        key = prefix + extra.removeprefix(prefix)
        with pytest.raises(ValueError, match=f"{key}: no such tensor in the model"):
            match(model, in_memory(state | {key: torch.zeros(3)}))
    with pytest.raises(ValueError, match="missing in the file"):
        match(model, in_memory({key: value for key, value in state.items() if key != name}))
    with pytest.raises(ValueError, match=rf"{name}: shape \(3,\)"):
        match(model, in_memory(state | {name: torch.zeros(3)}))


def test_half_a_head_half_a_decoder_and_two_keys_for_one_tensor():
    state = swin_as_simmim(timm_swin(num_classes=0))
    del state["decoder.0.bias"]
    with pytest.raises(ValueError, match=r"decoder\.0\.bias: missing"):
        match(nano_simmim(), in_memory(state))
    with pytest.raises(ValueError, match=r"head\.fc\.weight: missing"):
        match(nano(), in_memory(timm_swin(num_classes=0).state_dict() | {"head.fc.bias": torch.zeros(5)}), "keep")
    with pytest.raises(ValueError, match="both mean the model's"):
        match(nano_simmim(), in_memory(state | {"mask_token": torch.zeros(1, 1, 32)}))
    finetuned = {k: v for k, v in timm_beit().state_dict().items() if not k.startswith("fc_norm.")}
    with pytest.raises(ValueError, match=r"fc_norm\.weight: missing"):
        match(timm_beit(), in_memory(finetuned), "keep")


def test_an_evaluation_takes_a_complete_checkpoint_only():
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)
    state = scrambled(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)).state_dict()
    taken = complete(model, state, "test")
    assert taken.keys() == state.keys() and torch.equal(taken["norm.bias"], state["norm.bias"])
    with pytest.raises(ValueError, match="test has no head"):
        complete(model, {key: value for key, value in state.items() if "head" not in key}, "test")
    with pytest.raises(ValueError, match=r"are not those of this model.*1 dropped"):
        complete(model, state | {"mask_token": torch.zeros(1, 1, 32)}, "test")


def test_another_number_of_heads_is_an_error():
    state = swin_as_published(timm_swin(num_classes=0, num_heads=(2, 2, 4, 8)))
    with pytest.raises(ValueError, match=r"has \[2, 2, 4, 8\] heads per stage.*the model \[1, 2, 4, 8\]"):
        match(nano(num_classes=0), in_memory(state))


def test_extra_norms_must_agree():
    state = swin_as_simmim(timm_swin(num_classes=0))
    extra = {f"encoder.layers.2.blocks.1.enorm.{part}": torch.rand(128) for part in ("weight", "bias")}
    _, ours = match(nano_simmim(extra_norm_every=2), in_memory(state | extra))
    assert torch.equal(ours["encoder.layers.2.blocks.1.enorm.weight"], extra["encoder.layers.2.blocks.1.enorm.weight"])
    with pytest.raises(
        ValueError, match=r"in layers\.2\.blocks\.1, the model in 0 blocks; set model\.extra_norm_every=2"
    ):
        match(nano_simmim(), in_memory(state | extra))
    with pytest.raises(ValueError, match=r"in no block, the model in 1 blocks; set model\.extra_norm_every=0"):
        match(nano_simmim(extra_norm_every=2), in_memory(state))
    odd = {f"encoder.layers.2.blocks.{b}.enorm.weight": torch.rand(128) for b in (0, 2)}
    with pytest.raises(ValueError, match=r"no model\.extra_norm_every gives these"):
        match(nano_simmim(), in_memory(state | odd))
    with pytest.raises(ValueError, match="timm's network cannot have them"):
        match(timm_swin(num_classes=0), in_memory(state | extra))


def test_a_vit_does_not_fit_a_swin():
    with pytest.raises(ValueError, match="no such tensor in the model"):
        match(nano(num_classes=0), in_memory(deit_as_published(timm_deit(num_classes=0))))


def test_half_precision_becomes_fp32_and_the_model_stays_untouched(tmp_path):
    theirs = timm_swin()
    path = saved(tmp_path / "half.pth", {key: value.half() for key, value in theirs.state_dict().items()})
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, state = warm_start(model, path, "keep")
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(model, nn.Module) and not any(v.is_meta for v in state.values())
