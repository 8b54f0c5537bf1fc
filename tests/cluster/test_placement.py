"""Ranks and world sizes, from the environment that each launcher leaves."""

import pytest

from dsmim.cluster.placement import detect, expand_counts, first_host, is_first

TORCHRUN = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="n0", MASTER_PORT="29501", LOCAL_WORLD_SIZE="2")
SRUN = dict(
    SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NODEID="1", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NUM_NODES="2",
    SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_STEP_NODELIST="n[1-2]", SLURM_JOB_ID="77", SLURM_STEP_ID="0",
    SLURM_NTASKS="4", MASTER_ADDR="n1",
)  # fmt: skip

HOSTS = [
    ("node1", "node1"), ("node1,node2", "node1"), ("n[1-2]", "n1"), ("gpu[007-012,20]", "gpu007"),
    ("gpu[3,7-9]", "gpu3"), ("rack[1-2]n[01-16],login", "rack1n01"), ("a-b.example.org,c", "a-b.example.org"),
    ("127.0.0.1,127.0.0.2", "127.0.0.1"), ("", None), ("(null)", None),
]  # fmt: skip


def test_torch_variables():
    place = detect(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.master_addr, place.master_port) == ("n0", 29501)


def test_srun_variables():
    place = detect(SRUN)
    assert (place.launcher, place.rank, place.world_size) == ("srun", 3, 4)
    assert (place.local_rank, place.local_world_size) == (1, 2)
    assert place.master_addr == "n1" and 10000 <= place.master_port < 30000
    assert detect(SRUN | {"SLURM_JOB_ID": "78"}).master_port != place.master_port


def test_ranks_on_several_nodes_meet_without_scontrol(monkeypatch, tmp_path):
    """In a container there is none. tests/slurm compares with it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    alone = {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"}
    assert detect(alone | {"SLURM_STEP_NODELIST": "gpu[07-09,12],login1"}).master_addr == "gpu07"
    assert detect(alone | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}).master_addr == "127.0.0.1"
    assert detect(SRUN).master_addr == "n1"  # set by the user


@pytest.mark.parametrize(("nodes", "first"), HOSTS)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_single_process():
    assert (detect({}).rank, detect({}).world_size) == (0, 1)
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert detect(one).world_size == 1
    empty = {"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "SLURM_NTASKS": ""}
    assert detect(empty).world_size == 1 and is_first(empty)
    assert detect(SRUN | {"RANK": "", "WORLD_SIZE": ""}).launcher == "srun"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "Slurm gives 2 tasks but this process sees a world of 1"),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, "world of 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 .* outside a world of 4"),
        (TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE announces 8 ranks .* world of 4"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is no whole number; set it to one"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no TCP port"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2.0"}, "LOCAL_WORLD_SIZE='2.0' is no whole number"),
        (TORCHRUN | {"RANK": ""}, "set WORLD_SIZE, .* but not RANK"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is no whole number"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' is no whole number"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE announces 4 ranks"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE announces 2 ranks"),
        (SRUN | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost means another machine on every node"),
        (
            SRUN | {"MASTER_ADDR": "", "SLURM_STEP_NODELIST": ""},
            "first host of this step is unknown .* set MASTER_ADDR",
        ),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
            "on 2 nodes but all 4 ranks",
        ),
    ],
)
def test_contradictions_are_errors(env, message):
    with pytest.raises(ValueError, match=message):
        detect(env)


def test_torchrun_on_every_slurm_node_is_allowed():
    assert detect(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}).world_size == 4


def test_slurm_task_counts():
    assert expand_counts("2(x2),1") == [2, 2, 1] and expand_counts("8") == [8]


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"])
def test_rank_zero_is_known_from_variables_alone(name):
    assert is_first({}) and is_first({name: "0"}) and not is_first({name: "3"})
