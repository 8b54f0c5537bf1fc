"""The process group, this process's device, and what ranks exchange outside of the model."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import nn

from dsmim.cluster.placement import TORCH_VARIABLES, Placement, detect
from dsmim.health.collectives import is_lost_peer, own_fault, set_timeout, without_stack
from dsmim.health.host import HostMonitor
from dsmim.health.monitor import RankMonitor
from dsmim.health.outcome import FAILED, LOST, LostPeer, Stopped
from dsmim.shards.cores import cores

_RENDEZVOUS = "dsmim"
_sessions = itertools.count()
_CHANGED = (*TORCH_VARIABLES, "DS_ACCELERATOR", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Environment variables that `start` sets or removes."""


@dataclass(frozen=True)
class _Failure:
    """What a rank sends in place of a value when it has failed."""

    text: str


@dataclass(frozen=True)
class Runtime:
    """One rank of a started process group. `monitor` and `host` are set within `joined`."""

    place: Placement
    device: torch.device
    timeout_minutes: float = 10
    """How long ranks wait for one another outside of training steps."""
    monitor: RankMonitor | None = None
    host: HostMonitor | None = None

    @property
    def rank(self) -> int:
        """This process's number among all ranks, from 0."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.place.world_size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def phase(self, name: str, step: int | None = None) -> None:
        """Record what this rank begins, so that the others can tell why it does not answer.

        Every rank must call it equally often, and must begin its next phase before it waits in a collective for the
        slowest rank of the last one.
        """
        if self.monitor is not None:
            self.monitor.phase(name, step)

    def set_timeout(self, minutes: float) -> None:
        """Set how long ranks wait for one another from now on."""
        set_timeout(60 * minutes)
        if self.monitor is not None:
            self.monitor.limit = 60 * minutes

    @contextmanager
    def long_timeout(self) -> Iterator[None]:
        """Let ranks wait for one another as long as at the start, for what takes longer than a step."""
        assert self.monitor is not None
        before = self.monitor.limit / 60
        self.set_timeout(max(before, self.timeout_minutes))
        try:
            yield
        finally:
            self.set_timeout(before)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Make one stage of several steps succeed on every rank or fail on every rank.

        If a rank raises ValueError or OSError inside the block, every rank leaves the block with Stopped, which holds
        the messages of all ranks that failed, each text once. Within the block ranks may exchange values by `gather`,
        `on_rank_zero` and blocks of this kind: these three first exchange whether a rank has failed, so that no rank
        waits for one that has left the block. Other collectives (DeepSpeed makes some when an engine is built or
        loaded) do not: an error of one rank alone in the middle of these ends the run as a lost rank does.
        """
        try:
            yield
        except Stopped:
            raise  # every rank knows of it already
        except (ValueError, OSError) as error:
            self.gather(_Failure(str(error) or repr(error)))
            raise AssertionError("unreachable: gather raises when a rank has failed") from error
        self.gather(None)

    def on_rank_zero(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and give its (picklable) result to every rank. Raises Stopped on all if it fails."""
        result = None
        with self.all_or_none():
            if self.is_rank_zero:
                result = action()
        box = [result]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every rank's picklable value, in the order of ranks, on all ranks.

        Raises Stopped when a rank has failed in a block of `all_or_none`.
        """
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        if any(isinstance(value, _Failure) for value in values):
            raise Stopped(_merge([value.text if isinstance(value, _Failure) else None for value in values]))
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensor over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        return [count > 0 for count in self.sum(torch.tensor(flags, dtype=torch.int32, device=self.device)).tolist()]

    def broadcast(self, module: nn.Module) -> None:
        """Give every rank the parameters and saved buffers of rank 0, in place."""
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def start(timeout_minutes: float = 10) -> Runtime:
    """Join the process group that the launcher set up, through DeepSpeed.

    Raises ValueError when the environment contradicts itself, a rank has no device of its own or cannot use the
    network, or this process is in a process group already; LostPeer when not all ranks come.
    """
    if dist.is_initialized():
        raise ValueError(
            "this process is in a torch.distributed process group already, and dsmim joins its own: leave it first, by "
            "torch.distributed.destroy_process_group()"
        )
    place = replace(detect(os.environ), session=next(_sessions))
    accelerated = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    os.environ["DS_ACCELERATOR"] = "cuda" if accelerated else "cpu"
    index = _device_index(place) if accelerated else place.local_rank
    os.environ |= {  # what DeepSpeed and torch read
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(index),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
    }
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # DeepSpeed requires that it equals LOCAL_RANK
    if accelerated:
        torch.cuda.set_device(index)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // place.local_world_size))
    _join(place, accelerated, timedelta(minutes=timeout_minutes))
    return Runtime(place, torch.device("cuda", index) if accelerated else torch.device("cpu"))


@contextmanager
def joined(timeout_minutes: float = 10, low_memory: float = 0.05) -> Iterator[Runtime]:
    """Join a process group with a heartbeat, and leave both at the end.

    low_memory: share of a node's memory left at which to warn. Raises LostPeer in place of what a collective raises
    when another rank does not answer. After an error that only one of several ranks knows of, the group is not left:
    that would wait for ranks that wait for this one; the launcher ends them.
    """
    with _process_restored():
        runtime = start(timeout_minutes)
        set_timeout(60 * timeout_minutes)  # on accelerators with some slack, see there
        host = HostMonitor(runtime.place, lambda text: print(text, file=sys.stderr, flush=True), low_memory)
        every_beat = host.warn_if_low if runtime.place.local_rank == 0 else lambda: None
        monitor = RankMonitor(runtime.place, 60 * timeout_minutes, every_beat)
        try:
            yield replace(runtime, timeout_minutes=timeout_minutes, monitor=monitor, host=host)
        except BaseException as error:
            if is_lost_peer(error):
                raise _lost(runtime, monitor, error) from error
            monitor.close(alone=not isinstance(error, Stopped))
            if isinstance(error, Stopped) or runtime.world_size == 1:
                stop()
            if fault := own_fault(error):
                raise ValueError(f"rank {runtime.rank}: {fault}") from error
            raise
        monitor.close()
        stop()


@contextmanager
def _process_restored() -> Iterator[None]:
    """Undo at the end what `start` changes in this process, so that it can train more than once."""
    before, hook = {name: os.environ.get(name) for name in _CHANGED}, sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook  # torch wraps it at each join, to print the rank
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _lost(runtime: Runtime, monitor: RankMonitor, error: BaseException) -> LostPeer:
    found, raised = monitor.diagnose(), str(error).strip().splitlines()[0]
    status = FAILED if monitor.peer_failed else LOST
    return LostPeer(f"rank {runtime.rank}: {found}\n  ({raised})", status, monitor.close)


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # also forgets the group objects that DeepSpeed keeps for a next use


def _join(place: Placement, accelerated: bool, timeout: timedelta) -> None:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch deprecates, which would print four lines per step and rank.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    if not accelerated:
        # Otherwise DeepSpeed compiles a shared-memory collective at first use, which takes a compiler and a minute.
        deepspeed.ops.__compatible_ops__ = {}
    backend, method = "nccl" if accelerated else "gloo", f"{_RENDEZVOUS}://?session={place.session}"
    try:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, init_method=method, verbose=False
        )
    except RuntimeError as error:
        if explained := _not_joined(place, error):
            raise explained from error
        raise
    assert dist.get_world_size() == place.world_size


