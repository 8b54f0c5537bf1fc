"""Vision transformers as DeiT III trains them (arXiv 2204.07118), on timm's blocks and with its key names.

timm's `deit3_*` entry points load the published weights correctly but start training differently. Here, as in
facebookresearch/deit (models_v2.py), LayerScale starts at 1e-4 at every depth, stochastic depth has the same rate in
every block, and class token and head start as truncated normals. The class token has no position.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from timm.layers import LayerScale, trunc_normal_
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dsmim.models.blocks import Recompute, run
from dsmim.models.initialise import DEVIATION
from dsmim.models.stochastic_depth import DropPath, depth_rates, residual

LAYER_SCALE = 1e-4  # models_v2.py, init_values

# facebookresearch/deit, models_v2.py; "x2": two attentions, then two MLPs, in parallel. nano is ours, for CPUs.
# The paper's g and G have timm's names here: giant and gigantic.
SIZES = {
    "deit3_nano_patch16": dict(patch_size=16, embed_dim=96, depth=4, num_heads=3),
    "deit3_tiny_patch16": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "deit3_small_patch16": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "deit3_small_patch16_36": dict(patch_size=16, embed_dim=384, depth=36, num_heads=6),
    "deit3_small_patch16_18x2": dict(patch_size=16, embed_dim=384, depth=18, num_heads=6, parallel=True),
    "deit3_medium_patch16": dict(patch_size=16, embed_dim=512, depth=12, num_heads=8),
    "deit3_base_patch16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "deit3_base_patch16_36": dict(patch_size=16, embed_dim=768, depth=36, num_heads=12),
    "deit3_base_patch16_18x2": dict(patch_size=16, embed_dim=768, depth=18, num_heads=12, parallel=True),
    "deit3_large_patch16": dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "deit3_huge_patch14": dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
    "deit3_huge_patch14_52": dict(patch_size=14, embed_dim=1280, depth=52, num_heads=16),
    "deit3_huge_patch14_26x2": dict(patch_size=14, embed_dim=1280, depth=26, num_heads=16, parallel=True),
    "deit3_giant_patch14_40": dict(patch_size=14, embed_dim=1408, depth=40, num_heads=16),
    "deit3_giant_patch14_40x2": dict(patch_size=14, embed_dim=1408, depth=40, num_heads=16, parallel=True),
    "deit3_gigantic_patch14_48": dict(patch_size=14, embed_dim=1664, depth=48, num_heads=16),
    "deit3_gigantic_patch14_48x2": dict(patch_size=14, embed_dim=1664, depth=48, num_heads=16, parallel=True),
}


# The two blocks have timm's names, because DeepSpeed files name them (zero_optimization.leaf_module.classes).
class Block(timm_vit.Block):
    """timm's block; a branch is computed only for the samples that keep it."""

    branches = ("attention", "feed_forward")

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        """Return the block's output: (B, L, D) → (B, L, D). options: of the attention, see timm."""
        x = residual(x, (self.drop_path1, partial(self.attention, **options)))
        return residual(x, (self.drop_path2, self.feed_forward))

    def attention(self, x: torch.Tensor, **options) -> torch.Tensor:
        """Return the first branch."""
        return self.ls1(self.attn(self.norm1(x), **options))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the second branch."""
        return self.ls2(self.mlp(self.norm2(x)))


class ParallelThingsBlock(timm_vit.ParallelThingsBlock):
    """timm's block of parallel branches ("x2"), each of which is computed only for the samples that keep it."""

    branches = ("branch",)

    def forward(self, x: torch.Tensor, **_) -> torch.Tensor:
        """Return the block's output: (B, L, D) → (B, L, D)."""
        for parts in (self.attns, self.ffns):
            x = residual(x, *((part.drop_path, partial(self.branch, part)) for part in parts))
        return x

    def branch(self, part: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        """Return one branch: norm, attention or MLP, LayerScale."""
        for module in part:
            x = x if module is part.drop_path else module(x)
        return x


class DeiT3(VisionTransformer):
    """timm's network with DeiT III's first weights: images (B, in_chans, H, W) → logits (B, classes), or features
    (no head).

    If the image side is not a multiple of the patch, the rest is cut off: 160 pixels give 11 × 11 patches of 14.
    """

    def __init__(
        self, drop_path_rate: float, patch_size: int, in_chans: int = 3, drop_path_rates: str = "uniform",
        block_fn: type[nn.Module] = Block, **options,
    ):  # fmt: skip
        super().__init__(
            patch_size=patch_size, in_chans=in_chans, no_embed_class=True, init_values=LAYER_SCALE, weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6), block_fn=block_fn, **options,
        )  # fmt: skip
        self.in_chans = in_chans  # older timm does not keep it
        self.patch = self.stride = patch_size
        self.recompute = Recompute()
        rates = depth_rates(drop_path_rates, drop_path_rate, len(self.blocks))
        for block, rate in zip(self.blocks, rates, strict=True):
            _set_block(block, rate)

    def initialise(self) -> None:
        """Set the first values of position embedding and class token; the layers inside have their own."""
        trunc_normal_(self.pos_embed, std=DEVIATION)
        trunc_normal_(self.cls_token, std=DEVIATION)

    def forward_features(self, images: torch.Tensor, **_) -> torch.Tensor:  # newer timm passes attention masks
        """Return all tokens, the class token first: (B, in_chans, H, W) → (B, 1 + L, D)."""
        return self._through(self.patch_embed(images))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patches that a mask token may replace: (B, in_chans, H, W) → (B, H/patch, W/patch, D)."""
        return self.patch_embed(images).unflatten(1, self.patch_embed.grid_size)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features of tokens, without the class token: (B, h, w, D) → (B, D, h, w)."""
        B, h, w, D = tokens.shape
        return self._through(tokens.flatten(1, 2))[:, 1:].transpose(1, 2).reshape(B, D, h, w)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose the blocks to recompute."""
        self.recompute = recompute

    def _through(self, x: torch.Tensor) -> torch.Tensor:
        """Return all blocks' normalised output for patches: (B, L, D) → (B, 1 + L, D)."""
        return self.norm(run(self.blocks, self._pos_embed(x), self.recompute))


