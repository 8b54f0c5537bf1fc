"""Recipes: every error at once, with its key and its fix."""

import re
from functools import reduce

import pytest
import yaml

from dsmim.engine.ds_config import load_ds_config, shipped_configs
from dsmim.recipe import Recipe
from dsmim.recipe.errors import RecipeError
from dsmim.recipe.reading import differences, load_recipe, parse_recipe, shipped_recipes, stored_recipe
from tests.conftest import tiny_recipe


def problems_of(tree: dict) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree, "test")
    return caught.value.problems


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_published_pretraining_values():
    """arXiv 2206.04664 and the Swin V2 base configuration: lr 4e-4 at batch 2048, 500 k steps, drop at 437.5 k."""
    from dsmim.engine.schedule import resolve_schedule

    recipe = load_recipe("simmim_swinv2_base_192_pretrain")
    rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, 1_281_167)
    assert rate.at(6_250) == pytest.approx(4e-4)
    assert rate.at(0) == pytest.approx(2e-6)
    assert rate.at(437_499) == pytest.approx(4e-4) and rate.at(437_500) == pytest.approx(4e-5)
    assert rate.total == 500_000


def test_published_finetuning_values():
    from dsmim.engine.schedule import resolve_schedule

    recipe = load_recipe("simmim_swinv2_base_224_finetune")
    rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, 1_281_167)
    assert rate.peak == pytest.approx(5e-3) and rate.min_lr == pytest.approx(1e-6)
    assert recipe.optim.layer_decay == 0.75 and recipe.optim.clip_grad == 5.0
    # The authors drop the last batch of an epoch, which is not full: floor(1,281,167 / 2048) × 100 epochs.
    assert (rate.total, rate.warmup) == (1_281_167 // 2048 * 100, 1_281_167 // 2048 * 20) == (62_500, 12_500)
    assert recipe.validation.every.in_steps(2048, 1_281_167) == recipe.checkpoint.every.in_steps(2048, 1_281_167) == 625
    assert recipe.task.mix_run * 16 == recipe.batch.global_batch


def test_all_problems_at_once_with_the_nearest_key(tmp_path):
    tree = tiny_recipe(tmp_path)
    tree["optim"] = {"lrr": 1e-3, "weight_decay": -1}
    tree["task"]["mask_rato"] = 0.5
    tree["scheduler"] = {}
    found = problems_of(tree)
    assert "optim.lrr: unknown key; did you mean lr?" in found
    assert "optim.lr: missing; give it a value" in found
    assert any(p.startswith("optim.weight_decay: input should be greater than or equal to 0") for p in found)
    assert "task.mask_rato: unknown key; did you mean mask_ratio?" in found
    assert "scheduler: unknown key; did you mean schedule?" in found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schedule", "duration"), {"steps": 5, "epochs": 1}, "schedule.duration: give exactly one of"),
        (("checkpoint", "every"), {"steps": 5, "minutes": 1}, "give exactly one of steps, epochs, samples, minutes"),
        (("checkpoint", "keep_every"), {"minutes": 1}, "checkpoint.keep_every.minutes: unknown key"),
        (("task", "target_window"), 46, "must be odd"),
        (("task", "mask_patch"), 24, "does not divide model.img_size 32"),
        (("model", "drop_path"), 0.1, "model.drop_path: says how samples are drawn: independent or balanced; the rate"),
        (("task", "name"), "simim", "task.name: 'simim' is unknown; did you mean simmim?"),
        (("task",), {}, "task.name: missing; give it a value"),
        (("batch", "micro_batch"), 3, "batch.global_batch: 8 is not a multiple of batch.micro_batch 3"),
        (("schedule", "name"), "multistep", "schedule.milestones='[{epochs: 30}, {epochs: 60}]', for example"),
        (("schedule", "milestones"), [{"steps": 3}], "schedule.milestones have no effect with schedule.name=cosine"),
        (("data", "augment"), {"crop_scale": [1.0, 0.5]}, "crop_scale must go from small to large"),
        (("data", "augment"), {"rand_augment": "foo"}, "data.augment.rand_augment: string should match"),
        (("optim", "lr"), float("inf"), "optim.lr: input should be a finite number"),
        (("data", "image_key"), "a/b.jpg", "data.image_key: give the extension of a member, such as jpg"),
        (("data", "image_key"), ".", "data.image_key: give the extension of a member, such as jpg"),
        (("data", "workers"), "many", "data.workers: input should be a valid integer"),
        (
            ("schedule", "duration"),
            480,
            "schedule.duration: give a length with its unit: {steps: 480} or {epochs: 480} or",
        ),
        (("schedule", "warmup"), "5ep", "{steps: N} or {epochs: N} or {samples: N} (given: '5ep')"),
        (
            ("model",),
            "swinv2_nano",
            "model: is a section, not a value (given: 'swinv2_nano'); did you mean model.name=",
        ),
        (("log",), 5, "log: is a section, not a value (given: 5); its keys: every, low_memory, tensorboard"),
        (("task", "mask_ratio"), 0, "task.mask_ratio: 0 hides no patch"),
    ],
)
def test_contradictions_name_the_key(tmp_path, path, value, message):
    tree = tiny_recipe(tmp_path)
    *parents, key = path
    reduce(dict.get, parents, tree)[key] = value
    found = problems_of(tree)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("optim.learning_rate", 1, "optim.lr"),
        ("lr", 1, "optim.lr"),
        ("epochs", 300, "schedule.duration={epochs: 300}"),
        ("validation.epochs", 2, "every={epochs: 2}"),
        ("schedule.epochs", 90, "duration={epochs: 90}"),
        ("schedule.warmup_steps", 9, "schedule.warmup={steps: 9}"),
        ("batch.batch_size", 8, "batch.global_batch (of all ranks) or batch.micro_batch (of one)"),
        ("gradient-clipping", 1, "optim.clip_grad"),
        ("num_workers", 4, "data.workers"),
        ("weight_decay", 0.1, "optim.weight_decay"),
        ("data.crop_scale", [0.1, 1], "data.augment.crop_scale"),
        ("zero_stage", 2, "engine.deepspeed=zero2"),
    ],
)
def test_other_programs_names_and_keys_of_other_sections_are_told(tmp_path, key, value, name):
    tree = tiny_recipe(tmp_path)
    *parents, last = key.split(".")
    reduce(dict.get, parents, tree)[last] = value
    assert problems_of(tree) == [f"{key}: unknown key; did you mean {name}?"]


