"""dsmim predict and the figures per class, against what the network gives for each image."""

import csv
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dsmim
from dsmim.cli.per_class import ALL, table
from dsmim.evaluate import evaluate
from dsmim.predict import predict, write_predictions
from dsmim.shards.index import write_index
from dsmim.tasks.per_class import PerClass
from tests.conftest import dsmim as command
from tests.conftest import make_shards, tiny_recipe, two_forked_ranks, write_tar
from tests.weights.weight_files import run_directory, scrambled

NAMES = ["ant", "bee", "fly, fruit"]


class Home(NamedTuple):
    run_dir: Path
    folder: Path
    images: dict[str, bytes]
    """The validation samples' images by key, in the order of the shards."""
    labels: list[int]
    logits: torch.Tensor
    """Of the validation samples, (13, 3)."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A classifier with random weights, its shards with their classes.json, and what it gives for each sample."""
    folder = tmp_path_factory.mktemp("home")
    make_shards(folder, [4])
    shards = make_shards(folder, [8, 5], name="val")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    tree = tiny_recipe(folder, task={"name": "classify", "num_classes": 3})
    images, labels = {}, []
    for shard in shards:
        with tarfile.open(shard) as archive:
            read = {member.name: archive.extractfile(member).read() for member in archive}
        images |= {name.removesuffix(".png"): read[name] for name in read if name.endswith(".png")}
        labels += [int(read[name]) for name in read if name.endswith(".cls")]
    model = scrambled(dsmim.create_model("swinv2_nano", img_size=32, window_size=4, num_classes=3))
    run_dir = run_directory(folder / "run", tree, model)
    with torch.no_grad():
        network, transform = dsmim.load(run_dir)
        batch = torch.stack([transform(image) for image in images.values()])
        model.head.fc.bias -= network(batch).mean(dim=0)  # random weights give all images nearly the same logits
        model.head.fc.weight *= 100
        model.head.fc.bias *= 100
        shutil.rmtree(run_dir)
        logits = dsmim.load(run_directory(run_dir, tree, model)).model(batch)
    assert len(set(logits.argmax(dim=1).tolist())) > 1  # or the tests say little
    return Home(run_dir, folder, images, labels, logits)


def assert_those(found, home: Home) -> None:
    """The predictions for the validation samples: every class, in the order of its probability."""
    values, classes = home.logits.double().softmax(dim=1).topk(3)
    assert torch.equal(found.classes, classes)
    torch.testing.assert_close(found.probabilities, values, rtol=0, atol=1e-3)  # another batch size
    assert found.names == NAMES and found.undecodable == 0


def test_shards(home):
    found = predict(home.run_dir, [f"{home.folder}/val-*.tar"], [])
    assert_those(found, home)
    assert [key for _, key in found.images] == list(home.images)
    assert [Path(shard).name for shard, _ in found.images] == ["val-000.tar"] * 8 + ["val-001.tar"] * 5


def test_files_and_folders_in_the_order_given(home, tmp_path):
    paths = [tmp_path / f"{'ab'[number >= 9]}/{key}.png" for number, key in enumerate(home.images)]
    for path, image in zip(paths, home.images.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "a/.hidden.png").write_bytes(b"")
    found = predict(home.run_dir, [str(tmp_path / "a"), *map(str, paths[9:])], ["batch.eval_batch=5"])
    assert_those(found, home)
    assert found.images == [("", str(path)) for path in paths]
    (odd := tmp_path / "odd.dat").write_bytes(home.images["k00012"])  # a name says nothing of its content
    reverse = predict(home.run_dir, [str(odd), f"{tmp_path}/a/k0000[01].png"], [], top=1)
    assert reverse.classes[:, 0].tolist() == home.logits[[12, 0, 1]].argmax(dim=1).tolist()
    assert reverse.classes.shape == (3, 1)


def test_samples_without_labels(home, tmp_path):
    """And with labels that mean nothing to this model."""
    labels = {2: b"7", 5: b"word"}
    members = [
        (f"{key}.{extension}", data)
        for number, (key, image) in enumerate(home.images.items())
        for extension, data in (("png", image), ("cls", labels.get(number)))
        if data is not None
    ]
    write_index(shard := write_tar(tmp_path / "plain.tar", members))
    assert_those(predict(home.run_dir, [str(shard)], []), home)


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_the_command_gives_one_table_at_any_world_size(home, tmp_path):
    damaged = {**home.images, "k00003": b"damaged"}
    write_index(shard := write_tar(tmp_path / "some.tar", [(f"{key}.png", image) for key, image in damaged.items()]))
    done = command("predict", home.run_dir, shard, "--out", tmp_path / "one.csv", "--top", "2")
    assert "13 images, 1 of them undecodable and left empty" in done.stdout
    assert re.search(r"undecodable image without a prediction \(its row stays empty\): .*k00003\.png", done.stderr)
    two_forked_ranks("predict", home.run_dir, shard, "--out", tmp_path / "two.csv", "--top", "2")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    heading, *found = rows(tmp_path / "one.csv")
    assert heading == ["image", "shard", "class_1", "name_1", "probability_1", "class_2", "name_2", "probability_2"]
    assert [row[0] for row in found] == list(home.images) and {row[1] for row in found} == {str(shard)}
    assert found[3][2:] == [""] * 6
    shares, classes = home.logits.double().softmax(dim=1).topk(2)
    for number in (0, 1, 2, *range(4, 13)):
        assert [int(found[number][2]), int(found[number][5])] == classes[number].tolist()
        assert [found[number][3], found[number][6]] == [NAMES[label] for label in classes[number]]
        assert float(found[number][4]) == pytest.approx(shares[number, 0].item(), abs=1e-3)


