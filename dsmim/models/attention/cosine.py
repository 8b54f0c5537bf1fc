"""Scaled cosine attention within windows, with a position bias that is learnt (Swin Transformer V2, section 3.2).

    softmax(scale · q̂ k̂ᵀ + bias + mask) v,   q̂ = q / |q|,  k̂ = k / |k|

Three ways to compute it, equal within rounding. Of torch's fused kernels only the memory-efficient one (CUDA) takes a
bias *and* gives its gradient; flash attention takes no bias, and on a CPU a bias with gradient sends
`scaled_dot_product_attention` to its unfused path, which is slower than plain matrix products. Hence `fused` for
accelerators, `sequential` for their first stages at high resolution, and `blockwise_attention.py` for the CPU.

Shapes: a map has R × P windows of w × w = N tokens; H heads of D channels. qkv (B, R·w, P·w, 3, H, D), scale (H, 1, 1),
bias (H, N, N) and mask (R·P, N, N), all fp32 but qkv; the result (B, R·w, P·w, H·D) has the type of qkv.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dsmim.models.attention.blockwise import TINY, blockwise

CHUNK = 2**24  # scores computed at once in sequential attention: 64 MB in fp32

Tensor = torch.Tensor


def attend(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None, in_sequence=False):
    """Cosine attention in the way that suits the device; in_sequence: a few windows at a time, for less memory."""
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return blockwise(qkv, window, scale, bias, mask)
    return (sequential if in_sequence else fused)(qkv, window, scale, bias, mask)


def fused(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """By scaled_dot_product_attention: the scale goes into the queries, bias and mask are its attn_mask."""
    q, k, v = _windows(qkv, window, scale)
    out = _product(q, k, v, bias, mask)
    return _map(out, qkv.shape, window)


def sequential(
    qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None, scores: int = CHUNK
) -> Tensor:
    """`fused` over a few windows at a time, each recomputed in the backward pass (Swin V2, section 3.5): neither the
    scores nor the bias's gradient of all windows ever lie in memory together."""
    q, k, v = _windows(qkv, window, scale)  # (B, K, H, N, D)
    _, K, H, N, _ = q.shape
    step = max(1, scores // (H * N * N))  # windows
    places = min(step, K)
    images = max(1, step // places)
    columns = []
    for first in range(0, K, places):
        own = slice(first, first + places)
        part = None if mask is None else mask[own]
        rows = zip(*(x[:, own].split(images) for x in (q, k, v)), strict=True)
        done = [checkpoint(_product, *row, bias, part, use_reentrant=False) for row in rows]
        columns.append(torch.cat(done))
    return _map(torch.cat(columns, dim=1), qkv.shape, window)


def _product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """q · scale, k̂ and v (B, K, H, N, D) → the same. The kernel sums and exponentiates in fp32 whatever its inputs."""
    B, K, H, N, D = q.shape
    if mask is None:
        shape, shift = (B * K, H, N, D), bias
    else:  # an image's windows become heads, so that images share one tensor of bias and mask
        shape, shift = (B, K * H, N, D), (bias + mask.unsqueeze(1)).flatten(0, 1)
    q, k, v = (x.reshape(shape) for x in (q, k, v))
    shift = shift.to(q.dtype).unsqueeze(0)  # broadcast by the kernel, which pads it before, and not once per image
    return F.scaled_dot_product_attention(q, k, v, shift, scale=1.0).view(B, K, H, N, D)


def _windows(qkv: Tensor, window: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q̂ · scale, k̂ and v, (B, K, H, N, D) each; norms and scale in fp32."""
    q, k, v = qkv.unbind(3)
    q = (F.normalize(q.float(), dim=-1, eps=TINY) * scale.view(-1, 1)).to(qkv.dtype)
    k = F.normalize(k.float(), dim=-1, eps=TINY).to(qkv.dtype)
    B, height, width, H, D = v.shape
    shape = (B, height // window, window, width // window, window, H, D)
    order = (0, 1, 3, 5, 2, 4, 6)
    return tuple(x.view(shape).permute(order).flatten(1, 2).flatten(3, 4) for x in (q, k, v))


def _map(x: Tensor, shape: torch.Size, window: int) -> Tensor:
    """(B, K, H, N, D) → (B, R·w, P·w, H·D)."""
    B, height, width = shape[:3]
    x = x.unflatten(1, (height // window, width // window)).unflatten(4, (window, window))
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, height, width, -1)
