"""One emulated cluster for all tests of this folder, and a user whose home all its hosts share."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, make_shards, tiny_recipe
from tests.slurm.cluster import Cluster, missing

STEPS = 16
TEMPLATES = ROOT / "slurm"
# Two nodes with one rank, GPU and core each. The templates have four ranks per node, with eight cores each.
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass
class User:
    """A user with a home folder on the cluster."""

    cluster: Cluster
    home: Path

    def sbatch(self, template: str, *words: object, options: tuple[str, ...] = SMALL, **env: str) -> int:
        """Submit a template unmodified; its output goes to home/NUMBER.out."""
        env = {"DSMIM_SLURM": str(TEMPLATES), **AS_ROOT, **env}
        output = f"--output={self.home}/%j.out"
        return self.cluster.sbatch(*options, output, TEMPLATES / template, *words, cwd=self.home, **env)

    def output(self, job: int) -> str:
        """Return what the job has printed so far."""
        path = self.home / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_output(self, job: int, text: str, timeout: float = 180) -> None:
        """Wait until the job prints `text`. Raises TimeoutError, or AssertionError with its output if the job ends."""

        def printed() -> bool:
            if text in self.output(job):
                return True
            assert self.cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), self.output(job)[-3000:]
            return False

        self.cluster.until(printed, timeout, f"job {job} to print {text!r}; it printed\n{self.output(job)[-3000:]}")

    def completed(self, job: int, timeout: float = 180) -> None:
        """Wait until the job has completed. Raises AssertionError, with its output, if it ends in another way."""
        state = self.cluster.wait(job, timeout=timeout)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), self.output(job)[-4000:]


@pytest.fixture(scope="session")
def cluster():
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="dsmim-", dir="/tmp"))
    running = Cluster(folder, [folder, ROOT, Path(sys.prefix)])
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def user(cluster) -> User:
    """A user with shards, r.yaml (pre-training) and c.yaml (a classifier)."""
    home = cluster.folder / "home"
    make_shards(home / "shards", [17, 3, 13, 11, 9])
    make_shards(home / "shards", [8, 5], name="val")
    changes = {"schedule": {"duration": {"steps": STEPS}}, "checkpoint": {"every": {"steps": 1000}}}
    recipe = tiny_recipe(home / "shards", **changes)
    (home / "r.yaml").write_text(yaml.safe_dump(recipe))
    classify = recipe | {"task": {"name": "classify", "num_classes": 3}, "schedule": {"duration": {"steps": 2}}}
    (home / "c.yaml").write_text(yaml.safe_dump(classify))
    return User(cluster, home)
