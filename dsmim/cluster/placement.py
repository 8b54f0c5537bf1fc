"""Find this process's rank and the world size, once, from the environment variables that the launcher has set.

Launchers are tried in this order: deepspeed and torchrun (RANK, WORLD_SIZE, …), mpirun (variables of Open MPI or Hydra,
then mpi4py), srun (SLURM_* of the job step), a single process. Variables that contradict one another are an error: if
several tasks each saw a world size of 1, each would train the whole run, silently. An empty variable counts as not set.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Placement:
    """A process's place among the ranks of a run."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this node."""
    master_addr: str
    master_port: int
    session: int = 0
    """How many process groups this process has joined before."""


def detect(env: Mapping[str, str]) -> Placement:
    """Return the placement that the environment describes.

    Raises ValueError when variables are missing, no numbers, out of range, or contradict one another.
    """
    env = {name: value for name, value in env.items() if value}
    if "RANK" in env or "WORLD_SIZE" in env:
        place = _from_torch(env)
    elif "OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env:
        place = _from_mpi(number(env, "OMPI_COMM_WORLD_SIZE", 0) or number(env, "PMI_SIZE", 0))
    elif number(env, "SLURM_STEP_NUM_TASKS", 0) > 1:
        place = _from_slurm(env)
    else:
        place = Placement("single process", 0, 1, 0, 1, "127.0.0.1", free_port())
    _check_range(place)
    _check_against_mpi(place, env)
    _check_against_slurm(place, env)
    return place


def is_first(env: Mapping[str, str]) -> bool:
    """Return whether this process is rank 0. Reads variables only: no MPI is started, nothing is checked."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((env[name] for name in names if env.get(name)), "0") == "0"


def number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable that holds a whole number, or `default` where it is empty or not set.

    Raises ValueError, which names the variable, for other text, and for a missing one without a default.
    """
    text = env.get(name, "").strip()
    if not text and default is not None:
        return default
    if not re.fullmatch(r"-?[0-9]+", text):
        found = f"{name}={text!r} is no whole number" if text else f"{name} is not set"
        raise ValueError(f"the environment variable {found}; set it to one, or unset what no launcher has set")
    return int(text)


def _port(env: Mapping[str, str], default: int | None = None) -> int:
    """Return MASTER_PORT. Raises ValueError for what is no TCP port."""
    port = number(env, "MASTER_PORT", default)
    if not 0 <= port < 2**16:
        raise ValueError(
            f"the environment variable MASTER_PORT={port} is no TCP port; set it to one from 1024 to 65535"
        )
    return port


def free_port() -> int:
    """Return a TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _from_torch(env: Mapping[str, str]) -> Placement:
    missing = [name for name in TORCH_VARIABLES if name not in env]
    if missing:
        raise ValueError(
            f"the launcher set {', '.join(n for n in TORCH_VARIABLES if n in env)} but not {', '.join(missing)}; "
            "start with deepspeed, torchrun, srun or mpirun, or set all five"
        )
    rank, world, local = (number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    size = number(env, "LOCAL_WORLD_SIZE", 0) or number(env, "LOCAL_SIZE", 1)
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "RANK variables"
    return Placement(name, rank, world, local, size, env["MASTER_ADDR"], _port(env))


def _from_mpi(announced: int) -> Placement:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"started by mpirun, but mpi4py cannot load an MPI library: {error}") from None
    world = MPI.COMM_WORLD
    if announced and world.size != announced:
        raise ValueError(
            f"mpirun announces {announced} ranks but mpi4py sees a world of {world.size}: mpirun and mpi4py belong to "
            "different MPI installations; use the mpirun of the MPI that mpi4py loads"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = world.bcast((socket.gethostname(), free_port()) if world.rank == 0 else None)
    one_node = node.size == world.size
    host = "127.0.0.1" if one_node else address[0]
    return Placement("mpirun", world.rank, world.size, node.rank, node.size, host, address[1])


def _from_slurm(env: Mapping[str, str]) -> Placement:
    rank, world, local = (number(env, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    per_node = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = number(env, "SLURM_NODEID", 0)
    size = per_node[node] if node < len(per_node) else 1
    # Two jobs on one node, and two steps of one job, must not use the same port.
    job, step = number(env, "SLURM_JOB_ID", 0), number(env, "SLURM_STEP_ID", 0)
    port = _port(env, 10000 + (job * 17 + step) % 20000)
    address = env.get("MASTER_ADDR") or _first_host(env)
    if number(env, "SLURM_STEP_NUM_NODES", 1) > 1 and (address == "localhost" or address.startswith("127.")):
        raise ValueError(f"MASTER_ADDR={address} means another machine on every node of this step; unset it")
    return Placement("srun", rank, world, local, size, address, port)


def _first_host(env: Mapping[str, str]) -> str:
    """Return the host of rank 0, from Slurm's list of the step's hosts: in a container there is no scontrol to ask."""
    if number(env, "SLURM_STEP_NUM_NODES", 1) == 1:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    if host := first_host(nodes):
        return host
    raise ValueError(
        f"the first host of this step is unknown (SLURM_STEP_NODELIST is {nodes!r}): set MASTER_ADDR to the name of "
        'rank 0\'s node in the job: export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    )


def first_host(nodes: str) -> str | None:
    """Return the first host of a list as Slurm writes it, such as gpu07 for 'gpu[07-09,12],login1'; None for none."""
    match = re.match(r"(?:[\w.-]|\[[0-9][0-9,-]*\])+(?=,|$)", nodes)
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", match[0]) if match else None


def expand_counts(text: str) -> list[int]:
    """Return the numbers of tasks per node, such as [2, 2, 1] for Slurm's '2(x2),1'."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _check_range(place: Placement) -> None:
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.world_size):
        raise ValueError(
            f"{place.launcher}: rank {place.rank} (local rank {place.local_rank}) is outside a world of "
            f"{place.world_size}"
        )


def _check_against_mpi(place: Placement, env: Mapping[str, str]) -> None:
    """Check that the MPI launcher has not started more ranks than this process sees."""
    for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"):
        if place.world_size < number(env, name, 0):
            raise ValueError(
                f"{name} announces {env[name]} ranks but this process sees a world of {place.world_size} "
                f"({place.launcher}): they would train as separate runs; unset what another launcher left, or set "
                f"{', '.join(TORCH_VARIABLES)} for every rank"
            )


def _check_against_slurm(place: Placement, env: Mapping[str, str]) -> None:
    """Check that this process sees all tasks of the Slurm job. If not, every task would train a separate run."""
    step_tasks = number(env, "SLURM_STEP_NUM_TASKS", 0)
    tasks = step_tasks or number(env, "SLURM_NTASKS", 1)
    if place.world_size < step_tasks or (place.world_size == 1 and tasks > 1):
        raise ValueError(
            f"Slurm gives {tasks} tasks but this process sees a world of {place.world_size} ({place.launcher}): they "
            "would train as separate runs. Start with `srun python -m dsmim …` (or mpirun, torchrun, deepspeed for all "
            "tasks); if you want one process, `srun --ntasks=1 …`"
        )
    if number(env, "SLURM_STEP_NUM_NODES", 1) > 1 and place.local_world_size == place.world_size > 1:
        raise ValueError(
            f"Slurm started this step on {env['SLURM_STEP_NUM_NODES']} nodes but all {place.world_size} ranks of this "
            f"world ({place.launcher}) are on one: every node would train a separate run. Give torchrun --nnodes and a "
            "rendezvous endpoint, or start with `srun python -m dsmim …`"
        )
