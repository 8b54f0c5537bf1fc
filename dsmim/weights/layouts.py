"""Recognise the layouts of foreign files by their keys, and rename the keys to timm's names, which are dsmim's.

    authors' SimMIM release      Swin V2 under `encoder.`, `attn.rpe_mlp`, downsampling at the end of a stage, buffers
    microsoft/Swin-Transformer   the same without prefix and with `attn.cpb_mlp`, `head.weight`
    facebookresearch/deit        `gamma_1` for timm's `ls1.gamma`; parallel blocks `norm11`, `attn1`, `gamma_1_1`, …
    MAE                          a plain ViT; when pre-trained, `mask_token` and `decoder_…`
    BEiT                         `q_bias`, `v_bias`, tables of relative positions; when pre-trained, `lm_head`

Files of timm and dsmim's exports need no renaming, except for what they have around the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

MIM_ONLY = "only for masked image modelling"
_COMPUTED = (r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$", "computed, not learnt")

# Parallel blocks: facebookresearch/deit models_v2.py (Layer_scale_init_Block_paralx2) → timm's ParallelThingsBlock
_PARALLEL = {
    "norm1": "attns.0.norm", "attn": "attns.0.attn", "gamma_1": "attns.0.ls.gamma",
    "norm11": "attns.1.norm", "attn1": "attns.1.attn", "gamma_1_1": "attns.1.ls.gamma",
    "norm2": "ffns.0.norm", "mlp": "ffns.0.mlp", "gamma_2": "ffns.0.ls.gamma",
    "norm21": "ffns.1.norm", "mlp1": "ffns.1.mlp", "gamma_2_1": "ffns.1.ls.gamma",
}  # fmt: skip
_PLAIN = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


@dataclass
class Native:
    """A file with dsmim's names, and the origin of each tensor."""

    layout: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    """dsmim's name → key of the file"""
    dropped: dict[str, str] = field(default_factory=dict)
    """key of the file → why the model has no place for it"""

    def drop(self, key: str, reason: str) -> None:
        """Leave out the tensor with dsmim's name `key`."""
        del self.tensors[key]
        self.dropped[self.origin.pop(key)] = reason


@dataclass(frozen=True)
class _Layout:
    name: str
    rename: Callable[[str], str] = str
    drops: tuple[tuple[str, str], ...] = ()
    """(pattern of a key without prefix, why the model has no place for it)"""

    def reason(self, key: str) -> str | None:
        return next((reason for pattern, reason in self.drops if re.search(pattern, key)), None)


def to_native(tensors: Mapping[str, torch.Tensor], own: Collection[str], source: str) -> Native:
    """Return the file with dsmim's names: the network without prefix, plus `mask_token` and `decoder.0.…`.

    own: the names of the model's tensors. Raises ValueError when two keys mean the same tensor.
    """
    bare = {key: _bare(key, own) for key in tensors}
    layout = _recognise(set(bare.values()), own)
    native = Native(layout.name)
    for key, tensor in tensors.items():
        if reason := layout.reason(bare[key]):
            native.dropped[key] = reason
            continue
        name = layout.rename(bare[key])
        if name in native.origin:
            raise ValueError(f"{source}: {native.origin[name]} and {key} both mean the model's {name}")
        native.tensors[name], native.origin[name] = tensor, key
    return native


def to_swin_authors(name: str, simmim: bool) -> str:
    """Return the authors' name of a Swin V2 tensor, as in their SimMIM checkpoints or in their classifiers."""
    prefix, name = ("encoder.", name.removeprefix("encoder.")) if simmim else ("", name)
    if name.startswith("decoder."):
        return name
    name = name.replace(".attn.cpb_mlp.", ".attn.rpe_mlp.") if simmim else name
    return prefix + _shift_downsampling(name, -1).replace("head.fc.", "head.")


def to_deit(name: str) -> str:
    """Return facebookresearch/deit's name of a ViT's tensor."""
    for theirs, ours in [*_PARALLEL.items(), *_PLAIN.items()]:
        if match := re.fullmatch(rf"(blocks\.\d+)\.{re.escape(ours)}(\..+)?", name):
            return f"{match[1]}.{theirs}{match[2] or ''}"
    return name


def _bare(key: str, own: Collection[str]) -> str:
    """Return the key without SimMIM's prefix, unless the network has its own part `encoder` (some of timm have)."""
    return key if any(name.startswith("encoder.") for name in own) else key.removeprefix("encoder.")


def _recognise(keys: set[str], own: Collection[str]) -> _Layout:
    if keys <= set(own):
        return _Layout("the model's own names")
    if any(re.fullmatch(r"layers\.\d+\.blocks\.\d+\.attn\.(cpb|rpe)_mlp\.0\.weight", key) for key in keys):
        return _swin(keys)
    if "decoder_embed.weight" in keys:
        return _Layout("MAE, pre-trained", drops=((r"^(mask_token$|decoder_)", MIM_ONLY),))
    if any(re.fullmatch(r"blocks\.\d+\.attn\.q_bias", key) for key in keys):
        return _Layout("BEiT", drops=(_COMPUTED, (r"^(mask_token$|lm_head\.|cls_pt_layers\.)", MIM_ONLY)))
    if "blocks.0.norm11.weight" in keys:
        return _Layout("facebookresearch/deit, parallel blocks", lambda key: _from_deit(key, _PARALLEL))
    if "blocks.0.gamma_1" in keys and "blocks.0.gamma_1" not in own:
        return _Layout("facebookresearch/deit", lambda key: _from_deit(key, _PLAIN))
    return _Layout("timm")


def _swin(keys: set[str]) -> _Layout:
    at_end = "layers.0.downsample.reduction.weight" in keys
    if any(".attn.rpe_mlp." in key for key in keys):
        name = "Swin V2, the authors' SimMIM release"
    else:
        name = "Swin V2, microsoft/Swin-Transformer" if at_end else "Swin V2, timm"

    def rename(key: str) -> str:
        key = key.replace(".attn.rpe_mlp.", ".attn.cpb_mlp.")
        key = _shift_downsampling(key, 1) if at_end else key
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)

    return _Layout(name, rename, drops=(_COMPUTED,))


def _shift_downsampling(key: str, by: int) -> str:
    """Renumber: downsampling belongs to the stage before it in the authors' files, to the stage after it in timm."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + by}.downsample.", key)


def _from_deit(key: str, names: dict[str, str]) -> str:
    match = re.fullmatch(r"(blocks\.\d+)\.(\w+)(\..+)?", key)
    if not match or match[2] not in names:
        return key
    return f"{match[1]}.{names[match[2]]}{match[3] or ''}"
