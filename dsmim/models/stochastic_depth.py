"""Stochastic depth (arXiv 1603.09382) that computes a residual branch only for the samples that keep it.

Which samples these are is drawn on the host, so that shapes are known without waiting for the device:

    draws = PositionDraws(model, key, global_batch, device)  # once
    with draws.at(positions):  # per micro batch, around forward and backward
        model(images).sum().backward()

Then each draw depends on (key, branch, position) alone: neither on the world size nor on the micro batch, and blocks
that are recomputed see it again. Without `at`, a network in training mode draws from torch's generator, like timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

RATES = ("uniform", "linear")
TAKE_NO_ROWS = ("cpu", "meta")
"""Devices on which a branch of no samples is computed. Elsewhere some attention kernels refuse it (flash attention
before torch 2.10, cuDNN's: pytorch/pytorch #133780): there one sample is computed, and added with weight 0."""

Branch = Callable[[torch.Tensor], torch.Tensor]


class Kept(NamedTuple):
    """The samples of a micro batch for which a branch is computed."""

    samples: int
    """Size of the micro batch."""
    rows: torch.Tensor | None
    """Their numbers, (n,) int64 on the network's device; None: all."""
    scale: float
    """What the branch is multiplied by, 1 / (1 - rate)."""


class DropPath(nn.Module):
    """The stochastic depth of one branch, see `residual`."""

    uses = 1

    def __init__(self, rate: float):
        super().__init__()
        self.drop_prob = rate
        self.drawn: Kept | None = None

    def kept(self, x: torch.Tensor) -> Kept | None:
        """Return the samples of x (B, …) that keep the branch now; None when nothing is dropped."""
        if not (self.training and self.drop_prob):
            return None
        if self.drawn is not None:
            assert self.drawn.samples == len(x), f"drawn for {self.drawn.samples} samples, called with {len(x)}"
            return self.drawn
        mask = torch.rand(1, len(x), device="cpu").numpy() >= self.drop_prob
        return _kept(mask, [self], x.device)[0]

    def receive(self, kept: Kept | None) -> None:
        """Set the samples of the next forward and backward; None: draw them from torch's generator."""
        self.__dict__["drawn"] = kept  # nn.Module's own assignment is slow

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"drop_prob={self.drop_prob:.3f}"


def residual(x: torch.Tensor, *branches: tuple[DropPath, Branch]) -> torch.Tensor:
    """Return x (B, …) plus every branch of x, scaled by 1 / (1 - rate) and computed only for the samples that keep it.

    A branch that no sample keeps is still computed, without rows: all its parameters get a gradient (0), and ZeRO's
    collectives need every rank.
    """
    out = x
    for drop_path, branch in branches:
        kept = drop_path.kept(x)
        if kept is None:
            out = out + branch(x)
        elif kept.rows is None:
            out = torch.add(out, branch(x), alpha=kept.scale)
        else:
            added = branch(_Take.apply(x, kept.rows))
            dtype = torch.promote_types(out.dtype, added.dtype)  # under autocast the branch may be bfloat16
            out = _Add.apply(out.to(dtype), added.to(dtype), kept)
    return out


# torch's own index_select and index_add save the rows for the backward pass. Where a block is recomputed, reading them
# would start that, at another place than on a rank that keeps all samples, and ZeRO-3's all-gathers would not match. So
# these two save no tensor.
class _Take(torch.autograd.Function):
    """Rows of x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.samples = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.samples, *grad.shape[1:]).index_add_(0, ctx.rows, grad), None


class _Add(torch.autograd.Function):
    """x, with scaled rows added."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, added: torch.Tensor, kept: Kept) -> torch.Tensor:
        ctx.kept = kept
        return x.index_add(0, kept.rows, added, alpha=kept.scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, grad.index_select(0, ctx.kept.rows).mul_(ctx.kept.scale), None


class MultipliedDropPath(TimmDropPath):
    """timm's DropPath in timm's networks: the branch is computed and multiplied, by factors that PositionDraws draws.

    A block may use one such module for several branches; each call within a block has its own draw.
    """

    uses = 6  # timm's CoaT calls one six times in a block; no network of timm calls one more often

    def __init__(self, drop_prob: float, scale_by_keep: bool = True):
        super().__init__(drop_prob, scale_by_keep)
        self.factors: torch.Tensor | None = None
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, …) with every sample multiplied by its factor, 0 or 1 / (1 - rate).

        x may also be (k·B, …), the k parts of a sample one after the other; they share the draw. Raises ValueError for
        another number of rows.
        """
        if self.factors is None or not self.training:
            return super().forward(x)
        assert self.calls < self.uses, "more calls than draws"
        factors, samples = self.factors[self.calls], self.factors.shape[1]
        self.calls += 1
        if len(x) % samples:
            raise ValueError(
                f"model.drop_path_rate: this network of timm drops paths in {len(x)} parts of {samples} samples; set 0"
            )
        factors = factors.repeat_interleave(len(x) // samples).view(-1, *[1] * (x.ndim - 1))
        return x * factors.to(x.dtype)

    def begin(self, *_) -> None:
        """Count calls from 0: a block begins, for the first time or to be recomputed."""
        self.calls = 0

    def receive(self, factors: torch.Tensor | None) -> None:
        """Set the factors (uses, B) of the next forward and backward; None: draw from torch's generator."""
        self.__dict__.update(factors=factors, calls=0)


def depth_rates(kind: str, rate: float, depth: int) -> list[float]:
    """Return the rate of every block: "uniform", all the same; "linear", growing from 0 to `rate` at the last block.

    Raises ValueError for another kind.
    """
    if kind not in RATES:
        raise ValueError(f"model.drop_path_rates: no {kind!r}; give {' or '.join(RATES)}, or null")
    return [rate] * depth if kind == "uniform" else torch.linspace(0, rate, depth, device="cpu").tolist()


def multiply_by_position(model: nn.Module, uniform: float | None = None) -> None:
    """Replace every DropPath in a network of timm by a MultipliedDropPath.

    uniform: give this rate to all, also where timm has none because the first block's rate is 0. Raises ValueError when
    the network has no place for it.
    """
    found = [(parent, name) for parent in model.modules() for name in _drop_path_names(parent, uniform is not None)]
    if uniform and not found:
        raise ValueError("model.drop_path_rates: this network of timm has no drop path whose rate could be set")
    parents = {id(child): module for module in model.modules() for child in module.children()}
    for parent, name in found:
        old = getattr(parent, name)
        new = MultipliedDropPath(uniform or old.drop_prob, getattr(old, "scale_by_keep", True))
        setattr(parent, name, new.train(parent.training))
        block = parent
        while isinstance(block, (nn.ModuleList, nn.ModuleDict)):  # they are never called
            block = parents[id(block)]
        block.register_forward_pre_hook(new.begin)


def _drop_path_names(parent: nn.Module, all_places: bool) -> list[str]:
    children = dict(parent.named_children())
    dropping = [n for n, child in children.items() if isinstance(child, TimmDropPath) and child.drop_prob]
    if not all_places:
        return dropping
    none = [name for name, value in [*vars(parent).items(), *parent._modules.items()] if value is None]
    empty = [n for n in children if isinstance(children[n], (nn.Identity, TimmDropPath)) and n not in dropping]
    return [*dropping, *(name for name in [*none, *empty] if "drop_path" in name)]


class PositionDraws:
    """Draws which samples keep which branches of a network, from (key, branch, position) alone.

    Branches are numbered in the network's order. Every sample keeps a branch with probability 1 - rate. By default all
    draws are independent. balanced: of 2^k neighbours whose first position in the global batch is a multiple of 2^k, a
    branch keeps 2^k (1 - rate) samples, rounded up or down, so that ranks do equal work. Then only branches and steps
    are independent: within a step, sample number j keeps a branch if frac(u + bitreverse(j)) < 1 - rate, with one
    uniform u per branch. (Systematic sampling of van der Corput's sequence, whose 2^k aligned neighbours are spaced
    evenly.)
    """

    def __init__(
        self, model: nn.Module, key: int, global_batch: int, device: torch.device | str = "cpu", balanced: bool = False
    ):
        self.key, self.global_batch, self.balanced = key, global_batch, balanced
        self.device = torch.device(device)
        kinds = (DropPath, MultipliedDropPath)
        self.modules = [m for m in model.modules() if isinstance(m, kinds) and m.drop_prob]
        keep = [1 - module.drop_prob for module in self.modules for _ in range(module.uses)]
        self.thresholds = np.array([int(share * 2.0**64) for share in keep], np.uint64)[:, None]

    @property
    def note(self) -> str | None:
        """What a log should say: where dropped branches are computed nevertheless."""
        if not self.modules or isinstance(self.modules[0], DropPath):
            return None
        return "drop path: timm's blocks compute every branch and multiply it by 0, so that no time is saved"

    @contextmanager
    def at(self, positions: Sequence[int] | torch.Tensor) -> Iterator[None]:
        """Let the micro batch at these positions of the run's order be drawn, within the context.

        positions: (B,), in host memory.
        """
        if not self.modules:
            yield
            return
        mask = self.mask(np.asarray(positions, np.int64))
        for module, drawn in zip(self.modules, self._drawn(mask), strict=True):
            module.receive(drawn)
        try:
            yield
        finally:
            for module in self.modules:
                module.receive(None)

    def mask(self, positions: np.ndarray) -> np.ndarray:
        """Return whether a sample keeps a branch, (branches, B) bool, for positions (B,) int64."""
        if not self.balanced:
            return self._words(positions) < self.thresholds
        steps, places = np.divmod(positions, self.global_batch)
        own, step = np.unique(steps, return_inverse=True)  # all are one, except for a Python user's positions
        return self._words(own)[:, step] + _bit_reversed(places) < self.thresholds

    def _words(self, numbers: np.ndarray) -> np.ndarray:
        """Return (branches, B) random uint64: Philox words, which NumPy keeps across versions, at counters that follow
        from the numbers (B,) alone."""
        blocks = -(-len(self.thresholds) // 4)  # Philox counts in blocks of four words
        successive = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        rows = [
            np.random.Philox(key=self.key, counter=int(run[0]) * blocks).random_raw(len(run) * blocks * 4)
            for run in successive
        ]
        return np.concatenate(rows).reshape(len(numbers), -1)[:, : len(self.thresholds)].T

    def _drawn(self, mask: np.ndarray) -> Sequence[Kept] | torch.Tensor:
        """Return what each module receives; one transfer to the device for all of them."""
        if isinstance(self.modules[0], DropPath):
            return _kept(mask, self.modules, self.device)
        uses = MultipliedDropPath.uses
        scale = [[[1 / (1 - m.drop_prob) if m.scale_by_keep else 1.0]] for m in self.modules]
        factors = mask.reshape(len(self.modules), uses, -1) * np.array(scale, np.float32)
        return torch.from_numpy(factors).to(self.device, non_blocking=True)


def _kept(mask: np.ndarray, modules: Sequence[DropPath], device: torch.device) -> list[Kept]:
    """Return every branch's kept samples for a mask (branches, B)."""
    mask, samples = np.ascontiguousarray(mask), mask.shape[1]
    counts, scales = mask.sum(1).tolist(), [1 / (1 - module.drop_prob) for module in modules]
    if device.type not in TAKE_NO_ROWS:
        for branch in [number for number, count in enumerate(counts) if not count]:
            mask[branch, 0], counts[branch], scales[branch] = True, 1, 0.0
    rows = torch.from_numpy(np.flatnonzero(mask) % samples).to(device, non_blocking=True).split(counts)
    return [
        Kept(samples, None if count == samples and scale else own, scale)
        for own, count, scale in zip(rows, counts, scales, strict=True)
    ]


def _bit_reversed(numbers: np.ndarray) -> np.ndarray:
    """Return int64 numbers with the order of their 64 bits reversed, as uint64."""
    bits = numbers.astype(np.uint64)
    for shift in (1, 2, 4, 8, 16, 32):
        low = np.uint64((2**64 - 1) // (2**shift + 1))  # ones in every other group of `shift` bits
        bits = ((bits >> np.uint64(shift)) & low) | ((bits & low) << np.uint64(shift))
    return bits
