"""Resample learnt positions for another resolution: absolute embeddings, and BEiT's tables of relative positions."""

from __future__ import annotations

from math import isqrt

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn

from dsmim.weights.layouts import Native

_TABLE = "relative_position_bias_table"
_SHARED = f"rel_pos_bias.{_TABLE}"


def adapt(native: Native, model: nn.Module, source: str) -> dict[str, str]:
    """Resample positions for the model's resolution, in place. Return what was done, by name.

    Raises ValueError for positions that are not a square map, or whose slots for extra tokens do not fit the model.
    """
    own = model.state_dict()
    changed = _absolute(native, model, own, source) if "pos_embed" in native.tensors and "pos_embed" in own else {}
    changed |= _share(native, own)
    for name in [name for name in native.tensors if name.endswith(_TABLE) and name in own]:
        changed |= _relative(native, name, model, own[name], source)
    return changed


def _absolute(native: Native, model: nn.Module, own: dict[str, torch.Tensor], source: str) -> dict[str, str]:
    """Resample pos_embed (1, slots + positions, D) for the model's map, with or without a slot for the class token."""
    embed, wanted = native.tensors["pos_embed"], own["pos_embed"]
    grid = getattr(model.patch_embed, "grid_size", None)
    if embed.shape == wanted.shape or grid is None:
        return {}  # nothing to do, or an error that the check of shapes reports
    height, width = grid
    slots = wanted.shape[1] - height * width
    if embed.ndim != 3 or (embed.shape[1] == wanted.shape[1] and height != width):
        return {}  # as many positions as the model, or not an embedding, which the check of shapes reports
    side, extra = _square(embed.shape[1])
    if side is None:
        raise ValueError(
            f"{source}: pos_embed has {embed.shape[1]} positions, not a square map with or without a class token; "
            f"build the model at the file's resolution"
        )
    changed = _slots(native, extra, slots, source)
    if (side, side) != (height, width):
        native.tensors["pos_embed"] = resample_abs_pos_embed(  # as facebookresearch/deit main.py: no antialias
            native.tensors["pos_embed"], [height, width], num_prefix_tokens=slots, antialias=False
        )
        changed["pos_embed"] = f"resampled {side}×{side} → {height}×{width}"
    return changed


def _slots(native: Native, extra: int, wanted: int, source: str) -> dict[str, str]:
    """Add or remove the class token's slot, so that class token plus its position stays the same vector."""
    embed, token = native.tensors["pos_embed"], native.tensors.get("cls_token")
    if extra == wanted:
        return {}
    if (extra, wanted) == (1, 0) and token is not None and token.shape == embed[:, :1].shape:
        native.tensors["cls_token"] = token.float() + embed[:, :1].float()
        native.tensors["pos_embed"] = embed[:, 1:]
        return {"cls_token": "its position was added to it, because the model has no position for it"}
    if (extra, wanted) == (0, 1):
        native.tensors["pos_embed"] = torch.cat([torch.zeros_like(embed[:, :1]), embed], dim=1)
        return {"cls_token": "its position is 0, because the file has no position for it"}
    raise ValueError(f"{source}: pos_embed has {extra} slots for tokens outside the map, the model {wanted}")


def _share(native: Native, own: dict[str, torch.Tensor]) -> dict[str, str]:
    """Copy BEiT's table to every block: pre-training has one for all blocks, fine-tuning one for each."""
    blocks = [name for name in own if name.startswith("blocks.") and name.endswith(f".attn.{_TABLE}")]
    if _SHARED not in native.tensors or _SHARED in own or not blocks:
        return {}
    table, key = native.tensors.pop(_SHARED), native.origin.pop(_SHARED)
    for name in blocks:
        native.tensors[name], native.origin[name] = table, key
    return {"rel_pos_bias": f"shared table copied to {len(blocks)} blocks"}


def _relative(native: Native, name: str, model: nn.Module, wanted: torch.Tensor, source: str) -> dict[str, str]:
    """Resample a table ((2W - 1)² + extra, heads) for the model's window, by timm's function, which follows BEiT."""
    table, window = native.tensors[name], getattr(model.get_submodule(name.rpartition(".")[0]), "window_size", None)
    if window is None or table.ndim != 2 or table.shape == wanted.shape or table.shape[1:] != wanted.shape[1:]:
        return {}  # the check of shapes reports another number of heads
    extra = len(wanted) - (2 * window[0] - 1) * (2 * window[1] - 1)
    side = isqrt(max(len(table) - extra, 0))
    if side**2 != len(table) - extra or side % 2 == 0:
        found = f"{native.origin[name]} has {len(table)} rows"
        raise ValueError(f"{source}: {found}, which does not fit a square window ((2W - 1)² + {extra})")
    native.tensors[name] = resize_rel_pos_bias_table(table, window, tuple(wanted.shape))
    return {name: f"resampled window {(side + 1) // 2} → {window[0]}×{window[1]}"}


def _square(count: int) -> tuple[int | None, int]:
    """Return (side, slots) of a square map in `count` positions, with at most two slots (class, distillation token)."""
    for extra in (0, 1, 2):
        if count > extra and isqrt(count - extra) ** 2 == count - extra:
            return isqrt(count - extra), extra
    return None, 0
