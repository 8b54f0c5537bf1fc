"""Whole runs through the command line: bitwise resume, exact evaluation, export, and bad situations."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint import zero_shards
from dsmim.checkpoint.reading import locate
from dsmim.cluster.placement import free_port
from dsmim.health import replay
from dsmim.library import load
from tests.conftest import (
    ROOT,
    dsmim,
    environment,
    make_shards,
    patience,
    run,
    tiny_recipe,
    two_forked_ranks,
    two_ranks,
)
from tests.distributed.runs import (
    assert_same_bytes,
    kill_after_checkpoint,
    metrics,
    ranks,
    read_weights,
    wait_for,
    write_recipe,
)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, shards):
    """At stage 1; at stage 3 in test_signals.py, between two signals."""
    recipe = write_recipe(tmp_path, shards)
    command = ("-m", "dsmim", "train", recipe, "engine.deepspeed=zero1")
    two_ranks(*command, "--run-dir", tmp_path / "straight")
    port = str(free_port())
    launch = ("torchrun", "--nproc-per-node", 2, "--master-port", port, *command, "--run-dir", tmp_path / "killed")
    kill_after_checkpoint(tmp_path / "killed/checkpoints/step_00000002", *launch)
    assert not (tmp_path / "killed/checkpoints/step_00000006").exists()
    done = two_ranks(*command, "--run-dir", tmp_path / "killed", "data.workers=1")
    assert "resumed from" in done.stderr
    assert_same_bytes(*(tmp_path / name / "checkpoints/step_00000006" for name in ("straight", "killed")))
    assert (tmp_path / "killed/checkpoints/latest").read_text() == "step_00000006"
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed") and len(metrics(tmp_path / "killed")) == 6 + 2


def test_a_run_goes_on_by_other_numbers_of_ranks_and_stages(tmp_path, shards):
    """2 ranks at ZeRO-3, then 1 at stage 0, then 2 at stage 0, then 4 at stage 2."""
    model = tiny_recipe(shards)["model"] | {"drop_path_rate": 0.4, "drop_path_rates": "uniform"}
    recipe = write_recipe(tmp_path, shards, model=model, schedule={"duration": {"steps": 8}, "warmup": {"steps": 1}})
    command = ("train", recipe, "optim.ema_decay=0.9", "--run-dir")
    two_forked_ranks(*command, tmp_path / "straight")
    run_dir, log = tmp_path / "resized", tmp_path / "log"
    for count, stage, step in ((2, 3, 2), (1, 0, 4), (2, 0, 6), (4, 2, 8)):
        words = ("optim.ema_decay=0.9", "--run-dir", run_dir, f"engine.deepspeed=zero{stage}")
        with ranks(log, count, "train", recipe, *words) as processes:
            if step < 8:
                wait_for((run_dir / f"checkpoints/step_{step:08d}").exists, processes[0])
            else:
                assert [process.wait(timeout=patience(200)) for process in processes] == [0] * count
        if step < 8:
            for later in (run_dir / "checkpoints").glob(f"step_{step + 2:08d}"):
                shutil.rmtree(later)  # it may have come further
    assert "converting step_00000006 of 2 ranks at ZeRO stage 0 to" in log.read_text()
    assert "(1 micro batch of 2 per rank)" in log.read_text()
    assert not (run_dir / "checkpoints/universal").exists()
    one, other = metrics(tmp_path / "straight"), metrics(run_dir)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=1e-3)  # the gradient's norm; losses are nearer
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), abs=2e-6)
    for which in ("fp32", "ema"):
        left, right = (zero_shards.read_weights(locate(run), which) for run in (tmp_path / "straight", run_dir))
        assert max((left[name] - right[name]).abs().max() for name in left) < 5e-4


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards) -> tuple[Path, Path]:
    """(recipe, run directory) of a classifier trained to its end under ZeRO-3 by two ranks."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {
        "task": {"name": "classify", "num_classes": 3, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
        "optim": {"lr": 1e-3, "clip_grad": None},
    }
    recipe = write_recipe(folder, shards, **changes)
    two_forked_ranks("train", recipe, "--run-dir", folder / "run")
    return recipe, folder / "run"


def test_evaluation_is_exact_at_any_world_size_and_launcher(finished):
    _, run_dir = finished
    alone = json.loads(dsmim("evaluate", run_dir).stdout)
    assert alone["samples"] == 13
    torchrun = two_forked_ranks("evaluate", run_dir, "batch.eval_batch=4")
    mpirun = run(
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 3, "python", "-m", "dsmim", "evaluate", run_dir
    )
    for other in (torchrun, mpirun):
        assert json.loads(other.stdout) == alone
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "val_loss" in line][-1]
    assert last["val_accuracy"] == alone["accuracy"]
    assert last["val_loss"] == pytest.approx(alone["loss"], rel=1e-6)  # measured by ZeRO-3, and by the plain model


