"""Swin Transformer V2 (arXiv 2111.09883) through timm's implementation: its modules, its key names.

timm's network equals the authors' bit for bit after renaming keys, so that only the sizes live here.
"""

from __future__ import annotations

import re

from timm.models.swin_transformer_v2 import SwinTransformerV2

# Width of stage 1, blocks per stage, heads per stage (head width 32 throughout).
# tiny, small, base: Table 1 of the paper and microsoft/Swin-Transformer configs/swinv2; nano is ours, for CPUs.
SIZES = {
    "swinv2_nano": dict(embed_dim=32, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 8)),
    "swinv2_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
PATCH = 4  # pixels; every published size uses it
STRIDE = 32  # pixels between two outputs of the last stage


def build(
    name: str,
    img_size: int = 192,
    window_size: int = 12,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    pretrained_window_sizes: tuple[int, ...] | None = None,
) -> SwinTransformerV2:
    """The network `name` of SIZES; see registry.create_model for the options.

    Raises ValueError when img_size is not a multiple of 32.
    """
    if img_size % STRIDE:
        raise ValueError(f"model.img_size: {name} halves its map three times, so {img_size} must be a multiple of 32")
    return SwinTransformerV2(
        img_size=img_size,
        patch_size=PATCH,
        window_size=window_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        pretrained_window_sizes=tuple(pretrained_window_sizes or (0, 0, 0, 0)),
        **SIZES[name],
    )


def timm_arguments(name: str, **options) -> tuple[str, dict]:
    """An entry point of timm and the arguments that turn it into `name`."""
    options = {key: value for key, value in options.items() if value is not None}
    return "swinv2_base_window12_192", {"window_size": 12, "img_size": 192, **SIZES[name], **options}


def layer_ids(model: SwinTransformerV2) -> dict[str, int]:
    """Parameter name → layer id as microsoft/SimMIM counts (get_swin_layer): patch embedding 0, block k of the whole
    network k + 1, a downsampling layer with the last block before it, final norm and head one above all blocks.
    """
    depths = [len(stage.blocks) for stage in model.layers]
    return {name: _layer_id(name, depths) for name, _ in model.named_parameters()}


def _layer_id(name: str, depths: list[int]) -> int:
    if name.startswith("patch_embed."):
        return 0
    if match := re.match(r"layers\.(\d+)\.downsample\.", name):  # timm puts it at the head of the next stage
        return sum(depths[: int(match[1])])
    if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    return sum(depths) + 1
