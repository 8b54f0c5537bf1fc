"""Windowed cosine attention on a CPU, one block of windows at a time, so that the scores stay in the caches.

Forward and backward are written out because this makes them fast. The scores of a few windows fit into a core's caches;
the scores of all windows do not. And torch returns large tensors to the system, which fills their pages with zeros at
every new use. The backward pass computes the scores of a block again. All of it is in fp32.

Shapes: see cosine.py. The n windows of a block are stored with their heads first: (n·H, N, D) and (n·H, N, N), one
matrix per window and head.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

# The derivation, for one window and one head. Rows are tokens: q, k, V and O are (N, D), S and P are (N, N). Products
# written ∘ are element by element. dX is the gradient of the loss with respect to X. The code uses the same names.
#
# Forward. Each row of q and k is multiplied by one number, factor_q = scale / |q| and factor_k = 1 / |k|:
#
#   scaled_q = factor_q q                                 that is scale q̂
#   unit_k = factor_k k                                   that is k̂
#   S = scaled_q unit_kᵀ + bias + mask
#   P = softmax(S), row by row
#   O = P V
#
# Backward, where dO is given. From O = P V:
#
#   dV = Pᵀ dO
#   dP = dO Vᵀ
#
# The softmax of a row has the Jacobian diag(p) - p pᵀ, where p is the row of P:
#
#   dS = P ∘ (dP - rowsum(P ∘ dP))
#
# S = scaled_q unit_kᵀ + bias + mask. All windows share the bias; the mask is constant:
#
#   dbias = Σ dS                                          over windows
#   dscaled_q = dS unit_k
#   dunit_k = dSᵀ scaled_q
#
# Through the normalisation. x̂ = x / |x| has the Jacobian (I - x̂ᵀ x̂) / |x| (x is a row): what reaches x is the gradient
# without its part along x̂. For keys:
#
#   radial_k = rowsum(unit_k ∘ dunit_k)
#   tangent_k = dunit_k - unit_k radial_k
#   dk = factor_k tangent_k
#
# For queries, q̂ = scaled_q / scale gives a division by scale²:
#
#   radial_q = rowsum(scaled_q ∘ dscaled_q)
#   tangent_q = dscaled_q - scaled_q radial_q / scale²
#   dq = factor_q tangent_q
#
# And scaled_q = scale q̂, therefore dscale = Σ rowsum(q̂ ∘ dscaled_q):
#
#   dscale = Σ radial_q / scale                           over tokens and windows
#
# A norm counts as TINY at least. A row of zeros then gives q̂ = 0, and its gradient factor_q dscaled_q is finite.

TINY = 1e-12  # smallest norm to divide by, as in torch.nn.functional.normalize
BLOCK = 2**20  # most scores in one block: 4 MB

Tensor = torch.Tensor


def blockwise(qkv: Tensor, window: int, scale: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(scale · q̂ k̂ᵀ + bias + mask) v for every window; shapes as in cosine.py."""
    return _Blockwise.apply(qkv, window, scale, bias, mask)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, window, scale, bias, mask):
        norms = torch.linalg.vector_norm(qkv[..., :2, :, :], dim=-1, dtype=torch.float32).clamp_min_(TINY)
        ctx.save_for_backward(qkv, norms, scale, bias, mask)
        ctx.window = window
        out = qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])  # (B, height, width, H, D)
        for block in _blocks(qkv, window, norms, scale, bias, mask):
            block.attend(out)
        return out.flatten(3)

    @staticmethod
    def backward(ctx, grad_out):
        qkv, norms, scale, bias, mask = ctx.saved_tensors
        grad_out = grad_out.view(*qkv.shape[:3], *qkv.shape[4:])  # (B, height, width, H, D)
        grad_qkv, dbias, radial_q = torch.empty_like(qkv), torch.zeros_like(bias), torch.zeros(len(scale))
        grad_q, grad_k, grad_v = grad_qkv.unbind(3)
        for block in _blocks(qkv, ctx.window, norms, scale, bias, mask):
            block.backward_to_values(grad_out, grad_v)
            dbias += block.backward_to_scores()
            radial_q += block.backward_to_queries(scale, grad_q)
            block.backward_to_keys(grad_k)
        dscale = radial_q.view_as(scale) / scale  # dscale = Σ radial_q / scale
        return grad_qkv, None, dscale, dbias, None


