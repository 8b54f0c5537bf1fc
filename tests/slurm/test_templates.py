"""The headers of the templates as Slurm reads them, and jobs that depend on one another."""

from __future__ import annotations

import json
import re

import pytest

from tests.slurm.conftest import AS_ROOT, SMALL, TEMPLATES


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_reads_every_line_of_the_header(user, path):
    """Slurm silently ignores #SBATCH lines after the first command."""
    cluster = user.cluster
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", path.read_text(), re.M))
    nodes = int(options.get("nodes", 1))
    tasks = nodes * int(options.get("ntasks-per-node") or options["ntasks"])
    cpus = int(options["cpus-per-task"])
    asked = cluster.run("sbatch", "--test-only", path).stderr
    assert f"using {tasks * cpus} processors on nodes node" in asked
    number = cluster.sbatch("--hold", path, cwd=user.home)
    job = cluster.job(number)
    cluster.run("scancel", number)
    assert (job["NumNodes"].split("-")[0], job["NumTasks"], job["CPUs/Task"]) == (str(nodes), str(tasks), str(cpus))
    assert (job["TimeLimit"], job["Requeue"], job["JobName"]) == (
        options["time"].replace("24:", "1-00:"),
        "1",
        options["job-name"],
    )
    assert job.get("TresPerNode") == (f"gres:gpu:{options['gpus-per-node']}" if "gpus-per-node" in options else None)
    assert job["StdOut"].startswith(f"{user.home}/{options['job-name']}-{number}")


def test_pretraining_then_variants_then_their_evaluation(user):
    """At the same time, a second pipeline whose pre-training fails."""
    options = " ".join(("--nodes=1", *SMALL[1:]))
    env = {"DSMIM_SBATCH": f"{options} --output={user.home}/%j.out", "DSMIM_SWEEP": "seed=3 optim.lr=5e-4", **AS_ROOT}
    words = ("schedule.duration.steps=2", "validation.every.steps=2")
    jobs = user.cluster.run(TEMPLATES / "pipeline.sh", "graph", "r.yaml", "c.yaml", *words, cwd=user.home, **env).stdout
    pretrain, finetune, evaluate = map(int, re.findall(r"\d+", jobs))
    broken = user.cluster.run(TEMPLATES / "pipeline.sh", "no", "nothing", "c.yaml", cwd=user.home, **env).stdout
    first, *others = map(int, re.findall(r"\d+", broken))
    assert user.cluster.job(f"{evaluate}_1")["Dependency"].startswith(f"aftercorr:{finetune}")
    assert user.cluster.wait(first)["JobState"] == "FAILED" and "no shipped recipe of that name" in user.output(first)
    for other in others:
        state = user.cluster.wait(other, timeout=60)
        assert state["JobState"] == "CANCELLED" and state["Reason"] == "DependencyNeverSatisfied"
    user.completed(pretrain)
    for task in (0, 1):
        user.completed(f"{evaluate}_{task}")
    for variant, key, value in (("seed=3", "seed", 3), ("optim.lr=5e-4", "optim", 5e-4)):
        run = user.home / "graph/finetune" / variant
        figures = json.loads((run / "evaluation.json").read_text())
        assert figures["samples"] == 13 and figures["checkpoint"].endswith(f"{variant}/checkpoints/step_00000002")
        state = json.loads((run / "checkpoints/step_00000002/state.json").read_text())
        recipe = state["recipe"]
        assert (recipe[key] if key == "seed" else recipe[key]["lr"]) == value
        assert recipe["model"]["weights"] == "graph/pretrain"


def test_shards_are_indexed_and_verified_in_shares(user):
    indexes = sorted((user.home / "shards").glob("train-*.dsmi"))
    before = [path.read_bytes() for path in indexes]
    listed = user.home / "tars.txt"
    tars = sorted((user.home / "shards").glob("train-*.tar"))
    listed.write_text("".join(f"{path}\n" for path in tars))
    verify = user.sbatch("shards.sbatch", "verify", "tars.txt", options=("--array=3-4", "--cpus-per-task=1"))
    for task in (3, 4):
        assert user.cluster.wait(f"{verify}_{task}")["JobState"] == "COMPLETED"
    reports = [(user.home / f"tars.verified.{task}.jsonl").read_text().splitlines() for task in (3, 4)]
    assert [len(report) for report in reports] == [3, 2]
    gap = user.sbatch("shards.sbatch", "index", "tars.txt", options=("--array=0,2", "--cpus-per-task=1"))
    assert user.cluster.wait(f"{gap}_2")["JobState"] == "FAILED"
    assert before == [path.read_bytes() for path in indexes]
