"""The recipes of published runs: networks, parameter groups, learning rates, cost and memory.

Expected values are written here from the sources (docs/recipes.md names them), not read from the recipes.
"""

import math
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import torch

from dsmim.data.order import limited_accumulation
from dsmim.engine.optim import check_patterns, parameter_groups
from dsmim.engine.schedule import resolve_schedule
from dsmim.recipe.files import shipped_recipes
from dsmim.recipe.reading import load_recipe
from dsmim.tasks import build_task
from tests.conftest import ROOT, environment, patience

OURS = ("demo_pretrain", "demo_finetune", "finetune_small")
PUBLISHED = [name for name in shipped_recipes() if name not in OURS]
IMAGENET = 1_281_167

# Width of stage 1, parameters of SimMIM at 192 px and of the classifier at 224 px (docs/models.md, MODELHUB.md)
SWIN = {
    "small": (96, 51_321_882, 49_728_418),
    "base": (128, 90_042_744, 87_918_816),
    "large": (192, 199_924_788, 196_739_932),
    "huge": (352, 663_865_098, 658_027_922),
    "giant": (448, 1_071_990_564, 1_064_561_996),
}
# Patch, width, blocks, parameters at 224 px with 1000 classes (facebookresearch/deit, models_v2.py)
DEIT = {
    "small": (16, 384, 12, 22_059_496),
    "medium": (16, 512, 12, 38_849_512),
    "base": (16, 768, 12, 86_585_320),
    "large": (16, 1024, 24, 304_374_760),
    "huge": (14, 1280, 32, 632_126_440),
    "huge_52": (14, 1280, 52, 1_025_726_440),
}
# The networks of MAE with mean pooling and of BEiT
OTHERS = {
    "mae_base": 86_567_656, "mae_large": 304_326_632, "mae_huge": 632_045_800, "beit_base": 86_530_984,
    "beit_large": 304_430_568,
}  # fmt: skip
BLOCKS = {"base": 12, "large": 24, "huge": 32}
# DeiT III: resolution, drop path, peak rate (README_revenge.md; 400 epochs: deit3-jax, octic-vits)
FROM_SCRATCH = {
    "small": (224, 0.05, 0.0, 4e-3), "medium": (224, 0.1, 0.05, 3e-3), "base": (192, 0.2, 0.1, 3e-3),
    "large": (192, 0.45, 0.4, 3e-3), "huge": (160, 0.6, 0.5, 3e-3), "huge_52": (160, 0.6, 0.5, 3e-3),
}  # fmt: skip
FIXRES = {"base_224": 0.2, "large_224": 0.45, "huge_224": 0.55, "small_384": 0.0, "base_384": 0.15, "large_384": 0.4}
IN21K = {"small": (0.05, 0.0), "base": (0.1, 0.1), "large": (0.3, 0.3), "huge": (None, 0.5)}
TO_IN1K = {"small": 0.05, "base": 0.15, "large": 0.4, "huge": 0.45}
CLASSES = {"cifar10": 10, "cifar100": 100, "flowers": 102, "cars": 196, "inat18": 8142, "inat19": 1010}


def size_of(name: str) -> str:
    return "huge_52" if "huge_52" in name else re.search(r"_(small|medium|base|large|huge|giant)_", name)[1]


def rate_of(recipe):
    return resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, IMAGENET)


