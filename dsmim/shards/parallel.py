"""The same work on many shards, in worker processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from dsmim.shards.forking import end_with_parent


def parallel(work: Callable, items: Iterable, workers: int, verb: str) -> list:
    """Return the results of `work` on every item, in the order of the items. `verb` labels the progress bar.

    Every item is tried. Raises one ValueError that lists what failed, or says that a worker was killed.
    """
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
    """Yield one call per item that returns its result: computed here for a single worker, else in a pool."""
    if workers <= 1:
        yield [lambda item=item: work(item) for item in items]
        return
    # spawn: a fork would copy locks that other threads of this process may hold
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield [future.result for future in [pool.submit(work, item) for item in items]]
        except BaseException:  # on Ctrl-C, drop the items that have not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
