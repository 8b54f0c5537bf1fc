"""Which errors mean that another rank does not answer, and which that this rank was started in a wrong way."""

import subprocess
import sys

import pytest
import torch.distributed as dist

from dsmim.cluster.placement import free_port
from dsmim.health.collectives import is_lost_peer, own_fault
from tests.conftest import ROOT, environment, patience

STACK = "\nException raised from doWait at /pytorch/torch/csrc/distributed/c10d/TCPStore.cpp:1\nframe #0: …"
LOST = [
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, "
                          "NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network error"),
    dist.DistBackendError("[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value "
                          "store by key '0', but store->get('0') got error: Connection reset by peer" + STACK),
    dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    dist.DistBackendError("ncclSystemError: System call (e.g. socket, malloc) or external library call failed or "
                          "device error.\nLast error:\nsocketPollConnect: connect returned No route to host"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed." + STACK),
    dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined."),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:40000"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 300000ms for recv operation"),
]  # fmt: skip
OWN = [
    (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG=WARN for "
                           "details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of "
                           "NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA 9100"
                           + STACK), "each with a GPU of its own"),
    (dist.DistBackendError("NCCL error in: x, internal error\nncclInternalError: Internal check failed.\nLast error:\n"
                           "Bootstrap : no socket interface found"), "NCCL_SOCKET_IFNAME"),
    (RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: nope"),
     "GLOO_SOCKET_IFNAME"),
    (dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500, name: "
                           "EADDRINUSE, message: address already in use"), "MASTER_PORT"),
]  # fmt: skip


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
def test_a_rank_that_does_not_answer(error):
    assert is_lost_peer(error) and own_fault(error) is None


@pytest.mark.parametrize(("error", "fix"), OWN, ids=range(len(OWN)))
def test_a_rank_that_was_started_in_a_wrong_way(error, fix):
    """Starting it again would fail again."""
    assert not is_lost_peer(error)
    assert fix in own_fault(error) and "frame #0" not in own_fault(error) and "\n" not in own_fault(error)


def test_other_errors_are_neither():
    for error in (
        ValueError("Connection closed by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n… Connection reset by peer"),
        RuntimeError("Caught OSError in DataLoader worker process 0.\n… EADDRINUSE"),
        ConnectionResetError("Connection reset by peer"),
        dist.DistBackendError("NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ):
        assert not is_lost_peer(error) and own_fault(error) is None, error


JOIN = """
import sys
from dsmim.cli.ending import end
from dsmim.engine.runtime import joined
try:
    with joined(0.05):
        print("joined")
except Exception as error:
    end(error, None, True)
"""


@pytest.mark.parametrize(
    ("env", "status", "told"),
    [
        ({"GLOO_SOCKET_IFNAME": "nope9"}, 1, "Unable to find address for: nope9; NCCL_SOCKET_IFNAME and GLOO_SOCKET"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 70, "rank 0: the 2 ranks did not all meet at 127.0.0.1:"),
    ],
)
def test_ranks_that_cannot_meet(env, status, told):
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, check=False, timeout=patience(120),
        env=environment(**place | {"MASTER_PORT": str(free_port())} | env),
    )  # fmt: skip
    assert done.returncode == status and "joined" not in done.stdout, done.stderr
    assert done.stderr.count("dsmim: error: ") == 1 and told in done.stderr and "Traceback" not in done.stderr
