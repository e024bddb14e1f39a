"""A real Slurm on this machine: a login node and virtual nodes with fake GPUs, each in its own
network, process and host-name namespace, joined by a bridge. The nodes also run sshd.

    python -m tests.support.local_slurm --nodes 2  # a shell on the login node; all ends with it

Needs root and the packages of tests/install_cluster.sh. Nodes share this machine's files. A node is
one process tree: killing its first process is a power cut, taking its link down cuts its cable.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

NETWORK = "10.99.0"  # inside the namespaces only, so it cannot collide with the machine's own
LOGIN_ADDRESS = f"{NETWORK}.1"
CPUS, GPUS = 8, 8  # per node; Slurm is told so, the machine may have fewer
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
NODE_TIMEOUT_SEC = 25  # until Slurm takes a silent node for lost
GRACE_SEC = 120  # between the signal to a job that is preempted and its end
START_SEC = 180  # on a loaded machine
MISSING = "needs root, network namespaces and the packages of tests/install_cluster.sh (as root)"

SLURM_CONF = """
ClusterName=local
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired; the default is two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
SlurmdTimeout={node_timeout}
MessageTimeout=25
SchedulerParameters=sched_interval=2
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""

SSHD_CONFIG = """
HostKey {folder}/ssh/key
AuthorizedKeysFile {folder}/ssh/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""

SSH_CONFIG = """
IdentityFile {folder}/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""

# The first process of a machine reaps what others leave behind. The login node's ends when our end
# of its standard input closes, and all nodes with it: nothing outlives the program that started it.
STAY = {True: "while read -r _; do :; done", False: "while :; do sleep 3600 & wait; done"}


class Machine(NamedTuple):
    """The process that we started, and the first process inside the namespaces."""

    starter: subprocess.Popen
    first: int


