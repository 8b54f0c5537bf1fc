"""Scaled cosine attention within windows, with a learnt position bias (Swin Transformer V2, section 3.2).

    softmax(scale · q̂ k̂ᵀ + bias + mask) v,   q̂ = q / |q|,  k̂ = k / |k|

There are three implementations, equal within rounding. Among torch's fused kernels only the memory-efficient one (CUDA)
takes a bias *and* computes its gradient. Flash attention takes no bias. On a CPU, a bias that needs a gradient sends
`scaled_dot_product_attention` to its unfused path, which is slower than plain matrix products. Therefore `fused` serves
accelerators, `sequential` their first stages at high resolution, and `blockwise` (blockwise.py) the CPU.

Shapes: a map has R × P = K windows of w × w = N tokens, and H heads of D channels. qkv is (B, R·w, P·w, 3, H, D), scale
(H, 1, 1), bias (H, N, N) and mask (K, N, N). All but qkv are fp32. The result (B, R·w, P·w, H·D) has the type of qkv.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dsmim.models.attention.blockwise import TINY, blockwise

CHUNK = 2**24  # scores that sequential attention computes at once: 64 MB in fp32

Tensor = torch.Tensor


def attend(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None, in_sequence=False):
    """Return cosine attention, computed by the implementation that suits the device.

    in_sequence: on accelerators, a few windows at a time, for less memory.
    """
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return blockwise(qkv, window, scale, bias, mask)
    return (sequential if in_sequence else fused)(qkv, window, scale, bias, mask)


def fused(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return cosine attention by scaled_dot_product_attention.

    The scale is multiplied into the queries; bias and mask are the kernel's attn_mask.
    """
    q, k, v = _windows(qkv, window, scale)
    out = _product(q, k, v, bias, mask)
    return _map(out, qkv.shape, window)


def sequential(
    qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None, scores: int = CHUNK
) -> Tensor:
    """Return the result of `fused`, computed for a few windows at a time (at most `scores` scores, or one window).

    The backward pass computes each part again. So memory never holds the scores of all windows together, nor the
    bias's gradients of all windows (Swin V2, section 3.5).
    """
    q, k, v = _windows(qkv, window, scale)  # (B, K, H, N, D)
    _, K, H, N, _ = q.shape
    most = max(1, scores // (H * N * N))  # windows at a time
    per_image = min(most, K)
    images = max(1, most // per_image)
    parts = []
    for first in range(0, K, per_image):
        chosen = slice(first, first + per_image)
        masks = None if mask is None else mask[chosen]
        inputs = zip(*(x[:, chosen].split(images) for x in (q, k, v)), strict=True)
        outputs = [checkpoint(_product, *qkv_part, bias, masks, use_reentrant=False) for qkv_part in inputs]
        parts.append(torch.cat(outputs))
    return _map(torch.cat(parts, dim=1), qkv.shape, window)


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q kᵀ + bias + mask) v for q = scale · q̂, k = k̂ and v; all (B, K, H, N, D).

    The kernel sums and exponentiates in fp32 for every input type.
    """
    B, K, H, N, D = q.shape
    if mask is None:
        shape, shift = (B * K, H, N, D), bias
    else:  # the windows of an image become heads, so that all images share one tensor of bias and mask
        shape, shift = (B, K * H, N, D), (bias + mask.unsqueeze(1)).flatten(0, 1)
    q, k, v = (x.reshape(shape) for x in (q, k, v))
    shift = shift.to(q.dtype).unsqueeze(0)  # the kernel pads it once, not per image, and then broadcasts it
    return F.scaled_dot_product_attention(q, k, v, shift, scale=1.0).view(B, K, H, N, D)


def _windows(qkv: Tensor, window: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale · q̂, k̂ and v, each (B, K, H, N, D). Norms and scale are computed in fp32."""
    q, k, v = qkv.unbind(3)
    q = (F.normalize(q.float(), dim=-1, eps=TINY) * scale.view(-1, 1)).to(qkv.dtype)
    k = F.normalize(k.float(), dim=-1, eps=TINY).to(qkv.dtype)
    B, height, width, H, D = v.shape
    shape = (B, height // window, window, width // window, window, H, D)
    order = (0, 1, 3, 5, 2, 4, 6)
    return tuple(x.view(shape).permute(order).flatten(1, 2).flatten(3, 4) for x in (q, k, v))


def _map(x: Tensor, shape: torch.Size, window: int) -> Tensor:
    """Return windows (B, K, H, N, D) as a map (B, R·w, P·w, H·D)."""
    B, height, width = shape[:3]
    x = x.unflatten(1, (height // window, width // window)).unflatten(4, (window, window))
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, height, width, -1)
