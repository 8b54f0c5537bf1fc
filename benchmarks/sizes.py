"""Print for every model of dsmim: parameters, multiplications, bytes of its states, and the ZeRO stage they need.

    python benchmarks/sizes.py [--quick] [--markdown] [--ranks 8]

The networks themselves are counted, on the meta device: no weights are created. --markdown prints the tables of
docs/models.md, --quick leaves out most resolutions. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json

from torch import nn

from dsmim.models import SimMIM, create_model, model_names
from dsmim.models.flops import forward_macs

CLASSES, PIXELS = 1000, 224  # of the classifier whose parameters are counted
# Pixels → window in tokens; SimMIM pre-trains at the first
SWIN = {192: 12, 224: 14, 384: 24}
DEIT = (128, 160, 192, 224, 384)
QUICK = {"swinv2": (192, 224), "deit3": (160, 224)}

# AdamW in fp32 under bf16 autocast: 4 bytes of weights, 4 of gradients, 8 of moments, 16 per parameter in all (as with
# 16-bit weights and fp32 masters, arXiv 1910.02054). For each stage: bytes per parameter that every rank holds, and
# bytes that are divided among the ranks. Stages 1 and 2 also divide a copy of the weights, the masters (DeepSpeed
# runtime/zero/stage_1_and_2.py); at stage 3 weights and masters are the same memory (share_masters in
# engine/zero_internals.py).
# At stage 1 gradients are whole until the backward pass ends.
WHOLE = 16
BYTES = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 16)}
CARDS = (40, 80, 141)  # 10⁹ bytes of memory: A100, A100 and H100, H200
SHARE = 0.6  # of a card, for states; the rest is for activations, gathered weights and buffers. Our rule

Table = tuple[list[str], list[list[str]]]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rank_bytes(parameters: int, stage: int, ranks: int) -> float:
    """Return the most bytes of weights, gradients and optimizer states on one rank, without DeepSpeed's buckets."""
    held, shared = BYTES[stage]
    return parameters * (held + shared / ranks)


def smallest_stage(parameters: int, card: int, ranks: int) -> int | None:
    """Return the first ZeRO stage at which states take at most SHARE of a card of `card` · 10⁹ bytes, or None."""
    fits = (stage for stage in BYTES if rank_bytes(parameters, stage, ranks) <= SHARE * card * 1e9)
    return next(fits, None)


def measure(name: str, quick: bool, ranks: int) -> dict:
    """Return the figures of one model. The model that trains is SimMIM with a Swin V2, or a DeiT III classifier."""
    family = name.split("_")[0]
    pixels = [side for side in (SWIN if family == "swinv2" else DEIT) if not quick or side in QUICK[family]]
    figures = {"parameters": size(build(name, PIXELS, CLASSES))}
    trained = figures["parameters"]
    if family == "swinv2":
        trained = figures["simmim_parameters"] = size(SimMIM(build(name, next(iter(SWIN)), 0)))
    figures["gmacs"] = {side: round(forward_macs(build(name, side, CLASSES), side) / 1e9, 2) for side in pixels}
    figures["state_gib"] = round(WHOLE * trained / 2**30, 2)
    figures["stage"] = {card: smallest_stage(trained, card, ranks) for card in CARDS}
    return figures


def build(name: str, img_size: int, num_classes: int) -> nn.Module:
    window = SWIN[img_size] if name.startswith("swinv2") else None
    return create_model(name, "meta", img_size=img_size, window_size=window, num_classes=num_classes)


def table(found: dict[str, dict], ranks: int) -> Table:
    """Return head and rows of one family's table."""
    first = next(iter(found.values()))
    swin = "simmim_parameters" in first
    sides = [f"{side}/w{SWIN[side]}" if swin else str(side) for side in first["gmacs"]]
    head = ["model", "parameters", *(["with SimMIM"] if swin else []), f"GMAC {sides[0]}", *sides[1:]]
    head += ["states, GiB", f"stage, {ranks} × {'/'.join(map(str, CARDS))} GB"]
    rows = []
    for name, one in found.items():
        counts = [one["parameters"], *([one["simmim_parameters"]] if swin else [])]
        stages = "/".join("none" if stage is None else str(stage) for stage in one["stage"].values())
        gmacs = [f"{value:.2f}" for value in one["gmacs"].values()]
        rows.append([name, *(f"{count:,}" for count in counts), *gmacs, f"{one['state_gib']:.2f}", stages])
    return head, rows


def show(head: list[str], rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        rows = [[f"`{name}`", *rest] for name, *rest in rows]
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n", end="\n\n")
        return
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for first, *rest in (head, *rows):
        print(first.ljust(widths[0]), *(word.rjust(width) for word, width in zip(rest, widths[1:], strict=True)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two resolutions per family: half a minute on one core")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/models.md")
    parser.add_argument("--ranks", type=int, default=8, help="number of ranks among which ZeRO divides the states")
    args = parser.parse_args()
    found = {name: measure(name, args.quick, args.ranks) for name in model_names()}
    for family in QUICK:
        show(*table({name: one for name, one in found.items() if name.startswith(family)}, args.ranks), args.markdown)
    print(json.dumps({"ranks": args.ranks, "share_of_card": SHARE, "models": found}))


if __name__ == "__main__":
    main()
