"""Compare recipes on real photographs, three seeds each: the figures of docs/results.md.

    python examples/elpv/results.py [--quick] [--seeds 0,1,2] [--only deit3,plain]

DeiT III's recipe (deit3.yaml), also at a higher learning rate and with AdamW, against a plain one (plain.yaml) at
equal steps; and SimMIM pre-training followed by fine-tuning with and without layer decay, and training from scratch, at
equal steps. Everything runs by the commands that a user types, one after another, in runs/results; what is complete
there is not run again. The last line is one JSON object: name → accuracies of the seeds, mean, and standard deviation
of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from prepare import LICENCE, build, image_root, prepare, read_labels, split

DATA, RUNS, HERE = Path("data/elpv"), Path("runs/results"), Path(__file__).parent
EXPERIMENTS = {  # name → recipe, and whether it starts from SimMIM's weights; then overrides
    "plain": (HERE / "plain.yaml", False),
    "deit3": (HERE / "deit3.yaml", False),
    "deit3_faster": (HERE / "deit3.yaml", False, "optim.lr=1e-2"),
    "deit3_adamw": (HERE / "deit3.yaml", False, "optim.name=adamw", "optim.lr=1e-3"),
    "scratch": ("demo_finetune", False),
    "finetune": ("demo_finetune", True),
    "finetune_layer_decay": ("demo_finetune", True, "optim.layer_decay=0.75"),
}
QUICK = ["schedule.duration={steps: 4}", "schedule.warmup={steps: 1}", "validation.every={steps: 4}"]


def main() -> None:
    """Run what is missing, and print the table and the JSON line."""
    options = _options()
    print(LICENCE, file=sys.stderr)
    prepare(DATA)
    if not list(DATA.glob("supervised-*.tar")):
        root = image_root()
        build("supervised", split(read_labels(root))["train"], root, DATA, labels=True)
    short, seeds = (QUICK, [0]) if options.quick else ([], options.seeds)
    folder = RUNS / "quick" if options.quick else RUNS
    pretrained, figures = folder / "pretrain", {}
    if any(EXPERIMENTS[name][1] for name in options.only):
        train("demo_pretrain", pretrained, short)
    for name in options.only:
        recipe, warm, *overrides = EXPERIMENTS[name]
        overrides += [f"model.weights={pretrained}"] if warm else []
        runs = [folder / f"{name}_{seed}" for seed in seeds]
        for seed, run in zip(seeds, runs, strict=True):
            train(recipe, run, [*overrides, *short, f"seed={seed}"])
        figures[name] = summary([evaluate(run) for run in runs])
    print(table(figures))
    print(json.dumps(figures))


def train(recipe: str | Path, run: Path, overrides: list[str]) -> None:
    """Train a recipe, or do nothing if the run is complete."""
    dsmim("train", recipe, "--run-dir", run, *overrides)


def evaluate(run: Path) -> float:
    """Return the accuracy of a run's last checkpoint on the test images, which no run has seen."""
    out = run / "test.json"
    dsmim("evaluate", run, f"data.val={DATA}/test-*.tar", "--json", out)
    return json.loads(out.read_text())["accuracy"]


def dsmim(*words: object) -> None:
    """Run a command of dsmim on one CPU core, and end if it fails."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-m", "dsmim", *map(str, words)], env=environment, stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"results: dsmim {' '.join(map(str, words))} ended with status {done.returncode}")


def summary(accuracies: list[float]) -> dict:
    """Return the accuracies with their mean and, of several seeds, their standard deviation."""
    spread = stdev(accuracies) if len(accuracies) > 1 else None
    return {"accuracies": accuracies, "mean": mean(accuracies), "stdev": spread}


def table(figures: dict) -> str:
    """Return one line per experiment."""
    rows = [f"{'':22} {'mean':>6} {'stdev':>6}  seeds"]
    for name, found in figures.items():
        spread = "" if found["stdev"] is None else f"{found['stdev']:.3f}"
        rows.append(f"{name:22} {found['mean']:6.3f} {spread:>6}  {' '.join(f'{a:.3f}' for a in found['accuracies'])}")
    return "\n".join(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four steps of each and one seed: whether it works")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--only", type=_names, default=list(EXPERIMENTS), metavar="NAMES")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(EXPERIMENTS)}")
    return names


if __name__ == "__main__":
    main()
