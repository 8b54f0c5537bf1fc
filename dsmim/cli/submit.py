"""`dsmim submit`: a checked job for Slurm."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dsmim.cli.words import command, count
from dsmim.cluster import TEMPLATES

if TYPE_CHECKING:
    from dsmim.cluster.script import Job
    from dsmim.recipe import Recipe


def add_submit(commands) -> None:
    """The command `dsmim submit`."""
    about = "Check a job, then hand it to Slurm: what would fail in the queue is told before"
    submit = command(commands, "submit", about, _submit)
    submit.add_argument("recipe", help="a recipe's name or file; with --template evaluate a run directory")
    submit.add_argument("--nodes", type=count, required=True)
    submit.add_argument("--gpus-per-node", type=count, required=True, help="and as many ranks, one per GPU")
    submit.add_argument("--time", required=True, help="limit of one job, as Slurm writes it: 24:00:00, 2-12, minutes")
    submit.add_argument("--template", choices=TEMPLATES, default="pretrain", help="(default: pretrain)")
    submit.add_argument("--profile", help="the cluster's particulars: a file, or a NAME in ~/.config/dsmim/NAME.yaml")
    submit.add_argument("--run-dir", type=Path, help="where checkpoints and logs go (default: runs/RECIPE)")
    submit.add_argument("--fork", action="store_true", help="go on although the recipe has changed")
    submit.add_argument("--set", action="append", default=[], metavar="key=value", help="a recipe key to change")
    submit.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="the same as --set")


def _submit(options: argparse.Namespace) -> None:
    from dsmim.cluster.submit import submit, why_unavailable

    without = why_unavailable()
    if without and not options.dry_run:
        raise ValueError(f"{without}; submit on the cluster's login node (--dry-run prints the script anywhere)")
    overrides = [*options.set, *options.overrides]
    run_dir, recipe, problems = _checked(options, overrides)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    job = _job(options, overrides, run_dir, recipe, stamp)
    script = _script(job, options.profile, problems, ask_slurm=without is None)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"not submitted: {len(problems)} problem{'s' * (len(problems) > 1)}:{listed}")
    if options.dry_run:
        print(script, end="")
        return
    file = _write(run_dir, f"{stamp}-{options.template}.sbatch", script)
    if recipe is not None:
        _write(run_dir, f"{stamp}.yaml", recipe.to_yaml())
    print(submit(file))
    print(f"submitted {file}; its output goes to {job.output}", file=sys.stderr)


def _checked(options: argparse.Namespace, overrides: list[str]) -> tuple[Path, Recipe | None, list[str]]:
    """The run directory, the recipe (of a training), and all problems found."""
    from dsmim.preflight import Findings, check_evaluation, check_training
    from dsmim.recipe.reading import load_recipe

    if options.template == "evaluate":
        if options.run_dir or options.fork:
            raise ValueError("with --template evaluate the first argument is the run directory; no --run-dir, --fork")
        return Path(options.recipe), None, check_evaluation(Path(options.recipe), overrides)
    found = Findings()
    recipe = found.of(load_recipe, options.recipe, overrides)
    name = recipe.name if recipe else Path(options.recipe).stem
    run_dir = options.run_dir or Path("runs") / name
    if recipe is not None:
        found.problems += check_training(recipe, options.nodes * options.gpus_per_node, run_dir, options.fork)
    return run_dir, recipe, found.problems


def _job(options: argparse.Namespace, overrides: list[str], run_dir: Path, recipe: Recipe | None, stamp: str) -> Job:
    """The recipe is given as it was checked, so that an edit while the job waits changes nothing."""
    from dsmim.cluster.script import Job

    run_dir = run_dir.absolute()
    if options.template == "evaluate":
        name, words = f"{run_dir.name}-evaluate", [str(run_dir), *overrides]
    else:
        name = recipe.name if recipe else "?"
        words = [str(run_dir / f"slurm/{stamp}.yaml"), "--run-dir", str(run_dir), *["--fork"] * options.fork]
    output = f"{str(run_dir).replace('%', '%%')}/slurm/%x-%j.out"
    return Job(
        options.template, options.nodes, options.gpus_per_node, options.time, name, output, Path.cwd(), tuple(words)
    )


def _script(job: Job, profile_source: str | None, problems: list[str], ask_slurm: bool) -> str | None:
    """The batch script; None, or one that Slurm refuses, when problems were added."""
    from dsmim.cluster.profile import load_profile
    from dsmim.cluster.script import render
    from dsmim.cluster.slurm import limit_seconds
    from dsmim.cluster.submit import overridden, why_refused
    from dsmim.preflight import Findings

    found = Findings()
    profile = found.of(load_profile, profile_source)
    limit = found.of(limit_seconds, job.time)
    script = profile and found.of(render, job, profile)
    if profile and limit and limit <= profile.signal_seconds and job.template != "evaluate":
        found.problems.append(
            f"--time: of {job.time} ({limit} s) the last {profile.signal_seconds} s are kept for saving (the profile's "
            "signal_seconds), which leaves nothing for training"
        )
    if script:
        found.problems += overridden(script, os.environ)
    if script and not found.problems and ask_slurm:
        found.problems += filter(None, [found.of(why_refused, script)])
    problems += found.problems
    return script


def _write(run_dir: Path, name: str, text: str) -> Path:
    path = run_dir / "slurm" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
