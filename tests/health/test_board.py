"""The status board: how fast it is, and what happens when its store is gone."""

import time

import pytest
import torch.distributed as dist

from dsmim.cluster.placement import Placement, free_port
from dsmim.health.board import StatusBoard
from dsmim.health.status import WORKING
from tests.conftest import patience
from tests.health.statuses import statuses


def test_512_ranks_are_read_at_once_and_a_lost_store_is_seen():
    place = Placement("srun", 0, 512, 0, 8, "127.0.0.1", free_port())
    store = dist.TCPStore(place.master_addr, place.master_port, is_master=True, wait_for_workers=False)
    board = StatusBoard(place, patience=10)
    shown = statuses(*[(1, WORKING, "training", 40)] * 512)
    for rank in range(511):
        assert board.publish(rank, shown[rank])
    begun = time.monotonic()
    assert board.read() == [*shown[:511], None]
    assert board.publish(511, shown[511]) and board.read() == shown
    assert time.monotonic() - begun < patience(3)  # 0.05 s on an idle machine
    del store
    deadline = time.monotonic() + patience(10)
    while board.publish(0, shown[0]):  # until the closed connection is seen
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(ConnectionError):
        board.read()