def test_other_descriptions_than_a_recipe_are_not_told_the_recipe_s_keys():
    from pydantic import ValidationError

    from dsmim.cluster.profile import Profile
    from dsmim.recipe.errors import explain

    with pytest.raises(ValidationError) as caught:
        Profile.model_validate({"batch_size": 8, "acount": "me"})
    lines = explain(caught.value, Profile)
    assert any(line == "acount: unknown key; did you mean account?" for line in lines)
    assert not any("batch." in line for line in lines)


def test_every_alias_names_keys_that_exist():
    from dsmim.recipe.aliases import ALIASES
    from dsmim.recipe.errors import keys_of

    known = keys_of(Recipe)
    for word, target in ALIASES.items():
        for key in re.findall(r"[a-z]+\.[a-z_.]+", target):
            assert key in known or any(one.startswith(f"{key}.") for one in known), (word, key)


def test_a_key_of_another_task_is_told(tmp_path):
    tree = tiny_recipe(tmp_path)
    tree["task"]["mixup"] = 0.8
    assert problems_of(tree) == ["task.mixup: unknown key; it is a key of task.name=classify"]


CLASSIFY = {"name": "classify", "num_classes": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": CLASSIFY | {"mixup": 0.8}, "data": {"repeats": 3}, "batch": {"global_batch": 4}},
            "data.repeats: 3 copies of an image are more than half of batch.global_batch 4",
        ),
        (
            {"task": CLASSIFY | {"mixup": 0.8}, "batch": {"global_batch": 9}},
            "batch.global_batch: mixup and CutMix pair neig",
        ),
        ({"task": CLASSIFY | {"mixup": 0.8, "mix_switch": 0.3}}, "task.mix_switch: 0.3 has no effect without both"),
        (
            {"task": CLASSIFY | {"mixup": 0.8, "mix_run": 6}},
            "task.mix_run: 6 does not divide batch.global_batch 8; set a divisor, or 2",
        ),
        ({"task": CLASSIFY | {"mix_run": 4}}, "task.mix_run: 4 has no effect without task.mixup or task.cutmix"),
        ({"model": {"grad_checkpointing_stages": 2}}, "model.grad_checkpointing_stages: 2 has no effect without"),
        (
            {"model": {"drop_path_rate": 0.0, "drop_path": "balanced"}},
            "model.drop_path: balanced has no effect without model.drop_path_rate",
        ),
        ({"model": {"weights_head": "drop"}}, "model.weights_head: drop has no effect without model.weights"),
        ({"optim": {"lr_base_batch": 256}}, "optim.lr_base_batch: 256 has no effect without optim.lr_scaling=linear"),
        ({"data": {"cache_gb": 5}}, "data.cache_gb: 5.0 has no effect without data.cache_dir"),
        (
            {"data": {"augment": {"rand_augment": "rand-m9", "three_augment": True}}},
            "set data.augment.three_augment=false or data.augment.rand_augment=null",
        ),
        (
            {"data": {"augment": {"rand_augment": "rand-m9", "color_jitter": 0.3}}},
            "set data.augment.color_jitter=null or data.augment.rand_augment=null",
        ),
        (
            {"data": {"augment": {"crop": "simple", "crop_scale": [0.1, 1]}}},
            "crop_scale: [0.1, 1.0] has no effect without data.augment.crop=random_resized; give that, or set data",
        ),
        (
            {"model": {"in_chans": 4}, "data": {"mean": 0.5, "std": 0.5, "augment": {"three_augment": True}}},
            "data.augment.three_augment: works on RGB and grey, not with model.in_chans=4; set it to false",
        ),
        (
            {"model": {"in_chans": 4}, "data": {"mean": 0.5, "std": 0.5, "augment": {"color_jitter": 0.3}}},
            "data.augment.color_jitter: works on RGB and grey, not with model.in_chans=4; set it to null",
        ),
        ({"schedule": {"gamma": 0.5}}, "schedule.gamma: 0.5 has no effect without schedule.name=multistep"),
        (
            {"schedule": {"name": "multistep", "milestones": [{"steps": 3}], "min_lr": 1e-5}},
            "schedule.min_lr: 1e-05 has no effect without schedule.name=cosine",
        ),
        ({"schedule": {"min_lr": 0.1}}, "schedule.min_lr: 0.1 is above optim.lr 0.001"),
        (
            {"schedule": {"cosine": "whole", "warmup": {"epochs": 0}}},
            "schedule.cosine: whole has no effect without schedule.name=cosine and a warm-up",
        ),
        ({"schedule": {"epoch": {"steps": 4}}}, "has no effect without schedule.update=epoch; give that, or set sched"),
        (
            {"schedule": {"layer_scale": "rate"}, "optim": {"layer_decay": 1}},
            "schedule.layer_scale: rate has no effect without optim.layer_decay below 1",
        ),
        ({"optim": {"ema_warmup": True}}, "optim.ema_warmup: True has no effect without optim.ema_decay"),
        ({"optim": {"model_no_decay": False}}, "optim.model_no_decay: False has no effect without a network of timm"),
        ({"validation": {"ema": True}}, "validation.ema: True has no effect without optim.ema_decay"),
        (
            {"validation": {"ema": True}, "optim": {"ema_decay": 0.9}, "data": {"val": None}},
            "validation.ema: True has no effect without data.val",
        ),
        (
            {"task": CLASSIFY | {"loss": "bce", "label_smoothing": 0.1}},
            "task.label_smoothing: 0.1 makes every target larger than 0, and task.loss=bce counts such a target as 1",
        ),
        (
            {"checkpoint": {"keep_best": {"metric": "ema_loss", "mode": "min"}}},
            "simmim measures loss, no 'ema_loss'; set validation.ema=true",
        ),
        ({"schedule": {"warmup_lr": 0.1}}, "schedule.warmup_lr: 0.1 is above optim.lr 0.001"),
        (
            {"checkpoint": {"keep_best": {"metric": "accuracy", "mode": "max"}}},
            "simmim measures loss, no 'accuracy'",
        ),
        (
            {"checkpoint": {"keep_best": {"metric": "loss", "mode": "max"}}},
            "loss is better when it is small; set checkpoint.keep_best.mode=min",
        ),
        (
            {"task": CLASSIFY, "checkpoint": {"keep_best": {"metric": "accuracy", "mode": "min"}}},
            "accuracy is better when it is large; set checkpoint.keep_best.mode=max",
        ),
        (
            {
                "checkpoint": {"keep_best": {"metric": "ema_loss", "mode": "max"}},
                "optim": {"ema_decay": 0.9},
                "validation": {"ema": True},
            },
            "ema_loss is better when it is small",
        ),
        (
            {"data": {"val": None}, "checkpoint": {"keep_best": {"metric": "loss", "mode": "min"}}},
            "checkpoint.keep_best: needs a validation",
        ),
        ({"model": {"options": {"img_size": 64}}}, "model.options.img_size: 64 contradicts model.img_size 32"),
        ({"model": {"options": {"in_chans": 1}}}, "model.options.in_chans: 1 contradicts model.in_chans 3"),
        ({"model": {"options": {"pretrained": True}}}, "model.options.pretrained: nothing is downloaded"),
    ],
)
def test_settings_that_would_be_ignored_without_a_word(tmp_path, changes, message):
    tree = tiny_recipe(tmp_path)
    for section, keys in changes.items():
        tree[section] = keys if section == "task" else tree[section] | keys
    found = problems_of(tree)
    assert len(found) == 1 and message in found[0], found
    assert stored_recipe(tree, "checkpoint").name == "tiny"  # what a checkpoint keeps can still be evaluated


