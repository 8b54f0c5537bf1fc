"""Attention within windows with a continuous position bias: how a Swin Transformer V2 block mixes tokens."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from dsmim.models.attention.cosine import attend

MAX_LOGIT_SCALE = math.log(100)  # microsoft/Swin-Transformer: largest logarithm of the scale
FIRST_LOGIT_SCALE = math.log(10)
BIAS_RANGE = 16  # microsoft/Swin-Transformer: bias = 16 sigmoid(MLP)
MLP_WIDTH = 512  # microsoft/Swin-Transformer: width of the position-bias MLP


class _Projection(nn.Linear):
    """A linear layer whose bias is passed in. Its weight is used in its own forward, as ZeRO-3 needs."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class _ExactLinear(nn.Linear):
    """A layer of an fp32 island. Its weights are never rounded, not even when they are sent between ranks."""

    keep_fp32 = True


class WindowAttention(nn.Module):
    """Cosine attention between the tokens of each window. Key names are timm's.

    window: side in tokens. coordinate_window: side of the window in which position coordinates have length 1, which is
    the window of the pre-training (Swin V2, section 3.3). in_sequence: see attend.
    """

    def __init__(self, dim: int, window: int, num_heads: int, coordinate_window: int, in_sequence: bool = False):
        super().__init__()
        self.window, self.num_heads, self.coordinate_window = window, num_heads, coordinate_window
        self.in_sequence = in_sequence
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = nn.Sequential(
            _ExactLinear(2, MLP_WIDTH), nn.ReLU(inplace=True), _ExactLinear(MLP_WIDTH, num_heads, bias=False)
        )
        self.qkv = _Projection(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))  # keys have none
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("coordinates", _coordinates(window, coordinate_window), persistent=False)
        self.register_buffer("pairs", _pairs(window), persistent=False)
        self.fixed_bias: torch.Tensor | None = None
        """The position bias (H, N, N), computed once for weights that do not change; see fix_position_bias."""

    def initialise(self) -> None:
        """Set the first values of the logit scale and the biases; the layers inside have their own."""
        nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return attention on x (B, H, W, C), K windows of N tokens; mask (K, N, N) is added to the scores."""
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, qkv_bias).unflatten(-1, (3, self.num_heads, -1))  # (B, H, W, 3, heads, D)
        with _exact(x.device):  # scale, bias and softmax stay in fp32
            scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
            bias = self.position_bias() if self.fixed_bias is None else self.fixed_bias
            x = attend(qkv, self.window, scale, bias, mask, self.in_sequence)
        return self.proj(x)

    def position_bias(self) -> torch.Tensor:
        """Return the position bias (H, N, N) in fp32, minus its largest entry in each head.

        The subtraction does not change the softmax. It keeps the digits of the entries that matter where a kernel needs
        the bias in bfloat16.
        """
        with _exact(self.coordinates.device):
            table = BIAS_RANGE * self.cpb_mlp(self.coordinates.float()).float().sigmoid()  # ((2w - 1)², H)
            table = (table - table.detach().amax(0)).t().contiguous()
            tokens = self.window**2
            return table.gather(1, self.pairs.expand(self.num_heads, -1)).view(-1, tokens, tokens)

    def train(self, mode: bool = True) -> WindowAttention:
        """Set the mode, and forget the bias that was kept for evaluation."""
        self.fixed_bias = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self.fixed_bias = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments) -> None:
        self.fixed_bias = None
        super()._load_from_state_dict(*arguments)


@torch.no_grad()
def fix_position_bias(model: nn.Module) -> None:
    """Compute every position bias once, for inference with weights that do not change.

    train(), eval(), load_state_dict() and moves to another device undo this; then call it again. Don't use it for a
    model under ZeRO-3, whose schedule of all-gathers needs every forward to use the same modules.
    """
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.fixed_bias = module.position_bias()


def _exact(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, for an fp32 island (the meta device has no autocast)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _coordinates(window: int, coordinate_window: int) -> torch.Tensor:
    """Return the ((2w - 1)², 2) log-spaced relative positions, sign(x) log2(1 + |8 x / (w' - 1)|) / log2 8.

    Source: Swin V2, equation 4; the 8 is from microsoft/Swin-Transformer. w' is the coordinate window.
    """
    steps = torch.arange(1 - window, window, device="cpu", dtype=torch.float32) * 8 / max(coordinate_window - 1, 1)
    steps = steps.sign() * (steps.abs() + 1).log2() / math.log2(8)
    return torch.cartesian_prod(steps, steps)


def _pairs(window: int) -> torch.Tensor:
    """Return, for each pair of tokens (N²,), the row of its relative position in `_coordinates`."""
    place = torch.arange(window, device="cpu")
    y, x = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    dy, dx = (axis[:, None] - axis[None, :] + window - 1 for axis in (y, x))
    return (dy * (2 * window - 1) + dx).flatten()
