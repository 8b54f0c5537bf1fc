"""Training in bfloat16 with fp32 islands follows training in fp32."""

import random

import pytest
import torch

from dsmim.data.masking import RandomMask
from dsmim.models import SimMIM, create_model

STEPS = 20


def losses(bf16: bool, name: str, **options) -> list[float]:
    torch.manual_seed(0)
    random.seed(0)  # masks
    model = SimMIM(create_model(name, img_size=64, **options), target_window=15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    images = torch.nn.functional.interpolate(torch.randn(16, 3, 8, 8), 64, mode="bicubic")
    masks = torch.stack([RandomMask(64, 16, model.patch, 0.6)() for _ in images])
    seen = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(images, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize(("name", "options"), [("swinv2_nano", {"window_size": 4}), ("deit3_nano_patch16", {})])
def test_twenty_steps_in_bf16_follow_fp32(name, options):
    exact, rounded = losses(False, name, **options), losses(True, name, **options)
    assert exact[-1] < 0.97 * exact[0]  # it learns
    for step, (one, other) in enumerate(zip(exact, rounded, strict=True)):
        assert other == pytest.approx(one, rel=5e-3), step
    fall = exact[0] - exact[-1]
    assert rounded[0] - rounded[-1] == pytest.approx(fall, rel=0.05)
    assert rounded != exact  # bf16 was on
