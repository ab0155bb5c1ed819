"""A Slurm of two nodes on the hosts of ``tests/cluster/hosts.py``: its daemons, its state and its key are all in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.cluster.hosts import ADDRESSES, NAMES, Hosts, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

# No cgroups and no accounting; a job that asks for both nodes shares them. A node has the machine's cores, so that what one
# job leaves of them others can have.
_CONF = """
ClusterName=lisa
SlurmctldHost=n1({n1})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=3600
JobRequeue=1
ReturnToService=2
SlurmdTimeout=30
NodeName=n1 NodeAddr={n1} CPUs={cpus} RealMemory=4000
NodeName=n2 NodeAddr={n2} CPUs={cpus} RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 OverSubscribe=FORCE:4
"""


class Slurm:
    """Submits jobs and asks about them, from n1."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.folder = hosts.folder / "slurm"

    @contextlib.contextmanager
    def up(self) -> Iterator[Slurm]:
        """Start its daemons, and stop them."""
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        conf = _CONF.format(folder=folder, cpus=os.cpu_count(), **ADDRESSES)
        (folder / "slurm.conf").write_text(conf)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        self.hosts.run("n1", "munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        self.command("slurmctld", "-c")
        try:
            for name in NAMES:
                self.command("slurmd", host=name)
            wait_for(lambda: self.command("sinfo", "-h", "-o", "%D %t") == "2 idle\n", 60, "nodes are not idle")
            yield self
        finally:
            pids = (path.read_text().strip() for path in folder.glob("*.pid"))  # as n1 sees them
            self.hosts.run("n1", "kill", *pids, check=False)

    def command(self, *command: str, host: str = "n1", check: bool = True) -> str:
        """What one of Slurm's own programs says."""
        return self.hosts.run(host, *command, env=os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf"}, check=check)

    def submit(self, *arguments: str | Path, cwd: Path, env: Mapping[str, str]) -> str:
        """``sbatch``; returns the job's number."""
        env = {**env, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        return self.hosts.run("n1", "sbatch", "--parsable", *arguments, cwd=cwd, env=env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` tells of one that is or was."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, restarts: int = 0, timeout_s: float = 600) -> dict[str, str]:
        """Until a job is in one of ``states``, in its life after ``restarts`` restarts."""

        def there() -> bool:
            job = self.job(number)
            assert job["JobState"] not in ("FAILED", "TIMEOUT", *({"CANCELLED"} - set(states))), job
            return job["JobState"] in states and int(job["Restarts"]) == restarts

        wait_for(there, timeout_s, f"job {number} is not {' or '.join(states)}")
        return self.job(number)

    def start_now(self, number: str, restarts: int) -> None:
        """Have a requeued job start its next life; Slurm would hold it for two minutes."""
        self.wait(number, "PENDING", restarts=restarts)
        time.sleep(3)  # a credential of the second in which that of the last life was revoked counts as revoked, too
        self.command("scontrol", "update", f"jobid={number}", "StartTime=now")
