"""dsmim knn against a computation image by image, and dsmim evaluate with other right answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dsmim
from dsmim.cli.main import _parse
from dsmim.knn import knn
from dsmim.models import SimMIM, create_model
from dsmim.models.features import feature_network
from dsmim.shards.index import write_index
from tests.conftest import image_bytes, tiny_recipe, write_tar
from tests.weights.weight_files import run_directory, scrambled

SWIN = {"name": "swinv2_nano", "img_size": 32, "window_size": 4}
VIT = {"name": "deit3_nano_patch16", "img_size": 32}
CLASSES = 7
TRAIN, VAL = [20, 9, 13], [8, 6]
DAMAGED = {"train": 25, "val": 10}
"""Numbers of the samples, among those of their set, whose image cannot be decoded."""


def command(*words: object) -> None:
    options = _parse([str(word) for word in words])
    options.run(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Labelled shards with one damaged image in each set."""
    folder = tmp_path_factory.mktemp("neighbours")
    for name, counts in (("train", TRAIN), ("val", VAL)):
        number = 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                image = b"no image" if number == DAMAGED[name] else image_bytes(number + 1000 * (name == "val"))
                members += [(f"{name}{number}.png", image), (f"{name}{number}.cls", b"%d" % (number * 5 % CLASSES))]
                number += 1
            write_index(write_tar(folder / f"{name}-{shard:03d}.tar", members))
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Path]:
    """A classifier of each family and a pre-training of each, with random weights."""
    found = {}
    for name, model in (("swin", SWIN), ("vit", VIT)):
        tree = tiny_recipe(folder, model=model, task={"name": "classify", "num_classes": CLASSES})
        network = scrambled(create_model(num_classes=CLASSES, **model))
        found[f"classify_{name}"] = run_directory(folder / f"classify_{name}", tree, network)
        mim = scrambled(SimMIM(create_model(num_classes=0, **model)), seed=1)
        found[f"simmim_{name}"] = run_directory(folder / f"simmim_{name}", tiny_recipe(folder, model=model), mim)
    return found


def by_hand(features: torch.Tensor, bank: torch.Tensor, labels: list[int], own: list[int], k: int) -> tuple:
    """DINO's vote in NumPy: shares of queries that are right at top 1 and top 5."""
    queries, bank = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
                     for x in (features, bank))  # fmt: skip
    right = np.zeros(2)
    for query, label in zip(queries, own, strict=True):
        similar = bank @ query
        summed = {}
        for number in np.argsort(-similar, kind="stable")[:k]:
            summed[labels[number]] = summed.get(labels[number], 0) + np.exp(similar[number] / 0.07)
        order = sorted(summed, key=lambda one: (-summed[one], one))
        right += [label in order[:1], label in order[:5]]
    return tuple(right / len(own))


def samples(name: str, count: int) -> tuple[list[bytes], list[int]]:
    """Images and labels of a set, without the damaged one."""
    numbers = [number for number in range(count) if number != DAMAGED[name]]
    offset = 1000 * (name == "val")
    return [image_bytes(number + offset) for number in numbers], [number * 5 % CLASSES for number in numbers]


@pytest.mark.parametrize("name", ["classify_swin", "classify_vit", "simmim_swin", "simmim_vit"])
def test_neighbours_are_those_of_features_computed_one_by_one(runs, name, monkeypatch, capsys):
    monkeypatch.setattr("dsmim.knn.BLOCK", 12)  # of 3 batches: the bank is compared in several blocks
    found = knn(runs[name], [], [10, 1])
    model, transform = dsmim.load(runs[name])
    features, labels = [], []
    for of_set in (samples("val", sum(VAL)), samples("train", sum(TRAIN))):
        with torch.no_grad():
            features.append(torch.cat([feature(model, transform(image).unsqueeze(0), name) for image in of_set[0]]))
        labels.append(of_set[1])
    assert found["samples"] == 13 and found["undecodable"] == 1
    assert found["train_samples"] == 41 and found["train_undecodable"] == 1
    assert [row["k"] for row in found["knn"]] == [1, 10]
    for row in found["knn"]:
        top1, top5 = by_hand(*features, labels[1], labels[0], row["k"])
        assert (row["accuracy"], row["accuracy_top5"]) == pytest.approx((top1, top5))
    assert capsys.readouterr().err.count("undecodable image left out") == 2


def feature(model, image: torch.Tensor, name: str) -> torch.Tensor:
    """What timm's interface gives: pooled features of a classifier; for a pre-training, the mean of all patches."""
    if name.startswith("simmim_swin"):
        return model.encoder(image)  # without head: pooled over positions
    if name.startswith("simmim"):
        return model.encoder.forward_features(image)[:, 1:].mean(dim=1)
    if name == "classify_swin":
        return model.head(model.norm(model.layers(model.patch_embed(image))), pre_logits=True)
    return model.forward_head(model.forward_features(image), pre_logits=True)


def test_features_of_timms_networks():
    for name, width in (("timm:resnet18", 512), ("timm:deit_tiny_distilled_patch16_224", 2 * 192)):
        network = feature_network(create_model(name, num_classes=5).eval())
        assert network(torch.zeros(2, 3, 224, 224)).shape == (2, width)


