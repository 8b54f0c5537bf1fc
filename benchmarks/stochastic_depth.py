"""Compare stochastic depth that computes only what it keeps with timm's, which computes every branch and multiplies.

    python benchmarks/stochastic_depth.py [--quick]

Forward and backward of the same network with the same weights and images, in both forms, in turn; a figure is the
median over all rounds of the ratio within one round. Times on a CPU are this process's CPU time, which other processes
disturb less. speedup_06, speedup_045: DeiT III of ViT-S width at rates 0.6 and 0.45 in every block. swin_01, swin_02:
Swin V2-S at rates growing to 0.1 and 0.2. The bound is 1 / (1 - mean rate). memory_06: bytes that the forward pass
keeps for the backward pass at rate 0.6, one form / the other (counted by torch.autograd.graph.saved_tensors_hooks,
without weights); peak_06: the same of the memory that a step adds, allocated on a GPU or resident in a process of its
own. max_diff: largest difference of logits and gradients between both forms on the same draws, relative to the largest
entry of each tensor, for ViT, parallel ViT and Swin V2, with and without recomputation. draw_ms: host time to draw 104
branches for 128 samples. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from memory import PeakMemory
from timm.layers import drop_path
from torch import nn

from dsmim import strict_json
from dsmim.models import PositionDraws, Recompute, create_model, set_recompute, swin_v2, vit
from dsmim.models.stochastic_depth import DropPath

FORMS = ("kept", "multiplied")
KEY = 2026
Residual = Callable[..., torch.Tensor]


def as_timm(x: torch.Tensor, *branches) -> torch.Tensor:
    """Return x plus every branch, computed for all samples and multiplied as in timm's blocks."""
    for module, branch in branches:
        x = x + drop_path(branch(x), module.drop_prob, module.training)
    return x


def on_the_same_draws(x: torch.Tensor, *branches) -> torch.Tensor:
    """Return the same for the samples that the other form keeps."""
    out = x
    for module, branch in branches:
        kept, factors = module.kept(x), torch.ones(len(x))
        if kept is not None:
            factors *= 0
            factors[slice(None) if kept.rows is None else kept.rows] = kept.scale
        out = out + branch(x) * factors.view(-1, *[1] * (x.ndim - 1))
    return out


@contextmanager
def replaced(residual: Residual) -> Iterator[None]:
    """Let the blocks of dsmim add their branches by another function."""
    own = vit.residual, swin_v2.residual
    vit.residual = swin_v2.residual = residual
    try:
        yield
    finally:
        vit.residual, swin_v2.residual = own


