"""Weights of RGB images into networks with another number of channels, by timm's rule; the report names it."""

import pytest
import torch

from dsmim.models import SimMIM, create_model, materialise
from dsmim.weights.match import match
from tests.weights.weight_files import (
    in_memory,
    nano,
    nano_simmim,
    swin_as_published,
    swin_as_simmim,
    timm_deit,
    timm_swin,
    timm_vit,
)

NETWORKS = {
    "swin": (lambda: (swin_as_published(timm_swin()), timm_swin()), lambda chans: nano(in_chans=chans)),
    "deit": (
        lambda: (timm_deit().state_dict(), timm_deit()),
        lambda chans: create_model("deit3_nano_patch16", "meta", img_size=64, num_classes=5, in_chans=chans),
    ),
    "timm": (lambda: (timm_vit().state_dict(), timm_vit()), lambda chans: timm_vit(in_chans=chans)),
}


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("network", NETWORKS)
def test_grey_and_repeated_channels_give_the_features_of_rgb(network, channels):
    """One channel: the RGB image with that channel three times. Six: the RGB image twice."""
    (state, theirs), ours = NETWORKS[network][0](), NETWORKS[network][1](channels)
    report, fitting = match(ours, in_memory(state), "keep")
    list(materialise(ours, fitting))
    images = torch.randn(2, 1 if channels == 1 else 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = ours.eval()(images if channels == 1 else images.repeat(1, 2, 1, 1))
        expected = theirs(images.expand(2, 3, 64, 64))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    rule = {1: "3 channels → 1 (timm's rule: their sum)", 6: "3 channels → 6 (timm's rule: repeated, times 3/6)"}
    assert report.changed == {"patch_embed.proj.weight": rule[channels]} and report.fresh == []
    assert f"patch_embed.proj.weight: {rule[channels]}" in str(report)


def test_the_decoder_of_simmim_starts_fresh_and_the_report_says_so():
    state = swin_as_simmim(timm_swin(num_classes=0))
    report, fitting = match(SimMIM(nano(num_classes=0, in_chans=1)), in_memory(state))
    assert report.fresh == ["decoder.0.bias", "decoder.0.weight"] and "mask_token" in fitting
    assert "2 dropped (predicts 3 channels, the model 1)" in str(report)
    assert report.dropped["decoder.0.weight"] == "predicts 3 channels, the model 1"
    assert match(nano_simmim(), in_memory(state))[0].fresh == []


@pytest.mark.parametrize("channels", [1, 3])
def test_other_numbers_of_channels_have_no_rule(channels):
    state = timm_swin(in_chans=4).state_dict()
    assert match(nano(in_chans=4), in_memory(state), "keep")[0].changed == {}
    with pytest.raises(ValueError, match=rf"proj\.weight takes 4 channels, the model {channels}.*model\.in_chans=4"):
        match(nano(in_chans=channels), in_memory(state), "keep")
