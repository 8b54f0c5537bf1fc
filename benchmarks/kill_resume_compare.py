"""Finds the differences of two runs of kill_resume.py, each as one line of text."""

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


def differences(undisturbed: Path, killed: Path, recipe: Path) -> Iterator[str]:
    """Yield every difference between two run directories, each with the ranks' notes beside it (NAME.notes)."""
    yield from _checkpoints(undisturbed, killed)
    yield from _metrics(undisturbed, killed)
    yield from _samples(undisturbed, killed, recipe)


def notes(run: Path) -> list[dict[str, Any]]:
    """Return the ranks' notes in the order of time, without lines that a kill cut short."""
    return list(_complete_lines(run.with_suffix(".notes").read_bytes()))


def last_step(run: Path) -> int:
    """Return the last step that was begun in any session so far; -1 before the first."""
    path = run.with_suffix(".notes")
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        return max((note["step"] for note in list(_complete_lines(file.read()))[-1:]), default=-1)


def _complete_lines(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def steps_redone(run: Path) -> int:
    """Return how many steps rank 0 computed again after a kill."""
    begun = [note["step"] for note in notes(run) if note["rank"] == 0]
    return len(begun) - len(set(begun))


def _checkpoints(one: Path, other: Path) -> Iterator[str]:
    last = [locate(run) for run in (one, other)]
    states = [read_state(path) for path in last]
    for key in ("step", "samples_consumed", "data_fingerprint", "watch", "interval", "validation"):
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
    """Return how many numbers of each kind the optimizer's shards hold. Without numbers a comparison proves nothing."""
    counts = {"exp_avg": 0, "exp_avg_sq": 0, "ema": 0}
    for path in locate(run).glob("*.pt"):
        for name, value in leaves(_load(path)):
            kind = name.rsplit("/", 1)[-1]
            if kind in counts and isinstance(value, torch.Tensor):
                counts[kind] += value.numel()
    return counts


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed's own classes; the file is our own


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and plain values of a nested structure, with their paths."""
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
    """Return the lines of metrics.jsonl without the figures that differ between any two runs."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def _samples(one: Path, other: Path, file: Path) -> Iterator[str]:
    """Check that every step of both runs, also a repeated one, had the samples that `dsmim samples` lists, and the same
    pixels."""
    wanted = {(note["step"], note["rank"]): note for note in notes(one)}
    recipe = load_recipe(str(file), [])
    steps = recipe.schedule.duration.steps
    ranks = {rank for _, rank in wanted}
    for step in range(steps):
        for rank in ranks:
            expected = [key for key, _ in sample_keys(recipe, range(step, step + 1), len(ranks), rank)]
            if (step, rank) not in wanted or wanted[step, rank]["keys"] != expected:
                yield f"step {step}, rank {rank}: not the samples that `dsmim samples` lists"
    seen = notes(other)
    for note in seen:
        if note != (first := wanted.get((note["step"], note["rank"]))):
            yield f"step {note['step']}: {note} instead of {first}"
    missed = wanted.keys() - {(note["step"], note["rank"]) for note in seen}
    yield from (f"step {step}, rank {rank}: never trained" for step, rank in sorted(missed))
