"""The sentence that names the missing ranks, from made-up statuses of up to 512 ranks."""

from dsmim.health.blame import name_missing
from dsmim.health.status import BROKEN, DIAGNOSED, LEFT, WORKING
from tests.health.statuses import statuses


def test_missing_ranks_in_a_large_world():
    first = statuses(*[(1, WORKING, "training", 40)] * 512)
    second = statuses(*[(3, BROKEN, "training", 40)] * 512)
    dead = list(second)
    for rank in range(8, 16):
        dead[rank] = first[rank]
    text = name_missing(first, dead, own_rank=0, now=1010.0)
    assert text.startswith("rank 8 on node8 has given no sign of life for 10 s") and "and 4 more. It was killed" in text
    dead[3] = None
    assert name_missing(first, dead, 0, 1010.0).startswith("rank 3 has never given a sign of life; rank 8")
    assert "every rank is alive and at: training, step 5" in name_missing(first, second, 0, 1010.0)
    late = list(second)
    late[7] = statuses(*[(2, WORKING, "waiting for data", 39)] * 8)[7]
    assert name_missing(first, late, 0, 1010.0) == (
        "rank 7 on node7 has been at: waiting for data, step 5 for 9 s; the 511 others are at: training, step 5"
    )
    inside = list(second)
    inside[9] = statuses(*[(2, WORKING, "training", 40)] * 10)[9]
    text = name_missing(first, inside, 0, 1010.0)
    assert text == "rank 9 on node9 did not join the others; all ranks are at: training, step 5"


def test_a_rank_that_failed_because_of_another_is_not_named():
    first = statuses((1, BROKEN, "training", 4), (5, BROKEN, "training", 4), (7, WORKING, "training", 3))
    second = statuses((2, BROKEN, "training", 4), (5, DIAGNOSED, "training", 4), (7, WORKING, "training", 3))
    assert name_missing(first, second, 0, 1010.0).startswith("rank 2 on node2 has given no sign of life")
    came = statuses((2, BROKEN, "training", 4), (5, DIAGNOSED, "training", 4), (8, BROKEN, "training", 4))
    text = name_missing(first, came, 2, 1010.0)
    assert text == "rank 1 on node1 stopped waiting before this rank arrived, at: training, step 5"
    ended = statuses((2, BROKEN, "training", 4), (5, DIAGNOSED, "training", 4), (8, LEFT, "saving", 3))
    assert name_missing(first, ended, 0, 1010.0) == "rank 2 on node2 has left, at: saving, step 5; see its own message"
