"""The published sizes of Swin Transformer V2, and the functions that create_model needs for this family."""

from __future__ import annotations

import re

from dsmim.models.swin_v2 import SwinTransformerV2

# Width of stage 1, blocks per stage, heads per stage (head width 32 throughout).
# tiny, small, base, large: arXiv 2111.09883 and microsoft/Swin-Transformer configs/swinv2. huge, giant3b ("G"): width
# and depths from the same paper. The heads of huge are not published; 32 channels per head, as in all other sizes, is
# an inference. giant is the "g" of 1.06 B in arXiv 2206.04664, whose table is an image; its width and depths come from
# the size of the released weights and from third-party code that loads them. nano is ours, for CPUs.
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
    in_chans: int = 3,
    drop_path_rates: str = "linear",
) -> SwinTransformerV2:
    """Return the network `name` of SIZES; see SwinTransformerV2 for the options.

    Raises ValueError for an img_size that is not a multiple of 32, a missing window, or a wrong number of stages.
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
        in_chans=in_chans,
        drop_path_rates=drop_path_rates,
        **SIZES[name],
    )


def timm_arguments(name: str, extra_norm_every: int = 0, sequential_stages: int = 0, **options) -> tuple[str, dict]:
    """Return an entry point of timm and the arguments that turn it into `name`.

    Raises ValueError for a model with extra norms, which timm does not have.
    """
    if extra_norm_every:
        raise ValueError(f"timm's Swin V2 has no extra norm (model.extra_norm_every={extra_norm_every} of {name})")
    options = {key: value for key, value in options.items() if value is not None}
    return "swinv2_base_window12_192", {"window_size": 12, "img_size": 192, **SIZES[name], **options}


def layer_ids(model: SwinTransformerV2) -> dict[str, int]:
    """Return parameter name → layer id, as microsoft/SimMIM counts (get_swin_layer).

    The patch embedding is 0, block k of the whole network k + 1. A downsampling layer has the id of the last block
    before it. The final norm and the head are one above all blocks.
    """
    depths = [len(stage.blocks) for stage in model.layers]
    return {name: _layer_id(name, depths) for name, _ in model.named_parameters()}


def _layer_id(name: str, depths: list[int]) -> int:
    if name.startswith("patch_embed."):
        return 0
    if match := re.match(r"layers\.(\d+)\.downsample\.", name):  # in timm it is the first part of the next stage
        return sum(depths[: int(match[1])])
    if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    return sum(depths) + 1
