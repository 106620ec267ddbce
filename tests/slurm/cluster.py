"""A private Slurm of one node with accounting, for tests: real daemons, none of them system-wide.

Needs root (slurmd changes users) and Debian's packages, see ``.ci/install_slurm.sh``. Every
daemon has its directory, sockets and ports here and is ended by its pid.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")
LOW, HIGH = "low", "high"
"""Partitions: jobs of HIGH preempt those of LOW, which are asked to save and queued again."""


def missing() -> str:
    """Why no cluster can be started here; "" where one can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed: make test-slurm" if absent else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(command: list[str], seconds: float = 30.0, output: str = "") -> None:
    deadline = time.monotonic() + seconds
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and output in done.stdout:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        time.sleep(0.2)


class PrivateCluster:
    """The daemons of one cluster under ``root``, its node with as many CPUs as it is said to have.

    Args:
        root: of everything.
        num_cpus: more than there are let a job of more tasks run.
    """

    def __init__(self, root: Path, num_cpus: int | None = None) -> None:
        self.root = root
        self.num_cpus = num_cpus or os.cpu_count()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports = {
            name: _free_port() for name in ("mariadbd", "slurmdbd", "slurmctld", "slurmd")
        }
        self.munge = root / "munge" / "socket"
        for name in ("munge", "mysql", "state", "spool"):
            (root / name).mkdir(parents=True)

    def _start(self, *command: str) -> None:
        with (self.root / f"{command[0]}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            )

    def start(self) -> None:
        """All daemons, in order; returns when the node is idle."""
        self._start_munge()
        self._start_database()
        self._write_configuration()
        os.environ["SLURM_CONF"] = str(self.root / "slurm.conf")
        self._start("slurmdbd", "-D")
        _wait(["sacctmgr", "--noheader", "list", "cluster"])
        self._start("slurmctld", "-D", "-f", os.environ["SLURM_CONF"])
        self._start("slurmd", "-D", "-f", os.environ["SLURM_CONF"])
        _wait(["sinfo", "--noheader", "--format=%T"], output="idle")

    def _start_munge(self) -> None:
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        own = {"key-file": key, "socket": self.munge, "pid-file": self.root / "munge" / "pid"}
        own |= {"log-file": self.root / "munge" / "log", "seed-file": self.root / "munge" / "seed"}
        self._start(
            *("munged", "--foreground", "--force"), *(f"--{name}={v}" for name, v in own.items())
        )
        _wait(["munge", "--no-input", f"--socket={self.munge}"])

    def _start_database(self) -> None:
        data, sock = self.root / "mysql", self.root / "mysql.sock"
        subprocess.run(
            [
                *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"),
                "--auth-root-authentication-method=normal",
            ],
            check=True,
            capture_output=True,
        )
        self._start(
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}"),
            *("--bind-address=127.0.0.1", f"--port={self.ports['mariadbd']}"),
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
            f"--pid-file={self.root / 'mysql.pid'}",
        )
        statements = (
            "create database slurm; create user 'slurm'@'127.0.0.1' identified by 'x';"
            "create user 'slurm'@'localhost' identified by 'x';"
            "grant all on slurm.* to 'slurm'@'127.0.0.1';"
            "grant all on slurm.* to 'slurm'@'localhost'"
        )
        _wait(["mariadb", "--no-defaults", f"--socket={sock}", "--execute=select 1"])
        subprocess.run(
            ["mariadb", "--no-defaults", f"--socket={sock}", f"--execute={statements}"], check=True
        )

    def _write_configuration(self) -> None:
        host, root, ports = socket.gethostname().split(".")[0], self.root, self.ports
        database = root / "slurmdbd.conf"
        database.write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.munge}\nDbdHost={host}\n"
            f"DbdAddr=127.0.0.1\nDbdPort={ports['slurmdbd']}\nSlurmUser=root\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={ports['mariadbd']}\nStorageUser=slurm\nStoragePass=x\n"
            f"StorageLoc=slurm\nPidFile={root}/slurmdbd.pid\n"
        )
        database.chmod(0o600)
        (root / "slurm.conf").write_text(
            f"ClusterName=private\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports['slurmctld']}\n"
            f"SlurmdPort={ports['slurmd']}\nSlurmUser=root\nSlurmdUser=root\n"
            # A job that is queued again waits until its credentials have expired: 120 s by default.
            f"AuthType=auth/munge\nAuthInfo=socket={self.munge},cred_expire=20\nMpiDefault=none\n"
            f"ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            f"JobAcctGatherType=jobacct_gather/linux\n"
            f"AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={ports['slurmdbd']}\n"
            f"AccountingStoragePass={self.munge}\n"
            f"SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nReturnToService=2\n"
            f"PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nKillWait=5\n"
            f"StateSaveLocation={root}/state\nSlurmdSpoolDir={root}/spool\n"
            f"SlurmctldPidFile={root}/slurmctld.pid\nSlurmdPidFile={root}/slurmd.pid\n"
            f"SlurmdParameters=config_overrides\n"
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={self.num_cpus} RealMemory=4000\n"
            f"PartitionName={LOW} Nodes={host} Default=YES PriorityTier=1 GraceTime=60 State=UP\n"
            f"PartitionName={HIGH} Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP\n"
        )

    def stop(self) -> None:
        """End every job, then the daemons by pid, last first."""
        if "SLURM_CONF" in os.environ:
            subprocess.run(["scancel", "--full", "--user=root"], check=False)
            with contextlib.suppress(TimeoutError):
                _wait(["bash", "-c", 'test -z "$(squeue --noheader)"'])
            del os.environ["SLURM_CONF"]
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def private_cluster(root: Path, num_cpus: int | None = None) -> Iterator[PrivateCluster]:
    """A running cluster; its commands (sbatch, sacct, …) find it by SLURM_CONF."""
    cluster = PrivateCluster(root, num_cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
