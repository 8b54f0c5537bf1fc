"""What timm, Hugging Face's Trainer and DeepSpeed call the keys of a recipe, so that their users are told its name."""

from __future__ import annotations

_EPOCHS, _STEPS = "{{epochs: {0}}}", "{{steps: {0}}}"

ALIASES = {
    # the network and its weights
    "model_name": "model.name",
    "arch": "model.name",
    "architecture": "model.name",
    "image_size": "model.img_size",
    "input_size": "model.img_size",
    "resolution": "model.img_size",
    "drop_path": "model.drop_path_rate",
    "gradient_checkpointing": "model.grad_checkpointing",
    "use_checkpoint": "model.grad_checkpointing",
    "torchcompile": "model.compile",
    "torch_compile": "model.compile",
    "pretrained": "model.weights",
    "finetune": "model.weights",
    "initial_checkpoint": "model.weights",
    "init_checkpoint": "model.weights",
    "checkpoint_path": "model.weights",
    "nb_classes": "task.num_classes",
    "num_labels": "task.num_classes",
    # batches
    "batch_size": "batch.global_batch (of all ranks) or batch.micro_batch (of one)",
    "train_batch_size": "batch.global_batch",
    "global_batch_size": "batch.global_batch",
    "per_device_train_batch_size": "batch.micro_batch",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "micro_batch_size": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.micro_batch (what it leaves of batch.global_batch is accumulated)",
    "grad_accum_steps": "batch.micro_batch (what it leaves of batch.global_batch is accumulated)",
    "accum_iter": "batch.micro_batch (what it leaves of batch.global_batch is accumulated)",
    "per_device_eval_batch_size": "batch.eval_batch",
    "validation_batch_size": "batch.eval_batch",
    # the optimizer and its schedule
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "blr": "optim.lr",
    "lr_base": "optim.lr",
    "lr_base_size": "optim.lr_base_batch",
    "wd": "optim.weight_decay",
    "opt": "optim.name",
    "opt_eps": "optim.eps",
    "opt_kwargs": "optim.options",
    "adam_epsilon": "optim.eps",
    "opt_betas": "optim.betas",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "max_grad_norm": "optim.clip_grad",
    "gradient_clipping": "optim.clip_grad",
    "model_ema": "optim.ema_decay",
    "model_ema_decay": "optim.ema_decay",
    "model_ema_warmup": "optim.ema_warmup",
    "sched": "schedule.name",
    "sched_on_updates": "schedule.update",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "epochs": f"schedule.duration={_EPOCHS}",
    "num_epochs": f"schedule.duration={_EPOCHS}",
    "max_epochs": f"schedule.duration={_EPOCHS}",
    "num_train_epochs": f"schedule.duration={_EPOCHS}",
    "steps": f"schedule.duration={_STEPS}",
    "max_steps": f"schedule.duration={_STEPS}",
    "warmup_epochs": f"schedule.warmup={_EPOCHS}",
    "warmup_steps": f"schedule.warmup={_STEPS}",
    "warmup_ratio": f"schedule.warmup={_EPOCHS}",
    "decay_milestones": "schedule.milestones",
    "decay_rate": "schedule.gamma",
    # augmentation
    "bce_loss": "task.loss=bce",
    "smoothing": "task.label_smoothing",
    "label_smoothing_factor": "task.label_smoothing",
    "mixup_switch_prob": "task.mix_switch",
    "mixup_mode": "task.mix_run",
    "mask_patch_size": "task.mask_patch",
    "aa": "data.augment.rand_augment",
    "auto_augment": "data.augment.rand_augment",
    "reprob": "data.augment.random_erasing",
    "threeaugment": "data.augment.three_augment",
    "src": "data.augment.crop=simple",
    "scale": "data.augment.crop_scale",
    "ratio": "data.augment.crop_ratio",
    "crop_pct": "data.augment.eval_crop_ratio",
    "train_interpolation": "data.augment.interpolation",
    "aug_repeats": "data.repeats",
    "repeated_aug": "data.repeats",
    # reading, logging, saving
    "num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "train_data": "data.train",
    "data_dir": "data.train",
    "data_path": "data.train",
    "val_data": "data.val",
    "eval_every": "validation.every",
    "eval_steps": f"validation.every={_STEPS}",
    "save_every": "checkpoint.every",
    "save_steps": f"checkpoint.every={_STEPS}",
    "save_total_limit": "checkpoint.keep",
    "checkpoint_hist": "checkpoint.keep",
    "log_interval": "log.every",
    "logging_steps": "log.every",
    # the rest
    "zero_stage": "engine.deepspeed=zero{0}",
    "amp": "engine.precision",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "run_dir": "the option --run-dir",
    "output": "the option --run-dir",
    "output_dir": "the option --run-dir",
    "resume": "the option --run-dir (a run that is there is resumed)",
}


def alias(word: str, given: object) -> str | None:
    """Return what `word` is called here, with the given value where a unit is added to it; None: it is not known."""
    found = ALIASES.get(word.lower().replace("-", "_"))
    return None if found is None else found.format(shown_number(given))


def shown_number(given: object) -> str:
    """Return a number as text, and N for anything else."""
    return str(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else "N"
