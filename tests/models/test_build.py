"""A model built module by module equals the model built whole, and no parameter stays uninitialised."""

import pytest
import torch
from torch import nn

from dsmim.models import SimMIM, create_model, materialise, materialised

OPTIONS = {
    "swinv2_nano": {"img_size": 64, "window_size": 4, "extra_norm_every": 3},
    "deit3_nano_patch16": {"img_size": 64},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_building_in_parts_gives_the_same_weights(name):
    torch.manual_seed(3)
    whole = create_model(name, num_classes=4, **OPTIONS[name])
    parts = create_model(name, "meta", num_classes=4, **OPTIONS[name])
    assert all(parameter.is_meta for parameter in parts.parameters())
    torch.manual_seed(3)
    taken = {}
    for module in materialise(parts):  # as the engine does, take a module's weights away before the next ones exist
        for parameter in module.parameters(recurse=False):
            taken[parameter] = parameter.data
            parameter.data = torch.empty(0)
    values = {name: taken[parameter] for name, parameter in parts.named_parameters()}
    assert values.keys() == dict(whole.named_parameters()).keys()
    for key, value in whole.named_parameters():
        assert torch.equal(values[key], value), key


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_are_those_of_timm_s_first_weights(name):
    """timm initialises the whole network at once. DeiT III differs on purpose: class token, head, LayerScale."""
    import timm

    from dsmim.models import timm_arguments

    options = {key: value for key, value in OPTIONS[name].items() if key != "extra_norm_every"}
    torch.manual_seed(0)
    ours = create_model(name, num_classes=1000, **options)
    entry, arguments = timm_arguments(name, num_classes=1000, **options)
    theirs = dict(timm.create_model(entry, **arguments).named_parameters())
    different = ("cls_token", "head.weight") if name.startswith("deit3") else ()
    for key, value in ours.named_parameters():
        if key not in different and value.numel() > 1:
            spread = theirs[key].std().item()
            assert value.std().item() == pytest.approx(spread, rel=0.3 if value.numel() < 2000 else 0.05), key
            assert value.mean().item() == pytest.approx(theirs[key].mean().item(), abs=0.3 * spread + 1e-6), key


def test_a_parameter_without_initialiser_is_an_error():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.lost = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))

        def initialise(self):
            nn.init.zeros_(self.kept)

    with torch.device("meta"):
        model = Forgetful()
    with pytest.raises(AssertionError, match=r"Forgetful\.lost is not initialised"):
        materialised(model)


def test_simmim_s_own_parameters_are_created_like_the_encoder_s():
    options = {"img_size": 64, "window_size": 4}
    shape = SimMIM(create_model("swinv2_nano", "meta", **options))
    assert all(parameter.is_meta for parameter in shape.parameters())
    torch.manual_seed(0)
    filled = SimMIM(create_model("swinv2_nano", **options))
    assert filled.mask_token.std().item() == pytest.approx(0.02, rel=0.5) and filled.decoder[0].weight.std() > 0.01


def test_weights_overwrite_what_they_name():
    model = create_model("deit3_nano_patch16", "meta", img_size=64)
    given = {"pos_embed": torch.randn(1, 16, 96), "blocks.1.norm1.weight": torch.randn(96)}
    list(materialise(model, given))
    for name, value in given.items():
        assert torch.equal(model.get_parameter(name), value)
    assert (model.blocks[0].norm1.weight == 1).all()


def test_saved_buffers_are_overwritten_too():
    model = create_model("timm:resnet10t", img_size=64, num_classes=2)
    given = {"bn1.running_mean": torch.randn(32), "bn1.weight": torch.randn(32)}
    given = {name: torch.randn(model.state_dict()[name].shape) for name in given if name in model.state_dict()}
    assert given
    list(materialise(model, given))
    for name, value in given.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(("name", "head"), [("swinv2_nano", "head.fc"), ("deit3_nano_patch16", "head")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_deviation_of_the_heads_first_weights(name, head, device):
    options = {"img_size": 64, "window_size": 4 if name.startswith("swin") else None, "num_classes": 500}
    model = materialised(create_model(name, device, head_init_std=2e-5, **options))
    assert model.get_parameter(f"{head}.weight").std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.get_parameter(f"{head}.bias").any()
    with pytest.raises(ValueError, match=f"model.head_init_std: {name} has no classifier here"):
        create_model(name, device, head_init_std=2e-5, **options | {"num_classes": 0})


def test_the_deviation_of_the_head_of_a_network_of_timm():
    model = create_model("timm:beit_base_patch16_224", img_size=32, num_classes=500, options={"depth": 1})
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)  # timm's, as unilm/beit
    model = create_model(
        "timm:beit_base_patch16_224", img_size=32, num_classes=500, options={"depth": 1}, head_init_std=0.01
    )
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
