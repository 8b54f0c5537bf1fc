"""Run optimizer steps of a billion parameters on a repeated batch: does it fit, how fast is it, does the loss fall?

    python benchmarks/billion.py --model swinv2_giant            # SimMIM at 192 pixels, window 12
    python benchmarks/billion.py --model deit3_huge_patch14_52   # classification at 160 pixels

The script starts one rank per GPU, or two ranks on a machine without GPUs (12 GiB each for a billion parameters). The
model is created, sharded and trained by the same engine as in any run. It prints one line per step. The last line of
standard output is one JSON object: params, losses, seconds_per_step, peak_gib_per_rank, state_gib_per_rank next to the
bound of 16 bytes × parameters / ranks, and on GPUs images_per_second and mfu. --quick uses the family's base model.
--build-only only creates the model and cuts it into ZeRO-3's shards, to measure the memory of this, also for
swinv2_giant3b.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch
from memory import PeakMemory

from dsmim import strict_json
from dsmim.cluster.placement import free_port
from dsmim.engine.construct import construct
from dsmim.engine.runtime import Runtime, start, stop
from dsmim.engine.schedule import resolve_schedule
from dsmim.engine.zero import Engine
from dsmim.evaluate import to_device
from dsmim.models import create_model
from dsmim.models.flops import forward_macs
from dsmim.recipe import Recipe
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import Task, build_task

GIB = 2**30
STATE_BYTES = 16  # AdamW in mixed precision: weights, master weights, gradients and two moments (arXiv 1910.02054)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the data sheets
QUICK = {"swinv2": "swinv2_base", "deit3": "deit3_base_patch16"}
RATE = {"swinv2": 1e-4, "deit3": 2e-5}  # small enough to learn a batch of two without a jump of the loss

# glibc keeps freed blocks of up to 32 MB for later use, which costs a rank of a billion parameters more than 1 GB. The
# first setting stops this; large pages make it cheap to do so.
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "THP_MEM_ALLOC_ENABLE": "1"}


def recipe_for(args: argparse.Namespace, world_size: int) -> Recipe:
    """Return a recipe as a user would write it: the task of the model's family, every block recomputed."""
    swin = args.model.startswith("swinv2")
    model = {"name": args.model, "img_size": args.img_size or (192 if swin else 160)}
    model |= {"window_size": 12} if swin else {}
    model |= {"grad_checkpointing": 0 if args.no_checkpointing else 1, "compile": args.compile}
    tree = {
        "name": "billion",
        "task": {"name": "simmim"} if swin else {"name": "classify", "num_classes": 1000},
        "model": model,
        "batch": {"global_batch": args.micro_batch * world_size},
        "optim": {"lr": args.lr},
        "schedule": {"duration": {"steps": args.steps + 1}, "min_lr": args.lr},
        "engine": {"deepspeed": args.deepspeed, "precision": args.precision},
    }
    return parse_recipe(tree, "benchmarks/billion.py")


def batch_for(recipe: Recipe, task: Task, runtime: Runtime, size: int) -> dict:
    """Return one rank's images (soft coloured blobs) with masks and labels; the same at every step."""
    generator = torch.Generator().manual_seed(runtime.rank)
    side = recipe.model.img_size
    coarse = torch.rand(size, 3, 12, 12, generator=generator)
    images = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1).mul(255).byte()
    batch = {"image": images, "label": torch.randint(1000, (size,), generator=generator), "step": 0}
    if recipe.task.name == "simmim":
        tokens = side // task.model.patch
        cells = torch.rand(size, tokens // 8, tokens // 8, generator=generator) < recipe.task.mask_ratio
        batch["mask"] = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return to_device(batch, runtime.device)


def state_bytes(engine: Engine) -> int:
    """Return the bytes of weights, gradients and optimizer state that this rank holds, each storage counted once."""
    optimizer = engine.deepspeed.optimizer
    held = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    held += [p.grad for p in engine.module.parameters() if p.grad is not None]
    held += _tensors([getattr(optimizer, name, None) for name in _BUFFERS])
    held += _tensors(list(getattr(optimizer, "optimizer", optimizer).state.values()))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


# Attributes in which DeepSpeed keeps flat shards and gradients (runtime/zero/stage3.py, stage_1_and_2.py)
_BUFFERS = (
    "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat", "grad_partitions_flat_buffer", "bit16_groups_flat",
    "single_partition_of_fp32_groups", "averaged_gradients",
)  # fmt: skip


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def train(args: argparse.Namespace, runtime: Runtime) -> dict:
    recipe = recipe_for(args, runtime.world_size)
    memory, begin = PeakMemory(runtime.device), time.perf_counter()
    torch.manual_seed(0)
    task = build_task(recipe)
    params = sum(p.numel() for p in task.model.parameters())
    rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, 1)
    engine = Engine(task.model, task.layers, recipe, runtime, 1, rate, task.fill())
    built, build_seconds = memory.read(), time.perf_counter() - begin
    memory.reset()
    batch = batch_for(recipe, task, runtime, args.micro_batch)
    losses, seconds, held = [], [], 0
    for step in range(args.steps + 1):  # the last loss shows the effect of the last step
        begin = time.perf_counter()
        loss = task.training_loss(engine, batch)
        losses.append(runtime.sum(loss.detach().double() / runtime.world_size).item())
        if step < args.steps:
            engine.backward(loss)
            held = max(held, state_bytes(engine))
            result = engine.step(step)
            assert result.applied, "the step was skipped: the gradient is not finite"
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        if runtime.is_rank_zero:
            took = f", {seconds[-1]:.2f} s" if step < args.steps else ""
            print(f"step {step}: loss {losses[-1]:.5f}{took}", flush=True)
    own = torch.tensor([built, memory.read(), held], dtype=torch.float64)
    peaks = torch.tensor(runtime.gather(own.tolist())).amax(0) / GIB
    counted = seconds[1:] or seconds  # the first step allocates memory
    figures = {
        "model": args.model,
        "task": recipe.task.name,
        "params": params,
        "losses": [round(loss, 5) for loss in losses],
        "seconds_per_step": round(sum(counted) / len(counted), 3),
        "peak_gib_per_rank": round(peaks[1].item(), 2),
        "build_peak_gib_per_rank": round(peaks[0].item(), 2),
        "build_seconds": round(build_seconds, 1),
        "state_gib_per_rank": round(peaks[2].item(), 2),
        "bound_gib_per_rank": round(STATE_BYTES * params / runtime.world_size / GIB, 2),
        "img_size": recipe.model.img_size,
        "global_batch": recipe.batch.global_batch,
        "ranks": runtime.world_size,
        "zero_stage": engine.stage,
        "checkpointing": not args.no_checkpointing,
        "compile": args.compile,
        "precision": engine.precision,
        "torch": torch.__version__,
    }
    engine.close()
    return figures | (speed(args, recipe, figures) if runtime.device.type == "cuda" else {})


