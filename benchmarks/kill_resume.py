"""Shows that a run that is killed many times ends like an undisturbed one: weights, moments, average, metrics, samples.

    python benchmarks/kill_resume.py --kills 20 [--quick] [--seed S] [--stage 3] [--background] [--keep DIR]

Two ranks train a small Swin V2 on CPU under ZeRO, once undisturbed and once with SIGKILLs at random times. A kill hits
a random rank or all processes at once, while the run starts, trains or saves. After each kill the same command is
started again. The comparison is byte by byte, without tolerances. The samples of a step are those from which the ranks
computed its loss: they note them. Progress goes to standard error; the last line of standard output is one JSON object;
the exit status is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import kill_resume_compare as compare
import numpy as np
import psutil
import yaml
from kill_resume_rank import NOTES
from PIL import Image

from dsmim.cluster.placement import free_port
from dsmim.shards.index import write_index

HERE = Path(__file__).parent
BATCH, EPOCH = 8, 400  # samples; a run has more than one epoch, except the quick one
PATIENCE = 120  # seconds to wait for a start, and for a job's end after one of its ranks was killed


def recipe(shards: Path, steps: int, save_every: int, stage: int, background: bool) -> dict:
    """Return a recipe with everything that resuming could get wrong: drop path, a moving average, decoding in workers,
    validation between steps."""
    return {
        "name": "kill-resume",
        "task": {"name": "simmim", "mask_patch": 16},
        "model": {"name": "swinv2_nano", "img_size": 32, "window_size": 4, "drop_path_rate": 0.1},
        "data": {"train": f"{shards}/train-*.tar", "val": f"{shards}/val-*.tar", "workers": 1, "shuffle_window": 2},
        "batch": {"global_batch": BATCH, "eval_batch": 8},
        "optim": {"lr": 1e-3, "layer_decay": 0.9, "ema_decay": 0.98},
        "schedule": {"duration": {"steps": steps}, "warmup": {"steps": 5}},
        "engine": {"deepspeed": f"zero{stage}", "timeout_minutes": 2, "step_timeout_minutes": 1},
        "validation": {"every": {"steps": 3 * save_every}},
        "checkpoint": {"every": {"steps": save_every}, "keep": 2, "background": background},
        "log": {"every": 1, "tensorboard": False},
    }


def make_shards(folder: Path) -> None:
    """Write shards of small noise images; the numbers in the keys continue from shard to shard."""
    pixels, number = np.random.default_rng(0), 0
    for name, counts in (("train", [EPOCH // 4 + 7, EPOCH // 4 - 7, EPOCH // 4, EPOCH // 4]), ("val", [13])):
        for shard, count in enumerate(counts):
            path = folder / f"{name}-{shard:03d}.tar"
            with tarfile.open(path, "w") as archive:
                for _ in range(count):
                    Image.fromarray(pixels.integers(0, 256, (40, 40, 3), np.uint8)).save(data := io.BytesIO(), "PNG")
                    member = tarfile.TarInfo(f"k{number:05d}.png")
                    member.size, number = data.tell(), number + 1
                    data.seek(0)
                    archive.addfile(member, data)
            write_index(path)


@dataclass
class Job:
    """One run: the same command, started as often as necessary."""

    run: Path
    recipe: Path
    port: int = field(default_factory=free_port)
    sessions: int = 0

    def start(self) -> subprocess.Popen:
        self.sessions += 1
        words = ("train", self.recipe, "--run-dir", self.run)
        launcher = ("torchrun", "--nproc-per-node", 2, "--master-port", self.port, HERE / "kill_resume_rank.py")
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", NOTES: str(self.run.with_suffix(".notes"))}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        with self.log.open("w") as log:
            return subprocess.Popen(
                [str(word) for word in (*launcher, *words)], env=env, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> Path:
        """The log file of the newest session."""
        return self.run.with_name(f"{self.run.name}_session_{self.sessions:02d}.log")

    def step(self) -> int:
        return compare.last_step(self.run)

    def notes(self) -> int:
        path = self.run.with_suffix(".notes")
        return path.stat().st_size if path.exists() else 0


class Killer:
    """Kills a job's session at a random time.

    stride: the most steps that a session may take; stall: seconds of a save; step_seconds: seconds of a step.
    """

    def __init__(self, job: Job, seed: int, stride: int, stall: float, step_seconds: float):
        self.job, self.random, self.stride = job, random.Random(seed), stride
        self.stall, self.step_seconds = stall, step_seconds

    def kill(self, session: subprocess.Popen) -> str | None:
        """Wait for a random time, then kill. Return what was killed, in words; None if the run ended before."""
        begun, before = time.monotonic(), self.job.notes()
        instant = self.random.choices(("starting", "training", "saving"), (1, 4, 4))[0]
        if instant == "starting":
            self._sleep(self.random.uniform(0.5, 8))
        else:
            self._wait(session, lambda: self.job.notes() > before)
            goal = self.job.step() + self.random.randint(1, self.stride)
            self._wait(session, lambda: self.job.step() >= goal)
            if instant == "saving":
                folder = self.job.run / "checkpoints"
                self._wait(session, lambda: any(folder.glob(".partial_*")))
                self._sleep(self.random.uniform(0, 1.2 * self.stall))
            else:
                self._sleep(self.random.uniform(0, self.step_seconds))
        if session.poll() is not None:
            return None
        where = f"{instant}, step {self.job.step()}, {time.monotonic() - begun:.1f} s after its start"
        partial = " (a partial checkpoint is left)" if any((self.job.run / "checkpoints").glob(".partial_*")) else ""
        return f"{self._strike(session)} while {where}{partial}"

    def _strike(self, session: subprocess.Popen) -> str:
        launcher = psutil.Process(session.pid)
        family = [launcher, *launcher.children(recursive=True)]
        ranks = {rank: process for process in launcher.children() if (rank := _rank(process)) is not None}
        if not ranks or self.random.random() < 0.4:
            victims, name = family, "all processes"
        else:
            rank = self.random.choice(sorted(ranks))
            victims, name = [ranks[rank]], f"rank {rank}"
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        begun = time.monotonic()
        session.wait(PATIENCE)
        _, alive = psutil.wait_procs(family, timeout=30)
        if alive:
            raise RuntimeError(f"{name} killed, but {alive} still run")
        return f"killed {name} (the job ended {time.monotonic() - begun:.1f} s later)"

    def _wait(self, session: subprocess.Popen, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition() and session.poll() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happened for {PATIENCE} s: {self.job.log}")
            time.sleep(0.002)

    @staticmethod
    def _sleep(seconds: float) -> None:
        time.sleep(seconds)


def _rank(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


def run_undisturbed(job: Job) -> tuple[float, float]:
    """Run to the end. Return the median seconds of a step, and of the stall that a save causes."""
    session = job.start()
    if session.wait(3600):
        raise RuntimeError(f"ended with {session.returncode}:\n{job.log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return BATCH / statistics.median(rates), statistics.median(stalls(job))


def stalls(job: Job) -> list[float]:
    """Return the seconds that training waited for each checkpoint of the newest session."""
    return [float(found) for found in re.findall(r"training stalled ([\d.]+) s", job.log.read_text())]


def run_killed(job: Job, killer: Killer, kills: int) -> int:
    """Run to the end with up to so many kills. Return how many there were."""
    done = 0
    while True:
        session = job.start()
        if done < kills and (what := killer.kill(session)) is not None:
            done += 1
            print(f"kill {done} of {kills}: {what}", file=sys.stderr, flush=True)
            continue
        if session.wait(3600):
            raise RuntimeError(f"ended with {session.returncode} by itself:\n{job.log.read_text()[-3000:]}")
        return done


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Make both runs and compare them. Return the JSON object of the last line."""
    steps, save_every = (6 + 4 * args.kills, 3) if args.quick else (40 + 12 * args.kills, 5)
    (shards := folder / "shards").mkdir(parents=True)
    make_shards(shards)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(shards, steps, save_every, args.stage, args.background)))
    undisturbed, other = (Job(folder / name, file) for name in ("undisturbed", "killed"))
    step_seconds, stall = run_undisturbed(undisturbed)
    print(f"undisturbed: {step_seconds:.2f} s a step, {stall:.2f} s stall a save", file=sys.stderr, flush=True)
    stride = max(1, round(1.2 * steps / (args.kills + 1)) - save_every // 2)
    kills = run_killed(other, Killer(other, args.seed, stride, stall, step_seconds), args.kills)
    found = list(compare.differences(undisturbed.run, other.run, file))
    for difference in found[:20]:
        print(f"differs: {difference}", file=sys.stderr)
    return {
        "kills": kills, "steps_redone": compare.steps_redone(other.run), "differences": len(found), "steps": steps,
        "stage": args.stage, "background": args.background, "seed": args.seed,
        "compared": compare.moments(other.run), "stall_seconds": stall, "step_seconds": round(step_seconds, 3),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two kills of a short run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and the killed processes")
    parser.add_argument("--stage", type=int, default=3, choices=range(4), help="ZeRO stage")
    parser.add_argument("--background", action="store_true", help="checkpoints are written in the background")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, which is kept (default: a temporary one)")
    args = parser.parse_args()
    if args.quick:
        args.kills = 2
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            report = measure(args, args.keep or Path(temporary))
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    print(json.dumps(report | {"seconds": round(time.monotonic() - begun)}))
    return 1 if report["differences"] or report["kills"] < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