def test_the_best_may_be_that_of_the_moving_average(tmp_path):
    tree = tiny_recipe(tmp_path, checkpoint={"keep_best": {"metric": "ema_loss", "mode": "min"}})
    tree["optim"] |= {"ema_decay": 0.9}
    tree["validation"]["ema"] = True
    assert parse_recipe(tree, "t").checkpoint.keep_best.metric == "ema_loss"


@pytest.mark.parametrize("task", [{"name": "simmim", "mask_patch": 16}, CLASSIFY])
def test_the_figures_of_a_validation_are_those_that_keep_best_takes(tmp_path, task):
    import torch

    from dsmim.tasks import build_task

    recipe = parse_recipe(tiny_recipe(tmp_path, task=task), "t")
    measured = build_task(recipe).metrics(torch.ones(3, dtype=torch.float64))
    assert measured.keys() - {"samples"} == set(recipe.task.figures)


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    words = ["model.weights=~/runs/pre", "model.weights_head=~/rows.txt", "engine.deepspeed=~/my.json"]
    recipe = load_recipe("~/r.yaml", words)
    found = (recipe.model.weights, recipe.model.weights_head, recipe.engine.deepspeed)
    assert found == (f"{tmp_path}/runs/pre", f"{tmp_path}/rows.txt", f"{tmp_path}/my.json")
    assert load_recipe("~/r.yaml").engine.deepspeed == "zero3"


