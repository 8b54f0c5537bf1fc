"""Files of weights: what is read from them, and what is refused."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch

from dsmim.checkpoint.reading import STATE_FORMAT
from dsmim.preflight import _check_weights
from dsmim.weights.files import read, unfinished
from tests.conftest import tiny_recipe


def test_what_is_read_from_a_file(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    for name, content, left in [
        ("plain.pt", tensors, set()),
        ("lightning.ckpt", {"state_dict": tensors, "epoch": 3}, {"epoch"}),
        ("beit2.bin", {"model": {"module": tensors, "step": 1}, "model_ema": tensors}, {"model_ema", "step"}),
        ("ddp.pth", {"model": {f"module.{key}": value for key, value in tensors.items()}}, set()),
    ]:
        torch.save(content, tmp_path / name)
        weights = read(tmp_path / name)
        assert set(weights.left_out) == left and torch.equal(weights.tensors["a"], tensors["a"])
        assert list(weights.tensors) == ["a", "b"] and str(tmp_path / name) == weights.source
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "old.pth").tensors["a"], tensors["a"])


class Harmful:
    def __reduce__(self):
        return (print, ("harm done",))


def test_files_that_are_not_weights(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a run directory, a checkpoint, or a file that ends in \.safetensors"):
        read(tmp_path / "notes.txt")
    torch.save({"model": {"a": torch.ones(1)}, "more": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"would run .*print.*If you trust the file.*weights_only=False"):
        read(tmp_path / "harmful.pth")
    assert "harm done" not in capsys.readouterr().out
    for name, content in [("text.pth", b"hello"), ("text.safetensors", b"hello"), ("none.pth", pickle.dumps(None))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"optimizer is not a tensor.*found: optimizer, epoch"):
        read(tmp_path / "empty.pth")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        read(tmp_path)


# What yacs 0.1.8 pickles: a dict with flags in its __dict__, nested
YACS = """
class CfgNode(dict):
    def __init__(self, init=None):
        super().__init__(init or {})
        self.__dict__["__immutable__"] = True
        self.__dict__["__deprecated_keys__"] = set()
        print("code of yacs has run")
"""
WRITE = """
import argparse, sys, torch
from yacs.config import CfgNode
config = CfgNode({"MODEL": CfgNode({"NAME": "swinv2", "DEPTHS": [2, 2, 6, 2]}), "TRAIN": CfgNode({"BASE_LR": 1e-3})})
args = argparse.Namespace(lr=1e-3, nested=argparse.Namespace(path="x"))
content = {"model": {"a": torch.arange(3.0)}, "config": config, "args": args, "epoch": 7, "max_accuracy": 83.5}
torch.save(content, sys.argv[1], _use_new_zipfile_serialization=sys.argv[2] == "zip")
"""


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_checkpoint_with_the_settings_of_its_training(tmp_path, kind, capsys):
    (tmp_path / "yacs").mkdir()
    (tmp_path / "yacs" / "config.py").write_text(YACS)
    command = [sys.executable, "-c", WRITE, str(tmp_path / "ckpt_epoch_7.pth"), kind]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "yacs" not in sys.modules
    weights = read(tmp_path / "ckpt_epoch_7.pth")
    assert "yacs" not in sys.modules and "code of yacs" not in capsys.readouterr().out
    assert torch.equal(weights.tensors["a"], torch.arange(3.0)) and list(weights.tensors) == ["a"]
    beside = ("config", "args", "epoch", "max_accuracy")
    assert weights.left_out == dict.fromkeys(beside, "an entry beside the weights")


def test_other_code_under_the_name_of_yacs_is_refused(tmp_path):
    class Named:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"model": {"a": torch.ones(1)}, "config": Named()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"would run .*exec"):
        read(tmp_path / "bad.pth")


@pytest.mark.parametrize(("duration", "told"), [({"steps": 12}, "is at step 6 of 12"), ({"steps": 6}, None),
                                                ({"epochs": 2}, None)])  # fmt: skip
def test_a_run_that_is_not_at_its_end_is_told(tmp_path, duration, told):
    checkpoint = tmp_path / "checkpoints/step_00000006"
    checkpoint.mkdir(parents=True)
    recipe = tiny_recipe(tmp_path, schedule={"duration": duration})
    (checkpoint / "state.json").write_text(json.dumps({"format": STATE_FORMAT, "step": 6, "recipe": recipe}))
    found = unfinished(tmp_path)
    assert found == (told and f"{tmp_path} {told}")
    assert unfinished(checkpoint) is None and unfinished(tmp_path / "file.pth") is None
    problem = f"model.weights: {tmp_path} {told}; wait until it is complete, or give one of its checkpoints"
    if told:
        with pytest.raises(ValueError, match=re.escape(problem)):
            _check_weights(tmp_path)
    else:
        _check_weights(tmp_path)
