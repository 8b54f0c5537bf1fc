"""Schedulers and launchers: this process's rank, Slurm scripts, cluster profiles, submission."""

TEMPLATES = ("pretrain", "finetune", "evaluate", "pretrain_deepspeed", "pretrain_mpirun")
"""The templates in slurm/ that `dsmim submit` fills in."""
