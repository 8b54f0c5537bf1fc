"""Make the batch script of one job from a template: fill in its #SBATCH options, its site block and its arguments."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dsmim.cluster.profile import Profile

_OPTION = re.compile(r"#SBATCH --([\w-]+)(?:=(.*))?")
_SITE, _SITE_ENDS = "# ---- site", "# ---- end of site"
_RULE = 120


@dataclass(frozen=True)
class Job:
    """One job, as the user of `dsmim submit` describes it."""

    template: str
    nodes: int
    gpus_per_node: int
    time: str
    name: str
    output: str
    """Slurm's pattern, such as runs/base/slurm/%x-%j.out."""
    folder: Path
    """The working folder of the job: relative paths of the recipe start there."""
    words: tuple[str, ...]
    """The arguments of the template."""


def template_folder() -> Path:
    """Return the folder of the templates and supervise.sh."""
    return Path(str(resources.files("dsmim"))) / "slurm"


def render(job: Job, profile: Profile) -> str:
    """Return the batch script. Raises ValueError when the template cannot do what the profile asks for."""
    lines = (template_folder() / f"{job.template}.sbatch").read_text(encoding="utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(_SITE))
    end = next(n for n, line in enumerate(lines) if line.startswith(_SITE_ENDS))
    header = [match for line in lines[:begin] if (match := _OPTION.fullmatch(line))]
    slots = [line.split("=")[0] for line in lines[begin:end]]
    script = [
        lines[0],
        f"# Made by `dsmim submit` from its template {job.template}. To resume the run, `sbatch` this file again.",
        *_header(header, job, profile),
        "",
        f"{_SITE}, from the profile ".ljust(_RULE, "-"),
        *(_option(name, value) for name, value in _site_options(profile).items()),
        *(f"#SBATCH {option}" for option in profile.sbatch),
        *_site_lines(profile, slots, job.template),
        f"DSMIM_SLURM={shlex.quote(str(template_folder().resolve()))}",
        f"set -- {shlex.join(job.words)}",
        *lines[end:],
    ]
    return "\n".join(script) + "\n"


def _header(template: list[re.Match], job: Job, profile: Profile) -> list[str]:
    """Return the template's #SBATCH lines with the values of the job; other options stay as they are."""
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    own = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.gpus_per_node),
        "gpus-per-node": f"{kind}{job.gpus_per_node}",
        "time": job.time,
        "signal": f"B:USR1@{profile.signal_seconds}",
        "output": job.output,
    }
    if profile.cpus_per_task:
        own["cpus-per-task"] = str(profile.cpus_per_task)
    lines = [_option(match[1], own.get(match[1], match[2])) for match in template]
    return [*lines, _option("chdir", str(job.folder))]


def _site_options(profile: Profile) -> dict[str, str]:
    values = {
        name: getattr(profile, name) for name in ("account", "partition", "qos", "constraint", "reservation", "mem")
    }
    return {name: value for name, value in values.items() if value is not None}


def _site_lines(profile: Profile, slots: list[str], template: str) -> list[str]:
    """Return the profile's lines for the site block. slots: what the template lets a profile set, such as container."""
    if profile.container and "container" not in slots:
        raise ValueError(
            f"container: {template} starts its launcher in the batch shell, outside any container. Use the template "
            "pretrain (srun), or remove the container and activate an environment in `setup`"
        )
    lines = [f"module load {' '.join(profile.modules)}"] if profile.modules else []
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.env.items()]
    lines += [f"export DSMIM_RESTARTS={profile.restarts}"] if profile.restarts is not None else []
    lines += [f"container=({profile.container or ''})"] if "container" in slots else []
    lines += [f"srun_options=({shlex.join(profile.srun)})"] if "srun_options" in slots else []
    return lines


def _option(name: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    plain = re.fullmatch(r"[\w@%+=:,./\[\]-]+", value)
    return f"#SBATCH --{name}=" + (value if plain else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"')