def parameters(name: str, img_size: int, classes: int) -> int:
    """The published count, changed for positions and classes."""
    size, family = size_of(name), name.split("_")[0]
    if "swinv2" in name:
        return SWIN[size][1 if name.endswith("pretrain") else 2]
    if family in ("mae", "beit"):
        return OTHERS[f"{family}_{size}"]
    patch, width, _, at_224 = DEIT[size]
    if name == "simmim_vit_base_224_pretrain":  # no head, but a mask token and a decoder to 16 × 16 × 3 values
        return at_224 - 769 * 1000 + 768 + 769 * 768
    return at_224 + ((img_size // patch) ** 2 - (224 // patch) ** 2) * width + (classes - 1000) * (width + 1)


@pytest.fixture(scope="module", params=PUBLISHED)
def built(request):
    """A recipe and its task, on the meta device, with the warning of H's border left out."""
    recipe = load_recipe(request.param)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.img_size: 1")
        return request.param, recipe, build_task(recipe)


def test_network_and_groups(built):
    name, recipe, task = built
    found = sum(parameter.numel() for parameter in task.model.parameters())
    assert found == parameters(name, recipe.model.img_size, getattr(recipe.task, "num_classes", 0))
    groups = parameter_groups(task.model, task.layers, recipe.optim)
    check_patterns(task.model, recipe.optim)
    decays = {group.weight_decay for group in groups}
    assert decays == {0.0, recipe.optim.weight_decay}
    layers = 1
    if "finetune" in name:
        layers = 26 if "swinv2" in name else BLOCKS[size_of(name)] + 2
    assert len(groups) == 2 * layers
    assert min(group.scale for group in groups) == pytest.approx(recipe.optim.layer_decay ** (layers - 1))


def test_cost_and_memory(built):
    """By closed formulas; tests/models/test_sizes.py counts the networks themselves."""
    name, recipe, task = built
    side, classes = recipe.model.img_size, getattr(recipe.task, "num_classes", 0)
    if "swinv2" in name:
        width, window = SWIN[size_of(name)][0], recipe.model.window_size
        stages = [(((side // 4) // 2**s) ** 2, width * 2**s, min(window, side // 4 // 2**s), depth)
                  for s, depth in enumerate((2, 2, 18, 2))]  # fmt: skip
        macs = sum(depth * (12 * t * c**2 + 2 * t * w**2 * c) for t, c, w, depth in stages)
        macs += 48 * stages[0][0] * width + sum(8 * t * (c // 2) ** 2 for t, c, _, _ in stages[1:])
        macs += 8 * width * classes
        kept = 56 * sum(depth * t * c for t, c, _, depth in stages)
    else:
        patch, width, blocks, _ = DEIT[size_of(name)]
        patches = (side // patch) ** 2
        macs = blocks * (12 * (patches + 1) * width**2 + 2 * (patches + 1) ** 2 * width)
        macs += patches * 3 * patch**2 * width + width * classes
        kept = 44 * blocks * (patches + 1) * width
    assert recipe.about.gmacs == pytest.approx(macs / 1e9, rel=0.002, abs=0.006)
    per_rank = {"zero1": 9.5, "zero3": 2}[recipe.engine.deepspeed] * sum(p.numel() for p in task.model.parameters())
    assert recipe.model.grad_checkpointing == 0
    limit = recipe.batch.max_micro_batch
    assert per_rank + limit * kept <= 30e9 and limit <= 256
    assert limit == 256 or per_rank + 2 * limit * kept > 30e9  # the largest power of two
    for ranks in (1, 8, 16, 64):
        steps = limited_accumulation(recipe.batch.global_batch, limit, ranks, lambda size: size % 2 == 0)
        assert recipe.batch.global_batch // ranks // steps <= limit


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.about.paper and recipe.about.model and recipe.about.data
    assert recipe.batch.micro_batch == "auto" and recipe.batch.max_micro_batch
    assert f"{recipe.model.img_size} px" in recipe.about.model
    assert (name in OURS) == (recipe.about.paper == "none")


def test_there_is_a_recipe_for_every_published_run():
    swin = [f"simmim_swinv2_{size}_{end}" for size in SWIN for end in ("192_pretrain", "224_finetune")]
    deit = [f"deit3_{size}_{px}_in1k_{n}" for size, (px, *_) in FROM_SCRATCH.items() for n in (400, 800)]
    deit += [f"deit3_{run}_fixres" for run in FIXRES] + [f"deit3_{size}_224_in21k_to_in1k" for size in TO_IN1K]
    deit += [f"deit3_{size}_224_in21k_{n}" for size in ("small", "base", "large") for n in (90, 240)]
    other = ["simmim_vit_base_224_pretrain", "simmim_vit_base_224_finetune", "deit3_huge_128_in21k_90"]
    other += [f"{one}_224_finetune" for one in OTHERS] + [f"deit3_base_224_transfer_{data}" for data in CLASSES]
    assert sorted(PUBLISHED) == sorted(swin + deit + other)


def deit_rate(epoch: int, peak: float, epochs: int) -> float:
    """facebookresearch/deit: the scheduler is called after epoch e with e; a warm-up of 5 epochs, the cosine from 0."""
    t = max(epoch - 1, 0)
    if t < 5:
        return 1e-6 + t * (peak - 1e-6) / 5
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * t / epochs)) / 2


def check_deit(recipe, peak: float, epochs: int, steps: int) -> None:
    rate = rate_of(recipe)
    assert rate.total == epochs * steps and recipe.about.epochs == epochs
    for epoch in (0, 1, 2, 5, 6, 7, epochs // 2, epochs - 1):
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert rate.at(step) == pytest.approx(deit_rate(epoch, peak, epochs), rel=1e-9), (recipe.name, step)


@pytest.mark.parametrize("size", FROM_SCRATCH)
@pytest.mark.parametrize("epochs", [400, 800])
def test_deit_on_imagenet_1k(size, epochs):
    px, at_800, at_400, peak = FROM_SCRATCH[size]
    recipe = load_recipe(f"deit3_{size}_{px}_in1k_{epochs}")
    check_deit(recipe, peak, epochs, 625)
    optim, task, data = recipe.optim, recipe.task, recipe.data
    assert (recipe.model.img_size, recipe.batch.global_batch) == (px, 2048)
    assert recipe.model.drop_path_rate == (at_800 if epochs == 800 else at_400)
    assert optim.weight_decay == (0.05 if epochs == 800 else 0.02)
    assert (optim.name, optim.clip_grad, optim.eps, tuple(optim.betas)) == ("lamb", 1.0, 1e-8, (0.9, 0.999))
    assert (task.loss, task.label_smoothing, task.mixup, task.cutmix) == ("bce", 0, 0.8, 1.0)
    assert data.repeats == 3 and data.augment.three_augment and data.augment.color_jitter == 0.3
    assert data.augment.crop == "random_resized" and data.augment.eval_crop_ratio == 1.0


@pytest.mark.parametrize("run", FIXRES)
def test_deit_fixres(run):
    recipe = load_recipe(f"deit3_{run}_fixres")
    check_deit(recipe, 1e-5, 20, IMAGENET // 512)
    assert recipe.model.drop_path_rate == FIXRES[run] and recipe.batch.global_batch == 512
    assert (recipe.optim.name, recipe.optim.weight_decay, recipe.optim.clip_grad) == ("adamw", 0.1, None)
    assert (recipe.task.loss, recipe.task.label_smoothing, recipe.data.repeats) == ("cross_entropy", 0.1, 1)
    assert recipe.data.augment.rand_augment == "rand-m9-mstd0.5-inc1" and not recipe.data.augment.three_augment
    assert recipe.model.weights.removeprefix("runs/") in PUBLISHED


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "in21k" in name])
def test_deit_on_imagenet_21k(name):
    recipe, size = load_recipe(name), size_of(name)
    task, augment = recipe.task, recipe.data.augment
    assert (task.mixup, task.cutmix, task.label_smoothing, task.loss) == (0, 1.0, 0.1, "cross_entropy")
    assert (augment.crop, augment.three_augment, augment.color_jitter) == ("simple", True, 0.3)
    assert (recipe.optim.name, recipe.optim.weight_decay, recipe.optim.clip_grad) == ("lamb", 0.02, 1.0)
    if name.endswith("in1k"):
        check_deit(recipe, 3e-4, 50, IMAGENET // 2048)
        assert (recipe.model.drop_path_rate, task.num_classes) == (TO_IN1K[size], 1000)
        assert recipe.model.weights.removeprefix("runs/") in PUBLISHED and recipe.model.weights_head == "drop"
    else:
        epochs = int(name.rsplit("_", 1)[1])
        check_deit(recipe, 1e-3, epochs, 14_197_122 // 2048)
        assert (recipe.model.drop_path_rate, task.num_classes) == (IN21K[size][epochs == 90], 21841)


@pytest.mark.parametrize(
    ("name", "peak", "first", "epochs", "warm", "decay", "path"),
    [
        ("mae_base", 2e-3, 0, 100, 5, 0.65, 0.1),
        ("mae_large", 4e-3, 0, 50, 5, 0.75, 0.2),
        ("mae_huge", 4e-3, 0, 50, 5, 0.75, 0.3),
        ("beit_base", 4e-3, 0.0, 100, 20, 0.65, 0.1),
        ("beit_large", 1e-3, 0.0, 50, 5, 0.75, 0.2),
    ],
)
def test_mae_and_beit(name, peak, first, epochs, warm, decay, path):
    recipe = load_recipe(f"{name}_224_finetune")
    rate, steps = rate_of(recipe), IMAGENET // 1024
    assert (rate.total, rate.warmup) == (epochs * steps, warm * steps)
    for step in (0, steps, warm * steps):
        assert rate.at(step) == pytest.approx(first + (peak - first) * step / (warm * steps))
    middle = (epochs + warm) * steps / 2
    assert rate.at(int(middle)) == pytest.approx((peak + 1e-6) / 2, rel=1e-4)
    assert rate.at(rate.total - 1, 0.1) == pytest.approx(1e-7, rel=1e-3)  # layer decay scales min_lr too
    assert (recipe.optim.layer_decay, recipe.model.drop_path_rate, recipe.optim.clip_grad) == (decay, path, None)


@pytest.mark.parametrize(
    ("data", "images", "peak", "epochs"),
    [("cifar10", 50_000, 0.01, 1000), ("cifar100", 50_000, 0.01, 1000), ("flowers", 2_040, 0.01, 1000),
     ("cars", 8_144, 0.01, 1000), ("inat18", 437_513, 7.5e-5, 360), ("inat19", 265_213, 7.5e-5, 360)],
)  # fmt: skip
def test_transfer(data, images, peak, epochs):
    """The sampler of repeated augmentation keeps multiples of 256 images, on 8 GPUs of 96 each."""
    recipe = load_recipe(f"deit3_base_224_transfer_{data}")
    check_deit(recipe, peak, epochs, images // 256 * 256 // 8 // 96)
    inat = data.startswith("inat")
    assert (recipe.task.num_classes, recipe.batch.global_batch) == (CLASSES[data], 768)
    assert (recipe.optim.name, recipe.optim.weight_decay) == (("adamw", 0.05) if inat else ("timm:sgd", 1e-4))
    assert recipe.optim.options == ({} if inat else {"momentum": 0.9})
    assert (recipe.model.drop_path_rate, recipe.data.augment.random_erasing) == ((0.1, 0.1) if inat else (0, 0))


@pytest.mark.parametrize("size", SWIN)
@pytest.mark.parametrize(("steps", "milestone"), [(125_000, 109_375), (250_000, 218_750), (500_000, 437_500)])
def test_simmim_pre_training_in_three_lengths(size, steps, milestone):
    words = documented("simmim_swinv2_base_192_pretrain").get(f"{steps // 1000}k", [])
    assert bool(words) == (steps < 500_000)
    recipe = load_recipe(f"simmim_swinv2_{size}_192_pretrain", words)
    rate = rate_of(recipe)
    assert (rate.total, rate.warmup, rate.milestones) == (steps, 6_250, (milestone,))
    found = [rate.at(step) for step in (0, 6_250, milestone - 1, milestone, steps - 1)]
    assert found == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5])
    assert (recipe.task.target_window, recipe.model.window_size, recipe.batch.global_batch) == (47, 12, 2048)


@pytest.mark.parametrize("name", [*(f"swinv2_{size}" for size in SWIN), "vit_base"])
def test_simmim_fine_tuning(name):
    recipe = load_recipe(f"simmim_{name}_224_finetune")
    rate = rate_of(recipe)
    assert (rate.total, rate.warmup, rate.peak, rate.min_lr) == (62_500, 12_500, 5e-3, 1e-6)
    decay = {"swinv2_base": 0.75, "vit_base": 0.65}.get(name, recipe.optim.layer_decay)  # others: not published
    assert recipe.optim.layer_decay == decay
    dropped = 0.905 if name == "vit_base" else 1  # microsoft/SimMIM counts the cosine from step 0
    assert rate.at(12_500) == pytest.approx(5e-3 * dropped, rel=1e-3)
    assert recipe.model.weights == f"runs/simmim_{name}_{192 if 'swin' in name else 224}_pretrain"


def documented(name: str) -> dict[str, list[str]]:
    """The overrides in a recipe's comments, by their label."""
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    return {label: shlex.split(words) for label, words in re.findall(r"^#   (\S+): (\S*=.*)$", text, re.M)}


def test_overrides_in_comments_load():
    expected = {
        "simmim_swinv2_base_192_pretrain": ["125k", "250k", "10%", "20%", "50%", "22K"],
        "beit_base_224_finetune": ["ft22k"],
        "beit_large_224_finetune": ["ft22k"],
    }
    found = {name: documented(name) for name in PUBLISHED if documented(name)}
    assert {name: list(ways) for name, ways in found.items()} == expected
    for name, ways in found.items():
        for words in ways.values():
            assert load_recipe(name, words) != load_recipe(name)


def test_the_page_has_the_table_of_the_command_and_the_command_is_light():
    program = (
        "import sys, time; from dsmim.cli.main import main; assert main(['recipes']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          env=environment(), timeout=patience(120), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: re.split(r" {2,}", line) for line in done.stdout.split("\n\n")[1].splitlines()}
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"| `{name}` | {' | '.join(rows[name][1:])} |" in page, name
    assert rows["simmim_swinv2_base_192_pretrain"][5] == "161"  # 7.2 · 10¹⁹ operations


def test_the_page_s_example_of_a_base(tmp_path):
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    recipe, base = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("deit3_base_192_in1k_800")
    assert (recipe.name, recipe.task.num_classes, recipe.schedule.duration.epochs) == ("my_vit", 37, 300)
    assert (recipe.optim.name, recipe.data.augment, recipe.about.paper) == ("lamb", base.data.augment, None)
    for images in (500, 5_000, 100_000):
        rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, images)
        assert 0 < rate.warmup < rate.total
