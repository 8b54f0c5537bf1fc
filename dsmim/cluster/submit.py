"""Ask Slurm whether it accepts a batch script, and submit it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

TIMEOUT = 120
"""Seconds to wait for Slurm's controller."""
# Variables that sbatch uses instead of the options in the script (sbatch(1), INPUT ENVIRONMENT VARIABLES).
_OVERRIDES = {
    "SBATCH_ACCOUNT": "account", "SBATCH_CONSTRAINT": "constraint", "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_MEM_PER_NODE": "mem", "SBATCH_OPEN_MODE": "open-mode", "SBATCH_OUTPUT": "output",
    "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos", "SBATCH_RESERVATION": "reservation",
    "SBATCH_SIGNAL": "signal", "SBATCH_TIMELIMIT": "time",
}  # fmt: skip


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
    """Return one line for each option of the script that an environment variable would replace."""
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line[:8] == "#SBATCH "
    )
    return [
        f"{name}={env[name]} in the environment would replace --{option}={options[option]}; unset it"
        for name, option in _OVERRIDES.items()
        if name in env and option in options and env[name] != options[option]
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