def build(
    name: str,
    img_size: int = 224,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
    drop_path_rates: str = "uniform",
) -> DeiT3:
    """Return the network `name` of SIZES. Its rates are uniform as in models_v2.py: dpr = [rate] * depth."""
    size = dict(SIZES[name])
    block = ParallelThingsBlock if size.pop("parallel", False) else Block
    return DeiT3(
        img_size=img_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        drop_path_rates=drop_path_rates,
        in_chans=in_chans,
        block_fn=block,
        **size,
    )


def timm_arguments(name: str, **options) -> tuple[str, dict]:
    """Return an entry point of timm and the arguments that turn it into `name`."""
    size = dict(SIZES[name])
    options = {key: value for key, value in options.items() if value is not None}
    if size.pop("parallel", False):
        options["block_fn"] = timm_vit.ParallelThingsBlock
    return "deit3_base_patch16_224", size | {"init_values": LAYER_SCALE} | options


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Return parameter name → layer id of a ViT or BEiT, as BEiT, MAE and SimMIM count (get_layer_id_for_vit).

    Class token, positions and patch embedding are 0, block i is i + 1; final norm, head and the shared table of
    relative positions are one above all blocks. Timm's other tokens and its norm before the blocks are 0.
    """
    return {name: _layer_id(name, len(model.blocks)) for name, _ in model.named_parameters()}


def _layer_id(name: str, depth: int) -> int:
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return (
        0
        if re.match(r"(cls_token|dist_token|reg_token|mask_token|pos_embed|patch_embed|norm_pre)", name)
        else depth + 1
    )


def _set_block(block: nn.Module, rate: float) -> None:
    """Set a block's rate of drop path and LayerScale's first value."""
    for name, module in list(block.named_modules()):
        if isinstance(module, LayerScale):
            module.init_values = LAYER_SCALE
        parent, _, leaf = name.rpartition(".")
        if leaf.startswith("drop_path"):
            setattr(block.get_submodule(parent), leaf, DropPath(rate))
