"""The windows that a file of Swin V2 weights was trained with, against the model's.

The position bias is a function of coordinates (Swin V2, section 3.3). Weights mean the same in another attention window
only if a model measures its coordinates by the same window as the training did.
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
_CLOSE = 0.2  # tokens: a table in fp16 gives windows up to 64 within this


@dataclass(frozen=True)
class Windows:
    """Sides in tokens, one per stage: the attention's, and that in which position coordinates have length 1."""

    attention: tuple[int, ...]
    coordinates: tuple[int, ...]


def from_settings(img_size: int, window_size: int, pretrained_window_sizes: Sequence[int] | None) -> Windows:
    """Those of a Swin V2 built so: windows are clamped to the map, coordinates follow the attention where it says 0."""
    attention = tuple(min(window_size, img_size // PATCH // 2**stage) for stage in range(STAGES))
    given = tuple(pretrained_window_sizes or (0,) * STAGES)
    return Windows(attention, tuple(c or a for c, a in zip(given, attention, strict=True)))


def from_buffers(tensors: Mapping[str, torch.Tensor], source: str) -> Windows | None:
    """Those told by the buffers in the authors' files; None without any. Raises ValueError for a strange table.

    A table of window W measured by W' ends in log2(8 (W - 1) / (W' - 1) + 1) / 3 (microsoft/Swin-Transformer).
    """
    found = {int(match[1]): key for key in tensors if (match := _TABLE.search(key))}
    if not found:
        return None
    stages = [_from_table(found[stage], tensors[found[stage]], source) for stage in sorted(found)]
    return Windows(tuple(a for a, _ in stages), tuple(c for _, c in stages))


def of_model(model: nn.Module) -> Windows | None:
    """Those of a Swin V2, ours or timm's; None for any other network."""
    attentions = [getattr(stage.blocks[0], "attn", None) for stage in getattr(model, "layers", []) if _blocks(stage)]
    if not attentions or not all(hasattr(attn, "cpb_mlp") for attn in attentions):
        return None
    pairs = [_of_attention(attn) for attn in attentions]
    return Windows(tuple(a for a, _ in pairs), tuple(c for _, c in pairs))


def compare(told: Windows | None, model: Windows, source: str, setting: str) -> tuple[dict[str, str], list[str]]:
    """What changes, and what is to be remarked. `setting`: the name under which a user sets the model's coordinates.

    Raises ValueError where the file's coordinates are not the model's.
    """
    if told is None:
        return {}, [f"the file does not tell its windows: position coordinates taken as {_list(model.coordinates)}"]
    if told.coordinates != model.coordinates:
        raise ValueError(
            f"{source}: its position biases were learnt with windows {_list(told.coordinates)}, the model measures by "
            f"{_list(model.coordinates)} and would read them wrongly; set {setting}={_list(told.coordinates)}"
        )
    if told.attention == model.attention:
        return {}, []
    return {"attention windows": f"{_list(told.attention)} → {_list(model.attention)}, coordinates unchanged"}, []


def _from_table(key: str, table: torch.Tensor, source: str) -> tuple[int, int]:
    if table.ndim != 4 or table.shape[1] != table.shape[2] or table.shape[1] % 2 == 0:
        raise ValueError(f"{source}: {key} has shape {tuple(table.shape)}, no square window's (1, 2W - 1, 2W - 1, 2)")
    window = (table.shape[1] + 1) // 2
    if window == 1:  # a single token has no distances, whatever they are measured by
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
