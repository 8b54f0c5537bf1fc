"""The commands. Nothing heavy is imported until a command runs, so that `dsmim --help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dsmim import __version__
from dsmim.cli.shards import add_shards
from dsmim.cli.submit import add_submit
from dsmim.cli.words import command as _command
from dsmim.cli.words import count as _count
from dsmim.health import outcome
from dsmim.health.interrupt import Interrupt


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives the exit status. What a user can mend ends in one message and status 1."""
    options = _parse(arguments)
    for stream in (sys.stdout, sys.stderr):  # keys are whatever bytes file names were
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    if options.run not in (_train, _evaluate):
        return _run(options)
    try:
        status = _run(options)
    except Exception:  # the interpreter's own end would wait for data workers, which only end with this process
        traceback.print_exc()
        status = outcome.FAILED
    _leave(status)


def _run(options: argparse.Namespace) -> int:
    try:
        return options.run(options) or outcome.COMPLETE
    except BrokenPipeError:  # `dsmim samples … | head`
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return outcome.FAILED if options.run in (_train, _evaluate) else outcome.COMPLETE
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if _speaks(error):
            print(f"dsmim: error: {error}", file=sys.stderr, flush=True)
        return outcome.FAILED
    except outcome.LostPeer as error:
        print(f"dsmim: error: {error}", file=sys.stderr, flush=True)
        error.before_exit()
        os._exit(error.status)  # MPI's own end, too, would wait for the lost one


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes `key=value` words only directly behind the recipe; a user puts them behind options too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _speaks(error: Exception) -> bool:
    """Errors that every rank knows of are told by rank 0 alone."""
    from dsmim.cluster.placement import is_first
    from dsmim.recipe.errors import RecipeError

    shared = isinstance(error, (RecipeError, outcome.Stopped))
    return is_first(os.environ) or not shared


def _parser() -> argparse.ArgumentParser:
    about = "Train billion-parameter vision models on DeepSpeed, from WebDataset tars."
    parser = argparse.ArgumentParser("dsmim", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dsmim {__version__}")
    # The deepspeed launcher passes it; the rank comes from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_shards(commands)
    _add_samples(commands)
    _add_train(commands)
    _add_evaluate(commands)
    add_submit(commands)
    _add_export(commands)
    _add_recipes(commands)
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to change, such as batch.global_batch=64"
    )


def _add_samples(commands) -> None:
    samples = _command(commands, "samples", "Print the keys of the samples that steps see, one a line", _samples)
    samples.add_argument("recipe", help="a recipe's name or file")
    samples.add_argument("--steps", type=_steps, required=True, metavar="A:B", help="steps A … B-1, counted from 0")
    samples.add_argument("--world-size", type=_count, default=1)
    samples.add_argument("--rank", type=int, help="only this rank's share (default: the whole global batch)")
    samples.add_argument("--shards", action="store_true", help="print the shard too, after a tab")
    _add_overrides(samples)


def _add_train(commands) -> None:
    train = _command(commands, "train", "Train a recipe; an existing run directory is resumed", _train)
    train.add_argument("recipe", help="a recipe's name or file")
    train.add_argument("--run-dir", type=Path, help="where checkpoints and logs go (default: runs/RECIPE)")
    train.add_argument("--fork", action="store_true", help="go on although the recipe has changed")
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    _add_overrides(train)


def _add_evaluate(commands) -> None:
    evaluate = _command(commands, "evaluate", "Measure a checkpoint on data.val, exactly, at any world size", _evaluate)
    evaluate.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for its newest valid one")
    evaluate.add_argument(
        "--ema", action="store_true", help="the moving average of the weights, if optim.ema_decay kept one"
    )
    evaluate.add_argument("--json", type=Path, help="write the figures there too")
    evaluate.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    _add_overrides(evaluate)


def _add_export(commands) -> None:
    export = _command(commands, "export", "Write a checkpoint's weights for other tools", _export)
    export.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for its newest valid one")
    layouts = "timm (default), the network's authors', or ours with all that another run starts from"
    export.add_argument("--to", choices=["timm", "authors", "dsmim"], default="timm", help=f"whose names: {layouts}")
    export.add_argument(
        "--ema", action="store_true", help="the moving average of the weights, if optim.ema_decay kept one"
    )
    export.add_argument("out", type=Path, help="a .safetensors or .pth file")


def _add_recipes(commands) -> None:
    recipes = _command(commands, "recipes", "List the shipped recipes, or print one with every default", _recipes)
    recipes.add_argument("recipe", nargs="?", help="a recipe's name or file")
    _add_overrides(recipes)


def _samples(options) -> None:
    from dsmim.recipe.reading import load_recipe
    from dsmim.samples import sample_keys

    recipe = load_recipe(options.recipe, options.overrides)
    for key, shard in sample_keys(recipe, options.steps, options.world_size, options.rank):
        print(f"{key}\t{shard}" if options.shards else key)


def _train(options) -> int:
    interrupt = Interrupt()
    interrupt.listen()  # before the imports, which take seconds: a signal that nobody handles kills
    from dsmim.recipe.reading import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from dsmim.train import fit

    complete = fit(recipe, options.run_dir or Path("runs") / recipe.name, options.fork, interrupt)
    return outcome.COMPLETE if complete else outcome.STOPPED


def _evaluate(options) -> None:
    from dsmim.cluster.placement import is_first
    from dsmim.evaluate import evaluate

    figures = evaluate(options.checkpoint, options.overrides, "ema" if options.ema else "fp32")
    if is_first(os.environ):
        print(json.dumps(figures))
        if options.json:
            options.json.write_text(json.dumps(figures) + "\n")


def _leave(status: int) -> NoReturn:
    """End a rank here, its work done and its process group left, instead of in the interpreter's own shutdown: there a
    data worker in the middle of a download would be waited for, and torch aborts now and then (a thread that nobody
    joined), so that a finished job would count as failed."""
    if "mpi4py.MPI" in sys.modules and status != outcome.FAILED:
        sys.modules["mpi4py.MPI"].Finalize()  # mpirun takes a rank that skips it for a failed one, and ends the others
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _export(options) -> None:
    from dsmim.weights.export import export

    print(export(options.checkpoint, options.out, options.to, "ema" if options.ema else "fp32"))


def _recipes(options) -> None:
    from dsmim.recipe.reading import load_recipe, shipped_recipes

    if options.recipe:
        print(load_recipe(options.recipe, options.overrides).to_yaml(), end="")
        return
    for name, path in shipped_recipes().items():
        print(f"{name:32} {path.read_text().splitlines()[0].lstrip('# ')}")


def _steps(text: str) -> range:
    begin, colon, end = text.partition(":")
    if not (colon and begin.isdigit() and end.isdigit() and int(begin) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B with A < B")
    return range(int(begin), int(end))
