"""Ask Slurm about the job that this process belongs to, and read Slurm's time limits."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

TIMEOUT = 10
"""Seconds to wait for Slurm's controller. A busy one may take longer; then the run continues without an answer."""


def end_of_job(env: Mapping[str, str]) -> float | None:
    """Return when Slurm will end the job that `env` describes, in seconds since 1970.

    None outside a job, without a time limit, or when Slurm cannot be asked (no squeue in a container, no answer). Never
    raises. SLURM_JOB_END_TIME is used if it is set. slurm/supervise.sh sets it where Slurm (22.05) does not, so that
    ranks need not ask one by one.
    """
    end = _seconds(env.get("SLURM_JOB_END_TIME", ""))
    job = job_of(env)
    return end if end is not None or job is None else _ask_end(job, env)


def job_of(env: Mapping[str, str]) -> str | None:
    """Return the job's number for Slurm's commands; None outside a job.

    In a job array it is ARRAY_TASK. One task of an array has the number of the whole array, so a command with that
    number would reach all tasks.
    """
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_TASK_ID" in env else ("SLURM_JOB_ID",)
    numbers = [env.get(name, "") for name in names]
    return "_".join(numbers) if all(re.fullmatch(r"[0-9]+", number) for number in numbers) else None


def _ask_end(job: str, env: Mapping[str, str]) -> float | None:
    # The user's SQUEUE_… variables would filter or reformat the answer. %s: seconds since 1970, in any time zone.
    plain = {key: value for key, value in env.items() if not key.startswith("SQUEUE_")} | {"SLURM_TIME_FORMAT": "%s"}
    plain.setdefault("PATH", os.defpath)
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        done = subprocess.run(
            words, env=plain, capture_output=True, text=True, timeout=TIMEOUT, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return _seconds(done.stdout.strip())


def _seconds(text: str) -> float | None:
    """Return the time as a number; None for other text, such as NONE for a job without a limit."""
    return float(text) if re.fullmatch(r"[0-9]{9,12}", text) else None


def limit_seconds(text: str) -> int | None:
    """Return the seconds of a time limit; None for UNLIMITED.

    Slurm writes one as minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS (sbatch(1), --time). Raises ValueError for
    anything else, and for zero.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text)
    if not match:
        raise ValueError(f"--time: {text!r} is none of MINUTES, HH:MM:SS, DAYS-HH, DAYS-HH:MM:SS, UNLIMITED")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        seconds = ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    if not seconds:
        raise ValueError(f"--time: {text!r} is zero")
    return seconds