def test_overrides_of_which_only_the_last_would_count(tmp_path):
    def told(*words: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load_recipe("demo_pretrain", words)
        return caught.value.problems

    made_by_the_shell = [f"data.train=shards/train-{number:06d}.tar" for number in range(4)]
    assert told(*made_by_the_shell) == [
        "data.train: given 4 times: shards/train-000000.tar, shards/train-000001.tar, shards/train-000002.tar, … (4 in "
        "all); give it once; if the shell made them of one pattern {…}, quote it: 'data.train=…{000000..000003}.tar'"
    ]
    assert told("seed=1", "optim.lr=2e-3", "seed=2") == ["seed: given 2 times: 1, 2; give it once"]
    later = told("schedule.duration.steps=3", "schedule.duration={steps: 4}")
    assert later == [
        "schedule.duration: given after schedule.duration.steps, which it would replace; give schedule.duration first, "
        "or only one"
    ]
    assert load_recipe("demo_pretrain", ["optim={lr: 1}", "optim.eps=1e-6"]).optim.eps == 1e-6


def test_key_given_twice_is_an_error(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="given twice: name"):
        load_recipe(str(file))


def test_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=f"recipe {file}: 1 problem:\n  not valid YAML"):
        load_recipe(str(file))


def test_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    recipe = load_recipe(str(file), ["optim.lr=2e-3", "data.train=*.tar", "engine.precision=bf16"])
    assert (recipe.optim.lr, recipe.data.train, recipe.engine.precision) == (2e-3, "*.tar", "bf16")
    with pytest.raises(RecipeError, match="not of the form key=value"):
        load_recipe(str(file), ["optim.lr"])
    with pytest.raises(RecipeError, match="is a value, not a section"):
        load_recipe(str(file), ["name.x=1"])


