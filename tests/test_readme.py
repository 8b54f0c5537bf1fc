"""The README's commands, and those of docs/data.md, run as they stand there (training cut to two steps)."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, image_bytes, run

SHORT = (
    "schedule.duration.steps=2 schedule.warmup.steps=0 schedule.warmup.epochs=null schedule.duration.epochs=null "
    "batch.global_batch=4 data.workers=0"
)
TEXT = (ROOT / "README.md").read_text()
DATA = (ROOT / "docs/data.md").read_text()
MODELS = (ROOT / "docs/models.md").read_text()
PYTHON = (ROOT / "docs/python.md").read_text()
OWN = (ROOT / "docs/own_data.md").read_text()


def commands(text: str) -> list[str]:
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


LINES = commands(TEXT)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder with twenty photographs in two classes."""
    folder = tmp_path_factory.mktemp("home")
    for number in range(20):
        path = folder / "my_images" / ("cat" if number % 2 else "dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, side=128, kind="JPEG"))
    return folder


def test_the_readme_shows_the_commands():
    assert len(LINES) == 15 and all(line.split()[0] in ("dsmim", "deepspeed", "torchrun", "mpirun") for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_command(home, line):
    """In order: later commands use what earlier ones made."""
    words = shlex.split(line)
    if "train" in words:
        words += shlex.split(SHORT)
    if words[0] == "mpirun":  # the remark below the block
        words[1:1] = ["--allow-run-as-root", "--oversubscribe"]
    done = run(*words, cwd=home)
    if "train" in words:
        assert "step 2/2" in done.stderr or "step 2/2" in done.stdout


def test_the_data_page_s_commands(home, tmp_path):
    """In order, in a folder of their own."""
    (tmp_path / "my_images").symlink_to(home / "my_images")
    assert len(commands(DATA)) == 5
    for line in commands(DATA):
        run(*shlex.split(line), cwd=tmp_path)
    keys = {line.split("\t")[0] for line in (tmp_path / "half.txt").read_text().splitlines()}
    assert len(keys) == 9  # of 18


def test_the_data_page_s_webdataset_example(home, tmp_path, monkeypatch, capsys):
    run("dsmim", "shards", "build", home / "my_images", tmp_path / "shards", "--name", "train")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", DATA, re.S)[1], {})
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_the_library_example(home):
    """After the commands: it loads what they trained. A small network, and two steps of training."""
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1].replace("swinv2_base", "swinv2_nano")
    short = ", ".join(map(repr, ["data.val=null", *shlex.split(SHORT)]))
    code = code.replace('"data.val=null"', short) + "\nprint(tuple(logits.shape), loss.isfinite().item())"
    done = run("python", "-c", code, cwd=home)
    assert done.stdout.splitlines()[-1] == "(1, 2) True" and "step 2/2" in done.stderr + done.stdout


def test_the_python_page_s_examples(home):
    """In one process and in order, after the commands, whose runs they use."""
    code = "".join(re.findall(r"```python\n(.*?)```", PYTHON, re.S)) + (
        "\nprint(tuple(pooled.shape), tuple(feature_map.shape), tuple(drawn.shape))"
    )
    lines = run("python", "-c", code, cwd=home).stdout.splitlines()
    assert [line.split()[0] for line in lines[:10]] == sorted(f"my_images/cat/{n}.jpg" for n in range(1, 20, 2))
    assert {line.split()[1] for line in lines[:10]} <= {"cat", "dog"}
    assert lines[10:] == ["(1, 256) (1, 256, 3, 3) (3, 96, 96)"] and (home / "reconstruction.png").exists()


def test_the_own_data_page_s_commands(home, tmp_path):
    """In order, in a folder of their own (training cut to two steps)."""
    (tmp_path / "my_images").symlink_to(home / "my_images")
    assert len(commands(OWN)) == 6
    for line in commands(OWN):
        words = shlex.split(line)
        run(*words, *(shlex.split(SHORT) if "train" in words else []), cwd=tmp_path)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 21
    assert (tmp_path / "confusion.csv").read_text().splitlines()[0] == "label \\ prediction,cat,dog"


def test_named_files_and_recipes_exist():
    from dsmim.recipe.reading import shipped_recipes

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        for name in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / name).exists(), (page.name, name)
    for name in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", MODELS):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:simmim|demo|finetune)_\w+)`", TEXT + OWN):
        assert name in shipped_recipes(), name


def test_the_models_page_names_every_model_and_only_settings_that_exist():
    from dsmim.models import model_names
    from dsmim.recipe import Engine, Model

    listed = re.findall(r"^\| `((?:swinv2|deit3)_\w+)` \|", MODELS, re.M)
    assert listed == model_names()
    keys = {"model": Model.model_fields, "engine": Engine.model_fields}
    for section, key in re.findall(r"`(model|engine)\.(\w+)`", MODELS):
        assert key in keys[section], key
