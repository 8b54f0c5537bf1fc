"""Commands that need no training."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from dsmim.cli.main import main
from dsmim.recipe.reading import shipped_recipes
from tests.conftest import environment, run, tiny_recipe


@pytest.fixture
def recipe(tmp_path, shards):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(shards)))
    return str(path)


def keys(capsys, *words) -> list[str]:
    assert main(["samples", *words]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_of_the_ranks_make_up_the_global_batch(capsys, recipe, world):
    whole = keys(capsys, recipe, "--steps", "0:9")
    assert len(whole) == 72 and sorted(whole[:53]) == [f"k{i:05d}" for i in range(53)]
    by_rank = [
        keys(capsys, recipe, "--steps", "0:9", "--world-size", str(world), "--rank", str(rank)) for rank in range(world)
    ]
    share = 8 // world
    joined = [key for step in range(9) for rank in by_rank for key in rank[step * share : (step + 1) * share]]
    assert joined == whole
    assert keys(capsys, recipe, "--steps", "3:5", "--world-size", str(world)) == whole[24:40]


def test_samples_name_the_shard_and_follow_overrides(capsys, recipe, shards):
    assert main(["samples", recipe, "--steps", "0:1", "--shards", "batch.global_batch=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.split("\t")[1].startswith(f"{shards}/train-") for line in lines)
    assert keys(capsys, recipe, "--steps", "0:1", "seed=1") != keys(capsys, recipe, "--steps", "0:1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world-size", "3"], "batch.global_batch: 8 cannot be shared evenly by 3 ranks"),
        (["--rank", "2"], "--rank 2 is outside a world of 1"),
        (["data.train=null"], "data.train: missing"),
        (["data.trian=x"], "data.trian: unknown key; did you mean train?"),
    ],
)
def test_bad_requests_end_in_one_clear_error(capsys, recipe, words, message):
    assert main(["samples", recipe, "--steps", "0:1", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsmim: error: ") and message in error


def test_unknown_recipe_names_the_nearest_or_all(capsys):
    assert main(["recipes", "demo_pretrian"]) == 1
    assert capsys.readouterr().err.endswith("did you mean demo_pretrain?\n")
    assert main(["recipes", "/nowhere/r.yaml"]) == 1
    assert ", ".join(shipped_recipes()) in capsys.readouterr().err


def test_recipes_are_listed_and_printed_whole(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes())
    row = next(line for line in listed.splitlines() if line.startswith("simmim_swinv2_base_192_pretrain "))
    assert all(word in row for word in ("2206.04664", "SwinV2-B, 192 px", "ImageNet-1K", " 800 ", "loss 0.4588"))
    assert "124.8 * 10^12" in listed and " 161 " in row
    assert main(["recipes", "--tflops", "249.6"]) == 0
    assert " 80 " in capsys.readouterr().out.split("simmim_swinv2_base_192_pretrain ")[1].partition("\n")[0]
    assert main(["recipes", "demo_pretrain", "optim.lr=7e-4"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 7e-4 and printed["data"]["max_undecodable"] == 0.01


def test_keys_are_explained(capsys):
    assert main(["recipes", "--explain", "optim.lr"]) == 0
    assert capsys.readouterr().out.startswith("  optim.lr: number > 0, required\n      Peak learning rate")
    assert main(["recipes", "--explain"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{section}: " in text for section in ("model", "schedule", "log"))
    assert main(["recipes", "--explain", "optm"]) == 1
    assert "--explain optm: no such key; did you mean optim?" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan", "fast"])
def test_rates_that_are_none(capsys, rate):
    with pytest.raises(SystemExit):
        main(["recipes", "--tflops", rate])
    assert "--tflops" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "demo_pretrain", "--frok"],
        ["samples", "x", "--steps", "5"],
        ["nothing"],
        ["shards", "build", "x", "y", "--split", "a=0.5,a=0.2"],
    ],
)
def test_usage_errors(words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_the_home_folder_in_an_option(monkeypatch, tmp_path):
    from argparse import ArgumentParser

    from dsmim.cli.words import add_run_dir

    monkeypatch.setenv("HOME", str(tmp_path))
    add_run_dir(parser := ArgumentParser())
    assert parser.parse_args(["--run-dir=~/runs"]).run_dir == tmp_path / "runs"


def test_overrides_may_follow_options(capsys, recipe):
    assert main(["samples", recipe, "--steps", "0:1", "batch.global_batch=2", "--world-size", "2", "seed=3"]) == 0
    assert len(capsys.readouterr().out.split()) == 2


def test_help_is_instant_and_loads_nothing_heavy():
    begun = time.monotonic()
    run(sys.executable, "-m", "dsmim", "--help")  # a process of its own, not a fork of one that has imported everything
    assert time.monotonic() - begun < 2
    code = "import sys, dsmim.cli.main; sys.exit(bool({'torch', 'deepspeed', 'timm', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_closed_pipe_is_not_an_error(recipe):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        ["dsmim", "samples", recipe, "--steps", "0:1000"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""
