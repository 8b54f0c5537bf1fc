"""Reading checkpoints without a process group. The files are written here in DeepSpeed's format; test_elastic.py in
tests/distributed reads files that DeepSpeed wrote."""

import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from dsmim.checkpoint.zero_shards import ZeroShards, read_weights

MEGABYTE = 2**20


def tied() -> nn.Module:
    """A shared weight, a frozen layer, a buffer of integers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2).requires_grad_(False), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    return model


def stage_0(folder: Path, order: list[list[str]] | None) -> tuple[Path, nn.Module, torch.optim.AdamW]:
    """A checkpoint of stage 0 after one step. The optimizer has two groups, in another order than the model."""
    model = tied()
    by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = ["1.bias", "3.weight", "3.bias"]
    groups = [[by_name[name] for name in first], [p for name, p in by_name.items() if name not in first]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    saved = {
        "module": model.state_dict(),
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": optimizer.state_dict(),
        "shared_params": None,
        "dp_world_size": 5,
    }
    folder.mkdir()
    torch.save(saved, folder / "mp_rank_00_model_states.pt")
    (folder / "state.json").write_text(json.dumps({"optimizer_parameters": order} if order else {}))
    return folder, model, optimizer


ORDER = [["1.bias", "3.weight", "3.bias"], ["0.weight", "0.bias"]]


def stage_3(folder: Path, tensors: dict[str, torch.Tensor], world: int = 3) -> Path:
    """A checkpoint of stage 3 before the first step: one sub-group; `alias` is a second name of the first parameter."""
    folder.mkdir()
    for rank in range(world):
        pieces = []
        for tensor in tensors.values():
            size = -(-tensor.numel() // world)
            padded = torch.cat([tensor.flatten(), torch.full((size * world - tensor.numel(),), torch.nan)])
            pieces.append(padded[rank * size : (rank + 1) * size])
        model = {
            "module": {"buffer": torch.tensor([rank])},
            "buffer_names": ["buffer"],
            "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in tensors.items())],
            "shared_params": {"alias": next(iter(tensors))},
            "frozen_param_shapes": OrderedDict(frozen=torch.Size([2, 2])),
            "frozen_param_fragments": {"frozen": torch.arange(6.0)[rank * 2 : rank * 2 + 2]},
            "dp_world_size": world,
        }
        optimizer = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": [torch.cat(pieces)],
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_stage_0_with_the_names_in_state_json(tmp_path):
    folder, model, optimizer = stage_0(tmp_path / "c", ORDER)
    shards = ZeroShards(folder)
    assert (shards.stage, shards.world_size) == (0, 5)
    assert shards.names == [name for group in ORDER for name in group] and {
        float(found["step"]) for found in shards.scalars.values()
    } == {1.0}
    assert shards.shared == {"1.weight": "0.weight"} and shards.frozen == ["2.weight", "2.bias"]
    assert shards.keys == ["fp32", "exp_avg", "exp_avg_sq"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(shards.tensor(name), parameter)
            assert torch.equal(shards.tensor(name, "exp_avg_sq"), optimizer.state[parameter]["exp_avg_sq"])
    found = read_weights(folder)
    assert found.keys() == model.state_dict().keys() and found["3.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_stage_0_without_the_names_has_weights_only(tmp_path):
    folder, model, _ = stage_0(tmp_path / "c", None)
    assert all(torch.equal(value, read_weights(folder)[name]) for name, value in model.state_dict().items())
    assert read_weights(folder).keys() == model.state_dict().keys()
    for ask in (lambda shards: shards.keys, lambda shards: shards.scalars, lambda s: s.tensor("0.weight", "exp_avg")):
        with pytest.raises(ValueError, match=r"c: state\.json does not say which moments .* at ZeRO stage 0"):
            ask(ZeroShards(folder))


@pytest.mark.parametrize("order", [ORDER[:1], [["1.bias", "3.weight", "3.bias"], ["0.weight", "elsewhere"]]])
def test_stage_0_with_other_names_is_an_error(tmp_path, order):
    folder, *_ = stage_0(tmp_path / "c", order)
    with pytest.raises(ValueError, match=r"state\.json: optimizer_parameters does not name the optimizer's 5 param"):
        ZeroShards(folder)


def test_stage_3_pieces_padding_frozen_and_shared(tmp_path):
    tensors = {"seven": torch.randn(7, 1), "one": torch.randn(()), "four": torch.randn(2, 2)}
    folder = stage_3(tmp_path / "c", tensors)
    shards, found = ZeroShards(folder), read_weights(folder)
    assert shards.keys == ["fp32"] and not any(shards.scalars.values()) and shards.param_groups == [{"lr": 1.0}]
    assert found.keys() == {*tensors, "alias", "frozen", "buffer"}
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert torch.equal(found["alias"], tensors["seven"]) and found["buffer"].tolist() == [0]
    assert found["frozen"].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"c: holds no moving average; .*without optim\.ema_decay"):
        read_weights(folder, "ema")


def test_a_file_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    folder = stage_3(tmp_path / "c", {"p": torch.randn(3)})
    torch.save({"optimizer_state_dict": Bomb()}, file := folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match=re.escape(f"{file}: cannot be read as DeepSpeed's file")):
        ZeroShards(folder)
    assert not (tmp_path / "boom").exists()


def test_files_missing_or_cut(tmp_path):
    folder = stage_3(tmp_path / "c", {"p": torch.randn(3)})
    model = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{model}: cannot be read as DeepSpeed's file")):
        ZeroShards(folder)
    model.unlink()
    with pytest.raises(ValueError, match="by 3 ranks and holds the optimizer files of 3 and the model files of 2"):
        ZeroShards(folder)
    with pytest.raises(ValueError, match="nowhere: no such checkpoint"):
        ZeroShards(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt: cannot be read .*\(No such file"):
        ZeroShards(tmp_path / "empty")


def test_a_checkpoint_is_not_read_into_memory(tmp_path):
    """128 MB in four parameters: opening needs no memory; reading one needs its size and its pages of the file."""
    folder = stage_3(tmp_path / "c", {f"p{i}": torch.zeros(8 * MEGABYTE) for i in range(4)}, world=2)
    process = psutil.Process()
    before = process.memory_info().rss
    shards = ZeroShards(folder)
    opened = process.memory_info().rss
    tensor = shards.tensor("p2")
    read = process.memory_info().rss
    assert tensor.numel() == 8 * MEGABYTE
    assert opened - before < 8 * MEGABYTE and 32 * MEGABYTE <= read - opened < 80 * MEGABYTE
