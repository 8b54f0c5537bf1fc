"""LAMB without ZeRO, and on flat tensors in one process. tests/distributed/test_lamb.py has it under ZeRO."""

from types import SimpleNamespace

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch import nn

from dsmim.engine.lamb import Lamb
from dsmim.engine.layout import EnginePiece, FlatTensor, check_layout
from dsmim.engine.optim import check_optimizer
from dsmim.recipe import Optim


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    nn.init.zeros_(model[2].weight)  # a norm of 0: its ratio is 1
    return model


def groups(model: nn.Module) -> list[dict]:
    plain = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0},
    ]


def losses(model: nn.Module):
    torch.manual_seed(1)
    for _ in range(20):
        yield (model(torch.randn(5, 7)).square() - 1).square().mean()


def test_it_is_timm_s_lamb():
    ours, theirs = network(), network()
    optimizers = [
        Lamb(groups(ours), lr=3e-3, eps=1e-8),
        TimmLamb(groups(theirs), lr=3e-3, eps=1e-8, max_grad_norm=None),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for loss in losses(model):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for one, other, first in zip(ours.parameters(), theirs.parameters(), network().parameters(), strict=True):
        assert (one - other).norm() < 2e-6 * (other - first).norm()
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {20}


def flattened(tensors: list[torch.Tensor], gap: int) -> tuple[nn.Parameter, list[EnginePiece]]:
    """The tensors in a row, each followed by padding that is not 0."""
    parts, pieces, at = [], [], 0
    for number, tensor in enumerate(tensors):
        parts += [tensor.detach().flatten(), torch.full((gap,), 3.0)]
        pieces.append(EnginePiece(str(number), at, 0, tensor.numel()))
        at += tensor.numel() + gap
    return nn.Parameter(torch.cat(parts)), pieces


def test_tensors_in_a_flat_one_keep_their_own_ratios():
    model = network()
    whole = Lamb(groups(model), lr=3e-3)
    tensors = [group["params"] for group in whole.param_groups]
    flats = [flattened(group, gap) for group, gap in zip(tensors, (2, 0), strict=True)]
    flat = Lamb([{"params": [m], "weight_decay": g["weight_decay"]} for (m, _), g in
                 zip(flats, whole.param_groups, strict=True)], lr=3e-3)  # fmt: skip
    # The parts of another rank are of the same size: sums of both are twice those of one.
    bound = [
        FlatTensor(master, [*(p.name for p in pieces), "on the other rank"], pieces[::-1]) for master, pieces in flats
    ]
    flat.bind(bound, lambda sums: 2 * sums)
    for loss in losses(model):
        whole.zero_grad()
        loss.backward()
        for (master, pieces), group in zip(flats, tensors, strict=True):
            master.grad = torch.zeros_like(master)
            for piece, tensor in zip(pieces, group, strict=True):
                piece.of_flat(master.grad).copy_(tensor.grad.flatten())
        whole.step()
        flat.step()
        for (master, pieces), group in zip(flats, tensors, strict=True):
            for piece, tensor in zip(pieces, group, strict=True):
                assert torch.allclose(piece.of_flat(master), tensor.flatten(), rtol=1e-5, atol=1e-7)


def test_a_tensor_that_it_was_not_told_of_is_an_error():
    """Else its ratio would be that of a flat tensor, silently."""
    flat = nn.Parameter(torch.ones(4))
    optimizer = Lamb([{"params": [flat], "weight_decay": 0.1}], lr=1e-3)
    optimizer.bind([], lambda sums: sums)
    flat.grad = torch.ones(4)
    with pytest.raises(AssertionError, match="not told of"):
        optimizer.step()


def stage_1_engine(**changes) -> SimpleNamespace:
    """What dsmim reads of DeepSpeed at stage 1, on one rank."""
    model = nn.Linear(3, 2)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    settings = {
        "single_partition_of_fp32_groups": [flat],
        "partition_size": [8],
        "round_robin_bit16_groups": [parameters],
        "round_robin_bit16_offsets": [[0, 6]],
    } | changes
    kept = {key: value for key, value in settings.items() if value is not None}
    return SimpleNamespace(param_names={p: n for n, p in model.named_parameters()}, optimizer=SimpleNamespace(**kept))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"round_robin_bit16_offsets": None}, "round_robin_bit16_offsets"),
        ({"round_robin_bit16_offsets": [[2, 0]]}, "other values than expected where weight"),
        ({"partition_size": [9]}, "AssertionError"),
    ],
)
def test_another_layout_of_deepspeed_is_an_error(changes, found):
    assert [flat.names for flat in check_layout(stage_1_engine(), 1, 0)] == [["weight", "bias"]]
    with pytest.raises(ValueError, match=rf"optim\.name: lamb needs .*{found}.*install deepspeed 0\.19\.8"):
        check_layout(stage_1_engine(**changes), 1, 0)


@pytest.mark.parametrize(
    ("optim", "zero", "message"),
    [
        ({"name": "timm:muon"}, {"stage": 3}, r"timm:muon at ZeRO stage 3 is another optimizer: .* 2\d\d % off"),
        ({"name": "timm:lambc"}, {"stage": 1}, "take optim.name=lamb"),
        ({"name": "timm:adan"}, {"stage": 3}, "another optimizer"),
        ({"name": "timm:adahessian"}, {}, r"timm:adahessian fails at ZeRO stage 0 \(\w+Error"),
        ({"name": "timm:adagrad"}, {"stage": 2}, r"timm:adagrad fails at ZeRO stage 2 \(IndexError"),
        (
            {"name": "timm:lion", "options": {"caution": True}},
            {"stage": 2},
            r"optim\.options\.caution: at ZeRO stage 2",
        ),
        ({"name": "timm:lion", "options": {"cautoin": True}}, {}, r"options\.cautoin: .* did you mean caution\?"),
        ({"name": "timm:sgd", "options": {"momentum": 0}, "ema_decay": 0.9}, {}, r"optim\.ema_decay: timm:sgd without"),
        ({"name": "lamb"}, {"stage": 3, "offload_optimizer": {"device": "nvme"}}, r"offload_optimizer\.device: nvme"),
    ],
)
def test_what_would_be_another_optimizer_is_refused(optim, zero, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(Optim(lr=1e-3, **optim), {"zero_optimization": zero})


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["adamw", "lamb", "timm:lion", "timm:sgd", "timm:nadam"])
def test_what_is_exact_is_allowed(name, stage):
    check_optimizer(Optim(lr=1e-3, name=name), {"zero_optimization": {"stage": stage}})


def test_others_are_allowed_at_stage_0():
    for name, options in (("timm:muon", {}), ("timm:lamb", {}), ("timm:lion", {"caution": True})):
        check_optimizer(Optim(lr=1e-3, name=name, options=options), {"zero_optimization": {"stage": 0}})
