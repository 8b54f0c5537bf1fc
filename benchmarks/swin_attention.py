"""Compare Swin V2 with timm's: speed of forward and backward, peak memory, difference of the outputs.

    python benchmarks/swin_attention.py [--quick] [--model swinv2_small] [--batch 1]

`speedup` is measured for forward and backward at 192 pixels, window 12, with --batch images (default: 1 on a CPU, the
micro batch with which a CPU trains large models; 64 on a GPU). `speedups` has other batches and sizes, and inference.
Both networks have the same weights and images, and their steps alternate. A figure is the median over all rounds of the
ratio within one round. On a GPU the steps run under bf16 autocast, against timm eager and timm compiled. On a CPU they
run in fp32; memory is there the growth of the resident set in a separate process. The last line of standard output is
one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from memory import PeakMemory
from torch import nn

from dsmim import strict_json
from dsmim.models import compile_blocks, create_model, fix_position_bias, timm_arguments

Step = Callable[[], None]


class Case(NamedTuple):
    """What is timed: pixels, window in tokens, images, with or without backward pass."""

    img_size: int
    window: int
    batch: int
    training: bool = True

    def __str__(self) -> str:
        return f"{'train' if self.training else 'infer'}_{self.img_size}_w{self.window}_b{self.batch}"


def cases(batch: int, quick: bool) -> list[Case]:
    """Return the cases; the first is the one of `speedup` and the other figures without a case name."""
    some = [Case(192, 12, batch), Case(192, 12, 4 * batch), Case(224, 14, batch), Case(192, 12, batch, training=False)]
    more = [Case(192, 12, 8 * batch), Case(224, 7, batch), Case(256, 8, batch), Case(224, 14, batch, training=False)]
    return some if quick else [*some, *more]


def pair(name: str, case: Case, device: torch.device) -> dict[str, nn.Module]:
    """Return dsmim's and timm's network with the same weights, none of which is zero."""
    options = {"img_size": case.img_size, "window_size": case.window, "num_classes": 0}
    torch.manual_seed(0)
    ours = create_model(name, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    entry, arguments = timm_arguments(name, drop_path_rate=0.0, **options)
    theirs = timm.create_model(entry, **arguments)
    theirs.load_state_dict(ours.state_dict())
    return {key: model.to(device).train(case.training) for key, model in (("dsmim", ours), ("timm", theirs))}


def step_of(model: nn.Module, images: torch.Tensor, training: bool) -> Step:
    """Return a function that runs one forward pass, and in training one backward pass."""
    device = images.device.type

    def step() -> None:
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = model(images)
        if training:
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def steps_of(name: str, case: Case, device: torch.device) -> dict[str, Step]:
    """Return all steps that alternate, by name."""
    images = torch.randn(case.batch, 3, case.img_size, case.img_size, device=device)
    models = pair(name, case, device)
    if not case.training:
        fix_position_bias(models["dsmim"])
    if device.type == "cuda":
        compiled = pair(name, case, device)
        for key, model in compiled.items():
            compile_blocks(model)
            models[f"{key}_compiled"] = model
    return {key: step_of(model, images, case.training) for key, model in models.items()}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[key] += [time.perf_counter() - begin] if number else []
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str = "dsmim") -> float:
    """Return the median over the rounds of one step's time divided by another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def peak_memory(name: str, case: Case, batch: int, which: str, device: torch.device) -> int:
    """Return the bytes that two training steps add: allocated on the GPU, or resident in a new process."""
    if device.type == "cuda":
        return _grown(name, case, which, device)
    command = [sys.executable, __file__, "--model", name, "--batch", str(batch), "--memory-of", which]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _grown(name: str, case: Case, which: str, device: torch.device) -> int:
    images = torch.randn(case.batch, 3, case.img_size, case.img_size, device=device)
    step = step_of(pair(name, case, device)[which], images, training=True)
    memory = PeakMemory(device)
    before = memory.read()  # directly after the reset, the peak is the current memory
    step()
    step()
    return memory.read() - before


@torch.no_grad()
def output_difference(name: str, case: Case) -> float:
    """Return the largest difference of the features in fp32 on the CPU, relative to the largest feature."""
    models = pair(name, case, torch.device("cpu"))
    images = torch.randn(1, 3, case.img_size, case.img_size)
    ours, theirs = (models[key].eval()(images) for key in ("dsmim", "timm"))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a minute on two cores")
    parser.add_argument("--model", default="swinv2_small")
    parser.add_argument("--batch", type=int, help="images (default: 1 on a CPU, 64 on a GPU)")
    parser.add_argument("--memory-of", choices=["dsmim", "timm"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.batch = args.batch or (64 if device.type == "cuda" else 1)
    listed, rounds = cases(args.batch, args.quick), 5 if args.quick else 15
    if args.memory_of:
        print(_grown(args.model, listed[1], args.memory_of, device))
        return
    speedups, seconds = {}, {}
    for case in listed:
        seconds[str(case)] = measure(steps_of(args.model, case, device), rounds)
        speedups[str(case)] = {key: ratio(seconds[str(case)], key) for key in seconds[str(case)] if key != "dsmim"}
        print(f"{case}: {speedups[str(case)]}", file=sys.stderr, flush=True)
    memory = {which: peak_memory(args.model, listed[1], args.batch, which, device) for which in ("dsmim", "timm")}
    first = str(listed[0])
    figures = {
        "speedup": speedups[first]["timm"],
        "memory_ratio": round(memory["dsmim"] / memory["timm"], 3),
        "max_output_diff": output_difference(args.model, listed[0]),
        "speedups": {case: values["timm"] for case, values in speedups.items()},
        "seconds_per_step": {key: round(statistics.median(values), 4) for key, values in seconds[first].items()},
        "memory_bytes": memory,
        "memory_case": str(listed[1]),
        "model": args.model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if device.type == "cuda":
        figures["speedup_vs_compiled"] = ratio(seconds[first], "timm_compiled", "dsmim_compiled")
        figures["best_speedup_vs_compiled"] = max(
            ratio(seconds[first], "timm_compiled", own) for own in ("dsmim", "dsmim_compiled")
        )
    print(strict_json.dumps(figures))


if __name__ == "__main__":
    main()