def test_an_image_key_may_have_its_dot(tmp_path):
    tree = tiny_recipe(tmp_path)
    keys = [stored_recipe(tree, "t", [f"data.image_key={text}"]).data.image_key for text in (".jpg", "JPG", ".Seg.png")]
    assert keys == ["jpg", "jpg", "seg.png"]


def test_differences_leave_out_what_changes_speed_only(tmp_path):
    old = parse_recipe(tiny_recipe(tmp_path), "old")
    tree = tiny_recipe(tmp_path, log={"every": 7})
    tree["data"]["workers"] = 5
    assert differences(old, parse_recipe(tree, "new")) == []
    tree["optim"]["lr"] = 2e-3
    assert differences(old, parse_recipe(tree, "new")) == ["optim.lr: 0.001 → 0.002"]


def test_duration_units():
    from dsmim.recipe import Duration

    assert Duration(steps=7).in_steps(4, 100) == 7
    assert Duration(epochs=1.5).in_steps(4, 100) == 38  # 150 samples: 37.5 steps, none lost
    assert Duration(samples=9).in_steps(4, 100) == 3
    assert Duration(epochs=0.3).in_steps(3, 10) == 1  # 0.3 * 10 is 3 samples, not a hair more


@pytest.mark.parametrize("name", shipped_configs())
def test_deepspeed_files_take_the_recipe_s_values(name):
    config = load_ds_config(name, {"gradient_clipping": 5.0})
    assert config["gradient_clipping"] == 5.0 and "auto" not in config.values()


def test_deepspeed_file_contradictions(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(
        '{"gradient_cliping": 1.0, "gradient_clipping": 1.0, "bf16": {"enabled": true}, "train_batch_size": 8}'
    )
    with pytest.raises(ValueError) as caught:
        load_ds_config(str(file), {"gradient_clipping": 5.0, "train_batch_size": 8})
    message = str(caught.value)
    assert "gradient_cliping: DeepSpeed reads no such key; did you mean gradient_clipping?" in message
    assert "gradient_clipping: the file says 1.0, the recipe 5.0" in message
    assert "bf16: the recipe sets the precision" in message and "train_batch_size" not in message
