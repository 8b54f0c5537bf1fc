"""Run the main job from start to end, on real images, in minutes: `make demo`.

SimMIM pre-training of a nano Swin V2 on unlabelled photographs under ZeRO-3; fine-tuning on a fifth of the labels;
the same model from scratch on the same labels for the same number of steps; logistic regression on pixels. Everything
runs by the commands that a user types. Writes runs/demo/summary.json and runs/demo/reconstruction.png.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from baseline import accuracies
from prepare import CLASSES, LICENCE, prepare

DATA, RUNS = Path("data/elpv"), Path("runs/demo")
BIN = Path(sys.executable).parent
GPUS = torch.cuda.device_count()
RANKS = next(n for n in (8, 4, 2, 1) if n <= GPUS) if GPUS else 2  # must divide the batch of 32
ENVIRONMENT = os.environ | ({} if GPUS else {"DS_ACCELERATOR": "cpu"}) | {"PATH": f"{BIN}:{os.environ['PATH']}"}
STAGES = ["shards", "pretrain", "finetune", "from_scratch", "evaluate", "baseline", "picture"]


def main() -> None:
    """Run all stages, write the summary and print the results."""
    print(f"{LICENCE}\n")
    shutil.rmtree(RUNS, ignore_errors=True)  # a demo starts from nothing; `dsmim train` would resume
    RUNS.mkdir(parents=True)
    clock = Clock()
    counts = clock.run("shards", lambda: prepare(DATA))
    print(", ".join(f"{name}: {count} images" for name, count in counts.items()))
    clock.run("pretrain", lambda: train("demo_pretrain", "pretrain"))
    clock.run("finetune", lambda: train("demo_finetune", "finetune", f"model.weights={RUNS}/pretrain"))
    clock.run("from_scratch", lambda: train("demo_finetune", "from_scratch"))
    tuned, scratch = clock.run("evaluate", lambda: [evaluate(name) for name in ("finetune", "from_scratch")])
    baseline = clock.run("baseline", lambda: accuracies(DATA))
    picture = RUNS / "reconstruction.png"
    clock.run("picture", lambda: run(BIN / "dsmim", "reconstruct", RUNS / "pretrain", "--out", picture))
    state = json.loads(next((RUNS / "pretrain/checkpoints").glob("step_*/state.json")).read_text())
    summary = {
        "zero_stage": state["zero_stage"],
        "world_size": state["world_size"],
        "classes": list(CLASSES),
        "images": counts,
        "pretrain": curve(RUNS / "pretrain/metrics.jsonl"),
        "finetune": {"accuracy": tuned["accuracy"], "test_samples": tuned["samples"]},
        "from_scratch": {"accuracy": scratch["accuracy"], "test_samples": scratch["samples"]},
        "baseline": baseline,
        "seconds": clock.seconds,
    }
    (RUNS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))


class Clock:
    """Runs the stages one after another and measures the seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, stage: str, action):
        """Run one stage. Return what its action returns."""
        spent = sum(self.seconds.values())
        print(f"\n[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage} ({spent:.0f} s so far)", flush=True)
        begun = time.monotonic()
        result = action()
        self.seconds[stage] = round(time.monotonic() - begun, 1)
        return result


def launch(*words: object) -> None:
    """Run dsmim under the deepspeed launcher: one rank per GPU, or two ranks on a machine without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if GPUS and visible:  # the launcher would use the first GPUs of the machine instead of these
        where = ["--include", "localhost:" + ",".join(visible.split(",")[:RANKS])]
    else:
        where = ["--num_accelerators", RANKS]
    run(BIN / "deepspeed", *where, "--module", "dsmim", *words)


def run(*words: object) -> None:
    """Run a command, and end the demo if it fails."""
    done = subprocess.run([str(word) for word in words], env=ENVIRONMENT)
    if done.returncode:
        sys.exit(f"demo: {' '.join(map(str, words))} ended with status {done.returncode}")


def train(recipe: str, name: str, *overrides: str) -> None:
    """Train a recipe in the run directory runs/demo/NAME."""
    launch("train", recipe, "--run-dir", RUNS / name, *overrides)


def evaluate(name: str) -> dict:
    """Return the figures of a run's last checkpoint on the test images, measured by one process."""
    out = RUNS / f"{name}.json"
    run(BIN / "dsmim", "evaluate", RUNS / name, f"data.val={DATA}/test-*.tar", "--json", out)
    return json.loads(out.read_text())


def curve(metrics: Path) -> dict[str, list]:
    """Return the steps of the validations, their loss, and the mean training loss since the validation before."""
    steps, train_loss, val_loss, window = [], [], [], []
    for line in map(json.loads, metrics.read_text().splitlines()):
        if line.get("loss") is not None:
            window.append(line["loss"])
        if "val_loss" in line:
            steps.append(line["step"])
            train_loss.append(sum(window) / len(window))
            val_loss.append(line["val_loss"])
            window = []
    return {"steps": steps, "train_loss": train_loss, "val_loss": val_loss}


def table(summary: dict) -> str:
    """Return the results as lines of text."""
    pretrain, images = summary["pretrain"], summary["images"]
    rows = [
        ("SimMIM pre-training, then fine-tuning", summary["finetune"]["accuracy"]),
        ("the same model from scratch", summary["from_scratch"]["accuracy"]),
        ("logistic regression on pixels, tuned", summary["baseline"]["accuracy"]),
        ("logistic regression on pixels, default", summary["baseline"]["default_penalty_accuracy"]),
    ]
    lines = [f"\nTest accuracy on {images['test']} images, with {images['labelled']} labels:"]
    lines += [f"  {name:40} {value:.4f}" for name, value in rows]
    lines += [
        f"Pre-training on {images['train']} images without labels, validation loss {pretrain['val_loss'][0]:.4f} → "
        f"{pretrain['val_loss'][-1]:.4f} in {pretrain['steps'][-1]} steps",
        f"ZeRO stage {summary['zero_stage']}, {summary['world_size']} ranks, {sum(summary['seconds'].values()):.0f} s: "
        + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items()),
        f"{RUNS}/summary.json, {RUNS}/reconstruction.png",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
