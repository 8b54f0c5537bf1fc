"""Windowed cosine attention on a CPU: block by block, so that scores live in the caches and never in memory.

Forward and backward are written out because that is what makes it fast: a few windows' scores fit into a core's caches,
all windows' do not, and torch returns large tensors to the system, which zeroes their pages anew at every use. The
backward pass computes a block's scores again. All of it is in fp32. Shapes: see cosine_attention.py; n windows of a
block have heads first, (n·H, N, D).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

TINY = 1e-12  # smallest norm divided by, as torch.nn.functional.normalize
BLOCK = 2**20  # scores of one block: 4 MB

Tensor = torch.Tensor


def blockwise(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q̂ k̂ᵀ + bias + mask) v in every window; see cosine_attention.py."""
    return _Blockwise.apply(qkv, window, scale, bias, mask)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, window, scale, bias, mask):
        norms = torch.linalg.vector_norm(qkv[..., :2, :, :], dim=-1, dtype=torch.float32).clamp_min_(TINY)
        ctx.save_for_backward(qkv, norms, scale, bias, mask)
        ctx.window = window
        out = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])  # (B, height, width, H, D)
        for block in _blocks(qkv, window, norms, scale, bias, mask):
            block.scatter(torch.bmm(block.p, block.v, out=block.spare[0]), out)
        return out.flatten(3)

    @staticmethod
    def backward(ctx, grad):
        qkv, norms, scale, bias, mask = ctx.saved_tensors
        grad_qkv, grad_bias, along_q = torch.empty_like(qkv), torch.zeros_like(bias), torch.zeros(len(scale))
        grad = grad.view(*qkv.shape[:3], *qkv.shape[4:])
        into = grad_qkv.unbind(3)
        for block in _blocks(qkv, ctx.window, norms, scale, bias, mask):
            along_q += block.backward(grad, into, scale, grad_bias)
        return grad_qkv, None, (along_q.view_as(scale) / scale), grad_bias, None


