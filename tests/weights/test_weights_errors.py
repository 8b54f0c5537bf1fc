"""Foreign weights that do not fit: nothing is lost on the way, and every error names the mend."""

import pickle

import pytest
import torch
from torch import nn

from dsmim.models import create_model
from dsmim.weights.files import read, warm_start
from dsmim.weights.match import complete, match
from tests.weights.weight_files import (
    beit_as_pretrained,
    deit_as_published,
    nano,
    nano_deit,
    nano_simmim,
    saved,
    scrambled,
    shadow,
    swin_as_published,
    swin_as_simmim,
    timm_beit,
    timm_deit,
    timm_swin,
    timm_vit,
)

# --- nothing is lost -------------------------------------------------------------------------------------------------

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
    report, fitting = match(model, shadow(state))
    assert set(report.used) | set(report.dropped) == set(state)
    assert set(fitting) | set(report.fresh) == set(model.state_dict())
    assert all(tensor.shape == model.state_dict()[key].shape for key, tensor in fitting.items())
    for extra in ("strange", "blocks.0.strange", "layers.0.blocks.0.attn.strange", name + "2"):
        key = prefix + extra.removeprefix(prefix)
        with pytest.raises(ValueError, match=f"{key}: no such tensor in the model"):
            match(model, shadow(state | {key: torch.zeros(3)}))
    with pytest.raises(ValueError, match="missing in the file"):
        match(model, shadow({key: value for key, value in state.items() if key != name}))
    with pytest.raises(ValueError, match=rf"{name}: shape \(3,\)"):
        match(model, shadow(state | {name: torch.zeros(3)}))


def test_half_a_head_half_a_decoder_and_two_keys_for_one_tensor():
    state = swin_as_simmim(timm_swin(num_classes=0))
    del state["decoder.0.bias"]
    with pytest.raises(ValueError, match=r"decoder\.0\.bias: missing"):
        match(nano_simmim(), shadow(state))
    with pytest.raises(ValueError, match=r"head\.fc\.weight: missing"):
        match(nano(), shadow(timm_swin(num_classes=0).state_dict() | {"head.fc.bias": torch.zeros(5)}), "keep")
    with pytest.raises(ValueError, match="both are the model's"):
        match(nano_simmim(), shadow(state | {"mask_token": torch.zeros(1, 1, 32)}))
    finetuned = {k: v for k, v in timm_beit().state_dict().items() if not k.startswith("fc_norm.")}
    with pytest.raises(ValueError, match=r"fc_norm\.weight: missing"):
        match(timm_beit(), shadow(finetuned), "keep")


def test_an_evaluation_takes_a_complete_checkpoint_only():
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)
    state = scrambled(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)).state_dict()
    taken = complete(model, state, "test")
    assert taken.keys() == state.keys() and torch.equal(taken["norm.bias"], state["norm.bias"])
    with pytest.raises(ValueError, match="test has no head"):
        complete(model, {key: value for key, value in state.items() if "head" not in key}, "test")
    with pytest.raises(ValueError, match=r"are not this model's.*1 dropped"):
        complete(model, state | {"mask_token": torch.zeros(1, 1, 32)}, "test")


# --- Swin V2 beyond shapes -------------------------------------------------------------------------------------------


def test_another_number_of_heads_is_told():
    state = swin_as_published(timm_swin(num_classes=0, num_heads=(2, 2, 4, 8)))
    with pytest.raises(ValueError, match=r"has \[2, 2, 4, 8\] heads per stage.*the model \[1, 2, 4, 8\]"):
        match(nano(num_classes=0), shadow(state))


