"""How dsmim resumes and how fast it reads, against other readers of the same tars.

    pip install -e '.[peers]'
    python benchmarks/readers.py [--quick] [--cache DIR]

Every reader works in its own process, with the same JPEG decoder, random resized crop and flip, and is used as its own
documentation says for exact resume (readers_*.py cite it). A run is interrupted, then continued from the saved state in
the same layout (ranks × workers) and in others, and its global batches are compared with those of the run that went on:
"bytes" where keys and pixels are equal, "keys" where only the keys are. Rates are medians over rounds in which all
readers take turns. Progress goes to standard error, the last line of standard output is one JSON object. A reader that
is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

# Slow imports are inside the functions, because every spawned process, Grain's workers too, runs the top of this file.
MEASURED_WITH = ("torch", "torchvision", "torchdata")


def all_readers() -> dict:
    """Return every reader by name."""
    from readers_energon import Energon
    from readers_random_access import Dsmim, Grain
    from readers_torchdata import BUFFER, Datasets, Webdataset

    return {
        "dsmim": Dsmim(),
        "grain": Grain(),
        "megatron-energon": Energon(),
        "webdataset": Webdataset(),
        "datasets": Datasets(BUFFER),
        "datasets, shards shuffled only": Datasets(1, 1),
    }


def installed_readers() -> dict:
    """Return the readers whose packages are here; name the others on standard error."""
    from readers_common import missing

    found = {}
    for name, reader in all_readers().items():
        if absent := missing(reader.packages):
            print(f"{name}: left out, not installed: {', '.join(absent)}", file=sys.stderr)
        else:
            found[name] = reader
    return found


def plan_of(quick: bool):
    """Return the layouts and steps; the first other layout keeps ranks × workers. Fewer processes when quick."""
    from readers_common import GLOBAL_BATCH, Layout
    from readers_measure import Plan

    ranks, workers, others, before, after = (2, 1, [(1, 2)], 2, 2) if quick else (2, 2, [(4, 1), (1, 1)], 5, 10)
    micro = GLOBAL_BATCH // (ranks * workers)
    return Plan(Layout(ranks, workers, micro), [Layout(*other, micro) for other in others], before, after)


def measure_resumes(pools: dict, readers: dict, tars, plan) -> dict:
    """Return every reader's Resume; the readers work side by side, as nothing is timed."""
    from readers_measure import resume

    waiting = {name: pools[name].submit(resume, reader, tars, plan) for name, reader in readers.items()}
    outcomes = {}
    for name, future in waiting.items():
        outcomes[name] = future.result()
        print(f"{name}: resumed", file=sys.stderr, flush=True)
    return outcomes


def measure_rates(pools: dict, readers: dict, tars, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return images per second and core in every round, after one that is not counted."""
    from readers_measure import rate

    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, reader in readers.items():
            value = pools[name].submit(rate, reader, tars, steps).result()
            rates[name] += [value] if number else []
        shown = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items() if values)
        print(f"round {number} of {rounds}: {shown or 'warm-up'}", file=sys.stderr, flush=True)
    return rates


def print_table(resumes: dict, rates: dict[str, list[float]], base: str) -> None:
    """Print the outcome for people, with the ratios within a round and the reasons for what is false."""
    print(f"{'reader':32}{'img/s/core':>11}{'of dsmim':>9}{'state':>9}  {base} again; others")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["dsmim"], strict=True))
        kept = f"{resumes[name].same}; {resumes[name].others}"
        print(f"{name:32}{statistics.median(values):11.0f}{ratio:9.2f}{resumes[name].state_bytes:9}  {kept}")
    for name, outcome in resumes.items():
        for note in outcome.notes:
            print(f"{name}: {note}")


def report(resumes: dict, rates: dict[str, list[float]]) -> dict:
    """Return the JSON object of the last line."""
    return {
        name: {
            "images_per_second": round(statistics.median(values), 1),
            "state_bytes": resumes[name].state_bytes,
            "same_layout": resumes[name].same,
            "other_layout": resumes[name].others,
        }
        for name, values in rates.items()
    }


def run(cache: Path, quick: bool) -> None:
    """Measure and print everything."""
    from readers_common import make_tars

    samples, rounds, steps = (64, 3, 2) if quick else (384, 9, 10)
    readers, plan = installed_readers(), plan_of(quick)
    tars = make_tars(cache, samples)
    context = multiprocessing.get_context("spawn")  # a fresh process each: no library's threads or hooks meet another's
    processes = {type(reader): ProcessPoolExecutor(1, context) for reader in readers.values()}
    pools = {name: processes[type(reader)] for name, reader in readers.items()}
    resumes = measure_resumes(pools, readers, tars, plan)
    rates = measure_rates(pools, readers, tars, rounds, steps)
    for pool in processes.values():
        pool.shutdown()
    packages = sorted({package for reader in readers.values() for package in reader.packages} | set(MEASURED_WITH))
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))
    print_table(resumes, rates, str(plan.base))
    print(json.dumps(report(resumes, rates)))


def main() -> None:
    from photos import CACHE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, rounds and workers: about three minutes")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where photographs and tars are kept")
    args = parser.parse_args()
    begin, load = time.perf_counter(), os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not idle (load {load:.1f}); trust the ratios more than the rates", file=sys.stderr)
    try:
        run(args.cache, args.quick)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{time.perf_counter() - begin:.0f} seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
