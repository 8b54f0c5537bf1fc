"""Runs `dsmim …` and notes from which samples the loss of every micro batch is computed. kill_resume.py starts it.

The file $KILL_RESUME_NOTES gets a line per micro batch: step, rank, sample keys, and a digest of the input tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable

import torch

NOTES = "KILL_RESUME_NOTES"


def noting(training_loss: Callable, file: int) -> Callable:
    """Return the task's training_loss so that it writes a note before it computes."""
    rank = int(os.environ["RANK"])

    def noted(task, forward, batch):
        digest = hashlib.sha256()
        for name in sorted(batch):
            if isinstance(batch[name], torch.Tensor):
                digest.update(batch[name].contiguous().numpy().tobytes())
        note = {"step": batch["step"], "rank": rank, "keys": batch["key"], "digest": digest.hexdigest()}
        os.write(file, f"\n{json.dumps(note)}\n".encode())  # starts a new line even after one that a kill cut short
        return training_loss(task, forward, batch)

    return noted


def main() -> int:
    from dsmim.cli.main import main as dsmim
    from dsmim.tasks.simmim import MaskedImageModelling

    file = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    MaskedImageModelling.training_loss = noting(MaskedImageModelling.training_loss, file)
    return dsmim(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
