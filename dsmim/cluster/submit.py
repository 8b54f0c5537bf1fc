"""Ask Slurm whether it accepts a batch script, and submit it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

TIMEOUT = 120
"""Seconds to wait for Slurm's controller."""
# Variables that sbatch uses instead of the options in the script (sbatch(1), INPUT ENVIRONMENT VARIABLES; read in
# 22.05 and 26.11).
_OVERRIDES = {
    "SBATCH_ACCOUNT": "account", "SBATCH_CONSTRAINT": "constraint", "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_JOB_NAME": "job-name", "SBATCH_MEM_PER_NODE": "mem", "SBATCH_OPEN_MODE": "open-mode",
    "SBATCH_OUTPUT": "output", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation", "SBATCH_SIGNAL": "signal", "SBATCH_TIMELIMIT": "time",
}  # fmt: skip
_CONTRADICTIONS = {
    "SBATCH_ARRAY_INX": "make an array of the job, and all its tasks would use one run directory",
    "SBATCH_NO_REQUEUE": "forbid the requeue after a stop on request",
    "SBATCH_NO_KILL": "keep the job when a node fails, and no rank would be started in its place",
    "SBATCH_WAIT": "keep the submission waiting until the job has ended",
    "SBATCH_ERROR": "send the messages to another file than the output",
    "SBATCH_GPUS": "contradict --gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "contradict --gpus-per-node",
    "SBATCH_GRES": "ask for GPUs, or other resources, a second time",
    "SBATCH_CPUS_PER_GPU": "contradict --cpus-per-task",
    "SBATCH_OVERCOMMIT": "let all ranks share cores",
    "SBATCH_THREAD_SPEC": "take cores from the ranks",
    "SBATCH_CORE_SPEC": "take cores from the ranks",
}
"""What variables without a counterpart in the script would do."""
_OTHER_MEMORY = ("SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU")
"""Of these and --mem, Slurm accepts one."""


def why_unavailable() -> str | None:
    """Return why no job can be submitted from this machine; None when Slurm answers."""
    if not shutil.which("sbatch"):
        return "no sbatch on this machine"
    try:
        done = _run(["scontrol", "ping"])
    except ValueError as error:
        return str(error)
    return (done.stderr.strip() or done.stdout.strip() or "scontrol ping failed") if done.returncode else None


def why_refused(script: str) -> str | None:
    """Return why Slurm would refuse the script, in its own words; None when it would accept it."""
    done = _run(["sbatch", "--test-only"], script)
    if not done.returncode:
        return None
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
    return f"sbatch --test-only: {'; '.join(line for line in lines if line) or f'exit code {done.returncode}'}"


def submit(file: Path) -> str:
    """Submit the script; return the number of the new job. Raises ValueError with Slurm's own words."""
    done = _run(["sbatch", "--parsable", str(file)])
    if done.returncode:
        raise ValueError(f"{file}: not submitted: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER in a federation


def overridden(script: str, env: Mapping[str, str]) -> list[str]:
    """Return one line for each environment variable that would replace or contradict an option of the script."""
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line[:8] == "#SBATCH "
    )
    effects = {
        name: f"replace --{option}={options[option]}"
        for name, option in _OVERRIDES.items()
        if option in options and env.get(name) != options[option]
    }
    memory = {name: f"contradict --mem={options['mem']}" for name in _OTHER_MEMORY if "mem" in options}
    return [
        f"{name}={env[name]} in the environment would {effect}; unset it"
        for name, effect in (_CONTRADICTIONS | memory | effects).items()
        if name in env
    ]


def _run(words: list[str], script: str | None = None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            words,
            input=script or "",
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]}: no answer from Slurm's controller within {TIMEOUT} s; try again later") from None
