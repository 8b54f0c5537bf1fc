"""Which optimizers of timm are the same under ZeRO as without it? Each takes a few steps on two ranks at every stage,
and its weights are compared with those of a plain loop on the whole batch.

    python benchmarks/optimizers.py                     all that timm builds here (minutes)
    python benchmarks/optimizers.py --names lion,nadam  these
    python benchmarks/optimizers.py --quick             four of them, stages 0 and 3

It prints lines as in dsmim/recipe/optimizers.py, the table of the figures that dsmim goes by, and at the end JSON.
--docs writes that table into docs/optimizers.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from benchmarks.exactness import DECAY, Build, Weights, deepspeed_run, launch, plain_run, preload, relative_error
from dsmim.engine.runtime import Runtime
from dsmim.recipe.optimizers import BEGIN, END, EXACT, TIMM, Measured, markdown

STEPS, RATE, STAGES = 6, 1e-3, (0, 1, 2, 3)
QUICK = ("adamw", "lion", "lamb", "adagrad")
DOCS = Path(__file__).parents[1] / "docs/optimizers.md"


def rate(step: int) -> float:
    """Return the learning rate of a step."""
    return RATE * (1 - step / STEPS / 2)


def builder(name: str) -> Build:
    """Return what makes a timm optimizer of groups, with timm's own arguments."""
    return lambda groups: create_optimizer_v2(groups, opt=name, lr=RATE, weight_decay=DECAY)


def own_arguments(name: str) -> tuple[tuple[float, ...] | None, float | None]:
    """Return timm's betas and eps of an optimizer; None: it takes none, or none of the usual kind."""
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        return None, None
    found = inspect.signature(info.opt_class.__init__).parameters
    values = {key: (info.defaults or {}).get(key, found[key].default) for key in ("betas", "eps") if key in found}
    betas, eps = values.get("betas"), values.get("eps")
    usual = isinstance(betas, tuple) and all(isinstance(beta, float) for beta in betas)
    return betas if usual and info.has_betas else None, eps if isinstance(eps, float) and info.has_eps else None


def measure(names: list[str], stages: tuple[int, ...], out: Path, runtime: Runtime) -> None:
    """Write the figure, or the error, of every name and stage to `out`. Collective."""
    torch._dynamo.config.disable = True  # Kron and Muon compile, and a compiler hangs in a fork
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = _of_one(name, stages, runtime)
        if runtime.is_rank_zero:
            print(_line(name, found[name]), flush=True)
    if runtime.is_rank_zero:
        out.write_text(json.dumps(found))


def _of_one(name: str, stages: tuple[int, ...], runtime: Runtime) -> dict[str, Any]:
    try:
        wanted = plain_run(builder(name), STEPS, 0.0, rate)
    except Exception as error:
        return {str(stage): _message(error) for stage in stages}
    return {str(stage): _measured(name, stage, wanted, runtime) for stage in stages}


def _measured(name: str, stage: int, wanted: Weights, runtime: Runtime) -> float | str:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 20} if stage == 3 else {})
    torch.manual_seed(0)
    try:
        return relative_error(deepspeed_run(builder(name), STEPS, 0.0, rate, zero, runtime), wanted)
    except Exception as error:  # the same on all ranks
        return _message(error)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _line(name: str, found: dict[str, Any]) -> str:
    betas, eps = own_arguments(name.rsplit("_", 1)[-1])
    messages = [value for value in found.values() if isinstance(value, str)]
    errors = tuple(None if isinstance(value, str) else float(f"{value:.1e}") for value in found.values())
    failure = f", {messages[0]!r}" if messages else ""
    return f'    "{name}": Measured({betas}, {eps}, {errors}{failure}),'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", help="optimizers of timm, separated by commas; default: all that timm builds here")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, at stages 0 and 3")
    parser.add_argument(
        "--docs", action="store_true", help="measure nothing; write dsmim's table into docs/optimizers.md"
    )
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return
    built = [name for name in list_optimizers() if not isinstance(get_optimizer_info(name).opt_class, str)]
    names = options.names.split(",") if options.names else list(QUICK) if options.quick else built
    stages = (0, 3) if options.quick else STAGES
    os.environ["DS_ACCELERATOR"] = "cpu"
    preload()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launch(2, lambda runtime: measure(names, stages, out, runtime))
        found = json.loads(out.read_text())
    import deepspeed

    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "timm": timm.__version__}
    different = [name for name in names if name in TIMM and _differs(TIMM[name], found[name])]
    print(json.dumps({"versions": versions, "errors": found, "differs_from_table": different}))


def _differs(known: Measured, found: dict[str, Any]) -> bool:
    """Return whether an optimizer is exact, not exact or failing at another stage than dsmim goes by."""
    before = {str(stage): _kind(error, known.failure) for stage, error in enumerate(known.errors)}
    return any(before[stage] not in ("", _kind(value, "fails")) for stage, value in found.items())


def _kind(error: float | str | None, failure: str) -> str:
    """Return "fails", "exact" or "not exact"; "": not measured."""
    if not isinstance(error, float):
        return "fails" if failure else ""
    return "exact" if error <= EXACT else "not exact"


def write_docs() -> None:
    """Replace the table in docs/optimizers.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{markdown()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
