"""A SLURM cluster of two nodes on this machine, for tests: a real slurmctld and two slurmd, all state in one folder.

Everything listens on loopback and is started, and ended, by process id.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tests.support import Outcome, clean_environment, command

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
NODES = ("n1", "n2")
GPUS = 2  # a node: placeholder device files, which no program opens
SECONDS = 150  # until a job is where it should be
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout=5
InactiveLimit=0
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def unavailable() -> str:
    """Why no cluster can be started here, "" if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start this cluster"


def free_ports(number: int) -> list[int]:
    """Ports on which nobody listens now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Cluster:
    """Use as a context manager; `folder` must be empty, and short enough for a socket's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hurried: set[tuple[str, str]] = set()

    def __enter__(self) -> Cluster:
        folder = self.folder
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        text = CONFIG.format(folder=folder, host=socket.gethostname(), ports=free_ports(3), gpus=GPUS)
        self._config.write_text(text)
        for number in range(GPUS):
            os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{flag}={folder / name}" for flag, name in (names | {"log-file": "munge.log"}).items()]
        try:
            self._start("munged", "munged", "--foreground", "--force", *files)
            self.wait(lambda: (folder / "munge.socket").exists(), "munged listens")
            self._start("slurmctld", "slurmctld", "-c", "-D")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        if "slurmctld" in self._daemons:
            self.call("scancel", "--user=root")
            deadline = time.monotonic() + 10
            while self.call("squeue", "--noheader").out.strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        self._kill(self._strays())  # first, so that no slurmd waits for its steps
        for name in reversed(list(self._daemons)):
            self._stop(name)
        self._kill(self._strays())

    def call(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> Outcome:
        """Run a command in the cluster's environment."""
        return command(words, cwd or self.folder, SLURM_CONF=str(self._config), **environment)

    def sbatch(self, *words: str | Path, cwd: Path) -> str:
        """Submit; the job id."""
        outcome = self.call("sbatch", "--parsable", *words, cwd=cwd, PYTHONWARNINGS="")
        assert outcome.code == 0, outcome.err
        return outcome.out.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        outcome = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", outcome.out))

    def wait_for(self, number: str, *states: str, seconds: float = SECONDS) -> dict[str, str]:
        """Wait until a job is in one of `states`; returns what scontrol says of it then."""
        self.wait(lambda: self.job(number).get("JobState") in states, f"job {number} is {' or '.join(states)}", seconds)
        return self.job(number)

    def wait_to_end(self, number: str, seconds: float = SECONDS) -> dict[str, str]:
        """Wait until a job has ended for good. One that waits to be started again is started at once."""

        def ended() -> bool:
            facts = self.job(number)
            self.hurry(number, facts)
            return facts.get("JobState") in ENDED

        self.wait(ended, f"job {number} has ended", seconds)
        return self.job(number)

    def hurry(self, number: str, facts: dict[str, str] | None = None) -> None:
        """SLURM lets a requeued job wait for two minutes: three seconds are enough.

        (Not less: the node refuses a start that bears the same second as the end of the last one.)
        """
        facts = facts or self.job(number)
        start = (number, facts.get("Restarts", ""))
        if facts.get("JobState") == "PENDING" and facts.get("Restarts") != "0" and start not in self._hurried:
            self._hurried.add(start)
            self.call("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Wait until something holds; fails with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.last_words()}")
            time.sleep(0.1)

    def wait_for_nodes(self) -> None:
        """Wait until all nodes can take jobs."""

        def ready() -> bool:
            states = self.call("sinfo", "--noheader", "--Node", "--format=%T").out.split()
            return len(states) == len(NODES) and set(states) <= {"idle", "mixed", "allocated"}

        self.wait(ready, "all nodes are ready")

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """What a power cut does: slurmd and all that runs on the node is gone at once."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        tasks = self.processes(f"SLURMD_NODENAME={node}")
        parents = {parent_of(task) for task in tasks}
        self._kill(
            parent for parent in parents if words_of(parent)[:1] and words_of(parent)[0].startswith("slurmstepd")
        )
        self._kill(tasks)

    def processes(self, *wanted: str) -> list[int]:
        """Ids of this cluster's job processes whose environment has all of `wanted` (NAME=value)."""
        return list(self._strays(*wanted))

    def last_words(self) -> str:
        """The ends of the logs."""
        texts = []
        for log in sorted(self.folder.glob("*.log")):
            texts += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(texts)

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            environment = clean_environment(SLURM_CONF=str(self._config))
            self._daemons[name] = subprocess.Popen(words, env=environment, stdout=out, stderr=out, cwd=self.folder)

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _strays(self, *wanted: str) -> Iterable[int]:
        """Processes that SLURM started for jobs (slurmd's own children are in sessions of their own)."""
        wanted = (f"SLURM_CONF={self._config}", *wanted)
        daemons = {daemon.pid for daemon in self._daemons.values()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if set(wanted) <= set(words) and int(folder.name) not in daemons:
                yield int(folder.name)

    @staticmethod
    def _kill(processes: Iterable[int]) -> None:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def parent_of(process: int) -> int:
    """The process that started another; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def words_of(process: int) -> Sequence[str]:
    """The command line of a process, () if it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ()
