"""Stochastic depth: which samples keep which branch, and that computing only these changes no number."""

import copy
import time
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import nn

from dsmim.models import PositionDraws, Recompute, compile_blocks, create_model, set_recompute, stochastic_depth
from dsmim.models.stochastic_depth import DropPath, Kept, MultipliedDropPath
from tests.models.networks import gradients, perturbed

KEY, BATCH = 12345, 16
NETWORKS = {
    "vit": ("deit3_nano_patch16", {}),
    "parallel": ("deit3_small_patch16_18x2", {}),
    "swin": ("swinv2_nano", {"window_size": 4, "drop_path_rates": "uniform"}),
}


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return found.shape == wanted.shape and (found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-6


def network(kind: str, rate: float = 0.6, side: int = 64) -> nn.Module:
    name, options = NETWORKS[kind]
    model = create_model(name, img_size=side, num_classes=3, drop_path_rate=rate, **options)
    if kind == "parallel":
        del model.blocks[1:]
    return perturbed(model).train()


def multiplied(x: torch.Tensor, *branches) -> torch.Tensor:
    """Every branch of every sample, multiplied by 0 or 1 / (1 - rate): the definition."""
    out = x
    for drop_path, branch in branches:
        kept = drop_path.kept(x)
        factors = torch.zeros(len(x))
        factors[slice(None) if kept.rows is None else kept.rows] = kept.scale
        out = out + branch(x) * factors.view(-1, *[1] * (x.ndim - 1))
    return out


@pytest.mark.parametrize("rows_of_none", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_computing_only_what_is_kept_changes_nothing(kind, rows_of_none, monkeypatch):
    """Also where no sample keeps a branch, by no rows or by one of weight 0; with and without recomputation."""
    if not rows_of_none:
        monkeypatch.setattr(stochastic_depth, "TAKE_NO_ROWS", ())
    model, images, weight = network(kind), torch.randn(3, 3, 64, 64), torch.randn(3, 3)
    draws, results = PositionDraws(model, KEY, BATCH), []
    positions = next(p for p in np.arange(3000).reshape(-1, 3) if {0, 1, 3} <= {*draws.mask(p).sum(1).tolist()})
    for recompute in (0, 1):
        set_recompute(model, Recompute(recompute))
        with draws.at(torch.from_numpy(positions)):
            results.append(gradients(model, images, weight))
    set_recompute(model, Recompute())
    module = __import__(type(model).__module__, fromlist=["residual"])
    monkeypatch.setattr(module, "residual", multiplied)
    with draws.at(positions):
        results.append(gradients(model, images, weight))
    logits, wanted = results.pop()
    for own, found in results:
        assert close(own, logits)
        assert not [name for name, value in wanted.items() if not close(found[name], value)]


def test_draws_depend_on_the_position_alone():
    """Not on how positions are cut into micro batches, nor on what was drawn before."""
    for balanced in (False, True):
        model = network("vit", 0.4)
        draws = PositionDraws(model, KEY, BATCH, balanced=balanced)
        whole = draws.mask(np.arange(64))
        for order in (np.arange(64).reshape(16, 4), np.random.default_rng(0).permutation(64).reshape(4, 16)):
            for some in order:
                assert (draws.mask(some) == whole[:, some]).all()
        other = PositionDraws(model, KEY + 1, BATCH, balanced=balanced)
        assert (other.mask(np.arange(64)) != whole).any()


def test_independent_draws():
    """Mean, and no correlation between neighbours, steps and branches: each within 4.5 deviations."""
    draws, n = PositionDraws(network("vit", 0.3), KEY, BATCH), 20_000
    kept = draws.mask(np.arange(n)).astype(float)  # (8, n)
    centred = (kept - 0.7) / (0.7 * 0.3) ** 0.5
    bound = 4.5 / n**0.5
    assert abs(centred.mean(1)).max() < bound
    for shift in (1, 2, 8, BATCH):
        assert abs((centred[:, shift:] * centred[:, :-shift]).mean(1)).max() < bound * 1.01
    correlation = centred @ centred.T / n
    assert abs(correlation - np.diag(np.diag(correlation))).max() < bound


@pytest.mark.parametrize("rate", [0.1, 0.45, 0.6])
def test_balanced_draws(rate):
    """Every aligned run of 2^k has its share within one sample; every place of the batch has the probability."""
    steps = 3000
    draws = PositionDraws(network("vit", rate), KEY, BATCH, balanced=True)
    kept = draws.mask(np.arange(BATCH * steps)).reshape(8, steps, BATCH)
    for run in (1, 2, 4, 8, 16):
        counts = kept.reshape(8, steps, BATCH // run, run).sum(-1)
        exact = run * (1 - rate)
        assert np.floor(exact) <= counts.min() and counts.max() <= np.ceil(exact)
    deviation = (rate * (1 - rate) / steps) ** 0.5
    assert abs(kept.mean(1) - (1 - rate)).max() < 4.5 * deviation
    centred = (kept[:, :, 0] - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    assert abs(centred @ centred.T / steps - np.eye(8)).max() < 0.2


def test_drawing_is_cheap():
    """52 blocks, 128 samples."""
    model = nn.ModuleList(DropPath(0.5) for _ in range(104))
    for balanced in (False, True):
        draws, seconds = PositionDraws(model, KEY, 2048, balanced=balanced), []
        for first in range(0, 1280, 128):
            begin = time.perf_counter()
            with draws.at(torch.arange(first, first + 128)):
                pass
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 0.01  # about 0.0008 on an idle core


def test_without_positions_torch_s_generator_draws():
    model, images = network("vit"), torch.randn(8, 3, 64, 64)
    model.requires_grad_(False)
    torch.manual_seed(1)
    one, other = model(images), model(images)
    torch.manual_seed(1)
    assert torch.equal(model(images), one) and not torch.equal(other, one)
    with PositionDraws(model, KEY, BATCH).at(range(8)):
        drawn = model(images)
        assert torch.equal(model(images), drawn)
        with pytest.raises(AssertionError, match="drawn for 8 samples, called with 4"):
            model(images[:4])
    assert not torch.equal(model(images), drawn)  # the context is over
    model.eval()
    with PositionDraws(model, KEY, BATCH).at(range(8)):
        assert torch.equal(model(images), model(images))
    plain = create_model("deit3_nano_patch16", img_size=64, num_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images), model(images))


def test_half_of_the_branch_is_computed():
    model = network("vit", 0.5)
    rows = []
    for block in model.blocks:
        for module in (block.attn, block.mlp):
            module.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    draws = PositionDraws(model, KEY, BATCH)
    with draws.at(range(8)):
        model(torch.randn(8, 3, 64, 64))
    assert rows == draws.mask(np.arange(8)).sum(1).tolist() and sum(rows) < 8 * len(rows)


class Noted(torch.autograd.Function):
    """As ZeRO-3's hooks: calls a function before the backward pass of the module whose output it gets."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.note()
        return grad, None


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("kind", NETWORKS)
def test_modules_run_in_the_same_order_whatever_is_kept(kind, recompute):
    """Forward, recomputation and backward: at ZeRO stage 3 every rank gathers each module's weights in this order."""
    model, seen = network(kind), []
    set_recompute(model, Recompute(recompute))
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        module.register_forward_hook(
            lambda module, inputs, output, name=name: Noted.apply(output, partial(seen.append, f"{name} backward"))
        )
    draws, orders = PositionDraws(model, KEY, BATCH), []
    for rows in (range(3), [0, 2], [], [1]):
        kept = None if len(rows) == 3 else torch.tensor(rows, dtype=torch.long)
        for number, module in enumerate(draws.modules):
            module.receive(Kept(3, kept if number % 2 else torch.tensor([1]), 2.5))
        seen.clear()
        model(torch.randn(3, 3, 64, 64)).sum().backward()
        orders.append(list(seen))
    assert orders[0] == orders[1] == orders[2] == orders[3] and len(orders[0]) > 20


def test_rates():
    def rates(name, **options):
        model = create_model(name, "meta", img_size=64, drop_path_rate=0.3, **options)
        return [module.drop_prob for module in model.modules() if isinstance(module, (DropPath, TimmDropPath))]

    line = [0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert rates("deit3_nano_patch16") == rates("deit3_nano_patch16", drop_path_rates="uniform") == [0.3] * 8
    assert rates("deit3_small_patch16_18x2") == [0.3] * 72
    assert rates("deit3_nano_patch16", drop_path_rates="linear") == pytest.approx(line)
    assert rates("swinv2_nano", window_size=4) == pytest.approx(np.repeat(np.linspace(0, 0.3, 6), 2).tolist())
    assert rates("swinv2_nano", window_size=4, drop_path_rates="uniform") == [0.3] * 12
    depth = {"options": {"depth": 4}}
    assert rates("timm:vit_tiny_patch16_224", **depth) == pytest.approx(line[2:])  # timm's first block has none
    assert rates("timm:vit_tiny_patch16_224", drop_path_rates="uniform", **depth) == [0.3] * 8
    assert rates("timm:resnet18", drop_path_rates="uniform") == [0.3] * 8  # timm's first block has None
    with pytest.raises(ValueError, match="drop_path_rates: no 'cosine'; give uniform or linear"):
        rates("swinv2_nano", window_size=4, drop_path_rates="cosine")


TIMM = {
    "vit": ("timm:vit_tiny_patch16_224", {"depth": 3, "embed_dim": 32, "num_heads": 2}),
    "cait": ("timm:cait_xxs24_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}),  # one module, two branches
    "tnt": ("timm:tnt_s_legacy_patch16_224", {"depth": 2}),  # branches of parts of a sample
    "convnext": ("timm:convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
}


def foreign(kind: str, rate: float = 0.5) -> nn.Module:
    name, options = TIMM[kind]
    model = create_model(
        name, img_size=64, num_classes=3, drop_path_rate=rate, drop_path_rates="uniform", options=options
    )
    return perturbed(model).train()


@pytest.mark.parametrize("kind", TIMM)
def test_networks_of_timm_draw_by_position(kind):
    """A sample's output depends on its position alone, and a recomputed block sees the same draws."""
    model, images, weight = foreign(kind), torch.randn(6, 3, 64, 64), torch.randn(6, 3)
    draws = PositionDraws(model, KEY, BATCH)
    assert draws.modules and all(isinstance(module, MultipliedDropPath) for module in draws.modules)
    with draws.at(range(6)):
        logits, wanted = gradients(model, images, weight)
    parts = []
    for first in (0, 2, 4):
        with draws.at(range(first, first + 2)):
            parts.append(model(images[first : first + 2]))
    assert close(torch.cat(parts), logits)
    if kind != "convnext":
        set_recompute(model, Recompute(1))
        with draws.at(range(6)):
            again, found = gradients(model, images, weight)
        assert torch.equal(again, logits)
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, atol=1e-6), name
    with draws.at(range(6, 12)):
        assert not torch.allclose(model(images), logits, atol=1e-3)


def test_networks_of_timm_scale_as_timm_does():
    """With each branch's factors put in by hand, timm's own network gives the same."""
    model, images = foreign("vit"), torch.randn(4, 3, 64, 64)
    draws = PositionDraws(model, KEY, BATCH)
    factors = torch.from_numpy(draws.mask(np.arange(4)).reshape(6, MultipliedDropPath.uses, 4)[:, 0] / 0.5).float()

    class Fixed(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = own

        def forward(self, x):
            return x * self.own.view(-1, 1, 1)

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, drop_path_rate=0.5, **TIMM["vit"][1])
    theirs.load_state_dict(model.state_dict())
    for number, block in enumerate(theirs.blocks):
        block.drop_path1, block.drop_path2 = Fixed(factors[2 * number]), Fixed(factors[2 * number + 1])
    with draws.at(range(4)):
        assert torch.allclose(model(images), theirs.train()(images), atol=1e-5)
    copied = copy.deepcopy(model)  # its counting of calls too
    with PositionDraws(copied, KEY, BATCH).at(range(4)):
        assert torch.allclose(copied(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_compiled_blocks(kind, monkeypatch):
    """Equal numbers, without a new graph per number of kept samples. (The parity test compiles to machine code.)"""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = foreign("vit") if kind == "timm" else network("vit")
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    weight, graphs = torch.randn(6, 3), []
    for step in range(5):
        images = torch.randn(6, 3, 64, 64)
        results = []
        for each in (model, compiled):
            with PositionDraws(each, KEY, BATCH).at(range(6 * step, 6 * step + 6)):
                results.append(gradients(each, images, weight))
        (logits, wanted), (own, found) = results
        assert close(own, logits, 1e-4)
        assert not [name for name, value in wanted.items() if not close(found[name], value, 1e-4)]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == graphs[1:2] * 4, graphs
