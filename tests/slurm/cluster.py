"""A real Slurm on emulated hosts: one controller and some nodes, made of Linux namespaces (hosts.sh), with fake GPUs.

Nothing outside the namespaces changes. When their first process ends, everything in them ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.conftest import environment, patience

HOSTS = Path(__file__).with_name("hosts.sh")
WANTED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
CPUS, GPUS = 128, 8
# Preemption requeues; a node that does not answer for SlurmdTimeout seconds is down; jobs start at once.
CONF = """
ClusterName=test
SlurmctldHost=login(10.77.0.254)
AuthType=auth/munge
AuthInfo=socket={dir}/run/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmdPidFile={dir}/run/%n.pid
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdLogFile={dir}/log/%n.log
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=4000
ReturnToService=2
MpiDefault=none
GresTypes=gpu
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
SlurmdTimeout={node_timeout}
KillWait=5
UnkillableStepTimeout=15
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=512000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return why no cluster can be started here; None when one can."""
    absent = [name for name in WANTED if not shutil.which(name)]
    if absent:
        return f"no {', '.join(absent)} (tests/slurm/install.sh installs them, where apt-get exists)"
    if os.geteuid():
        return "only root can make the network of the emulated hosts"
    probe = subprocess.run(["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "--mount-proc", "ip", "link", "add", "br0",
                            "type", "bridge"], capture_output=True, text=True, check=False)  # fmt: skip
    return f"no namespaces can be made here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """An emulated cluster: start it, use it, stop it.

    folder: must be short (socket names have 107 bytes) and inside one of `shared`, the folders that all hosts see.
    """

    def __init__(self, folder: Path, shared: list[Path], nodes: int = 2):
        self.folder, self.nodes = folder, nodes
        self.shared = sorted({str(path) for path in shared if path.is_relative_to("/tmp")})
        self.outer: subprocess.Popen | None = None

    def start(self, timeout: float = 60) -> None:
        """Start the cluster; return when every node is idle."""
        self._write()
        words = ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "--kill-child", "--mount-proc", "bash", HOSTS]
        with (self.folder / "log/cluster.out").open("w") as out:
            self.outer = subprocess.Popen(
                [*map(str, words), "cluster", str(self.folder), str(self.nodes), *self.shared],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment(),
            )  # fmt: skip
        self.until(self._ready, timeout, "the cluster to be up")

    def stop(self) -> None:
        """Kill the first process of the namespaces, and with it everything in them."""
        if self.outer is not None:
            self.outer.kill()
            self.outer.wait()
            time.sleep(0.5)

    def run(self, *words: object, check: bool = True, cwd: Path | None = None, **env: str):
        """Run a command on the login node."""
        inside = ["nsenter", "-t", str(self._first()), "-m", "-u", "-i", "-n", "-p", f"-w{cwd or self.folder}"]
        done = subprocess.run(
            [*inside, *map(str, words)], capture_output=True, text=True, check=False, timeout=patience(120),
            env=environment(SLURM_CONF=str(self.folder / "slurm.conf"), **env),
        )  # fmt: skip
        assert not check or not done.returncode, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, *words: object, cwd: Path | None = None, **env: str) -> int:
        """Submit a job; return its number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, **env).stdout.split(";")[0])

    def job(self, number: object) -> dict[str, str]:
        """Return what `scontrol show job` prints. number: the job's, or ARRAY_TASK."""
        shown = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait(self, number: object, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until the job is in one of these states (by default: ended in any way); return the job."""
        wanted = states or ENDED

        def reached() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] in wanted else None

        return self.until(reached, timeout, f"job {number} to be {' or '.join(wanted)}")

    def requeued(self, number: object, times: int = 1, timeout: float = 120) -> None:
        """Wait until the job has been requeued so many times and is pending."""

        def waits() -> bool:
            job = self.job(number)
            assert job["JobState"] not in ENDED or job["JobState"] in ("PREEMPTED", "NODE_FAIL"), job
            return job["JobState"] == "PENDING" and job["Restarts"] == str(times)

        self.until(waits, timeout, f"job {number} to be requeued")

    def start_again(self, number: object, times: int = 1, timeout: float = 120) -> None:
        """Wait until the job has been requeued; start it at once, where Slurm would let it wait two minutes."""
        self.requeued(number, times, timeout)
        time.sleep(patience(2.5))  # until the nodes have forgotten the job's last start
        self.run("scontrol", "update", f"jobid={number}", "StartTime=now")
        self.wait(number, "RUNNING", "COMPLETED", timeout=30)

    def power_off(self, node: int) -> None:
        """Cut a node's power: everything on it ends, and no other host is told.

        The network goes first, or the kernel would still close the node's connections.
        """
        self.run("ip", "link", "del", f"veth{node}")
        self.run("kill", "-9", (self.folder / f"run/node{node}.outer").read_text().strip())

    def power_on(self, node: int) -> None:
        """Start a node again; return when it is idle."""
        self.run("bash", HOSTS, "power_on", self.folder, node, *self.shared)
        self.until(self._ready, 60, f"node{node} to be back")

    def until(self, condition, timeout: float, what: str):
        """Wait for the condition's first true value and return it. timeout: seconds on an idle machine, see patience.

        Raises TimeoutError, with the queue and the end of the controller's log.
        """
        timeout = patience(timeout)
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline or self.outer.poll() is not None:
                raise TimeoutError(f"waited {timeout:.0f} s for {what}\n{self._state()}")
            time.sleep(0.1)
        return value

    def log(self) -> str:
        """Return the log of the controller."""
        return (self.folder / "log/slurmctld.log").read_text(errors="replace")

    def _state(self) -> str:
        parts = []
        with contextlib.suppress(AssertionError, OSError, ValueError):
            parts += [self.run("squeue", check=False).stdout, self.run("sinfo", check=False).stdout]
        for name in ("cluster.out", "slurmctld.log"):
            with contextlib.suppress(OSError):
                parts.append((self.folder / "log" / name).read_text()[-3000:])
        return "\n".join(parts)

    def _first(self) -> int:
        """Return the number of the cluster's first process, as this machine sees it."""
        return int(Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()[0])

    def _ready(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            up = self.run("sinfo", "-h", "-N", "-p", "normal", "-t", "idle,mix,alloc", "-o", "%N", check=False)
            return len(set(up.stdout.split())) == self.nodes
        return False

    def _write(self) -> None:
        for name in ("state", "log", "run", "gpus", *(f"spool/node{n}" for n in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, self.folder / "run"):
            path.chmod(0o755)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        hosts = ["127.0.0.1 localhost", "10.77.0.254 login"]
        hosts += [f"10.77.0.{n} node{n}" for n in range(1, self.nodes + 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for gpu in range(GPUS):
            (self.folder / f"gpus/gpu{gpu}").touch()
        conf = CONF.format(
            dir=self.folder, nodes=self.nodes, cpus=CPUS, gpus=GPUS, node_timeout=round(patience(2)),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        gres = f"NodeName=node[1-{self.nodes}] Name=gpu File={self.folder}/gpus/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