def _blocks(qkv, window, norms, scale, bias, mask) -> Iterator[_Block]:
    """Every window once, in blocks of at most BLOCK scores (or one window): several rows of windows, or part of one."""
    B, height, width, _, H, D = qkv.shape
    rows, columns, N = height // window, width // window, window**2
    most = max(1, BLOCK // (H * N * N))  # windows
    wide, high = min(most, columns), max(1, most // columns)
    factors = 1 / norms  # (B, height, width, 2, H)
    factors[..., 0, :] *= scale.view(-1)
    scratch = _scratch(min(high, B * rows) * wide * H, N, D)
    for top in range(0, B * rows, high):
        for left in range(0, columns, wide):
            place = _Place(window, slice(top, min(top + high, B * rows)), slice(left, min(left + wide, columns)))
            yield _Block(place, qkv, factors, bias, None if mask is None else place.masks(mask, rows), scratch)


class _Place:
    """A block's windows: rows of windows, counted through all images, and columns."""

    def __init__(self, window: int, rows: slice, columns: slice):
        self.window, self.rows, self.columns = window, rows, columns

    def __call__(self, x: Tensor) -> Tensor:
        """(B, height, width, H, …) → (rows, columns, H, w, w, …): a view."""
        w, (B, height, width, H, *rest) = self.window, x.shape
        x = x.view(B * height // w, w, width // w, w, H, *rest)[self.rows, :, self.columns]
        return x.permute(0, 2, 4, 1, 3, *range(5, x.ndim))

    def masks(self, mask: Tensor, rows: int) -> Tensor:
        """(K, N, N) masks of an image's windows → those of the block, (rows, columns, 1, N, N)."""
        which = torch.arange(self.rows.start, self.rows.stop) % rows
        return mask.unflatten(0, (rows, -1))[which][:, self.columns].unsqueeze(2)


class _Block:
    """One block: q · scale, k̂, v (n·H, N, D) and the probabilities p (n·H, N, N), in shared buffers."""

    def __init__(self, place: _Place, qkv: Tensor, factors: Tensor, bias: Tensor, masks: Tensor | None, scratch):
        self.place, self.factors = place, factors
        q, k, v = (place(x) for x in qkv.unbind(3))  # (rows, columns, H, w, w, D)
        self.shape = q.shape
        flat = len(q) * q.shape[1] * q.shape[2]
        scores, small = (x[:, :flat] for x in scratch)
        self.q, self.k, self.v, *self.spare = small
        for into, x, number in ((self.q, q, 0), (self.k, k, 1)):
            torch.mul(x, self.factor(number), out=into.view(self.shape))
        self.v.view(self.shape).copy_(v)
        self.p, self.spare_scores = scores
        every = self.p.view(*self.shape[:3], *bias.shape[1:])  # (rows, columns, H, N, N)
        if masks is None:
            every.copy_(bias)
        else:
            torch.add(bias, masks, out=every)
        self.p.baddbmm_(self.q, self.k.transpose(1, 2))
        torch.softmax(self.p, -1, out=self.p)

    def factor(self, number: int) -> Tensor:
        """scale / |q| (0) or 1 / |k| (1), (rows, columns, H, w, w, 1)."""
        return self.place(self.factors[..., number, :]).unsqueeze(-1)

    def scatter(self, x: Tensor, into: Tensor) -> None:
        """(n·H, N, D) to its windows of a map (B, height, width, H, D)."""
        self.place(into).copy_(x.view(self.shape))

    def backward(self, grad: Tensor, into: tuple[Tensor, ...], scale: Tensor, grad_bias: Tensor) -> Tensor:
        """Write the gradients of q, k and v to their maps, add that of the bias; gives Σ scale · q̂ · dq̂ per head."""
        g, x, y = self.spare
        g.view(self.shape).copy_(self.place(grad))
        self.scatter(torch.bmm(self.p.transpose(1, 2), g, out=x), into[2])
        s = torch.bmm(g, self.v.transpose(1, 2), out=self.spare_scores)
        torch.ops.aten._softmax_backward_data.out(s, self.p, -1, s.dtype, grad_input=s)
        grad_bias += s.view(-1, *grad_bias.shape).sum(0)
        every = (-1, *grad_bias.shape[:2], 1)  # (n, H, N, 1)
        along = torch.mul(torch.bmm(s, self.k, out=x), self.q, out=y).sum(-1).view(every)
        self._through_norm(x, self.q, along / scale**2, 0, into[0], y)
        x = torch.bmm(s.transpose(1, 2), self.q, out=x)
        self._through_norm(x, self.k, torch.mul(x, self.k, out=y).sum(-1), 1, into[1], y)
        return along.sum((0, 2, 3))

    def _through_norm(self, grad: Tensor, unit: Tensor, along: Tensor, number: int, into: Tensor, spare: Tensor):
        """Towards x, where unit = f x and f = scale / |x|: f (grad - unit · along), along = unit · grad / scale²."""
        torch.addcmul(grad, unit, along.reshape(*grad.shape[:2], 1), value=-1, out=grad)
        torch.mul(grad.view(self.shape), self.factor(number), out=spare.view(self.shape))
        self.scatter(spare, into)


_LOCAL = threading.local()


def _scratch(matrices: int, N: int, D: int) -> tuple[Tensor, Tensor]:
    """Buffers (2, matrices, N, N) and (6, matrices, N, D) of this thread, kept from call to call."""
    scores, small = 2 * matrices * N * N, 6 * matrices * N * D
    kept = getattr(_LOCAL, "kept", None)
    if kept is None or kept.numel() < scores + small:
        with torch.inference_mode(False):  # or it could be used in inference mode alone from then on
            kept = _LOCAL.kept = torch.empty(scores + small)
    return kept[:scores].view(2, matrices, N, N), kept[scores : scores + small].view(6, matrices, N, D)