def test_parquet(home, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    found = predict(home.run_dir, [f"{home.folder}/val-*.tar"], [])
    write_predictions(found, tmp_path / "all.parquet")
    read = pyarrow.read_table(tmp_path / "all.parquet").to_pydict()
    assert read["image"] == list(home.images) and read["class_1"] == found.classes[:, 0].tolist()
    assert read["probability_3"] == found.probabilities[:, 2].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"inputs": ["x.png", "no/where"]},
            "no image found: x.png, no/where; give image files, folders or shards (.tar)",
        ),
        ({"inputs": ["{home}/val-000.tar", "{home}/run"]}, "/val-000.tar a shard; give one kind at a time"),
        ({"names": ["a", "b", "c", "d"]}, "names.json: lists 4 classes, the model has 3; give the list of the shards"),
        ({"names": {"0": "a"}}, "names.json: its 1 classes are not numbered from 0 to 0"),
        ({"overrides": ["data.worker=0"]}, "data.worker: unknown key; did you mean workers?"),
    ],
)
def test_errors(home, tmp_path, given, message):
    inputs = [word.format(home=home.folder) for word in given.get("inputs", ["{home}/val-*.tar"])]
    if names := given.get("names"):
        (tmp_path / "names.json").write_text(json.dumps(names))
    with pytest.raises(ValueError) as caught:
        predict(home.run_dir, inputs, given.get("overrides", []), names=tmp_path / "names.json" if names else None)
    assert message in str(caught.value)


def test_no_image_that_can_be_decoded_is_an_error(home, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"damage")
    with pytest.raises(ValueError, match="none of the 2 images can be decoded"):
        predict(home.run_dir, [str(tmp_path)], [])


def test_a_run_without_classes(home, tmp_path):
    run_dir = run_directory(tmp_path / "run", tiny_recipe(home.folder), torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match="tiny: its task is simmim, which knows no classes; give a run that classifies"
    ):
        predict(run_dir, [f"{home.folder}/val-*.tar"], [])


def test_the_kind_of_file_is_checked_first(monkeypatch):
    import dsmim.predict

    with pytest.raises(ValueError, match=r"--out a.txt: the suffix decides .* it must be .csv or .parquet"):
        dsmim.predict.check_output(Path("a.txt"))
    monkeypatch.setattr(dsmim.predict, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow, which is not installed; .* or give a.csv"):
        dsmim.predict.check_output(Path("a.parquet"))


def test_without_a_list_names_are_left_out(home, tmp_path):
    make_shards(tmp_path, [4])
    tree = tiny_recipe(tmp_path, task={"name": "classify", "num_classes": 3})
    model = dsmim.create_model("swinv2_nano", img_size=32, window_size=4, num_classes=3)
    found = predict(run_directory(tmp_path / "run", tree, model), [f"{tmp_path}/train-000.tar"], [])
    write_predictions(found, tmp_path / "out/all.csv")
    assert rows(tmp_path / "out/all.csv")[0][:4] == ["image", "shard", "class_1", "probability_1"]


def test_per_class_figures(home):
    answers = home.logits.argmax(dim=1).tolist()
    plain, found = evaluate(home.run_dir, []), evaluate(home.run_dir, [], task_of=PerClass)
    classes = found.pop("classes")
    assert found == plain
    for number, row in enumerate(classes):
        own = [answer == number for answer, label in zip(answers, home.labels, strict=True) if label == number]
        wanted = {"class": number, "name": NAMES[number], "accuracy": sum(own) / len(own), "samples": len(own)}
        assert row == wanted
    assert sum(row["accuracy"] * row["samples"] for row in classes) == pytest.approx(plain["accuracy"] * 13)


def test_the_confusion_matrix_at_any_world_size(home, tmp_path):
    wanted = [[0] * 3 for _ in range(3)]
    for label, answer in zip(home.labels, home.logits.argmax(dim=1).tolist(), strict=True):
        wanted[label][answer] += 1
    for name, run in (
        ("one", lambda *words: command(*words)),
        ("two", lambda *words: two_forked_ranks(*words)),
    ):
        out, figures = tmp_path / f"{name}.csv", tmp_path / f"{name}.json"
        done = run("evaluate", home.run_dir, "--confusion", out, "--json", figures)
        heading, *counts = rows(out)
        assert heading == ["label \\ prediction", *NAMES] and [row[0] for row in counts] == NAMES
        assert [[int(count) for count in row[1:]] for row in counts] == wanted
        lines = done.stdout.splitlines()
        assert "classes" not in json.loads(lines[-1]) and "1 bee" in lines[-3] and lines[-5].startswith("class ")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["classes"] == two["classes"] and one["accuracy"] == two["accuracy"]


def test_many_classes_are_not_all_printed():
    classes = [{"class": n, "name": "", "accuracy": n / 1000 if n else None, "samples": n} for n in range(1000)]
    lines = table(classes).splitlines()
    assert len(lines) < ALL and lines[1].split() == ["1", "0.0010", "1"]
    assert lines[-1] == "the 20 lowest of 999 classes with samples; --json FILE has all"
    assert table(classes[:3]).splitlines()[1].split() == ["0", "-", "0"]


def test_names_without_figures_per_class(home):
    done = command("evaluate", home.run_dir, "--classes", home.folder / "classes.json", check=False)
    assert done.returncode == 1 and "--classes has no effect without --per-class or --confusion" in done.stderr
