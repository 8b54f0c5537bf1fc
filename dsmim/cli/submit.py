"""`dsmim submit`: check a job, then submit it to Slurm."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dsmim.cli.words import add_overrides, add_run_dir, command, count
from dsmim.cluster import TEMPLATES

if TYPE_CHECKING:
    from dsmim.cluster.script import Job
    from dsmim.recipe import Recipe


def add_submit(commands) -> None:
    """Add the command `dsmim submit`."""
    about = "Check a job and submit it to Slurm: what would fail in the queue is reported now"
    submit = command(commands, "submit", about, _submit)
    submit.add_argument("recipe", help="a recipe's name or file; for --template evaluate, a run directory")
    submit.add_argument("--nodes", type=count, required=True, metavar="N", help="number of nodes")
    submit.add_argument("--gpus-per-node", type=count, required=True, metavar="N", help="one rank runs on each GPU")
    submit.add_argument("--time", required=True, help="time limit of one job, as for sbatch: 24:00:00, 2-12, minutes")
    submit.add_argument(
        "--template", choices=TEMPLATES, default="pretrain", help="batch script to fill in (default: pretrain)"
    )
    submit.add_argument("--profile", help="settings of your cluster: a file, or the NAME of ~/.config/dsmim/NAME.yaml")
    add_run_dir(submit)
    submit.add_argument("--set", action="append", default=[], metavar="key=value", help="a recipe key to change")
    submit.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    add_overrides(submit, "the same as --set")


def _submit(options: argparse.Namespace) -> None:
    from dsmim.cluster.submit import submit, why_unavailable

    no_slurm = why_unavailable()
    if no_slurm and not options.dry_run:
        raise ValueError(f"{no_slurm}; submit on the cluster's login node (--dry-run prints the script anywhere)")
    overrides = [*options.set, *options.overrides]
    run_dir, recipe, problems = _checked(options, overrides)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    job = _job(options, overrides, run_dir, recipe, stamp)
    script = _script(job, options.profile, problems, ask_slurm=no_slurm is None)
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
    """Return the run directory, the recipe (None for an evaluation), and all problems found."""
    from dsmim.preflight import Findings, check_evaluation, check_training
    from dsmim.recipe.reading import load_recipe

    if options.template == "evaluate":
        if options.run_dir or options.fork:
            raise ValueError(
                "--template evaluate: leave out --run-dir and --fork; the first argument is the run directory"
            )
        return Path(options.recipe), None, check_evaluation(Path(options.recipe), overrides)
    found = Findings()
    recipe = found.check(load_recipe, options.recipe, overrides)
    name = recipe.name if recipe else Path(options.recipe).stem
    run_dir = options.run_dir or Path("runs") / name
    if recipe is not None:
        found.problems += check_training(recipe, options.nodes * options.gpus_per_node, run_dir, options.fork)
    return run_dir, recipe, found.problems


def _job(options: argparse.Namespace, overrides: list[str], run_dir: Path, recipe: Recipe | None, stamp: str) -> Job:
    """Return the job. It reads the recipe as it was checked: an edit while the job waits has no effect."""
    from dsmim.cluster.script import Job

    run_dir = run_dir.absolute()
    if options.template == "evaluate":
        name, words = f"{run_dir.name}-evaluate", [str(run_dir), *overrides]
    else:
        name = recipe.name if recipe else "?"
        words = [str(run_dir / f"slurm/{stamp}.yaml"), "--run-dir", str(run_dir), *["--fork"] * options.fork]
        words += ["data.allow_pipe=true"] * bool(recipe and recipe.data.allow_pipe)  # no file may hold it
    output = f"{str(run_dir).replace('%', '%%')}/slurm/%x-%j.out"
    return Job(
        options.template, options.nodes, options.gpus_per_node, options.time, name, output, Path.cwd(), tuple(words)
    )


def _script(job: Job, profile_source: str | None, problems: list[str], ask_slurm: bool) -> str | None:
    """Return the batch script and add to problems. With problems it is None, or a script that Slurm refuses."""
    from dsmim.cluster.profile import load_profile
    from dsmim.cluster.script import render
    from dsmim.cluster.slurm import limit_seconds
    from dsmim.cluster.submit import overridden, why_refused
    from dsmim.preflight import Findings

    found = Findings()
    profile = found.check(load_profile, profile_source)
    limit = found.check(limit_seconds, job.time)
    script = profile and found.check(render, job, profile)
    if profile and limit and limit <= profile.signal_seconds and job.template != "evaluate":
        found.problems.append(
            f"--time: the last {profile.signal_seconds} s are kept for saving (signal_seconds in the profile), and "
            f"{job.time} is only {limit} s; give more time"
        )
    if script:
        found.problems += overridden(script, os.environ)
    if script and not found.problems and ask_slurm:
        found.problems += filter(None, [found.check(why_refused, script)])
    problems += found.problems
    return script


def _write(run_dir: Path, name: str, text: str) -> Path:
    path = run_dir / "slurm" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
