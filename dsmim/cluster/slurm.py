"""What Slurm knows of the job that this process belongs to."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

TIMEOUT = 10
"""Seconds to wait for an answer of Slurm's controller; a busy one can take longer, and then nobody waits for it."""


def end_of_job(env: Mapping[str, str]) -> float | None:
    """When the job that `env` describes will be ended by Slurm, in seconds since the epoch.

    None outside a job, without a time limit, or when nobody can tell (no squeue in a container, no answer). Never
    raises. What SLURM_JOB_END_TIME says is taken as it is; slurm/supervise.sh sets it where Slurm (22.05) does not, so
    that ranks need not ask one by one.
    """
    told = _seconds(env.get("SLURM_JOB_END_TIME", ""))
    job = job_of(env)
    return told if told is not None or job is None else _ask(job, env)


def job_of(env: Mapping[str, str]) -> str | None:
    """The job's name for Slurm's commands. In a job array ARRAY_TASK, because one of the tasks bears the number of the
    whole array, and a command would reach all of them."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_TASK_ID" in env else ("SLURM_JOB_ID",)
    numbers = [env.get(name, "") for name in names]
    return "_".join(numbers) if all(re.fullmatch(r"[0-9]+", number) for number in numbers) else None


def _ask(job: str, env: Mapping[str, str]) -> float | None:
    # SQUEUE_… of the user would filter or reshape the answer; %s is seconds since the epoch in any time zone.
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
    """None of what is no time, such as NONE for a job without a limit."""
    return float(text) if re.fullmatch(r"[0-9]{9,12}", text) else None


def limit_seconds(text: str) -> int | None:
    """Seconds of a time limit as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; None of
    UNLIMITED. Raises ValueError for anything else, and for no time at all."""
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
        raise ValueError(f"--time: {text!r} is no time at all")
    return seconds
