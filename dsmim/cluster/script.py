"""A shipped template becomes the batch script of one job: the same text with its options, its site block and its
arguments filled in."""

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
    """What `dsmim submit` is told about one job."""

    template: str
    nodes: int
    gpus_per_node: int
    time: str
    name: str
    output: str
    """Slurm's pattern, such as runs/base/slurm/%x-%j.out."""
    folder: Path
    """Where it runs: relative paths of the recipe begin there."""
    words: tuple[str, ...]
    """The arguments of the template."""


def template_folder() -> Path:
    """Where the shipped templates and supervise.sh lie."""
    return Path(str(resources.files("dsmim"))) / "slurm"


def render(job: Job, profile: Profile) -> str:
    """The batch script. Raises ValueError where the template cannot do what the profile asks for."""
    lines = (template_folder() / f"{job.template}.sbatch").read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(_SITE))
    end = next(n for n, line in enumerate(lines) if line.startswith(_SITE_ENDS))
    header = [match for line in lines[:begin] if (match := _OPTION.fullmatch(line))]
    slots = [line.split("=")[0] for line in lines[begin:end]]
    script = [
        lines[0],
        f"# Made by `dsmim submit` from its template {job.template}; `sbatch` with this file goes on.",
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
    """The template's own options with the job's values; what the job does not say stays."""
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
    """slots: what the template's own site block can be told, such as container."""
    if profile.container and "container" not in slots:
        raise ValueError(
            f"container: {template} starts its launcher in the batch shell, outside of a container; use the template "
            "pretrain (srun), or leave the container out and set the environment up"
        )
    lines = [f"module load {' '.join(profile.modules)}"] if profile.modules else []
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.env.items()]
    lines += [f"container=({profile.container or ''})"] if "container" in slots else []
    lines += [f"srun_options=({shlex.join(profile.srun)})"] if "srun_options" in slots else []
    return lines


def _option(name: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    plain = re.fullmatch(r"[\w@%+=:,./\[\]-]+", value)
    return f"#SBATCH --{name}=" + (value if plain else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"')
