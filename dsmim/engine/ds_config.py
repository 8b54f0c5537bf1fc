"""Reads the DeepSpeed JSON, checks it against the recipe and completes it.

Each setting has one owner. The recipe owns what is learned: batch, clipping, precision, optimizer, schedule. The JSON
owns how memory and communication are used. A key that the recipe owns may be "auto" or absent in the JSON, as in
Hugging Face's integration. A value that contradicts the recipe is an error that names both.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from dsmim.recipe import Recipe

# DeepSpeed 0.19 silently ignores unknown top-level keys. It reads these (runtime/config.py).
_KNOWN = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
gradient_clipping gradient_predivide_factor gradient_allreduce_op prescale_gradients optimizer scheduler bf16 fp16
torch_autocast data_types communication_data_type zero_optimization zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer activation_checkpointing aio checkpoint comms_logger flops_profiler wall_clock_breakdown
memory_breakdown steps_per_print dump_state disable_allgather disable_python_gc log_level compile timers
seq_parallel_communication_data_type dataloader_drop_last tensor_parallel
"""
KNOWN = _KNOWN.split()
REFUSED = {
    "optimizer": "the recipe's optim section builds the optimizer",
    "scheduler": "the recipe's schedule section sets the learning rate",
    "bf16": "the recipe sets the precision (engine.precision), through torch_autocast: DeepSpeed's bf16 mode casts "
    "buffers that Swin V2 needs in fp32",
    "fp16": "the recipe sets the precision (engine.precision); fp16 is not supported",
    "managed_gradient_accumulation": "dsmim needs DeepSpeed's own accumulation of gradients",
    "data_types": "the recipe sets the precision (engine.precision)",
}


def shipped_configs() -> dict[str, Path]:
    """Return name → file of every DeepSpeed JSON that comes with dsmim."""
    folder = Path(str(resources.files("dsmim"))) / "ds_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_ds_config(source: str, owned: dict[str, Any]) -> dict[str, Any]:
    """Return the complete configuration: the keys of the file and `owned`, the recipe's values for its own keys.

    source: a shipped name or a path. Raises ValueError that lists every unknown key and every contradiction.
    """
    path = shipped_configs().get(source, Path(source))
    if not path.is_file():
        raise ValueError(f"engine.deepspeed: no file {source!r}; dsmim comes with {', '.join(shipped_configs())}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    problems = [_unknown(key) for key in config if key not in KNOWN]
    problems += [f"{key}: {why}; remove it" for key, why in REFUSED.items() if config.get(key, "auto") != "auto"]
    problems += [
        f'{key}: the file says {config[key]!r}, the recipe {value!r}; write "auto" or remove it'
        for key, value in owned.items()
        if config.get(key, "auto") not in ("auto", value)
    ]
    if problems:
        raise ValueError("".join([f"{path}:", *(f"\n  {problem}" for problem in problems)]))
    kept = {key: value for key, value in config.items() if value != "auto"}
    return kept | owned | {"steps_per_print": kept.get("steps_per_print", 10**9)}  # dsmim prints its own line


def owned_keys(recipe: Recipe, world_size: int, accumulation: int | None) -> dict[str, Any]:
    """Return the recipe's values for its own keys of batch, clipping and optimizer.

    accumulation: micro batches per rank and step; None: not known.
    """
    size = recipe.batch.global_batch
    # gradient_clipping is always written: DeepSpeed's default is 1.0.
    owned: dict[str, Any] = {"train_batch_size": size, "gradient_clipping": recipe.optim.clip_grad or 0.0}
    if recipe.optim.name != "adamw":
        owned["zero_allow_untested_optimizer"] = True  # engine/optim.py allows those that were measured to be exact
    if accumulation is None:
        return owned
    micro = size // (world_size * accumulation)
    return owned | {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a complete configuration; DeepSpeed's default is 0."""
    return config.get("zero_optimization", {}).get("stage", 0)


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, KNOWN, n=1)
    return f"{key}: DeepSpeed reads no such key" + (f"; did you mean {close[0]}?" if close else "; remove it")
