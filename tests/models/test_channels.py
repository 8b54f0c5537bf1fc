"""Images with other than three channels: the networks, SimMIM around them, and timm's form of the network."""

import pytest
import timm
import torch

from dsmim.models import SimMIM, create_model, timm_arguments
from tests.models.networks import perturbed

SIZES = {"swinv2_nano": {"img_size": 64, "window_size": 4}, "deit3_nano_patch16": {"img_size": 64}}


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", SIZES)
def test_a_network_equals_timms_with_as_many_channels(name, channels):
    options = SIZES[name] | {"in_chans": channels, "num_classes": 3}
    ours = perturbed(create_model(name, **options)).eval()
    entry, arguments = timm_arguments(name, **options)
    assert arguments["in_chans"] == channels
    theirs = timm.create_model(entry, **arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert "in_chans" not in timm_arguments(name, **options | {"in_chans": 3})[1]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", SIZES)
def test_simmim_predicts_every_channel(name, channels, window):
    torch.manual_seed(0)
    model = SimMIM(create_model(name, in_chans=channels, **SIZES[name]), window).eval()
    assert model.decoder[0].out_channels == channels * model.stride**2
    images, mask = torch.randn(2, channels, 64, 64), torch.rand(2, 64 // model.patch, 64 // model.patch) > 0.5
    hidden = model.hidden_pixels(mask).expand_as(images)
    assert hidden.shape == images.shape and model.reconstruct(images, mask).shape == images.shape
    errors = (model.target(images) - model.reconstruct(images, mask)).abs()
    assert model(images, mask).item() == pytest.approx(errors[hidden].mean().item(), rel=1e-5)
    for channel in range(channels):  # every channel has its own statistics
        alone = model.target(images[:, channel : channel + 1])
        torch.testing.assert_close(model.target(images)[:, channel : channel + 1], alone)


def test_a_network_of_timm():
    model = create_model("timm:vit_tiny_patch16_224", img_size=32, in_chans=2, num_classes=3)
    assert model(torch.randn(1, 2, 32, 32)).shape == (1, 3)
