"""The published models have the published sizes: parameters to the last one, multiplications within half a per cent."""

import pytest

from dsmim.models import SimMIM, create_model, model_names
from dsmim.models.flops import forward_macs

# arXiv 2206.04664 and microsoft/Swin-Transformer's MODELHUB.md (millions: encoder and SimMIM at 192/12, classifier at
# 224/14); multiplications in 10⁹ by the authors' flops() at 192/12, 224/14 and 224/7.
SWIN = {
    "swinv2_small": (48.96, 51.32, 49.73, 6.74, 9.41, 8.75),
    "swinv2_base": (86.89, 90.04, 87.92, 11.76, 16.32, 15.44),
    "swinv2_large": (195.20, 199.92, 196.74, 25.96, 35.81, 34.48),
    "swinv2_huge": (655.21, 663.87, 658.03, 85.75, 117.59, 115.15),
    "swinv2_giant": (1060.98, 1071.99, 1064.56, 138.27, 189.31, 186.21),
    "swinv2_giant3b": (2997.8, 3010, 3002, 370.7, 506.9, 500.5),
}
# facebookresearch/deit models_v2.py: parameters at 224 with 1000 classes; 10⁹ multiplications at 160 and 224
DEIT = {
    "deit3_tiny_patch16": (5_721_832, 0.60, 1.25),
    "deit3_small_patch16": (22_059_496, 2.27, 4.60),
    "deit3_small_patch16_36": (64_665_064, None, 13.68),
    "deit3_small_patch16_18x2": (64_665_064, None, 13.68),
    "deit3_medium_patch16": (38_849_512, 3.98, 7.99),
    "deit3_base_patch16": (86_585_320, 8.83, 17.56),
    "deit3_base_patch16_36": (256_731_112, None, 52.46),
    "deit3_base_patch16_18x2": (256_731_112, None, 52.46),
    "deit3_large_patch16": (304_374_760, 31.08, 61.55),
    "deit3_huge_patch14": (632_126_440, 78.07, 167.30),
    "deit3_huge_patch14_52": (1_025_726_440, 126.80, 271.73),
    "deit3_huge_patch14_26x2": (1_025_726_440, None, 271.73),
    "deit3_giant_patch14_40": (955_030_504, 117.87, 252.21),
    "deit3_giant_patch14_40x2": (1_907_458_024, None, 504.21),
    "deit3_gigantic_patch14_48": (1_599_158_248, 197.07, 420.69),
    "deit3_gigantic_patch14_48x2": (3_195_240_424, None, 841.12),
}


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shown(value: float, digits: int = 2) -> float:
    """Half a per cent, or half of the table's last digit."""
    return max(0.005 * value, 0.5 * 10**-digits)


@pytest.mark.parametrize("name", SWIN)
def test_swin(name):
    encoder, simmim, classifier, at_192, at_224, small_windows = SWIN[name]
    digits = 2 if name != "swinv2_giant3b" else 0
    pretrained = SimMIM(create_model(name, "meta", img_size=192, window_size=12))
    # The table counts the mask token to the encoder.
    counts = [size(pretrained.encoder) + pretrained.mask_token.numel(), size(pretrained)]
    finetuned = create_model(name, "meta", img_size=224, window_size=14, num_classes=1000)
    counts = [count / 1e6 for count in [*counts, size(finetuned)]]
    assert counts == pytest.approx([encoder, simmim, classifier], abs=0.501 * 10**-digits + 0.001)
    assert forward_macs(pretrained.encoder, 192) / 1e9 == pytest.approx(at_192, abs=shown(at_192))
    assert forward_macs(finetuned, 224) / 1e9 == pytest.approx(at_224, abs=shown(at_224))
    if name == "swinv2_small":
        model = create_model(name, "meta", img_size=224, window_size=7)
        assert forward_macs(model, 224) / 1e9 == pytest.approx(small_windows, abs=shown(small_windows))


def test_the_billion_of_the_first_paper_to_the_last_parameter():
    assert size(create_model("swinv2_giant", "meta", img_size=192, window_size=12)) == 1_060_976_996


@pytest.mark.parametrize("name", DEIT)
def test_deit(name):
    parameters, at_160, at_224 = DEIT[name]
    model = create_model(name, "meta", img_size=224, num_classes=1000)
    assert size(model) == parameters
    assert forward_macs(model, 224) / 1e9 == pytest.approx(at_224, abs=shown(at_224))
    if at_160 is not None:
        low = create_model(name, "meta", img_size=160, num_classes=1000)
        assert forward_macs(low, 160) / 1e9 == pytest.approx(at_160, abs=shown(at_160))


@pytest.mark.parametrize(
    ("name", "img_size", "classes", "parameters"),
    [
        ("deit3_huge_patch14", 160, 1000, 631_953_640),
        ("deit3_huge_patch14", 128, 1000, 631_902_440),
        ("deit3_huge_patch14_52", 160, 1000, 1_025_553_640),
        ("deit3_large_patch16", 384, 1000, 304_763_880),
        ("deit3_huge_patch14", 224, 21841, 658_823_761),
        ("deit3_huge_patch14_52", 224, 21841, 1_052_423_761),
    ],
)
def test_deit_at_other_resolutions_and_heads(name, img_size, classes, parameters):
    assert size(create_model(name, "meta", img_size=img_size, num_classes=classes)) == parameters


def test_every_model_is_in_a_table_or_is_ours():
    ours = {"swinv2_nano", "swinv2_tiny", "deit3_nano_patch16"}
    assert set(model_names()) == SWIN.keys() | DEIT.keys() | ours