def build(args: argparse.Namespace, runtime: Runtime) -> dict:
    """Create a model as the engine does, at ZeRO stage 3, and return the memory that this needs."""
    recipe, memory, begin = recipe_for(args, runtime.world_size), PeakMemory(torch.device("cpu")), time.perf_counter()
    base = memory.read()
    torch.manual_seed(0)
    task = build_task(recipe)
    params = sum(p.numel() for p in task.model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in task.model.modules())
    config = {"train_batch_size": runtime.world_size, "zero_optimization": {"stage": 3}}
    construct(task.model, task.fill(), config, 3, runtime)
    peak = max(runtime.gather(memory.read() - base))
    return {
        "model": args.model,
        "params": params,
        "build_peak_gib_per_rank": round(peak / GIB, 2),
        "shard_gib_per_rank": round(4 * params / runtime.world_size / GIB, 2),
        "largest_module_gib": round(4 * largest / GIB, 2),
        "whole_model_gib": round(4 * params / GIB, 2),
        "build_seconds": round(time.perf_counter() - begin, 1),
        "ranks": runtime.world_size,
    }


def speed(args: argparse.Namespace, recipe: Recipe, figures: dict) -> dict:
    """Return images per second and the share of the GPUs' peak, without the multiplications of recomputed blocks."""
    name = torch.cuda.get_device_name()
    images = recipe.batch.global_batch / figures["seconds_per_step"]
    model = create_model(args.model, "meta", img_size=recipe.model.img_size, window_size=recipe.model.window_size)
    flops = 6 * forward_macs(model, recipe.model.img_size) * images / figures["ranks"]
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    mfu = round(flops / peak, 3) if peak else None
    return {"gpu": name, "images_per_second": round(images, 1), "tflops_per_gpu": round(flops / 1e12, 1), "mfu": mfu}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_giant", help="a model of dsmim")
    parser.add_argument("--quick", action="store_true", help="use the family's base model: under a minute on two cores")
    parser.add_argument("--build-only", action="store_true", help="only create and shard the model, and measure this")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, at least two")
    parser.add_argument("--micro-batch", type=int, default=1, help="images per rank")
    parser.add_argument("--img-size", type=int, help="pixels (default: 192 for Swin V2, 160 for DeiT III)")
    parser.add_argument("--deepspeed", default="zero3_low_memory", help="a DeepSpeed JSON in dsmim, or a path")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--lr", type=float, help="learning rate (default: 1e-4 for Swin V2, 2e-5 for DeiT III)")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(
            "--steps: at least 2; AdamW's moments are allocated by the first step, which shows neither memory nor time"
        )
    family = args.model.split("_")[0]
    if args.quick:
        args.model = QUICK[family]
    args.lr = args.lr or RATE[family]
    return args


def main() -> None:
    args = parse()
    if "WORLD_SIZE" not in os.environ:
        threads = str(max(1, len(os.sched_getaffinity(0)) // args.ranks))
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"]
        launch += [f"--master-port={free_port()}", *sys.argv]
        sys.exit(subprocess.run(launch, env={"OMP_NUM_THREADS": threads} | LEAN | os.environ).returncode)
    runtime = start(timeout_minutes=30)
    figures = build(args, runtime) if args.build_only else train(args, runtime)
    if runtime.is_rank_zero:
        print(strict_json.dumps(figures))
    stop()


if __name__ == "__main__":
    main()