def _not_joined(place: Placement, error: RuntimeError) -> Exception | None:
    if fault := own_fault(error):
        return ValueError(f"rank {place.rank}: {fault}")
    if not is_lost_peer(error):
        return None
    where = f"{place.master_addr}:{place.master_port}"
    return LostPeer(
        f"rank {place.rank}: the {place.world_size} ranks did not all meet at {where}: {without_stack(error)}"
    )


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Rendezvous as torch's env:// does, under keys of this session.

    torchrun keeps one store for as long as its ranks live. In a second group ranks would read the addresses that they
    left there for the first one.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    yield dist.PrefixStore(urlparse(url).query, store), rank, world_size


dist.register_rendezvous_handler(_RENDEZVOUS, _meet)


def _device_index(place: Placement) -> int:
    visible = torch.cuda.device_count()
    if place.local_rank < visible:
        return place.local_rank
    if visible == 1 and place.launcher == "srun":  # one bound GPU per task, as `srun --gpus-per-task=1` gives
        return 0
    raise ValueError(
        f"local rank {place.local_rank} has no GPU of its own: {visible} are visible on this node; start as many ranks "
        "per node as there are GPUs, or set DS_ACCELERATOR=cpu"
    )


def _merge(said: list[str | None]) -> str:
    """Join the messages of the ranks that failed; ranks with the same message share a line."""
    messages = {text: [rank for rank, other in enumerate(said) if other == text] for text in said if text}
    if len(messages) == 1 and len(next(iter(messages.values()))) in (1, len(said)):
        return next(iter(messages))
    return "\n".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in messages.items())
