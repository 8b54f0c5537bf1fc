"""Masks of whole patches."""

import pytest

from dsmim.data.masking import RandomMask, mask_count


@pytest.mark.parametrize(("patches", "ratio", "count"), [(36, 0.6, 22), (49, 0.6, 30), (10, 0.3, 3), (9, 1.0, 9)])
def test_mask_counts_are_rounded_up(patches, ratio, count):
    assert mask_count(patches, ratio) == count


def test_mask_hides_whole_patches():
    mask = RandomMask(192, 32, 4, 0.6)()
    assert mask.shape == (48, 48) and mask.sum() == 22 * 64
    blocks = mask.view(6, 8, 6, 8).permute(0, 2, 1, 3).reshape(36, 64)
    assert set(blocks.sum(dim=1).tolist()) == {0, 64}
    with pytest.raises(ValueError, match=r"task\.mask_patch"):
        RandomMask(192, 30, 4, 0.6)
