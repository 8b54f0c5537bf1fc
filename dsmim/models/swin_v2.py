"""Swin Transformer V2 (arXiv 2111.09883): the network, with timm's key names.

Its outputs equal those of timm's implementation within rounding; timm's equals the authors' after renaming keys. It is
written again here because the project changes the inside of a block: attention, activation checkpointing, and creation
module by module.

Shapes: all maps are (B, H, W, C), as in timm.
"""

from __future__ import annotations

import torch
from timm.layers import ClassifierHead, Mlp, PatchEmbed
from torch import nn
from torch.nn import functional as F

from dsmim.models.attention.window import WindowAttention
from dsmim.models.blocks import Recompute, run
from dsmim.models.stochastic_depth import DropPath, depth_rates, residual

PATCH = 4  # pixels; every published size uses it
MASKED = -100.0  # microsoft/Swin-Transformer: added to scores of tokens that are not neighbours


class ResPostNorm(nn.LayerNorm):
    """The norm at the end of a residual branch. It starts at 0, so every block starts as the identity."""

    def initialise(self) -> None:
        """Set scale and shift to 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SwinTransformerV2Block(nn.Module):
    """Attention in (shifted) windows, then an MLP, each normalised before it is added; perhaps a norm after both.

    size: side of the map in tokens. extra_norm: a LayerNorm on the main branch (section 3.2 of the paper), with the key
    `enorm` of the authors' later code. coordinate_window: see WindowAttention; 0 means the window itself.
    """

    def __init__(self, dim: int, size: int, num_heads: int, window: int, shifted: bool, coordinate_window: int,
                 drop_path: float, extra_norm: bool, in_sequence: bool):  # fmt: skip
        super().__init__()
        self.window = min(window, size)
        self.shift = window // 2 if shifted and size > window else 0
        self.attn = WindowAttention(dim, self.window, num_heads, coordinate_window or self.window, in_sequence)
        self.norm1 = ResPostNorm(dim)
        self.drop_path1 = DropPath(drop_path)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = ResPostNorm(dim)
        self.drop_path2 = DropPath(drop_path)
        self.enorm = nn.LayerNorm(dim) if extra_norm else None
        padded = size + -size % self.window
        self.register_buffer("mask", _mask(padded, self.window, self.shift) if self.shift else None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output: (B, H, W, C) → (B, H, W, C)."""
        x = residual(x, (self.drop_path1, self.attention))
        x = residual(x, (self.drop_path2, self.feed_forward))
        return x if self.enorm is None else self.enorm(x)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first branch."""
        return self.norm1(self.mix(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the second branch."""
        return self.norm2(self.mlp(x))

    @property
    def branches(self) -> tuple[str, ...]:
        """The methods that can be compiled for any number of samples. Attention in sequence would need a graph for each
        number."""
        return ("feed_forward",) if self.attn.in_sequence else ("attention", "feed_forward")

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Return attention within windows, on the map rolled by the shift and padded with zeros to whole windows."""
        _, H, W, _ = x.shape
        w, s = self.window, self.shift
        x = x.roll((-s, -s), (1, 2)) if s else x
        if H % w or W % w:
            x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        x = self.attn(x, self.mask)[:, :H, :W]
        return x.roll((s, s), (1, 2)) if s else x


class PatchMerging(nn.Module):
    """(B, H, W, C) → (B, H/2, W/2, 2C): four neighbours become one token."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Join four neighbours, reduce their 4C channels to 2C, and normalise."""
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)  # column by column, as published
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    """Blocks at one resolution. All stages but the first begin with a PatchMerging, as in timm."""

    def __init__(self, number: int, first_block: int, blocks: list[nn.Module], dim: int):
        super().__init__()
        self.number, self.first_block = number, first_block
        self.downsample = PatchMerging(dim // 2) if number else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = Recompute()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stage's output (B, H, W, C); its input is twice as high and wide except in the first stage."""
        return run(self.blocks, self.downsample(x), self.recompute, self.first_block, self.number)


class SwinTransformerV2(nn.Module):
    """The whole network: images (B, in_chans, img_size, img_size) → logits (B, num_classes), or pooled
    features without head.

    window_size: in tokens, clamped to the map. pretrained_window_sizes: the coordinate_window of each stage, see
    WindowAttention (0: the window itself). extra_norm_every: an extra norm after each n-th block of a stage (0: none).
    sequential_stages: number of first stages whose attention computes a few windows at a time. drop_path_rates: how
    the drop path rate grows from block to block, see depth_rates.
    """

    patch, stride = PATCH, 8 * PATCH

    def __init__(self, img_size: int, window_size: int, embed_dim: int, depths: tuple[int, ...],
                 num_heads: tuple[int, ...], num_classes: int, drop_path_rate: float,
                 pretrained_window_sizes: tuple[int, ...], extra_norm_every: int, sequential_stages: int,
                 in_chans: int = 3, drop_path_rates: str = "linear"):  # fmt: skip
        super().__init__()
        self.in_chans = in_chans
        self.embed_dim, self.num_features = embed_dim, embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(img_size, PATCH, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC")
        rates = depth_rates(drop_path_rates, drop_path_rate, sum(depths))
        stages, first = [], 0
        for stage, depth in enumerate(depths):
            dim, size = embed_dim * 2**stage, img_size // PATCH // 2**stage
            blocks = [
                SwinTransformerV2Block(
                    dim, size, num_heads[stage], window_size, number % 2 == 1, pretrained_window_sizes[stage],
                    rates[first + number], bool(extra_norm_every) and (number + 1) % extra_norm_every == 0,
                    stage < sequential_stages,
                )
                for number in range(depth)
            ]  # fmt: skip
            stages.append(Stage(stage, first, blocks, dim))
            first += depth
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type="avg", input_fmt="NHWC")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes), or pooled features (B, num_features) without head."""
        return self.head(self.norm(self.layers(self.patch_embed(images))))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return the patches that a mask token may replace: (B, in_chans, H, W) → (B, H/4, W/4, C)."""
        return self.patch_embed(images)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features of tokens: (B, h, w, C) → (B, 8C, h/8, w/8)."""
        return self.norm(self.layers(tokens)).permute(0, 3, 1, 2)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose the blocks to recompute."""
        for stage in self.layers:
            stage.recompute = recompute


def _mask(size: int, window: int, shift: int) -> torch.Tensor:
    """Return (K, N, N) for the K windows of a rolled map: 0 for tokens that were neighbours before, else MASKED."""
    edges = torch.zeros(size, device="cpu")
    edges[-window:-shift] = 1
    edges[-shift:] = 2
    region = 3 * edges[:, None] + edges[None, :]
    region = region.view(size // window, window, size // window, window).transpose(1, 2).reshape(-1, window**2)
    return (region[:, :, None] != region[:, None, :]).float() * MASKED
