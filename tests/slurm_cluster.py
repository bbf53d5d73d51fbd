"""A real Slurm of a few emulated nodes on this machine: for tests of launching, and for benchmarks/chaos.py.

munged, mariadbd, slurmdbd, slurmctld and one slurmd a node, all children of this process and in one
temporary folder, each stopped by its process id. Needs root and Debian's packages (``PACKAGES``); no systemd,
no cgroups. Two partitions: ``low``, and ``high``, whose jobs preempt (requeue) those of ``low``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server-core", "mariadb-client-core")
PROGRAMS = ("munged", "mariadbd", "mariadb", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sacct")
HOSTS = Path("/etc/hosts")
SEARCHED = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def missing() -> str | None:
    """Why no Slurm can be started here, for a person; None where it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a Slurm of its own is started by root alone"
    lacks = [p for p in PROGRAMS if shutil.which(p, path=SEARCHED) is None]
    return f"no {', '.join(lacks)} here: apt-get install {' '.join(PACKAGES)}" if lacks else None


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait_until(is_true, what: str, seconds: float = 60.0, every: float = 0.1) -> None:
    """Waits for a condition; AssertionError where it does not come."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(every)


class Cluster:
    """Slurm under way; a context manager.

    Args:
      nodes: how many. cpus: of each. kill_wait: seconds between SIGTERM and SIGKILL.

    Attributes:
      environment: what a command needs to reach it. nodes: their names.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, kill_wait: int = 10):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.cpus, self.kill_wait = cpus, kill_wait
        self.ports = free_ports(3 + nodes)
        # of this process alone, as they are kept in a file of the whole machine; a name ends in its number,
        # as JAX reads the first node of a list such as a[1-2]
        self.nodes = [f"slurm{os.getpid()}x{n + 1}" for n in range(nodes)]
        self.environment = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("log", "state", "munge", *(f"spool-{n}" for n in self.nodes)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        with open(HOSTS, "a") as f:  # a node's name must resolve: JAX's coordinator is the first one
            f.write(f"{self._hosts_line()}\n")
        self._write_configs()
        self._start_accounting()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self._idle() == len(self.nodes), "all nodes are idle")

    def _hosts_line(self) -> str:
        return "127.0.0.1 " + " ".join(self.nodes)

    def _write_configs(self) -> None:
        here, database, accounting, controller, *nodes = self.folder, *self.ports
        socket_, name = here / "munge" / "socket", socket.gethostname().split(".")[0]
        dbd = here / "slurmdbd.conf"
        dbd.write_text(
            f"""AuthType=auth/munge
AuthInfo=socket={socket_}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
PidFile={here}/slurmdbd.pid
LogFile={here}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
"""
        )
        dbd.chmod(0o600)
        of_nodes = "\n".join(
            f"NodeName={node} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            "RealMemory=2000 State=UNKNOWN"
            for node, port in zip(self.nodes, nodes, strict=True)
        )
        (here / "slurm.conf").write_text(
            f"""ClusterName=lab
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket_},cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmdSpoolDir={here}/spool-%n
StateSaveLocation={here}/state
SlurmctldLogFile={here}/log/slurmctld
SlurmdLogFile={here}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={socket_}
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={self.kill_wait}
SlurmdTimeout=60
SlurmdParameters=config_overrides
{of_nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=ALL MaxTime=1-0 PriorityTier=10 PreemptMode=OFF State=UP
"""
        )

    def _start_accounting(self) -> None:
        here, port = self.folder, self.ports[0]
        munge = here / "munge"
        self._run(
            "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={here}/log/munged", f"--seed-file={munge}/seed",
        )  # fmt: skip
        data = f"--datadir={here}/database"
        install = ("mariadb-install-db", "--no-defaults", "--user=root", data, "--skip-test-db",
                   "--auth-root-authentication-method=normal")  # fmt: skip
        self.command(*install)
        self._run(
            "mariadbd", "--no-defaults", "--user=root", data, f"--socket={here}/sql", f"--port={port}",
            f"--pid-file={here}/mariadbd.pid", "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        sql = ("mariadb", "--no-defaults", f"--socket={here}/sql", "--user=root", "--execute")
        wait_until(lambda: self._try(*sql, "select 1").returncode == 0, "the database answers")
        for host in ("127.0.0.1", "localhost"):
            self.command(*sql, f"create user slurm@'{host}' identified by 'slurm'")
            self.command(*sql, f"grant all on accounting.* to slurm@'{host}'")
        self._run("slurmdbd", "-D", SLURM_CONF=str(here / "slurmdbd.conf"))
        wait_until(lambda: self._try("sacctmgr", "-n", "list", "cluster").returncode == 0, "slurmdbd answers")

    def start_controller(self) -> None:
        self._run("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        wait_until(lambda: "UP" in self._try("scontrol", "ping").stdout, "slurmctld answers")

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node, as_name=node)

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Ends a daemon: ``slurmctld``, or a node's slurmd by the node's name."""
        process = self.daemons.pop(name)
        process.send_signal(how)
        process.wait(30)

    def _idle(self) -> int:
        return self._try("sinfo", "-h", "-N", "-p", "low", "-o", "%T").stdout.split().count("idle")

    def _run(self, *command: str, as_name: str | None = None, **environment: str) -> None:
        name = as_name or command[0]
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env={**self.environment, **environment}, start_new_session=True,
            )  # fmt: skip

    def _try(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)

    def command(self, *command: str) -> str:
        """Runs a command of Slurm; what it says. AssertionError where it fails."""
        done = self._try(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State of each job that is not over, by id (an array's element: 12_3)."""
        rows = self.command("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(row.split() for row in rows)

    def stop(self) -> None:
        """Cancels what runs, ends the daemons and removes their folder."""
        if "slurmctld" in self.daemons and "slurmd" not in self.daemons:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.command("scancel", "--user=root", "--signal=KILL")
                self.command("scancel", "--user=root")
                wait_until(lambda: not self.jobs(), "no job is left", 15)
        for name in [*self.nodes, "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            process = self.daemons.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(x for x in lines if x.strip() != self._hosts_line()))
        shutil.rmtree(self.folder, ignore_errors=True)