def _blocks(qkv, window, norms, scale, bias, mask) -> Iterator[_Block]:
    """Yield every window once, in blocks of at most BLOCK scores (or one window).

    A block is several whole rows of windows, or a part of one row.
    """
    B, height, width, _, H, D = qkv.shape
    rows, columns, N = height // window, width // window, window**2
    most = max(1, BLOCK // (H * N * N))  # windows in a block
    wide, high = min(most, columns), max(1, most // columns)
    factors = 1 / norms  # (B, height, width, 2, H)
    factors[..., 0, :] *= scale.view(-1)
    buffers = _Buffers.of_this_thread(min(high, B * rows) * wide * H, N, D)
    for top in range(0, B * rows, high):
        for left in range(0, columns, wide):
            part = _Part(window, slice(top, min(top + high, B * rows)), slice(left, min(left + wide, columns)))
            yield _Block(part, qkv, factors, bias, None if mask is None else part.masks(mask, rows), buffers)


class _Part:
    """The place of a block's windows: rows of windows, counted through all images, and columns."""

    def __init__(self, window: int, rows: slice, columns: slice):
        self.window, self.rows, self.columns = window, rows, columns

    def windows(self, x: Tensor) -> Tensor:
        """Return a view of a map (B, height, width, H, …) as the block's windows, (rows, columns, H, w, w, …)."""
        w, (B, height, width, H, *rest) = self.window, x.shape
        x = x.view(B * height // w, w, width // w, w, H, *rest)[self.rows, :, self.columns]
        return x.permute(0, 2, 4, 1, 3, *range(5, x.ndim))

    def masks(self, mask: Tensor, rows: int) -> Tensor:
        """Return the block's masks, (rows, columns, 1, N, N), out of those of an image's windows, (K, N, N)."""
        row_in_image = torch.arange(self.rows.start, self.rows.stop) % rows
        return mask.unflatten(0, (rows, -1))[row_in_image][:, self.columns].unsqueeze(2)


class _Buffers(NamedTuple):
    """Memory for the matrices of one block: one buffer per quantity of the derivation.

    Only S and dP have none: they exist inside one method each, which turns them into P and dS in place. This keeps the
    large matrices at two, for the caches.
    """

    P: Tensor  # 2 buffers (n·H, N, N)
    dS: Tensor
    scaled_q: Tensor  # 10 buffers (n·H, N, D)
    unit_k: Tensor
    V: Tensor
    O: Tensor  # noqa: E741 (the name in the derivation)
    dO: Tensor
    dV: Tensor
    dscaled_q: Tensor
    dunit_k: Tensor
    product: Tensor  # x ∘ y inside rowsum(x ∘ y)
    tangent: Tensor  # tangent_q, then tangent_k

    @classmethod
    def of_this_thread(cls, matrices: int, N: int, D: int) -> _Buffers:
        """Return buffers for a number of matrices, in memory that the thread keeps for the next call."""
        scores, tokens = 2 * matrices * N * N, 10 * matrices * N * D
        kept = getattr(_LOCAL, "kept", None)
        if kept is None or kept.numel() < scores + tokens:
            with torch.inference_mode(False):  # else later calls could use it in inference mode only
                kept = _LOCAL.kept = torch.empty(scores + tokens)
        of_scores = kept[:scores].view(2, matrices, N, N)
        of_tokens = kept[scores : scores + tokens].view(10, matrices, N, D)
        return cls(*of_scores, *of_tokens)

    def first(self, matrices: int) -> _Buffers:
        """Return the part of every buffer that holds the first matrices."""
        return _Buffers(*(buffer[:matrices] for buffer in self))


_LOCAL = threading.local()


class _Block:
    """One block of windows. Its methods are the steps of the derivation; each line computes the quantity it names."""

    def __init__(
        self, part: _Part, qkv: Tensor, factors: Tensor, bias: Tensor, masks: Tensor | None, buffers: _Buffers
    ):
        """Compute everything up to P."""
        q, k, v = (part.windows(x) for x in qkv.unbind(3))  # (rows, columns, H, w, w, D)
        self.part, self.shape, self.heads = part, q.shape, q.shape[2]
        self.buffers = b = buffers.first(q.shape[:3].numel())
        self.factor_q, self.factor_k = (part.windows(x).unsqueeze(-1) for x in factors.unbind(3))  # (…, w, w, 1)
        torch.mul(q, self.factor_q, out=b.scaled_q.view(self.shape))
        torch.mul(k, self.factor_k, out=b.unit_k.view(self.shape))
        b.V.view(self.shape).copy_(v)
        self._probabilities(bias, masks)

    def _probabilities(self, bias: Tensor, masks: Tensor | None) -> None:
        """Compute S in the memory of P, then P from it in place."""
        b = self.buffers
        S = b.P
        S_by_window = S.view(*self.shape[:3], *bias.shape[1:])  # (rows, columns, H, N, N)
        if masks is None:
            S_by_window.copy_(bias)
        else:
            torch.add(bias, masks, out=S_by_window)
        S.baddbmm_(b.scaled_q, b.unit_k.mT)  # S = scaled_q unit_kᵀ + bias + mask
        torch.softmax(S, -1, out=b.P)  # P = softmax(S)

    def attend(self, out: Tensor) -> None:
        """Write O to its windows of the map `out` (B, height, width, H, D)."""
        b = self.buffers
        torch.bmm(b.P, b.V, out=b.O)  # O = P V
        self.part.windows(out).copy_(b.O.view(self.shape))

    def backward_to_values(self, grad_out: Tensor, grad_v: Tensor) -> None:
        """Read dO from its map, and write dV to its map."""
        b = self.buffers
        b.dO.view(self.shape).copy_(self.part.windows(grad_out))
        torch.bmm(b.P.mT, b.dO, out=b.dV)  # dV = Pᵀ dO
        self.part.windows(grad_v).copy_(b.dV.view(self.shape))

    def backward_to_scores(self) -> Tensor:
        """Compute dP in the memory of dS, then dS from it in place; return this block's part of dbias, (H, N, N)."""
        b = self.buffers
        dP = torch.bmm(b.dO, b.V.mT, out=b.dS)  # dP = dO Vᵀ
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        softmax_backward(dP, b.P, -1, dP.dtype, grad_input=b.dS)  # dS = P ∘ (dP - rowsum(P ∘ dP))
        return b.dS.unflatten(0, (-1, self.heads)).sum(0)

    def backward_to_queries(self, scale: Tensor, grad_q: Tensor) -> Tensor:
        """Write dq to its map; return this block's part of Σ radial_q, (H,)."""
        b = self.buffers
        torch.bmm(b.dS, b.unit_k, out=b.dscaled_q)  # dscaled_q = dS unit_k
        radial_q = self._rowsum(b.scaled_q, b.dscaled_q).unflatten(0, (-1, self.heads))  # (n, H, N, 1)
        self._through_norm(b.dscaled_q, b.scaled_q, (radial_q / scale**2).flatten(0, 1), self.factor_q, grad_q)
        return radial_q.sum((0, 2, 3))

    def backward_to_keys(self, grad_k: Tensor) -> None:
        """Write dk to its map."""
        b = self.buffers
        torch.bmm(b.dS.mT, b.scaled_q, out=b.dunit_k)  # dunit_k = dSᵀ scaled_q
        radial_k = self._rowsum(b.unit_k, b.dunit_k)
        self._through_norm(b.dunit_k, b.unit_k, radial_k, self.factor_k, grad_k)

    def _rowsum(self, x: Tensor, y: Tensor) -> Tensor:
        """Return rowsum(x ∘ y), (n·H, N, 1)."""
        return torch.mul(x, y, out=self.buffers.product).sum(-1, keepdim=True)

    def _through_norm(self, grad: Tensor, x: Tensor, radial: Tensor, factor: Tensor, into: Tensor) -> None:
        """Write factor · tangent, where tangent = grad - x radial, to its windows of the map `into`."""
        tangent = torch.addcmul(grad, x, radial, value=-1, out=self.buffers.tangent)
        torch.mul(tangent.view(self.shape), factor, out=self.part.windows(into))
