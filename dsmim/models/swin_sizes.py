"""The published sizes of Swin Transformer V2, and what else depends on the family."""

from __future__ import annotations

import re

from dsmim.models.swin_v2 import SwinTransformerV2

# Width of stage 1, blocks per stage, heads per stage (head width 32 throughout).
# tiny, small, base, large: arXiv 2111.09883 and microsoft/Swin-Transformer configs/swinv2; huge, giant3b ("G"): width
# and depths of that paper. Heads of huge are not published: 32 channels each, as everywhere else, is an inference.
# giant is arXiv 2206.04664's "g" of 1.06 B, whose table is an image: width and depths by its released weights' size and
# by third-party code that loads them. nano is ours, for CPUs.
SIZES = {
    "swinv2_nano": dict(embed_dim=32, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 8)),
    "swinv2_tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swinv2_base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swinv2_large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "swinv2_huge": dict(embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88)),
    "swinv2_giant": dict(embed_dim=448, depths=(2, 2, 18, 2), num_heads=(14, 28, 56, 112)),
    "swinv2_giant3b": dict(embed_dim=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128)),
}
STAGES = 4


def build(
    name: str,
    img_size: int = 192,
    window_size: int | None = None,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    pretrained_window_sizes: tuple[int, ...] | None = None,
    extra_norm_every: int = 0,
    sequential_stages: int = 0,
) -> SwinTransformerV2:
    """The network `name` of SIZES; see SwinTransformerV2 for the options.

    Raises ValueError for an img_size that is not a multiple of 32, a missing window, or another number of stages.
    """
    stride = SwinTransformerV2.stride
    if img_size % stride:
        raise ValueError(
            f"model.img_size: {name} halves its map three times, so {img_size} must be a multiple of {stride}"
        )
    if window_size is None:
        raise ValueError(f"model.window_size: {name} attends within windows, give their side in tokens (12 at 192 px)")
    windows = tuple(pretrained_window_sizes or (0,) * STAGES)
    if len(windows) != STAGES:
        raise ValueError(f"model.pretrained_window_sizes: {name} has {STAGES} stages, got {len(windows)} sizes")
    return SwinTransformerV2(
        img_size=img_size,
        window_size=window_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        pretrained_window_sizes=windows,
        extra_norm_every=extra_norm_every,
        sequential_stages=sequential_stages,
        **SIZES[name],
    )


def timm_arguments(name: str, extra_norm_every: int = 0, sequential_stages: int = 0, **options) -> tuple[str, dict]:
    """An entry point of timm and the arguments that turn it into `name`. Raises ValueError where timm has none."""
    if extra_norm_every:
        raise ValueError(f"timm's Swin V2 has no extra norm (model.extra_norm_every={extra_norm_every} of {name})")
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
