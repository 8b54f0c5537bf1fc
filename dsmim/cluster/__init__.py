"""What speaks to a scheduler. Imports nothing of dsmim but the words for errors."""

TEMPLATES = ("pretrain", "finetune", "evaluate", "pretrain_deepspeed", "pretrain_mpirun")
"""Those that `dsmim submit` fills in, in slurm/."""
