"""Schedulers and launchers: this process's rank, Slurm scripts, cluster profiles, submission."""

TEMPLATES = ("pretrain", "finetune", "evaluate", "pretrain_deepspeed", "pretrain_mpirun")
"""Those that `dsmim submit` fills in, in slurm/."""
