"""A linear probe on two ranks at every ZeRO stage, against a plain loop; then what its checkpoints are good for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmim.checkpoint import zero_shards
from dsmim.checkpoint.reading import locate
from dsmim.data.dataset import collate
from dsmim.engine.runtime import joined
from dsmim.engine.schedule import resolve_schedule
from dsmim.evaluate import evaluate
from dsmim.knn import knn
from dsmim.models import create_model
from dsmim.recipe.reading import parse_recipe
from dsmim.session import open_data
from dsmim.train import fit
from dsmim.weights.export import export
from tests.conftest import tiny_recipe, two_ranks
from tests.distributed.runs import metrics

STEPS, BATCH = 4, 8
MODELS = {
    "swin": {"name": "swinv2_nano", "img_size": 32, "window_size": 4},
    "vit": {"name": "deit3_nano_patch16", "img_size": 32},
}
HEADS = {"swin": "head.fc", "vit": "head"}
RUNS = [("swin", 0), ("swin", 2), ("swin", 3), ("vit", 1), ("vit", 3)]
WORKER = """
import json, sys
from pathlib import Path
from dsmim.evaluate import evaluate
from dsmim.knn import knn
from dsmim.recipe.reading import parse_recipe
from dsmim.train import fit

folder = Path(sys.argv[1])
found = {}
for name, recipe in json.loads((folder / "recipes.json").read_text()).items():
    assert fit(parse_recipe(recipe, name), folder / name)
    found[name] = evaluate(folder / name, []), knn(folder / name, [], [1, 5, 7])
    print(name, flush=True)
(folder / "found.json").write_text(json.dumps(found))
"""


def probe(shards: Path, folder: Path, model: str, stage: int) -> dict:
    """At stage 3 every parameter is cut up."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    return tiny_recipe(
        shards,
        task={"name": "classify", "num_classes": 3, "mixup": 0.8},
        model=MODELS[model] | {"trainable": "head", "weights": str(folder / f"{model}.safetensors")},
        optim={"lr": 0.01, "ema_decay": 0.5, "clip_grad": None},
        schedule={"duration": {"steps": STEPS}, "warmup": {"steps": 1}},
        validation={"every": {"steps": STEPS}},
        engine={"deepspeed": str(folder / f"zero{stage}.json"), "precision": "fp32"},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory, shards) -> Path:
    """RUN for each of RUNS, their figures, and the weights that they start from: random numbers, so that every part of
    the network has an effect."""
    folder = tmp_path_factory.mktemp("probe")
    generator = torch.Generator().manual_seed(0)
    for name, settings in MODELS.items():
        state = create_model(num_classes=0, **settings).state_dict()
        random = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        save_file(random, folder / f"{name}.safetensors")
    recipes = {f"{model}{stage}": probe(shards, folder, model, stage) for model, stage in RUNS}
    (folder / "recipes.json").write_text(json.dumps(recipes))
    (folder / "worker.py").write_text(WORKER)
    two_ranks(folder / "worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def plain(home, shards) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after a loop in torch that gives the optimizer only the classifier."""
    return {model: plain_run(parse_recipe(probe(shards, home, model, 0), "plain"), home, model) for model in MODELS}


def plain_run(recipe, home: Path, model: str) -> dict[str, torch.Tensor]:
    with joined() as runtime:
        task, data = open_data(recipe, runtime)
        torch.manual_seed(recipe.seed)
        list(task.fill(load_file(home / f"{model}.safetensors")))
        network, head = task.model.eval(), task.model.get_submodule(HEADS[model])
        groups = [{"params": [head.bias], "weight_decay": 0.0}, {"params": [head.weight], "weight_decay": 0.05}]
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        rate = resolve_schedule(recipe.schedule, recipe.optim, BATCH, 53)
        for step in range(STEPS):
            batch = collate(data.train.__getitems__(list(range(step * BATCH, (step + 1) * BATCH))))
            loss = task.training_loss(network, batch | {"step": step})
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate.at(step)
            optimizer.step()
        return {name: parameter.detach() for name, parameter in network.named_parameters()}


def assert_near(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], home: Path, model: str) -> None:
    """The head is the plain loop's, everything else as it was, bit for bit."""
    before = load_file(home / f"{model}.safetensors")
    assert found.keys() == before.keys() | {f"{HEADS[model]}.weight", f"{HEADS[model]}.bias"}
    for name, value in found.items():
        if name in before:
            assert torch.equal(value, before[name]), name
        else:
            assert (value - plain[name]).abs().max() < 2e-5 and value.abs().max() > 0.005, name


@pytest.mark.parametrize(("model", "stage"), RUNS)
def test_two_ranks_equal_a_plain_loop(home, plain, model, stage):
    checkpoint = locate(home / f"{model}{stage}")
    assert_near(zero_shards.read_weights(checkpoint), plain[model], home, model)
    average = zero_shards.read_weights(checkpoint, "ema")  # of what is frozen it is the weight itself
    head = f"{HEADS[model]}.weight"
    assert average.keys() == plain[model].keys() and not torch.equal(average[head], plain[model][head])
    shards = zero_shards.ZeroShards(checkpoint)
    assert set(shards.names) == {head, f"{HEADS[model]}.bias"}
    assert set(shards.frozen) == plain[model].keys() - set(shards.names)


@pytest.mark.parametrize(("model", "stage", "then"), [("vit", 3, 0), ("swin", 0, 0), ("vit", 1, 3)])
def test_it_goes_on_alone_and_at_another_stage(home, plain, shards, tmp_path, model, stage, then):
    """From the checkpoint after 2 steps, which two ranks have written."""
    run_dir = shutil.copytree(home / f"{model}{stage}", tmp_path / "run")
    shutil.rmtree(run_dir / f"checkpoints/step_{STEPS:08d}")
    assert fit(parse_recipe(probe(shards, home, model, then), "alone"), run_dir)
    assert_near(zero_shards.read_weights(locate(run_dir)), plain[model], home, model)
    one, other = metrics(home / f"{model}{stage}"), metrics(run_dir)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for left, right in zip(one, other, strict=True):
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), abs=1e-5)


def test_figures_and_neighbours_at_any_world_size(home):
    found = json.loads((home / "found.json").read_text())
    assert evaluate(home / "vit3", []) == found["vit3"][0] and found["vit3"][0]["samples"] == 13
    assert knn(home / "vit3", [], [1, 5, 7]) == found["vit3"][1] and found["vit3"][1]["train_samples"] == 53
    assert found["vit1"][1]["knn"] == found["vit3"][1]["knn"]  # the classifier has no part in it


def test_an_export_has_the_whole_network(home, plain, tmp_path):
    export(home / "vit3", tmp_path / "model.safetensors")
    assert_near(load_file(tmp_path / "model.safetensors"), plain["vit"], home, "vit")