def test_extra_norms_must_agree():
    state = swin_as_simmim(timm_swin(num_classes=0))
    extra = {f"encoder.layers.2.blocks.1.enorm.{part}": torch.rand(128) for part in ("weight", "bias")}
    _, ours = match(nano_simmim(extra_norm_every=2), shadow(state | extra))
    assert torch.equal(ours["encoder.layers.2.blocks.1.enorm.weight"], extra["encoder.layers.2.blocks.1.enorm.weight"])
    with pytest.raises(
        ValueError, match=r"in layers\.2\.blocks\.1, the model in 0 blocks; set model\.extra_norm_every=2"
    ):
        match(nano_simmim(), shadow(state | extra))
    with pytest.raises(ValueError, match=r"in no block, the model in 1 blocks; set model\.extra_norm_every=0"):
        match(nano_simmim(extra_norm_every=2), shadow(state))
    odd = {f"encoder.layers.2.blocks.{b}.enorm.weight": torch.rand(128) for b in (0, 2)}
    with pytest.raises(ValueError, match=r"no model\.extra_norm_every gives these"):
        match(nano_simmim(), shadow(state | odd))
    with pytest.raises(ValueError, match="timm's network has none"):
        match(timm_swin(num_classes=0), shadow(state | extra))


def test_a_strange_table_of_coordinates():
    state = swin_as_published(timm_swin(num_classes=0))
    key = "layers.1.blocks.0.attn.relative_coords_table"
    with pytest.raises(ValueError, match="no whole window size"):
        match(nano(num_classes=0), shadow(state | {key: state[key] * 1.1}))
    with pytest.raises(ValueError, match="no square window's"):
        match(nano(num_classes=0), shadow(state | {key: state[key][:, :6]}))


def test_a_vit_is_no_swin_and_positions_must_be_a_square(tmp_path):
    with pytest.raises(ValueError, match="no such tensor in the model"):
        match(nano(num_classes=0), shadow(deit_as_published(timm_deit(num_classes=0))))
    state = deit_as_published(timm_deit(num_classes=0))
    with pytest.raises(ValueError, match="pos_embed has 15 positions, no square map"):
        match(nano_deit(0), shadow(state | {"pos_embed": torch.zeros(1, 15, 96)}))
    with pytest.raises(ValueError, match="2 slots for tokens beside the map, the model 0"):
        match(nano_deit(0), shadow(state | {"pos_embed": torch.zeros(1, 18, 96)}))
    beit = timm_beit().state_dict()
    name = "blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"table has 50 rows, which no square window gives"):
        match(timm_beit(), shadow(beit | {name: torch.zeros(50, 2)}), "keep")


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_stands_in_a_file(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    for name, content, left in [
        ("plain.pt", tensors, set()),
        ("lightning.ckpt", {"state_dict": tensors, "epoch": 3}, {"epoch"}),
        ("beit2.bin", {"model": {"module": tensors, "step": 1}, "model_ema": tensors}, {"model_ema", "step"}),
        ("ddp.pth", {"model": {f"module.{key}": value for key, value in tensors.items()}}, set()),
    ]:
        torch.save(content, tmp_path / name)
        weights = read(tmp_path / name)
        assert set(weights.left_out) == left and torch.equal(weights.tensors["a"], tensors["a"])
        assert list(weights.tensors) == ["a", "b"] and str(tmp_path / name) == weights.source
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "old.pth").tensors["a"], tensors["a"])


class Harmful:
    def __reduce__(self):
        return (print, ("harm done",))


def test_files_that_are_not_weights(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a run directory, a checkpoint, or \.safetensors"):
        read(tmp_path / "notes.txt")
    torch.save({"model": {"a": torch.ones(1)}, "more": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"wants to run .*print.*if you trust it.*weights_only=False"):
        read(tmp_path / "harmful.pth")
    assert "harm done" not in capsys.readouterr().out
    for name, content in [("text.pth", b"hello"), ("text.safetensors", b"hello"), ("none.pth", pickle.dumps(None))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"optimizer is no tensor of weights.*found: optimizer, epoch"):
        read(tmp_path / "empty.pth")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="nothing in it is no tensor"):
        read(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        read(tmp_path)


def test_half_precision_becomes_fp32_and_the_model_stays_untouched(tmp_path):
    theirs = timm_swin()
    path = saved(tmp_path / "half.pth", {key: value.half() for key, value in theirs.state_dict().items()})
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, state = warm_start(model, path, "keep")
    assert all(value.dtype == torch.float32 for value in state.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(model, nn.Module) and not any(v.is_meta for v in state.values())
