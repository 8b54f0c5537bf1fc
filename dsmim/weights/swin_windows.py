"""Compare the windows with which a file of Swin V2 weights was trained with the model's windows.

The position bias is a function of coordinates (Swin V2, section 3.3). Weights mean the same in another attention window
only if the model measures its coordinates by the same window as the training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.layers import to_2tuple
from torch import nn

from dsmim.models.swin_sizes import STAGES
from dsmim.models.swin_v2 import PATCH

_TABLE = re.compile(r"(?:^|\.)layers\.(\d+)\.blocks\.0\.attn\.relative_coords_table$")
_CLOSE = 0.2  # tokens: the error of windows up to 64 that are read from a table in fp16


@dataclass(frozen=True)
class Windows:
    """Sides in tokens, per stage: of attention windows, and of windows in which position coordinates have length 1."""

    attention: tuple[int, ...]
    coordinates: tuple[int, ...]


def from_settings(img_size: int, window_size: int, pretrained_window_sizes: Sequence[int] | None) -> Windows:
    """Return the windows of a Swin V2 with these settings.

    Attention windows are clamped to the map. Where pretrained_window_sizes is 0, coordinates use the attention window.
    """
    attention = tuple(min(window_size, img_size // PATCH // 2**stage) for stage in range(STAGES))
    given = tuple(pretrained_window_sizes or (0,) * STAGES)
    return Windows(attention, tuple(c or a for c, a in zip(given, attention, strict=True)))


def from_buffers(tensors: Mapping[str, torch.Tensor], source: str) -> Windows | None:
    """Return the windows that the buffers in the authors' files show; None without such buffers.

    Raises ValueError for a table that no window gives.

    A table of window W measured by W' ends in log2(8 (W - 1) / (W' - 1) + 1) / 3 (microsoft/Swin-Transformer).
    """
    found = {int(match[1]): key for key in tensors if (match := _TABLE.search(key))}
    if not found:
        return None
    stages = [_from_table(found[stage], tensors[found[stage]], source) for stage in sorted(found)]
    return Windows(tuple(a for a, _ in stages), tuple(c for _, c in stages))


def of_model(model: nn.Module) -> Windows | None:
    """Return the windows of a Swin V2, dsmim's or timm's; None for any other network."""
    attentions = [getattr(stage.blocks[0], "attn", None) for stage in getattr(model, "layers", []) if _blocks(stage)]
    if not attentions or not all(hasattr(attn, "cpb_mlp") for attn in attentions):
        return None
    pairs = [_of_attention(attn) for attn in attentions]
    return Windows(tuple(a for a, _ in pairs), tuple(c for _, c in pairs))


def compare(file: Windows | None, model: Windows, source: str, setting: str) -> tuple[dict[str, str], list[str]]:
    """Return what changes, and notes for the log. `setting`: the key with which a user sets the model's coordinates.

    Raises ValueError when the file's coordinates are not the model's.
    """
    if file is None:
        return {}, [f"the file does not name its windows: position coordinates taken as {_list(model.coordinates)}"]
    if file.coordinates != model.coordinates:
        raise ValueError(
            f"{source}: its position biases were learnt with windows {_list(file.coordinates)}, the model measures by "
            f"{_list(model.coordinates)} and would read them wrongly; set {setting}={_list(file.coordinates)}"
        )
    if file.attention == model.attention:
        return {}, []
    return {"attention windows": f"{_list(file.attention)} → {_list(model.attention)}, coordinates unchanged"}, []


def _from_table(key: str, table: torch.Tensor, source: str) -> tuple[int, int]:
    if table.ndim != 4 or table.shape[1] != table.shape[2] or table.shape[1] % 2 == 0:
        raise ValueError(f"{source}: {key} has shape {tuple(table.shape)}, a square window has (1, 2W - 1, 2W - 1, 2)")
    window = (table.shape[1] + 1) // 2
    if window == 1:  # a single token has no distances to measure
        return 1, 1
    measured = 1 + 8 * (window - 1) / (2 ** (3 * table.max().item()) - 1)
    if not abs(measured - round(measured)) < _CLOSE:
        raise ValueError(f"{source}: {key} ends in {table.max().item():g}, which no whole window size gives")
    return window, round(measured)


def _of_attention(attn: nn.Module) -> tuple[int, int]:
    if hasattr(attn, "coordinate_window"):
        return attn.window, attn.coordinate_window
    window = to_2tuple(attn.window_size)[0]  # timm's
    return window, to_2tuple(attn.pretrained_window_size)[0] or window


def _blocks(stage: nn.Module) -> bool:
    return len(getattr(stage, "blocks", ())) > 0


def _list(windows: Sequence[int]) -> str:
    return f"[{','.join(map(str, windows))}]"
