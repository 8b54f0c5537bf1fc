"""Files in foreign layouts, made from independent networks of timm with keys renamed here; and runs of dsmim."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from dsmim.models import SimMIM, create_model, materialise
from dsmim.weights.files import warm_start
from dsmim.weights.match import Weights

SWIN = dict(embed_dim=32, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 8))  # swinv2_nano's
VIT = dict(embed_dim=96, depth=4, num_heads=3)  # deit3_nano_patch16's
TINY = dict(embed_dim=64, depth=2, num_heads=2)


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, with random numbers in every parameter, so that each part has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)
    return model.eval()


def timm_swin(num_classes: int = 5, img_size: int = 64, window_size: int = 4, **options) -> nn.Module:
    options = SWIN | {"num_classes": num_classes, "img_size": img_size, "window_size": window_size} | options
    return scrambled(timm.create_model("swinv2_base_window12_192", **options))


def timm_deit(parallel: bool = False, num_classes: int = 5, img_size: int = 64, **options) -> nn.Module:
    block = {"block_fn": ParallelThingsBlock} if parallel else {}
    options = VIT | {"num_classes": num_classes, "img_size": img_size} | block | options
    return scrambled(timm.create_model("deit3_small_patch16_224", **options))


def timm_vit(**options) -> nn.Module:
    return scrambled(timm.create_model("vit_base_patch16_224", **{**TINY, "img_size": 64, "num_classes": 5, **options}))


def timm_beit(**options) -> nn.Module:
    return scrambled(
        timm.create_model("beit_base_patch16_224", **{**TINY, "img_size": 64, "num_classes": 5, **options})
    )


def swin_as_published(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return timm's Swin V2 under microsoft/Swin-Transformer's names, with the buffers of its files."""
    state = {}
    for key, value in model.state_dict().items():
        if match := re.match(r"layers\.(\d)\.downsample\.(.+)", key):
            key = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        state[key.replace("head.fc.", "head.")] = value
    for stage, layer in enumerate(model.layers):
        for number, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{number}"
            state[f"{name}.attn.relative_coords_table"] = block.attn.relative_coords_table
            state[f"{name}.attn.relative_position_index"] = block.attn.relative_position_index
            if block.attn_mask is not None:
                state[f"{name}.attn_mask"] = block.attn_mask
    return state


def swin_as_simmim(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the same with the prefix, the names and the further tensors of the authors' SimMIM release."""
    state = {k.replace("cpb_mlp", "rpe_mlp"): v for k, v in swin_as_published(model).items() if "head." not in k}
    state["mask_token"] = torch.randn(1, 1, 32)
    decoder = {"decoder.0.weight": torch.randn(3072, 256, 1, 1), "decoder.0.bias": torch.randn(3072)}
    return {f"encoder.{key}": value for key, value in state.items()} | decoder


def deit_as_published(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return timm's DeiT III under facebookresearch/deit's names."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", key)
        if match := re.match(r"blocks\.(\d+)\.(attns|ffns)\.(\d)\.(norm|attn|mlp|ls)\.(.+)", key):
            block, kind, branch, part, rest = match.groups()
            first, second = ("1" if kind == "attns" else "2"), ("1" if branch == "1" else "")
            part = {"norm": f"norm{first}{second}", "ls": f"gamma_{first}{'_1' * (branch == '1')}"}.get(
                part, part + second
            )
            key = f"blocks.{block}.{part}" + ("" if part.startswith("gamma") else f".{rest}")
        state[key] = value
    return state


def beit_as_pretrained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return unilm/beit's pre-trained file for `model`, its fine-tuned form with equal tables in all blocks."""
    state = dict(model.state_dict())
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    state["rel_pos_bias.relative_position_bias_table"] = state[tables[0]]
    state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    state |= {"lm_head.weight": torch.zeros(9, 64), "lm_head.bias": torch.zeros(9), "mask_token": torch.zeros(1, 1, 64)}
    state |= {"norm.weight": state["fc_norm.weight"], "norm.bias": state["fc_norm.bias"]}
    gone = {*tables, "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    return {key: value for key, value in state.items() if key not in gone}


def saved(path: Path, state: dict[str, torch.Tensor], **beside) -> Path:
    """Save as the authors' scripts do: the weights as `model`, among other things."""
    torch.save({"model": state, "args": argparse.Namespace(lr=1), **beside}, path)
    return path


def started(model: nn.Module, path: Path, head: str | None = None):
    """Return (report, the model filled from the file, in eval mode); the model may be on the meta device."""
    report, state = warm_start(model, path, head)
    for _ in materialise(model, state):
        pass
    return report, model.eval()


def nano(num_classes: int = 5, img_size: int = 64, window_size: int = 4, **options) -> nn.Module:
    options |= {"num_classes": num_classes, "img_size": img_size, "window_size": window_size}
    return create_model("swinv2_nano", device="meta", **options)


def nano_simmim(**options) -> SimMIM:
    return SimMIM(nano(num_classes=0, **options))


def nano_deit(num_classes: int = 5, img_size: int = 64) -> nn.Module:
    return create_model("deit3_nano_patch16", device="meta", num_classes=num_classes, img_size=img_size)


def run_directory(folder: Path, recipe: dict, model: nn.Module) -> Path:
    """Write a run with one checkpoint, as ZeRO stage 0 does (tests/distributed has real ones of all stages)."""
    checkpoint = folder / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    buffers = sorted(model.state_dict().keys() - dict(model.named_parameters()).keys())
    saved = {"module": model.state_dict(), "buffer_names": buffers, "shared_params": None, "dp_world_size": 1}
    optimizer = {"state": {}, "param_groups": []}  # one that has not stepped
    torch.save(saved | {"optimizer": optimizer}, checkpoint / "mp_rank_00_model_states.pt")
    state = {"format": 1, "step": 7, "zero_stage": 0, "recipe": recipe}
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in checkpoint.iterdir()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def in_memory(state: dict[str, torch.Tensor]) -> Weights:
    """Return the tensors as Weights, without a file."""
    return Weights(state, "test")


@torch.no_grad()
def assert_same(ours, theirs, size=64):
    expected = theirs(images(size))
    assert expected.std() > 1e-3  # or the comparison says nothing
    torch.testing.assert_close(ours(images(size)), expected, rtol=1e-4, atol=1e-4)
