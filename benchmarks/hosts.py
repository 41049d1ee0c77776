"""Several hosts on one machine, with links of known speed between them, and an MPI job over them.

    python -m benchmarks.hosts --hosts 4 --ranks 2 --rate-mbit 1000 -- python -m benchmarks allreduce

To MPI and to mpipar these are hosts: each has a name, an address and shared memory of its own, and reaches the others
through its network card only. Cores and files are those of the machine. It needs root, and Linux.

The links are what is measured, as long as the cores can follow: a rank needs a core for its share of the additions
and of TCP.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from benchmarks.command import leave_when_asked, path_of, run_command
from benchmarks.namespaces import Network
from mpipar.command_line import parse
from mpipar.errors import ConfigError, LaunchError
from mpipar.launch.options import split

Order = Literal["slot", "node"]
"""Of ranks: first all of one host, or one of each host in turn."""

# What stands in for ssh. The mounts are seen by the command alone: its host has shared memory of its own, in which
# killed ranks leave nothing behind, and knows the others by name.
_AGENT = """#!/bin/sh
# agent [OPTION...] HOST COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec {run}-"$host" unshare --mount --uts sh -ec '
    hostname "$0"
    mount -t tmpfs tmpfs /dev/shm
    mount --bind {folder}/names /etc/hosts
    eval "$1"' "$host" "$*"
"""


class Hosts:
    """Hosts h1, h2 and so on, from `with` to its end. Then what runs on them is killed, and nothing of them is left.

    Args:
        count: Hosts.
        rate_mbit: Of each host's link, in Mbit/s (1e6 bits, headers included), in both directions at once.
        delay_ms: From any host to any other, one way.

    Raises:
        ConfigError: There are no such hosts or links.
        LaunchError: This machine cannot make them: see `why_not`.
    """

    def __init__(self, count: int, rate_mbit: float, delay_ms: float = 0.0):
        self._network = Network(count, rate_mbit, delay_ms)
        self.names = self._network.hosts

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as undo:
            network = undo.enter_context(self._network)
            names = [f"{network.address(name)} {name}\n" for name in self.names]
            (network.folder / "names").write_text("".join(["127.0.0.1 localhost\n", *names]))
            self._agent = network.folder / "agent"
            self._agent.write_text(_AGENT.format(run=network.folder.name, folder=shlex.quote(str(network.folder))))
            self._agent.chmod(0o700)
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._network.__exit__(*error)

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host. It gets SIGTERM when the process that has started it dies."""
        return ["setpriv", "--pdeathsig", "TERM", str(self._agent), name, f"exec {shlex.join(command)}"]

    def mpirun(
        self,
        ranks: Sequence[int],
        command: Sequence[str],
        *,
        by: Order = "slot",
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Runs an MPI job over the hosts; its output is that of this process. When it is over, no rank is left.

        Args:
            ranks: How many each host gets, at least 1.
            command: What a rank runs.
            by: In what order: first all of one host, or one of each host in turn.
            env: Variables for the ranks, besides those of this process.
            timeout_s: After this time the job is killed.

        Returns:
            The exit code of mpirun.

        Raises:
            LaunchError: There is no mpirun, or the time has passed.
        """
        assert len(ranks) == len(self.names) and min(ranks) > 0
        slots = ",".join(f"{name}:{count}" for name, count in zip(self.names, ranks, strict=True))
        place = ["--host", slots, "-n", str(sum(ranks)), "--map-by", f"{by}:nooversubscribe", "--bind-to", "none"]
        # All hosts share the machine's cores: a rank that waits gives its core to one that has something to do.
        modest = ["--mca", "mpi_yield_when_idle", "1"]
        launch = [path_of("mpirun"), "--prtemca", "plm_ssh_agent", str(self._agent), *place, *modest, *command]
        own = {
            "TMPDIR": str(self._network.folder),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        process = subprocess.Popen(
            self.on(self.names[0], launch),
            env={**os.environ, **own, **(env or {})},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: it ends the job from here
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"the job did not end within {timeout_s:g} s and was killed") from None
        finally:
            self._network.end_processes()
            process.wait()


def why_not(delay_ms: float = 0.0) -> str | None:
    """Why there can be no hosts here, with links of this delay, in one line; None if there can. It tries."""
    try:
        with Hosts(1, rate_mbit=1000, delay_ms=delay_ms) as hosts:
            version = [path_of("mpirun"), "--version"]
            done = subprocess.run(hosts.on("h1", version), capture_output=True, text=True, timeout=60, check=False)
    except LaunchError as error:
        return str(error)
    said = (done.stdout + done.stderr).strip().partition("\n")[0]
    if done.returncode:
        return f"a host cannot run a command: {said}"
    return None if "(Open MPI) 5." in said else f"the hosts need the mpirun of Open MPI 5, here it is {said}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """Runs an MPI job over several hosts on this machine: python -m benchmarks.hosts [OPTIONS] -- PROGRAM..."""

    hosts: int = 2
    """Hosts. They are called h1, h2 and so on."""
    ranks: Annotated[str, tyro.conf.arg(aliases=["--ranks-per-host"])] = "1"
    """Ranks of each host: one number for all, or one for each, as in 3,1."""
    rate_mbit: float = 1000.0
    """Speed of each host's link, in Mbit/s, in both directions at once."""
    delay_ms: float = 0.0
    """From a host to another, one way, in ms."""
    by: Order = "slot"
    """Order of ranks: first all of one host, or one of each host in turn."""
    timeout_s: float | None = None
    """The job is killed after this time."""

    def run(self, program: Sequence[str]) -> int:
        """Runs the job; returns its exit code."""
        if not program:
            raise ConfigError("what shall the hosts run? python -m benchmarks.hosts [OPTIONS] -- PROGRAM...")
        hosts = Hosts(self.hosts, self.rate_mbit, self.delay_ms)
        ranks = self._ranks()
        with hosts:
            delay = f"{self.delay_ms:g} ms one way" if self.delay_ms else "no delay"
            print(f"# ranks of the hosts: {ranks}; links of {self.rate_mbit:g} Mbit/s, {delay}", flush=True)
            return hosts.mpirun(ranks, program, by=self.by, timeout_s=self.timeout_s)

    def _ranks(self) -> list[int]:
        try:
            ranks = [int(count) for count in self.ranks.split(",")]
        except ValueError:
            raise ConfigError(f"--ranks {self.ranks}: expected a number, or one for each host, as in 3,1") from None
        if len(ranks) == 1:
            ranks *= self.hosts
        if len(ranks) != self.hosts:
            raise ConfigError(f"--ranks {self.ranks} is for {len(ranks)} hosts, but there are --hosts {self.hosts}")
        if min(ranks) < 1:
            raise ConfigError(f"--ranks {self.ranks}: each host needs at least 1")
        return ranks


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    own, program = split(arguments)
    return run_command(lambda: parse(Command, "python -m benchmarks.hosts", own).run(program))


if __name__ == "__main__":
    leave_when_asked()
    sys.exit(main(sys.argv[1:]))
