"""The windows of Swin V2: the model must measure positions by the windows of the file."""

import pytest

from dsmim.weights.files import warm_start
from dsmim.weights.match import match
from tests.weights.weight_files import (
    assert_same,
    in_memory,
    nano,
    saved,
    started,
    swin_as_published,
    swin_as_simmim,
    timm_swin,
)


def test_window_may_change_while_coordinates_stay(tmp_path):
    path = saved(tmp_path / "simmim.pth", swin_as_simmim(timm_swin(num_classes=0)))
    theirs = timm_swin(num_classes=0, img_size=96, window_size=6, pretrained_window_sizes=(4, 4, 4, 2))
    larger = nano(num_classes=0, img_size=96, window_size=6, pretrained_window_sizes=(4, 4, 4, 2))
    report, ours = started(larger, path)
    assert_same(ours, theirs, 96)
    assert report.changed == {"attention windows": "[4,4,4,2] → [6,6,6,3], coordinates unchanged"}
    again = saved(tmp_path / "fine.pth", swin_as_published(theirs))  # attention window ≠ coordinates' window
    assert "[6,6,6,3] → [4,4,4,2]" in str(warm_start(nano(pretrained_window_sizes=(4, 4, 4, 2)), again)[0])
    with pytest.raises(ValueError, match=r"learnt with windows \[4,4,4,2\].*by \[6,6,6,3\].*sizes=\[4,4,4,2\]"):
        warm_start(nano(img_size=96, window_size=6), path)
    with pytest.raises(ValueError, match=r"the network's option pretrained_window_sizes=\[4,4,4,2\]"):
        warm_start(timm_swin(num_classes=0, img_size=96, window_size=6), path)


def test_a_strange_table_of_coordinates():
    state = swin_as_published(timm_swin(num_classes=0))
    key = "layers.1.blocks.0.attn.relative_coords_table"
    with pytest.raises(ValueError, match="no whole window size"):
        match(nano(num_classes=0), in_memory(state | {key: state[key] * 1.1}))
    with pytest.raises(ValueError, match="a square window has"):
        match(nano(num_classes=0), in_memory(state | {key: state[key][:, :6]}))