def network(name: str, side: int, rate: float, device: torch.device, **options) -> nn.Module:
    """Return a network in training mode in which no branch is zero."""
    torch.manual_seed(0)
    model = create_model(name, img_size=side, num_classes=10, drop_path_rate=rate, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.to(device).train()


class Steps:
    """Forward and backward passes of one network in both forms, on micro batches at successive positions."""

    def __init__(self, model: nn.Module, side: int, batch: int, device: torch.device):
        self.model, self.batch, self.device = model, batch, device
        self.images = torch.randn(batch, 3, side, side, device=device)
        self.draws = PositionDraws(model, KEY, batch, device)
        self.number = 0

    def forward(self, form: str) -> torch.Tensor:
        """Return the loss."""
        precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with precision, replaced(as_timm) if form == "multiplied" else nullcontext():
            return self.model(self.images).float().square().mean()

    def __call__(self, form: str) -> None:
        """Take one step."""
        first = self.number * self.batch
        with self.draws.at(range(first, first + self.batch)):
            self.forward(form).backward()
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def speedup(steps: Steps, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the median ratio of the times of both forms, and the median seconds of each."""
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    clock = time.process_time if steps.device.type == "cpu" else time.perf_counter
    for number in range(rounds + 1):
        steps.number = number
        for form in FORMS[:: 1 if number % 2 else -1]:
            begin = clock()
            steps(form)
            seconds[form] += [clock() - begin] if number else []
    ratios = [b / a for a, b in zip(*(seconds[form] for form in FORMS), strict=True)]
    return statistics.median(ratios), {form: statistics.median(values) for form, values in seconds.items()}


def saved_bytes(steps: Steps, form: str) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the network's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*steps.model.parameters(), *steps.model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with steps.draws.at(range(steps.batch)), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        steps.forward(form)
    return sum(storage.nbytes() for storage in found.values())


def peak(arguments: argparse.Namespace, form: str) -> int:
    """Return the bytes that a step adds, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", form, *(["--quick"] if arguments.quick else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_here(steps: Steps, form: str) -> int:
    """Return the bytes that the largest of three steps adds in this process."""
    memory = PeakMemory(steps.device)
    before = memory.read()
    for steps.number in range(3):
        steps(form)
    return memory.read() - before


def difference() -> float:
    """Return the largest relative difference between both forms on the same draws, in fp32 on the CPU."""
    largest, images = 0.0, torch.randn(6, 3, 64, 64)
    networks = {"deit3_nano_patch16": {}, "deit3_small_patch16_18x2": {}, "swinv2_nano": {"window_size": 4}}
    for name, options in networks.items():
        model = network(name, 64, 0.6, torch.device("cpu"), drop_path_rates="uniform", **options)
        draws, wanted = PositionDraws(model, KEY, 6), None
        for residual, recompute in ((on_the_same_draws, 0), (None, 0), (None, 1)):
            set_recompute(model, Recompute(recompute))
            with draws.at(range(6)), replaced(residual) if residual else nullcontext():
                logits = model(images)
                found = [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]
            wanted = wanted or found
            pairs = zip(found, wanted, strict=True)
            largest = max([largest, *(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)])
    return largest


def draw_milliseconds() -> float:
    """Return the host time for one micro batch: 52 blocks of two branches, 128 samples."""
    draws, seconds = PositionDraws(nn.ModuleList(DropPath(0.5) for _ in range(104)), KEY, 2048), []
    for first in range(0, 128 * 50, 128):
        begin = time.perf_counter()
        with draws.at(range(first, first + 128)):
            seconds.append(time.perf_counter() - begin)
    return 1000 * statistics.median(seconds)


class Sizes:
    """The networks that are timed. quick: smaller images, and fewer rounds."""

    def __init__(self, quick: bool, device: torch.device):
        large, self.device = device.type == "cuda", device
        self.rounds, self.deit_side, self.swin_side = (3, 128, 96) if quick else (9, 224, 192)
        self.deit_batch, self.swin_batch = (128, 64) if large else (16, 8)

    def deit(self, rate: float) -> Steps:
        """Return the steps of DeiT III."""
        model = network("deit3_small_patch16", self.deit_side, rate, self.device)
        return Steps(model, self.deit_side, self.deit_batch, self.device)

    def swin(self, rate: float) -> Steps:
        """Return the steps of Swin V2."""
        model = network("swinv2_small", self.swin_side, rate, self.device, window_size=self.swin_side // 16)
        return Steps(model, self.swin_side, self.swin_batch, self.device)

    def speedups(self) -> dict[str, float]:
        """Return the speed-up of every network."""
        cases = {
            "speedup_06": (self.deit, 0.6, 0.6), "speedup_045": (self.deit, 0.45, 0.45),
            "swin_01": (self.swin, 0.1, 0.05), "swin_02": (self.swin, 0.2, 0.1),
        }  # fmt: skip
        found = {}
        for name, (build, rate, mean) in cases.items():
            rounds = self.rounds * (1 if build == self.deit else 2)  # a gain of a few per cent needs more
            found[name], seconds = speedup(build(rate), rounds)
            shown = ", ".join(f"{form} {value:.3f} s" for form, value in seconds.items())
            print(f"{name}: {found[name]:.3f} of {1 / (1 - mean):.3f} ({shown})", file=sys.stderr, flush=True)
        return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller images, fewer rounds: a minute on two cores")
    parser.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = Sizes(args.quick, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.peak_of:
        print(peak_here(sizes.deit(0.6), args.peak_of))
        return
    figures: dict[str, object] = sizes.speedups()
    steps = sizes.deit(0.6)
    figures["memory_06"] = round(saved_bytes(steps, "kept") / saved_bytes(steps, "multiplied"), 3)
    if not args.quick:
        figures["peak_06"] = round(peak(args, "kept") / peak(args, "multiplied"), 3)
    figures |= {"max_diff": difference(), "draw_ms": round(draw_milliseconds(), 3), "device": sizes.device.type}
    print(strict_json.dumps(figures | {"torch": torch.__version__, "quick": args.quick}))


if __name__ == "__main__":
    main()