def test_export_gives_timm_equal_logits(finished, tmp_path):
    import timm

    from dsmim.models import create_model

    _, run_dir = finished
    out = tmp_path / "model.safetensors"
    printed = dsmim("export", run_dir, "--to", "timm", out).stdout
    theirs = eval(printed.splitlines()[-1], {"timm": timm}).eval()
    ours = create_model("swinv2_nano", img_size=32, window_size=4, num_classes=3).eval()
    ours.load_state_dict(read_weights(run_dir))
    images = torch.randn(2, 3, 32, 32)
    assert type(theirs).__module__.startswith("timm.")
    assert torch.allclose(theirs(images), ours(images), atol=1e-6)


def test_a_finished_run_and_a_changed_recipe(finished):
    recipe, run_dir = finished
    done = two_forked_ranks("train", recipe, "--run-dir", run_dir)
    assert "complete at step 6 of 6" in done.stderr
    changed = dsmim("train", recipe, "--run-dir", run_dir, "optim.lr=2e-3", "data.workers=3", check=False)
    assert changed.returncode == 1 and "optim.lr: 0.001 → 0.002" in changed.stderr and "--fork" in changed.stderr
    assert "workers" not in changed.stderr and "Traceback" not in changed.stderr
    three = ("torchrun", "--nproc-per-node", 3, "--master-port", free_port(), "-m", "dsmim", "train", recipe)
    uneven = run(*three, "--run-dir", run_dir, check=False)
    assert uneven.returncode == 1 and "8 cannot be shared evenly by 3 ranks" in uneven.stderr
    assert "resume on 2 or 4 ranks" in uneven.stderr


def test_finetuning_starts_from_the_pretrained_encoder(tmp_path, shards):
    recipe = write_recipe(tmp_path, shards, schedule={"duration": {"steps": 2}})
    dsmim("train", recipe, "--run-dir", tmp_path / "pre", "engine.deepspeed=zero0")
    done = dsmim(
        "train", recipe, "--run-dir", tmp_path / "fine", "task={name: classify, num_classes: 3}",
        f"model.weights={tmp_path}/pre", "model.img_size=64",
        "model.pretrained_window_sizes=[4,4,2,1]", "optim.lr=1e-30", "model.drop_path_rate=0",
    )  # fmt: skip
    assert "3 dropped (only for masked image modelling)" in done.stderr and "newly initialised: head.fc" in done.stderr
    before, after = (read_weights(tmp_path / name) for name in ("pre", "fine"))
    assert torch.allclose(
        before["encoder.layers.2.blocks.1.attn.qkv.weight"], after["layers.2.blocks.1.attn.qkv.weight"]
    )


