"""Which errors mean that another rank does not answer."""

import torch.distributed as dist

from dsmim.health.collectives import is_lost_peer


def test_only_errors_of_collectives_mean_a_lost_rank():
    assert is_lost_peer(dist.DistBackendError("NCCL error")) and is_lost_peer(dist.DistNetworkError("x"))
    assert is_lost_peer(dist.DistStoreError("x"))
    for error in (
        ValueError("Connection closed by peer"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n… Connection reset by peer"),
        ConnectionResetError("Connection reset by peer"),
    ):
        assert not is_lost_peer(error)