class LocalSlurm:
    """The cluster; use as a context manager."""

    def __init__(self, num_nodes=2):
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets: short path
        self._machines = {}

    def __enter__(self):
        self._write_files()
        try:
            self._boot("login", self._login_script())
            for node in self.nodes:
                self.boot(node)
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception):
        # The nodes' process namespaces are children of the login node's, and end with it.
        if "login" in self._machines:
            os.kill(self._machines["login"].first, signal.SIGKILL)
        for machine in self._machines.values():
            machine.starter.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command, machine="login", check=True, env=None, cwd=None, stdin=None):
        """Run a command on a machine to its end; return its standard output."""
        result = subprocess.run(
            self.inside(machine, *command),
            env=self.environment(env),
            cwd=cwd,
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and result.returncode:
            raise AssertionError(f"{command}: exit {result.returncode}\n{result.stderr}")
        return result.stdout

    def inside(self, machine, *command):
        """Return the command line that runs `command` on a machine."""
        enter = ["nsenter", f"--target={self._machines[machine].first}", *NAMESPACES]
        return [*enter, f"--wdns={os.getcwd()}", *(str(part) for part in command)]

    def environment(self, extra=None):
        """Return the environment that the login node's shell has."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD"))}
        set_by_login = {"SHELL": "/bin/bash"}  # what salloc starts; cron and containers have none
        return set_by_login | kept | {"SLURM_CONF": str(self.folder / "slurm.conf")} | (extra or {})

    def boot(self, node):
        """Start a node, or start it again after `power_off`."""
        number = self.nodes.index(node) + 1
        self._boot(
            node,
            f"""
            until ip link show eth0; do sleep 0.05; done
            ip address add {NETWORK}.{10 + number}/24 dev eth0
            ip link set eth0 up
            slurmd -f {self.folder}/slurm.conf -N {node}
            /usr/sbin/sshd -f {self.folder}/ssh/sshd_config
            """,
            parent="login",
        )
        of_login = ["nsenter", f"--target={self._machines['login'].first}", "--net", "ip", "link"]
        first = self._machines[node].first
        for change in (
            f"add {node} type veth peer name eth0 netns {first}",
            f"set {node} master bridge up",
        ):
            subprocess.run([*of_login, *change.split()], check=True)
        wait_for((self.folder / f"{node}.up").exists, START_SEC, self.logs)

    def power_off(self, node):
        """Kill everything on a node at once; its neighbours are told nothing."""
        machine = self._machines.pop(node)
        os.kill(machine.first, signal.SIGKILL)
        machine.starter.wait()

    def kill_slurmd(self, node):
        """Kill a node's slurmd only; its job goes on."""
        self.run("pkill", "-KILL", "-x", "slurmd", machine=node)

    def start_slurmd(self, node):
        """Start a node's slurmd again."""
        self.run("slurmd", "-f", self.folder / "slurm.conf", "-N", node, machine=node)

    def cut_cable(self, node, is_cut=True):
        """Take a node's link down at the switch, or up again."""
        self.run("ip", "link", "set", node, "down" if is_cut else "up")

    def slow_down(self, node, rate=None):
        """Limit what a node sends and receives, e.g. to "20mbit"; None lifts the limit."""
        ends = ((node, "login"), ("eth0", node))
        for device, machine in ends:
            self.run("tc", "qdisc", "del", "dev", device, "root", machine=machine, check=False)
            if rate is not None:
                limit = f"tc qdisc add dev {device} root tbf rate {rate} burst 64kb latency 400ms"
                self.run(*limit.split(), machine=machine)

    def wait_until_up(self):
        """Wait until Slurm has heard of every node, busy or not."""
        wait_for(
            lambda: not re.search(r"down|unk|\*", self.run("sinfo", "-h", "-N", "-o", "%T")),
            START_SEC,
            lambda: "nodes are not up:\n" + self.run("sinfo", "-N", "-l") + self.logs(),
        )

    def logs(self):
        """Return the ends of Slurm's own logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs)

    def _write_files(self):
        folder = self.folder
        for name in ("state", "spool", "munge", "gpu", "ssh"):
            (folder / name).mkdir(mode=0o700)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(GPUS):
            (folder / f"gpu/gpu{number}").touch()
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "ssh/key"], check=True
        )
        (folder / "ssh/sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        (folder / "ssh/ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        hosts = ["127.0.0.1 localhost", f"{LOGIN_ADDRESS} login"]
        lines = []
        for number, node in enumerate(self.nodes, 11):
            hosts.append(f"{NETWORK}.{number} {node}")
            lines.append(
                f"NodeName={node} NodeAddr={NETWORK}.{number} CPUs={CPUS} CoresPerSocket={CPUS} "
                f"RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            )
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        text = SLURM_CONF.format(
            login=LOGIN_ADDRESS,
            folder=folder,
            node_timeout=NODE_TIMEOUT_SEC,
            grace=GRACE_SEC,
            nodes="\n".join(lines),
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu/gpu[0-{GPUS - 1}]\n")

    def _login_script(self):
        munge = f"{self.folder}/munge"
        return f"""
            ip link add bridge type bridge
            ip address add {LOGIN_ADDRESS}/24 dev bridge
            ip link set bridge up
            munged --force --key-file={munge}/key --socket={munge}/socket \\
              --seed-file={munge}/seed --pid-file={munge}/pid --log-file={self.folder}/munged.log
            slurmctld -f {self.folder}/slurm.conf
            """

    def _boot(self, name, script, parent=None):
        """Start a machine: new namespaces whose first process runs `script` and stays."""
        script = f"""
            set -e
            hostname {name}
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/ssh/ssh_config /etc/ssh/ssh_config
            mount -t tmpfs none /run
            mkdir /run/sshd  # sshd insists on it
            ip link set lo up
            {script}
            touch {self.folder}/{name}.up
            {STAY[parent is None]}
            """
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        command += ["bash", "-c", script]
        if parent is not None:
            command = self.inside(parent, *command)
        (self.folder / f"{name}.up").unlink(missing_ok=True)
        with open(self.folder / f"{name}.boot.log", "w") as log:
            starter = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if parent is None else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
            )
        found = []

        def find():
            assert starter.poll() is None, f"{name} does not start; it {MISSING}\n{self.logs()}"
            found[:] = _descendants(starter.pid)
            return bool(found) and _command(found[-1]).startswith("bash\0-c")

        wait_for(find, START_SEC, self.logs)
        self._machines[name] = Machine(starter, found[-1])
        if parent is None:
            wait_for((self.folder / f"{name}.up").exists, START_SEC, self.logs)


def _descendants(pid):
    """Return the only child of a process, its only child, and so on while the chain is one."""
    chain = []
    while True:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if children and not _command(pid).startswith("bash\0-c"):
                pid = int(children[0])
                chain.append(pid)
                continue
        return chain


def _command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def wait_for(condition, seconds, explain):
    """Wait until `condition()`; fail with what `explain()` says when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


def main():
    """Open a shell on the login node of a new cluster."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs="*", default=["bash"])
    args = parser.parse_args()
    with LocalSlurm(args.nodes) as cluster:
        command = cluster.inside("login", *args.command)
        sys.exit(subprocess.run(command, env=cluster.environment(), check=False).returncode)


if __name__ == "__main__":
    main()
