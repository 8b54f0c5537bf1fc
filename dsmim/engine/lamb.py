"""LAMB (arXiv 1904.00962), exact under ZeRO at every stage and number of ranks.

LAMB multiplies the update of each tensor by a trust ratio of two norms over the whole tensor. ZeRO hands an optimizer
flat tensors instead: at stages 1 and 2 a rank's part of all tensors of a group in a row, at stage 3 a rank's parts of
the tensors of a sub-group, one sub-group per call of step(). So each rank sums the squares of its own part of every
tensor, and the ranks add their sums: one all-reduce of two numbers per tensor, for each flat tensor with weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dsmim.engine.layout import FlatTensor, check_layout


@dataclass(frozen=True)
class _Slices:
    """A flat tensor in consecutive slices: each is this rank's part of one tensor, or padding."""

    lengths: list[int]
    owner: torch.Tensor
    """(slices,) of int64: the number of each slice's tensor in its group; `tensors` for padding."""
    tensors: int
    """Number of tensors in the group, also those of which this rank has nothing."""


class Lamb(torch.optim.Optimizer):
    """LAMB as apex.optimizers.FusedLAMB computes it with timm's arguments; also timm.optim.Lamb without its clipping.

    update = m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + eps) + weight_decay · w, with Adam's moments m and v;
    w ← w - lr · ratio · update, where ratio = |w| / |update| of the whole tensor without any limit, 1 if one of them
    is 0. Groups without weight decay always have the ratio 1.

    Gradients are clipped before, by DeepSpeed. Each tensor has its own step counter, because DeepSpeed steps sub-groups
    one by one. Under ZeRO call `bind` before the first step.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._slices: dict[torch.Tensor, _Slices] | None = None
        self._total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums

    def bind(self, flats: list[FlatTensor], total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Tell which parts of which tensors this rank's flat tensors hold.

        total: returns the sum of a tensor over the ranks. Collective: every rank calls it equally often, once per flat
        tensor with weight decay and step.
        """
        self._slices, self._total = {flat.master: _slices(flat) for flat in flats}, total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the tensors of every group. Nothing waits for the device."""
        assert closure is None, "DeepSpeed gives none"
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                self._step_group(group, tensors)

    def _step_group(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        updates = self._adam_updates(group, tensors)
        if decay := group["weight_decay"]:
            torch._foreach_add_(updates, tensors, alpha=decay)
            self._multiply_by_ratios(tensors, updates)
        torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _adam_updates(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Count the step, update the moments and return Adam's updates without the learning rate."""
        states = [self._state_of(tensor) for tensor in tensors]
        first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        (beta1, beta2), grads = group["betas"], [tensor.grad for tensor in tensors]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        counts = [step.item() for step in steps]  # they are in host memory
        divisors = torch._foreach_sqrt(second)
        torch._foreach_div_(divisors, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(first, [1 - beta1**count for count in counts])
        torch._foreach_div_(updates, divisors)
        return list(updates)

    def _state_of(self, tensor: torch.Tensor) -> dict[str, Any]:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        return state

    def _multiply_by_ratios(self, tensors: list[torch.Tensor], updates: list[torch.Tensor]) -> None:
        if self._slices is None:
            _multiply(updates, _ratios(_square_sums(tensors, updates)))
            return
        for flat, update in zip(tensors, updates, strict=True):
            assert flat in self._slices, "bind was not told of this tensor"
            slices = self._slices[flat]
            parts = update.view(-1).split(slices.lengths)
            own = _square_sums(flat.view(-1).split(slices.lengths), parts)
            sums = own.new_zeros(2, slices.tensors + 1)
            sums[:, slices.owner] = own
            sums[:, -1] = 0  # padding
            _multiply(parts, _ratios(self._total(sums))[slices.owner])


def bind_lamb(lamb: Lamb, engine: Any, stage: int, rank: int, device: torch.device) -> None:
    """Bind the optimizer to the flat tensors of DeepSpeed's engine, which has not stepped yet; at stage 0 do nothing.

    device: where ranks exchange tensors. Raises ValueError when DeepSpeed keeps its tensors in an unknown way.
    """
    if stage == 0:
        return

    def total(sums: torch.Tensor) -> torch.Tensor:
        exchanged = sums.to(device)  # with the optimizer in host memory, sums are there
        dist.all_reduce(exchanged, group=engine.optimizer.dp_process_group)
        return exchanged.to(sums.device)

    lamb.bind(check_layout(engine, stage, rank), total)


def _slices(flat: FlatTensor) -> _Slices:
    """Return the slices of a flat tensor: its pieces in order, and what is between and after them as padding."""
    number = {name: position for position, name in enumerate(flat.names)}
    lengths, owners, end = [], [], 0
    for piece in [*sorted(flat.pieces, key=lambda piece: piece.at), None]:
        begin = flat.master.numel() if piece is None else piece.at
        if begin > end:
            lengths.append(begin - end)
            owners.append(len(number))
        if piece is not None:
            lengths.append(piece.numel)
            owners.append(number[piece.name])
            end = piece.at + piece.numel
    return _Slices(lengths, torch.tensor(owners, device=flat.master.device), len(number))


def _square_sums(weights: Any, updates: Any) -> torch.Tensor:
    """Return the sums of squares of each weight and each update, (2, number of tensors)."""
    return torch.stack(torch._foreach_norm([*weights, *updates])).square().view(2, -1)


def _ratios(sums: torch.Tensor) -> torch.Tensor:
    weights, updates = sums.sqrt()
    return torch.where((weights > 0) & (updates > 0), weights / updates, 1.0)


def _multiply(updates: Any, ratios: torch.Tensor) -> None:
    torch._foreach_mul_(list(updates), list(ratios.unbind()))
