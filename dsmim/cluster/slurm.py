"""What Slurm knows of the job that this process belongs to."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime

TIMEOUT = 10
"""Seconds to wait for an answer of Slurm's controller; a busy one can take longer, and then nobody waits for it."""


def end_of_job(env: Mapping[str, str]) -> float | None:
    """When the job that `env` describes will be ended by Slurm, in seconds since the epoch.

    None outside a job, without a time limit, or when nobody can tell (no squeue in a container, no answer). Never
    raises. What SLURM_JOB_END_TIME says is taken as it is; slurm/supervise.sh sets it where Slurm (before 23.02) does
    not, so that ranks need not ask one by one.
    """
    told = env.get("SLURM_JOB_END_TIME", "")
    if re.fullmatch(r"\d{9,}", told):
        return float(told)
    job = env.get("SLURM_JOB_ID", "")
    return _ask(job, env) if re.fullmatch(r"\d+", job) else None


def _ask(job: str, env: Mapping[str, str]) -> float | None:
    # A user's own SQUEUE_… and SLURM_TIME_FORMAT would filter or reshape the answer.
    plain = {key: value for key, value in env.items() if not key.startswith("SQUEUE_") and key != "SLURM_TIME_FORMAT"}
    plain.setdefault("PATH", os.defpath)
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        done = subprocess.run(
            words, env=plain, capture_output=True, text=True, timeout=TIMEOUT, check=True, stdin=subprocess.DEVNULL
        )
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # "N/A" and "NONE" are no times
        return None
