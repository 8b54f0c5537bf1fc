"""Where two runs of kill_resume.py differ, in words, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint.reading import locate, read_state
from dsmim.checkpoint.zero_shards import read_weights
from dsmim.recipe.reading import load_recipe
from dsmim.samples import sample_keys

TIMED = ("images_per_second", "data_wait")


def differences(peace: Path, killed: Path, recipe: Path) -> Iterator[str]:
    """Everything that is not the same in two run directories, each with the ranks' notes beside it (NAME.notes)."""
    yield from _checkpoints(peace, killed)
    yield from _metrics(peace, killed)
    yield from _samples(peace, killed, recipe)


def notes(run: Path) -> list[dict[str, Any]]:
    """What the ranks noted, in the order in which it happened. A line that a kill cut short counts for none."""
    return list(_whole(run.with_suffix(".notes").read_bytes()))


def last_step(run: Path) -> int:
    """The step that was begun last, in any session so far; -1 before the first."""
    path = run.with_suffix(".notes")
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        return max((note["step"] for note in list(_whole(file.read()))[-1:]), default=-1)


def _whole(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def steps_redone(run: Path) -> int:
    """Steps that rank 0 began more than once, each as often as that."""
    begun = [note["step"] for note in notes(run) if note["rank"] == 0]
    return len(begun) - len(set(begun))


def _checkpoints(one: Path, other: Path) -> Iterator[str]:
    last = [locate(run) for run in (one, other)]
    states = [read_state(path) for path in last]
    for key in ("step", "samples_consumed", "data_fingerprint", "watch", "validation"):
        if states[0].get(key) != states[1].get(key):
            yield f"state.json: {key} {states[1].get(key)} instead of {states[0].get(key)}"
    for which in ("fp32", "ema"):
        yield from _tensors(f"weight ({which})", *(read_weights(path, which) for path in last))
    names = [sorted(path.name for path in checkpoint.glob("*.pt")) for checkpoint in last]
    if names[0] != names[1]:
        yield f"files {names[1]} instead of {names[0]}"
    for name in names[0]:
        yield from _tensors(name, *(dict(leaves(_load(checkpoint / name))) for checkpoint in last))


def moments(run: Path) -> dict[str, int]:
    """How many numbers of each kind the optimizer's shards hold: a comparison of nothing proves nothing."""
    counts = {"exp_avg": 0, "exp_avg_sq": 0, "ema": 0}
    for path in locate(run).glob("*.pt"):
        for name, value in leaves(_load(path)):
            kind = name.rsplit("/", 1)[-1]
            if kind in counts and isinstance(value, torch.Tensor):
                counts[kind] += value.numel()
    return counts


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed's own classes; we wrote it ourselves


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of a nested structure, with their paths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{number}")
    elif isinstance(value, (torch.Tensor, int, float, str, bool, type(None))):
        yield path, value


def _tensors(where: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    for name in left.keys() | right.keys():
        if name not in left or name not in right or not _same(left[name], right[name]):
            yield f"{where}: {name}"


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, torch.Tensor):
        return left == right
    return isinstance(right, torch.Tensor) and _bytes(left) == _bytes(right)


def _bytes(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _metrics(one: Path, other: Path) -> Iterator[str]:
    left, right = (stream(run / "metrics.jsonl") for run in (one, other))
    if len(left) != len(right):
        yield f"metrics.jsonl: {len(right)} lines instead of {len(left)}"
    yield from (f"metrics.jsonl: {b} instead of {a}" for a, b in zip(left, right, strict=False) if a != b)


def stream(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def _samples(one: Path, other: Path, file: Path) -> Iterator[str]:
    """Every step of either run, redone ones too, saw the samples that `dsmim samples` tells, and the same pixels."""
    wanted = {(note["step"], note["rank"]): note for note in notes(one)}
    recipe = load_recipe(str(file), [])
    steps = recipe.schedule.duration.steps
    ranks = {rank for _, rank in wanted}
    for step in range(steps):
        for rank in ranks:
            told = [key for key, _ in sample_keys(recipe, range(step, step + 1), len(ranks), rank)]
            if (step, rank) not in wanted or wanted[step, rank]["keys"] != told:
                yield f"step {step}, rank {rank}: not the samples that `dsmim samples` tells"
    seen = notes(other)
    for note in seen:
        if note != (first := wanted.get((note["step"], note["rank"]))):
            yield f"step {note['step']}: {note} instead of {first}"
    missed = wanted.keys() - {(note["step"], note["rank"]) for note in seen}
    yield from (f"step {step}, rank {rank}: never trained" for step, rank in sorted(missed))
