"""A profile: what is particular to one cluster (account, partition, modules, …), in a YAML file of the user."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dsmim.recipe.errors import explain


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("must be one line")
    return text


def _shell_words(text: str) -> str:
    try:
        shlex.split(_one_line(text))
    except ValueError as error:
        raise ValueError(f"is not a shell command ({error})") from None
    return text


Word = Annotated[str, Field(pattern=r"^[^\s'\"#\\]+$")]
Line = Annotated[str, AfterValidator(_one_line)]
Option = Annotated[str, Field(pattern=r"^--?[A-Za-z][^\n]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Profile(BaseModel):
    """The keys of a profile. All are optional; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gpu_type: Word | None = None
    """As in --gpus-per-node=TYPE:4; null: any."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """Cores of a rank and its data workers; null: as the template says."""
    mem: Word | None = None
    """Memory per node, as in --mem=480G; null: the cluster's default."""
    modules: list[Word] = []
    """Loaded in the batch shell, in this order."""
    setup: list[Line] = []
    """More lines for the batch shell, such as one that activates an environment."""
    container: Annotated[str, AfterValidator(_shell_words)] | None = None
    """Put before the command, such as `apptainer exec --nv image.sif`."""
    env: dict[Variable, Line] = {}
    """Variables to export. Values are literal; use setup lines for computed ones."""
    sbatch: list[Option] = []
    """More options for sbatch."""
    srun: list[Option] = []
    """More options for srun."""
    signal_seconds: Annotated[int, Field(ge=60, le=65535)] = 300
    """How long before the time limit Slurm asks the run to save and stop. Slurm may be up to a minute early."""
    restarts: Annotated[int, Field(ge=0)] | None = None
    """How many restarts in a row may pass without a new checkpoint; null: DSMIM_RESTARTS, or 3 if it is not set."""


def profile_folder() -> Path:
    """Return the folder in which profiles are looked up by name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dsmim"


def load_profile(source: str | None) -> Profile:
    """Read a profile by its path, or by the name of a file in profile_folder(); None gives the empty profile.

    Raises ValueError, which lists every problem.
    """
    if source is None:
        return Profile()
    path = _locate(source)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"profile {path}: the file must hold a mapping of keys to values")
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        listed = "; ".join(explain(error, Profile))
        raise ValueError(f"profile {path}: {listed}") from None


def _locate(source: str) -> Path:
    named = profile_folder() / f"{source}.yaml"
    for path in (Path(source), named):
        if path.is_file():
            return path
    known = sorted(path.stem for path in profile_folder().glob("*.yaml"))
    there = f" (there: {', '.join(known)})" if known else ""
    raise ValueError(f"profile {source!r}: no such file, and no {named}{there}")