def test_what_knn_refuses(runs, folder, tmp_path):
    with pytest.raises(ValueError, match=r"--k 43: data\.train has 42 samples; give a smaller number"):
        knn(runs["simmim_vit"], [], [1, 43])
    with pytest.raises(ValueError, match=r"data\.train and data\.val share 2 shards, such as .*val-000\.tar: an"):
        knn(runs["simmim_vit"], [f"data.train={folder}/*.tar"], [1])
    write_index(write_tar(tmp_path / "bare.tar", [("a.png", image_bytes(1)), ("b.png", image_bytes(2))]))
    with pytest.raises(ValueError, match=r"data\.train: 2 of 2 samples have no class number, by which neighbours vote"):
        knn(runs["simmim_vit"], [f"data.train={tmp_path}/bare.tar"], [1])
    with pytest.raises(ValueError, match=r"data\.val"):
        knn(runs["simmim_vit"], ["data.val=null"], [1])


def test_broken_weights_have_no_neighbours(folder, tmp_path):
    model = scrambled(create_model(num_classes=CLASSES, **VIT))
    model.norm.weight.data[0] = torch.nan
    tree = tiny_recipe(folder, model=VIT, task={"name": "classify", "num_classes": CLASSES})
    with pytest.raises(ValueError, match="some features are not finite"):
        knn(run_directory(tmp_path / "run", tree, model), [], [1])


def test_the_commands_print_tables_and_json(runs, folder, tmp_path, capsys):
    command("knn", runs["classify_vit"], "--k", "1,5", "--table", "--json", tmp_path / "knn.json")
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads((tmp_path / "knn.json").read_text()) == knn(runs["classify_vit"], [], [1, 5])
    assert lines[0].split() == ["k", "accuracy", "accuracy_top5"] and lines[1].split()[0] == "1" and "%" in lines[2]
    command("evaluate", runs["classify_vit"], "--table")
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert f"accuracy       {100 * figures['accuracy']:.2f} %" in lines and "undecodable    1" in lines
    assert figures["accuracy"] <= figures["accuracy_top5"] and figures["samples"] == 13


def test_evaluate_with_other_right_answers(runs, folder, tmp_path, capsys):
    """Two labels of a data set that mean one class of the model; and several right labels per image."""
    run_dir = runs["classify_vit"]
    logits = logits_of(run_dir)
    labels = samples("val", sum(VAL))[1]
    rows = [2, 2, 4, -1, 0, 5, 6]
    (tmp_path / "map.json").write_text(json.dumps(rows))
    command("evaluate", run_dir, "--label-map", tmp_path / "map.json", "--per-class", "--json", tmp_path / "one.json")
    figures = json.loads((tmp_path / "one.json").read_text())
    kept = [number for number, label in enumerate(labels) if rows[label] >= 0]
    logits[:, [1, 3]] = -torch.inf  # no label means these
    answers = logits.argmax(dim=1).tolist()
    right = [answers[number] == rows[labels[number]] for number in kept]
    assert figures["accuracy"] == pytest.approx(np.mean(right)) and figures["samples"] == len(kept)
    assert figures["left_out"] == 13 - len(kept) and figures["undecodable"] == 1 and "accuracy_top5" not in figures
    assert [row["class"] for row in figures["classes"]] == [0, 2, 4, 5, 6]

    keys = [f"val{number}" for number in range(sum(VAL))]
    several = {key: [number % CLASSES, (number + 2) % CLASSES] if number % 5 else [] for number, key in enumerate(keys)}
    (tmp_path / "right.json").write_text(json.dumps(several))
    capsys.readouterr()
    command("evaluate", run_dir, "--labels", tmp_path / "right.json")
    figures = json.loads(capsys.readouterr().out)
    logits, decoded = logits_of(run_dir), [number for number in range(sum(VAL)) if number != DAMAGED["val"]]
    judged = [(row, several[f"val{number}"]) for row, number in enumerate(decoded) if several[f"val{number}"]]
    for name, top in (("accuracy", 1), ("accuracy_top5", 5)):
        hits = [bool(set(logits[row].topk(top).indices.tolist()) & set(right)) for row, right in judged]
        assert figures[name] == pytest.approx(np.mean(hits))
    assert figures["samples"] == len(judged) and figures["left_out"] == 13 - len(judged) and "loss" not in figures


def logits_of(run_dir: Path) -> torch.Tensor:
    model, transform = dsmim.load(run_dir)
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in samples("val", sum(VAL))[0]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--labels", "real", "--per-class", "--label-map", "x"],
            "--labels cannot be used with --per-class and --",
        ),
        (["--labels", "real"], "holds classes of ImageNet-1K, 1000; the model has 7"),
        (["--label-map", "imagenet-a"], "means rows of ImageNet-1K's 1000 classes, the model has 7"),
        (["--label-map", "nowhere.txt"], "there is no such file"),
    ],
)
def test_what_evaluate_refuses(runs, words, message):
    with pytest.raises(ValueError, match=message):
        command("evaluate", runs["classify_vit"], *words)


def test_other_answers_need_a_classifier(runs):
    for words in (["--labels", "real"], ["--label-map", "imagenet-a"], ["--per-class"]):
        with pytest.raises(ValueError, match="its task is simmim, which knows no classes"):
            command("evaluate", runs["simmim_vit"], *words)