def test_damaged_checkpoints_a_held_directory_and_a_fork(tmp_path, shards):
    recipe = write_recipe(tmp_path, shards)
    run_dir = tmp_path / "run"
    train = ("train", recipe, "--run-dir", run_dir)
    dsmim(*train)
    shard = next((run_dir / "checkpoints/step_00000006").glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    next((run_dir / "checkpoints/step_00000004").glob("*model_states.pt")).unlink()
    measured = json.loads(dsmim("evaluate", run_dir).stdout)
    assert measured["checkpoint"].endswith("step_00000002")
    with subprocess.Popen(
        ["dsmim", *map(str, train)], env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as first:
        said = ""
        while "steps 2 to 6" not in said:  # the headline comes after the lock is taken
            line = first.stderr.readline()
            assert line, said
            said += line
        first.send_signal(signal.SIGSTOP)  # alive, but not finishing while the second one looks
        second = dsmim(*train, check=False)
        first.send_signal(signal.SIGCONT)
        said += first.stderr.read()
    assert first.returncode == 0, said
    assert "step_00000006 skipped" in said and "is damaged" in said
    assert "step_00000004 skipped" in said and "is missing" in said and "resumed from" in said
    assert second.returncode == 1 and f"another live run holds this directory (process {first.pid}" in second.stderr
    longer = dsmim(*train, "schedule.duration.steps=7", "optim.weight_decay=0.3", "--fork")
    assert "forked: schedule.duration.steps: 6 → 7" in longer.stderr and "step 7/7" in longer.stderr
    shard = next((run_dir / "checkpoints/step_00000007").glob("*optim_states.pt"))
    groups = torch.load(shard, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}  # not what the checkpoint brought along
    for path, text in zip(
        (run_dir / "checkpoints").glob("step_????????/manifest.json"), ("null", "{}", "["), strict=True
    ):
        path.write_text(text)
    none_left = dsmim(*train, "--fork", check=False)
    assert none_left.returncode == 1 and "no checkpoint is valid" in none_left.stderr


def test_the_best_validation_is_saved_and_kept(tmp_path, shards):
    """Although no step of checkpoint.every meets one of validation.every before the end; also when the clock saves.

    At a learning rate of 0.3 the loss grows, so that the first validation is the best.
    """
    recipe = write_recipe(tmp_path, shards, validation={"every": {"steps": 2}})
    best = "checkpoint={every: {steps: 5}, keep: 1, keep_best: {metric: loss, mode: min}}"
    train = ("train", recipe, "engine.deepspeed=zero0", "--run-dir")
    dsmim(*train, tmp_path / "steps", best, "optim.lr=0.3")
    dsmim(*train, tmp_path / "clock", best.replace("steps: 5", "minutes: 100"), "checkpoint.background=true")
    for name in ("steps", "clock"):
        figures = {line["step"]: line["val_loss"] for line in metrics(tmp_path / name) if "val_loss" in line}
        assert list(figures) == [2, 4, 6]
        best_step = min(figures, key=figures.get)
        assert name == "clock" or best_step == 2
        wanted = f"step_{best_step:08d}"
        assert (tmp_path / name / "checkpoints/best").read_text() == wanted
        kept = {path.name for path in (tmp_path / name / "checkpoints").glob("step_*")}
        assert kept == {wanted, "step_00000006"}


def test_the_clock_saves_on_all_ranks_at_once(tmp_path, shards):
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": {"steps": 3}, "keep": 9})
    two_forked_ranks("train", recipe, "--run-dir", tmp_path / "steps")
    clock = ("train", recipe, "checkpoint={every: {minutes: 1.0e-6}, keep: 9}", "--run-dir")
    two_forked_ranks(*clock, tmp_path / "clock")
    kept = sorted(path.name for path in (tmp_path / "clock/checkpoints").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in range(1, 7)]
    assert_same_bytes(*(tmp_path / name / "checkpoints/step_00000006" for name in ("steps", "clock")))
    for step in (5, 6):
        shutil.rmtree(tmp_path / f"clock/checkpoints/step_{step:08d}")
    done = two_forked_ranks(*clock, tmp_path / "clock")
    assert "resumed from" in done.stderr and "checkpoint step_00000004" not in done.stderr  # it is there already
    assert_same_bytes(*(tmp_path / name / "checkpoints/step_00000006" for name in ("steps", "clock")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=/nowhere/*.tar", "data.train: no shards match '/nowhere/*.tar'"),
        ("batch.micro_batch=8", "batch.global_batch: 8 is not a multiple of 2 ranks × micro batch 8 = 16"),
        ("model.weights=/nowhere", "/nowhere: no such file or run directory"),
        ("engine.deepspeed=zero4", "engine.deepspeed: no file 'zero4'"),
    ],
)
def test_errors_common_to_all_ranks_are_told_once(tmp_path, shards, override, message):
    recipe = write_recipe(tmp_path, shards)
    done = two_forked_ranks("train", recipe, "--run-dir", tmp_path / "run", override, check=False)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert "dsmim: error:" in done.stderr and 'File "' not in done.stderr.split("dsmim: error:")[0]
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_what_was_there(tmp_path, shards):
    recipe = write_recipe(tmp_path, shards)
    (run_dir := tmp_path / "run").mkdir()
    (run_dir / "notes.txt").write_text("mine")
    for folder in (run_dir, tmp_path / "new/run"):
        failed = dsmim("train", recipe, "--run-dir", folder, "engine.deepspeed=zero4", check=False)
        assert failed.returncode == 1 and "engine.deepspeed: no file 'zero4'" in failed.stderr
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"] and not (tmp_path / "new").exists()
    dsmim("train", recipe, "--run-dir", run_dir, "schedule.duration.steps=2", "engine.deepspeed=zero0")
    files = sorted(run_dir.rglob("*"))
    again = ("train", recipe, "--run-dir", run_dir, "schedule.duration.steps=3")
    assert dsmim(*again, check=False).returncode == 1
    assert dsmim(*again, "--fork", "engine.deepspeed=zero4", check=False).returncode == 1
    assert sorted(run_dir.rglob("*")) == files


def test_relative_shards_are_found_from_another_folder(tmp_path, shards, monkeypatch):
    here, there, run_dir = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    there.mkdir()
    shutil.copytree(shards, here / "data")
    recipe = write_recipe(tmp_path, Path("data"))
    words = ("train", recipe, "--run-dir", run_dir, "engine.deepspeed=zero0")
    dsmim(*words, "schedule.duration.steps=2", cwd=here)
    measured = [json.loads(dsmim("evaluate", run_dir, cwd=folder).stdout) for folder in (here, there)]
    assert measured[0]["loss"] == measured[1]["loss"]
    assert [figures["data"] for figures in measured] == ["data/val-*.tar", f"{here}/data/val-*.tar"]
    monkeypatch.chdir(there)
    assert load(run_dir).recipe.data.train == f"{here}/data/train-*.tar"
    resumed = dsmim(*words, "--fork", cwd=there)
    assert "resumed from" in resumed.stderr and "step 6/6" in resumed.stderr
    make_shards(there / "data", [4], name="val")  # what is found here counts
    assert json.loads(dsmim("evaluate", run_dir, "data.val=data/val-*.tar", cwd=there).stdout)["samples"] == 4
    shutil.rmtree(here)
    for command in (("evaluate", run_dir), words):
        failed = dsmim(*command, cwd=tmp_path, check=False)
        assert failed.returncode == 1 and f"no shards match '{here}/data/" in failed.stderr
        assert failed.stderr.count("error") == 1


def test_a_fork_that_changes_the_model_is_refused_by_key(finished, tmp_path):
    recipe, run_dir = finished
    fork = ("--fork", "task.num_classes=5", "optim.no_decay=[]")
    changed = two_forked_ranks("train", recipe, "--run-dir", run_dir, *fork, check=False)
    assert "step_00000006: its weights do not fit the model" in changed.stderr
    keys, tensors = "  task.num_classes: 3 → 5", "  head.fc.weight: has shape [3, 256], here [5, 256]"
    assert f"{keys}\nTensors that do not fit:\n{tensors}" in changed.stderr
    assert changed.stderr.count("do not fit the model") == 1
    assert 'File "' not in changed.stderr.split("dsmim: error:")[0]
    assert "num_classes: 3\n" in (run_dir / "recipe.yaml").read_text()  # a fork that fails changes nothing


def test_undecodable_images_are_named_counted_and_limited(tmp_path):
    from dsmim.shards.index import write_index
    from tests.conftest import image_bytes, write_tar

    members = [(f"k{i}.png", b"rubbish" if i == 3 else image_bytes(i)) for i in range(10)]
    write_index(write_tar(tmp_path / "train-000.tar", members))
    recipe = write_recipe(tmp_path, tmp_path)
    train = ("train", recipe, "data.val=null", "engine.deepspeed=zero0")
    stopped = dsmim(*train, "--run-dir", tmp_path / "a", check=False)
    assert stopped.returncode == 1 and "more than data.max_undecodable 0.01 allows" in stopped.stderr
    done = dsmim(*train, "--run-dir", tmp_path / "b", "data.max_undecodable=0.2")
    assert "train-000.tar: k3.png cannot be decoded" in done.stderr
    last = json.loads((tmp_path / "b/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and 4 <= last["undecodable"] <= 5  # 48 samples of a set of 10: 4 or 5 passes


def test_a_rate_that_is_too_high_is_not_trained_through(tmp_path, shards):
    schedule = {"duration": {"steps": 100}, "warmup": {"steps": 90}}
    recipe = write_recipe(tmp_path, shards, schedule=schedule, checkpoint={"every": {"steps": 10}})
    train = ("train", recipe, "data.val=null", "engine.deepspeed=zero0")
    finite = dsmim(*train, "optim.lr=30", "--run-dir", tmp_path / "finite", check=False)
    assert finite.returncode == 1 and "the loss has diverged" in finite.stderr and "Lower optim.lr" in finite.stderr
    infinite = dsmim(
        *train,
        "optim.lr=1e4",
        "optim.clip_grad=null",
        "engine.max_loss_growth=null",
        "--run-dir",
        tmp_path / "inf",
        check=False,
    )
    assert infinite.returncode == 1 and "steps in a row were not finite" in infinite.stderr
    for name in ("finite", "inf"):
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["step"] < 90  # of 100
    bundles = sorted((tmp_path / "inf/replay").iterdir())
    assert len(bundles) == 3  # of more steps than that: disks are finite too
    (micro_batch,), told = replay.read(bundles[0], rank=0)
    step = told["step"]
    assert f"step {step}: loss" in infinite.stderr and f"kept for replay: {bundles[0]}" in infinite.stderr
    assert micro_batch["key"] == dsmim("samples", recipe, "--steps", f"{step}:{step + 1}").stdout.split()
    assert micro_batch["image"].dtype == torch.uint8 and micro_batch["image"].shape == (8, 3, 32, 32)
    assert micro_batch["mask"].dtype == torch.bool and told["recipe"]["optim"]["lr"] == 1e4
