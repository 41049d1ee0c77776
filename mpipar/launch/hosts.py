"""Where ranks may run, and which of those hosts are still there.

Hosts come from --hosts, or from the allocation of Slurm. Without either there is one host, this one, or a list that
mpirun gets from another batch system; then nothing is asked of hosts, and a start is again on all of them.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpipar.errors import ConfigError
from mpipar.supervised import FOLDER

# How long a host may take to answer. A network that is busy with the dying job answers late.
_ANSWER_S = 20.0

_SRUN = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--input=none", "--quiet", "--nodelist")
_SSH = ("ssh", "-o", "BatchMode=yes")


@dataclass(frozen=True)
class Host:
    """A host.

    Args:
        name: As mpirun knows it.
        slots: How many ranks it takes.
    """

    name: str
    slots: int = 1

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def parse_hosts(text: str) -> tuple[Host, ...]:
    """ "h1:2,h2:2"; a host without a number takes one rank.

    Raises:
        ConfigError: It is no such list.
    """
    hosts = []
    for part in text.split(","):
        name, slots = part.strip().rsplit(":", 1) if ":" in part else (part.strip(), "1")
        if not name or not slots.isdecimal() or int(slots) < 1:
            raise ConfigError(f"--hosts {text}: expected hosts with the ranks that each takes, as in h1:2,h2:2")
        hosts.append(Host(name, int(slots)))
    names = [host.name for host in hosts]
    if len(set(names)) < len(names):
        raise ConfigError(f"--hosts {text}: a host is named twice: give it once, with all of its ranks")
    return tuple(hosts)


def allocated_hosts(environ: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of a Slurm allocation; none outside of one."""
    nodes, tasks = environ.get("SLURM_JOB_NODELIST"), environ.get("SLURM_TASKS_PER_NODE")
    if nodes is None or tasks is None:
        return ()
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"scontrol does not say which hosts {nodes} are: {error}") from error
    return tuple(map(Host, shown.stdout.split(), expand_tasks(tasks)))


def expand_tasks(text: str) -> list[int]:
    """The ranks of each node from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={text} is not understood")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


class Remote:
    """Runs commands on the other hosts, as mpirun would: through srun inside an allocation, else ssh or what is given.

    Args:
        agent: A command like ssh, which is given a host and a command line; None for the usual one.
        environ: The environment, which says whether this is an allocation, and what this host is called in it.
        prepare: For each of the processes, before it becomes another program.
    """

    def __init__(self, agent: str | None, environ: Mapping[str, str], prepare: Callable[[], None]):
        slurm = "SLURM_JOB_ID" in environ
        self._agent = tuple(shlex.split(agent)) if agent else _SRUN if slurm else _SSH
        self._shell = ("sh", "-c") if self._agent is _SRUN else ()
        name = socket.gethostname()
        self._own = {name, name.partition(".")[0], "localhost", "127.0.0.1", environ.get("SLURMD_NODENAME", name)}
        self._prepare = prepare

    def others(self, hosts: Sequence[Host]) -> list[Host]:
        """Those that are not this one."""
        return [host for host in hosts if host.name not in self._own]

    def run(self, hosts: Sequence[Host], script: str, limit_s: float = _ANSWER_S) -> list[Host]:
        """Runs a shell script on all hosts but this one, at once. Returns those on which it did not succeed in time."""
        running = {host: self._start(host, script) for host in self.others(hosts)}
        deadline = time.monotonic() + limit_s
        silent = []
        for host, process in running.items():
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code:
                silent.append(host)
        return silent

    def _start(self, host: Host, script: str) -> subprocess.Popen[bytes]:
        nothing = subprocess.DEVNULL
        command = [*self._agent, host.name, *self._shell, script]
        try:
            return subprocess.Popen(
                command, stdin=nothing, stdout=nothing, stderr=nothing, preexec_fn=self._prepare, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"hosts cannot be reached, {command[0]} does not start: {error.strerror}") from error


def kill_script(folder: str) -> str:
    """Kills what a job has left running on a host: the processes that were given this folder, or one below it."""
    mark = shlex.quote(f"{FOLDER}={folder}/")
    return (
        f'for f in /proc/[0-9]*/environ; do if grep -qsF {mark} "$f"; then p=${{f#/proc/}}; '
        "kill -9 ${p%/environ}; fi; done; true"
    )
