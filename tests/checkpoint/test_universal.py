"""What of the universal layout needs no process group. tests/distributed/test_elastic.py converts and loads."""

from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.universal import checksum, read_manifest, read_module, read_parameter


def test_the_checksum_of_a_whole_is_the_sum_of_its_parts():
    whole = torch.randn(101, 3)
    assert checksum(whole) == sum(checksum(part) for part in whole.flatten().split(37))
    changed = whole.clone()
    changed.view(torch.int32)[50, 1] ^= 1  # one bit
    assert abs(checksum(changed) - checksum(whole)) == 1
    assert checksum(torch.full((1000,), -1.0)) == 1000 * checksum(torch.tensor(-1.0))  # no overflow of 32 bits


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = tmp_path / "zero" / "layer.weight"
    with pytest.raises(ValueError, match=r"layer\.weight/fp32\.pt: cannot be read .*No such file"):
        read_parameter(tmp_path, "layer.weight", "fp32")
    folder.mkdir(parents=True)
    torch.save({"param": Path("x")}, folder / "fp32.pt")  # a class that is not allowed
    with pytest.raises(ValueError, match=r"layer\.weight/fp32\.pt: cannot be read"):
        read_parameter(tmp_path, "layer.weight", "fp32")
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt: cannot be read"):
        read_module(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"format": 1, "parameters": {}}'])
def test_another_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is not a universal checkpoint"):
        read_manifest(tmp_path)
