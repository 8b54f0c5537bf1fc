"""Files of weights: what is read from them, and what is refused."""

import pickle

import pytest
import torch

from dsmim.weights.files import read


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
