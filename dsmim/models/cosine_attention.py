"""Scaled cosine attention within windows, with a position bias that is learnt (Swin Transformer V2, section 3.2).

    softmax(scale · q̂ k̂ᵀ + bias + mask) v,   q̂ = q / |q|,  k̂ = k / |k|

Three ways to compute it, equal within rounding. Of torch's fused kernels only the memory-efficient one (CUDA) takes a
bias *and* gives its gradient; flash attention takes no bias, and on a CPU a bias with gradient sends
`scaled_dot_product_attention` to its unfused path, which is slower than plain matrix products. Hence `fused` for
accelerators, `sequential` for their first stages at high resolution, `blockwise` for the CPU.

Shapes: W windows (all images' one after another: window w lies at place w mod K of its image), N tokens of a window,
H heads, D = 32 channels of a head; qkv (W, N, 3, H, D), scale (H, 1, 1), bias (H, N, N) and mask (K, N, N), all fp32
but qkv; the result (W, N, H · D) has the type of qkv.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TINY = 1e-12  # smallest norm divided by, as torch.nn.functional.normalize
BLOCK = 2**20  # scores of one block: 4 MB, which stay in the caches of a core
CHUNK = 2**24  # scores computed at once in sequential attention: 64 MB in fp32


def attend(qkv, scale, bias, mask=None, in_sequence: bool = False) -> torch.Tensor:
    """Cosine attention in the way that suits the device; in_sequence: a few windows at a time, for less memory."""
    if torch.compiler.is_compiling() or qkv.device.type != "cpu":
        return sequential(qkv, scale, bias, mask) if in_sequence else fused(qkv, scale, bias, mask)
    return blockwise(qkv, scale, bias, mask)


def fused(qkv, scale, bias, mask=None) -> torch.Tensor:
    """By scaled_dot_product_attention: the scale goes into the queries, bias and mask are its attn_mask.

    Norms and scale are computed in fp32, the kernel sums and exponentiates in fp32 whatever the inputs' type.
    """
    W, N, _, H, D = qkv.shape
    kind = qkv.dtype
    q, k, v = qkv.unbind(2)  # (W, N, H, D)
    q = (F.normalize(q.float(), dim=-1, eps=TINY) * scale.view(H, 1)).to(kind)
    k = F.normalize(k.float(), dim=-1, eps=TINY).to(kind)
    if mask is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (W, H, N, D)
        out = F.scaled_dot_product_attention(q, k, v, bias.to(kind).unsqueeze(0).expand(W, H, N, N), scale=1.0)
        return out.transpose(1, 2).reshape(W, N, H * D)
    K = len(mask)
    # An image's windows become heads, so that images share one tensor of bias and mask.
    q, k, v = (x.view(-1, K, N, H, D).transpose(2, 3).reshape(-1, K * H, N, D) for x in (q, k, v))
    shift = (bias + mask.unsqueeze(1)).to(kind).view(1, K * H, N, N).expand(len(q), -1, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, shift, scale=1.0)  # (images, K · H, N, D)
    return out.view(-1, K, H, N, D).transpose(2, 3).reshape(W, N, H * D)


def sequential(qkv, scale, bias, mask=None, scores: int = CHUNK) -> torch.Tensor:
    """`fused` over a few windows at a time, each recomputed in the backward pass (Swin V2, section 3.5): neither the
    scores nor the bias's gradient of all windows ever lie in memory together."""
    W, N, _, H, D = qkv.shape
    K = 1 if mask is None else len(mask)
    step = max(1, scores // (H * N * N))
    pieces = []
    for places in range(0, K, step):  # the same places of every image, so that a piece needs its masks once
        own = None if mask is None else mask[places : places + step]
        part = qkv.view(-1, K, *qkv.shape[1:])[:, places : places + step]  # (images, places, N, 3, H, D)
        rows = part.flatten(0, 1).split(max(1, step // part.shape[1]) * part.shape[1])
        done = torch.cat([checkpoint(fused, r, scale, bias, own, use_reentrant=False) for r in rows])
        pieces.append(done.view(-1, part.shape[1], N, H * D))
    return torch.cat(pieces, dim=1).view(W, N, H * D)


def blockwise(qkv, scale, bias, mask=None) -> torch.Tensor:
    """On a CPU, block by block: scores live in the caches only, in fp32, and are recomputed in the backward pass."""
    return _Blockwise.apply(qkv, scale, bias, mask)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale, bias, mask):
        ctx.save_for_backward(qkv, scale, bias, mask)
        W, N, _, H, D = qkv.shape
        out = qkv.new_empty(W, N, H, D)
        blocks = _Blocks(qkv, scale, bias, mask)
        for rows in blocks:
            block = blocks.scores(rows)
            out[rows] = _tokens_first(torch.bmm(block.probabilities(), block.v), H)
        return out.view(W, N, H * D)

    @staticmethod
    def backward(ctx, grad):
        qkv, scale, bias, mask = ctx.saved_tensors
        W, N, _, H, D = qkv.shape
        grad_qkv = torch.empty_like(qkv)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        blocks = _Blocks(qkv, scale, bias, mask)
        for rows in blocks:
            block = blocks.scores(rows)
            p = block.probabilities()
            g = _heads_first(grad.view(W, N, H, D)[rows].float())  # (n · H, N, D)
            into = grad_qkv[rows]  # (n, N, 3, H, D)
            into[:, :, 2] = _tokens_first(torch.bmm(p.transpose(1, 2), g), H)
            s = torch._softmax_backward_data(torch.bmm(g, block.v.transpose(1, 2), out=blocks.spare(p)), p, -1, p.dtype)
            grad_bias += s if len(s) == H else s.view(-1, H, N, N).sum(0)
            q, along = _through_norm(_tokens_first(torch.bmm(s, block.k), H), block.q_unit, block.q_norm)
            grad_scale += along.sum((0, 1)).view(H, 1, 1)
            into[:, :, 0] = q.mul_(scale.view(H, 1))
            k, _ = _through_norm(_tokens_first(torch.bmm(s.transpose(1, 2), block.q), H), block.k_unit, block.k_norm)
            into[:, :, 1] = k
        return grad_qkv, grad_scale, grad_bias, None


class _Blocks:
    """Cuts the windows into blocks and computes a block's scores, in buffers that the blocks share."""

    def __init__(self, qkv, scale, bias, mask):
        self.qkv, self.scale, self.bias, self.mask = qkv, scale.view(-1, 1), bias, mask
        W, N, _, H, _ = qkv.shape
        self.size = min(W, max(1, BLOCK // (H * N * N)))
        self.buffers = torch.empty(2, self.size * H, N, N)

    def __iter__(self):
        for start in range(0, len(self.qkv), self.size):
            yield slice(start, min(start + self.size, len(self.qkv)))

    def scores(self, rows: slice) -> _Block:
        q, k, v = self.qkv[rows].float().unbind(2)  # (n, N, H, D)
        q_unit, q_norm = _unit(q)
        k_unit, k_norm = _unit(k)
        block = _Block(
            _heads_first(q_unit * self.scale), _heads_first(k_unit), _heads_first(v), q_unit, q_norm, k_unit, k_norm
        )
        block.scores = self.buffers[0, : len(block.q)]
        H, N, _ = self.bias.shape
        whole = block.scores.view(-1, H, N, N)
        if self.mask is None:
            whole.copy_(self.bias)
        else:
            places = torch.arange(rows.start, rows.stop) % len(self.mask)
            torch.add(self.bias, self.mask[places].unsqueeze(1), out=whole)
        block.scores.baddbmm_(block.q, block.k.transpose(1, 2))
        return block

    def spare(self, like: torch.Tensor) -> torch.Tensor:
        return self.buffers[1, : len(like)]


class _Block:
    """One block: heads-first q · scale, k̂ and v (n · H, N, D), the unit vectors and norms (n, N, H, D or 1)."""

    scores: torch.Tensor

    def __init__(self, q, k, v, q_unit, q_norm, k_unit, k_norm):
        self.q, self.k, self.v = q, k, v
        self.q_unit, self.q_norm, self.k_unit, self.k_norm = q_unit, q_norm, k_unit, k_norm

    def probabilities(self) -> torch.Tensor:
        """(n · H, N, N), in place of the scores."""
        return torch.softmax(self.scores, -1, out=self.scores)


def _unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(TINY)
    return x / norm, norm


def _through_norm(grad, unit, norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x / |x| towards x; and the part of `grad` along x̂ (…, 1)."""
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).div_(norm), along


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(n, N, H, D) → (n · H, N, D), contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _tokens_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(n · H, N, D) → (n, N, H, D), a view."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)
