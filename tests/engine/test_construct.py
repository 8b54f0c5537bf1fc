"""What of a model's construction needs no process group: buffers, and the names of classes for autocast."""

import torch

from dsmim.engine.construct import autocast_modules, move_buffers
from dsmim.models import create_model


def test_buffers_go_to_the_device_of_the_parameters():
    """At ZeRO-3 DeepSpeed does not move them. The meta device takes the place of a GPU here."""
    model = create_model("swinv2_nano", img_size=64, window_size=4, drop_path_rate=0.1)
    saved = model.state_dict().keys()
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"} and len(list(model.buffers())) > 10
    assert model.state_dict().keys() == saved  # buffers that are not saved stay so


def test_modules_that_may_send_bfloat16_are_named_by_their_exact_classes():
    """DeepSpeed compares classes, not subclasses. The position-bias MLP stays in fp32."""
    named = autocast_modules(create_model("swinv2_nano", "meta", img_size=64, window_size=4))
    assert "torch.nn.modules.linear.Linear" in named and "torch.nn.modules.conv.Conv2d" in named
    assert "dsmim.models.attention.window._Projection" in named and not any("Exact" in name for name in named)
