"""A linear probe in one process: what is frozen, what the forward pass keeps, and how the recipe is checked."""

import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsmim.engine import construct
from dsmim.engine.runtime import joined
from dsmim.engine.schedule import resolve_schedule
from dsmim.engine.zero import Engine
from dsmim.models import create_model, frozen_modules
from dsmim.models.freezing import freeze_all_but_classifier
from dsmim.recipe.reading import load_recipe, parse_recipe
from dsmim.tasks import build_task
from tests.conftest import ROOT, tiny_recipe

SWIN = {"name": "swinv2_nano", "img_size": 32, "window_size": 4}
VIT = {"name": "deit3_nano_patch16", "img_size": 32}
RESNET = {"name": "timm:resnet18", "img_size": 32}
PROBE = {"trainable": "head", "weights": "elsewhere"}


def tree(model: dict, **changes) -> dict:
    return tiny_recipe("nowhere", model=model, task={"name": "classify", "num_classes": 6}, optim={"lr": 1}) | changes


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (SWIN, {"head.fc.weight", "head.fc.bias"}),
        (VIT, {"head.weight", "head.bias"}),
        (RESNET, {"fc.weight", "fc.bias"}),
    ],
)
def test_only_the_classifier_learns_and_the_rest_keeps_nothing(model, head):
    kept = {}
    for settings in ({}, PROBE):
        task = build_task(parse_recipe(tree(model | settings), "test"))
        list(task.fill())
        trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
        assert trained == head if settings else trained == dict(task.model.named_parameters()).keys()
        kept["trainable" in settings] = bytes_kept(task.model)
    assert kept[True] < 0.01 * kept[False], kept


def bytes_kept(model: nn.Module) -> int:
    """Return the size of the tensors that a forward pass keeps for the backward pass, besides parameters."""
    own, sizes = {parameter.data_ptr() for parameter in model.parameters()}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    model.train()
    for module in frozen_modules(model):
        module.training = False
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(2, 3, 32, 32))
    return sum(sizes)


def test_what_is_frozen_stays_in_evaluation_mode():
    """A step of the engine: BatchNorm keeps its statistics, dropout before the classifier is off."""
    recipe = parse_recipe(tree(RESNET | PROBE | {"options": {"drop_rate": 0.5}}, engine={"deepspeed": "zero0"}), "t")
    task = build_task(recipe)
    with joined() as runtime:
        rate = resolve_schedule(recipe.schedule, recipe.optim, 8, 100)
        engine = Engine(task.model, task.layers, recipe, runtime, 1, rate, task.fill())
        engine.eval()
        engine.train()
        training = {name for name, module in engine.module.named_modules() if module.training}
        assert training == {"fc"} and not engine.module.training
        before = {name: value.clone() for name, value in engine.module.state_dict().items()}
        batch = {"image": torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(8) % 6}
        first, second = (task.training_loss(engine, batch) for _ in range(2))
        assert torch.equal(first, second)
        engine.backward(second)
        engine.step(3)
        after = engine.module.state_dict()
        assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
        engine.close()


def test_frozen_running_statistics_are_the_same_on_every_rank(monkeypatch):
    """So several ranks may probe such a network, but not train it."""
    monkeypatch.setattr(construct.dist, "broadcast", lambda *_, **__: None)
    model, runtime = create_model("timm:resnet18", num_classes=6), SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="keeps running statistics"):
        construct.share_buffers(model, runtime)
    freeze_all_but_classifier(model)
    construct.share_buffers(model, runtime)


def test_a_network_without_classifier_cannot_be_probed():
    with pytest.raises(ValueError, match=r"model\.trainable: this network has no classifier that could learn"):
        freeze_all_but_classifier(create_model(device="meta", num_classes=0, **SWIN))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"weights": None}, {}, r"model\.trainable: head leaves the rest at random first weights; give model\.weights"),
        ({"drop_path_rate": 0.1}, {}, r"model\.drop_path_rate: 0\.1 has no effect without model\.trainable=all"),
        ({"grad_checkpointing": 1}, {}, r"model\.grad_checkpointing: 1 has no effect without model\.trainable=all"),
        ({}, {"optim": {"lr": 1, "layer_decay": 0.7}}, r"optim\.layer_decay: 0\.7 has no effect without model\.train"),
        ({}, {"task": {"name": "simmim", "mask_patch": 16}}, r"model\.trainable: simmim has no classifier"),
        ({"trainable": "heads"}, {}, r"model\.trainable: .*head"),
    ],
)
def test_keys_that_a_frozen_encoder_contradicts(model, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(tree(VIT | PROBE | model, **changes), "test")


def test_the_page_s_command_is_a_whole_recipe():
    page = (ROOT / "docs/evaluation.md").read_text().replace("\\\n", " ")
    _, _, name, *words = shlex.split(re.search(r"dsmim train .*trainable=head.*", page)[0])
    recipe = load_recipe(name, [word for word in words if "=" in word])
    assert recipe.model.trainable == "head" and recipe.model.weights == "runs/pretrain"
