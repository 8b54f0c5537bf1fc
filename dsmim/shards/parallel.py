"""The same work on many shards, in processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm


def parallel(work: Callable, items: Iterable, workers: int, verb: str) -> list:
    """`work` on every item, results in order. Every item is tried; then one ValueError lists what failed."""
    items = list(items)
    results, problems = [], []
    with _calls(work, items, min(workers, len(items))) as calls:
        for call in tqdm(calls, desc=verb, unit="shard", total=len(items), disable=None):
            try:
                results.append(call())
            except (ValueError, OSError) as error:
                problems.append(str(error))
            except BrokenProcessPool:
                raise ValueError(f"{verb}: a worker process was killed (by a lack of memory?); run it again") from None
    if problems:
        raise ValueError("\n".join(problems))
    return results


@contextmanager
def _calls(work: Callable, items: list, workers: int) -> Iterator[Iterable[Callable[[], Any]]]:
    """One call per item that gives its result: here for a single worker, else in a pool."""
    if workers <= 1:
        yield [lambda item=item: work(item) for item in items]
        return
    # spawn: threads that the parent may run do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield [future.result for future in [pool.submit(work, item) for item in items]]
        except BaseException:  # Ctrl-C: what has not begun need not
            pool.shutdown(wait=False, cancel_futures=True)
            raise
