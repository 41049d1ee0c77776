"""Network namespaces, joined by links of known speed: the ground on which `hosts` builds.

Each host has a namespace with a device `eth0` of its own; one more is the switch between them.

    without delay   a veth pair from each host to a bridge; a token bucket at both its ends limits upload and download
    with delay      TAP devices and a process that carries frames between them: `delay_switch`

All names begin with `mpipar-hosts-PID-`, so that runs at the same time do not meet, and what a killed run has left is
recognised by the next: its process is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import delay_switch
from benchmarks.command import ENDING
from mpipar.errors import ConfigError, LaunchError

_SUBNET = "10.77.0"
_NAMESPACES = Path("/run/netns")  # where `ip netns` keeps them
_NAME = re.compile(r"mpipar-hosts-\d+-\w+")

_PROGRAMS = ("ip", "tc", "setpriv", "unshare", "mount", "hostname")

# Two buckets make a link. The large one holds its average speed, and what a late timer has missed is made up for. The
# small one keeps that from being much faster than the link: after a rest, a message gains no more than `_AHEAD_S`.
_CATCH_UP_S = 1e-3
_CATCH_UP_SPEED = 1.1  # times that of the link
_AHEAD_S = 120e-6
_FRAME_BYTES = (4_000, 64_000)  # what TCP may give to the card at once, so that it fits into the small bucket

_QUEUE_MS = 20

_PATIENCE_S = 10.0  # for what takes milliseconds


class Network:
    """Hosts h1, h2 and so on, and the links between them, from `with` to its end.

    Args:
        count: Hosts.
        rate_mbit: Of each host's link, in Mbit/s (1e6 bits, headers included), in both directions at once.
        delay_ms: From any host to any other, one way.

    Raises:
        LaunchError: This machine cannot make them.
    """

    def __init__(self, count: int, rate_mbit: float, delay_ms: float = 0.0):
        if not 1 <= count <= 250:
            raise ConfigError(f"--hosts {count} must be 1 to 250")
        if not 0.1 <= rate_mbit <= 100_000:
            raise ConfigError(f"--rate-mbit {rate_mbit:g} must be 0.1 to 100000")
        if not 0 <= delay_ms <= 10_000:
            raise ConfigError(f"--delay-ms {delay_ms:g} must be 0 to 10000")
        self.rate_mbit = rate_mbit
        self.delay_ms = delay_ms
        self.hosts = [f"h{i + 1}" for i in range(count)]
        self.folder = Path()
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Network:
        if os.geteuid() != 0:
            raise LaunchError("hosts on one machine are network namespaces, which only root can make")
        missing = [program for program in _PROGRAMS if shutil.which(program) is None]
        if missing:
            raise LaunchError(f"hosts on one machine need `{missing[0]}`: install iproute2, util-linux and hostname")
        _remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=f"mpipar-hosts-{os.getpid()}-"))
        try:
            self._bring_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C of somebody impatient comes through when all is gone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            _remove(self.folder)
            if self._switch is not None:
                self._switch.communicate()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def namespace(self, host: str) -> str:
        """The name of a host's namespace; that of the switch for "switch"."""
        return f"{self.folder.name}-{host}"

    def address(self, host: str) -> str:
        """The IPv4 address of a host."""
        return f"{_SUBNET}.{host[1:]}"

    def end_processes(self) -> None:
        """Kills what runs on the hosts: all that was started there, for a process keeps the host it was started on."""
        _kill_all(self.namespace(host) for host in self.hosts)

    def _bring_up(self) -> None:
        switch = self.namespace("switch")
        for host in ["switch", *self.hosts]:
            _run("ip", "netns", "add", self.namespace(host))
            _run("ip", "-n", self.namespace(host), "link", "set", "lo", "up")
        if self.delay_ms:
            self._start_switch(switch)
        else:
            _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in self.hosts:
            here = self.namespace(host)
            if self.delay_ms:
                _run("ip", "-n", switch, "link", "set", f"port-{host}", "netns", here, "name", "eth0")
            else:
                self._join_bridge(switch, f"port-{host}", here)
            _run("ip", "-n", here, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _run("ip", "-n", here, "link", "set", "eth0", "up")
            # Programs ask for the route to the outside to find out by which device this host reaches others.
            _run("ip", "-n", here, "route", "add", "default", "dev", "eth0")

    def _join_bridge(self, switch: str, port: str, host: str) -> None:
        """The link of one host, up on the side of the switch."""
        _run("ip", "link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", switch)
        rate = self.rate_mbit * 1e6
        ahead = max(int(rate / 8 * _AHEAD_S), _FRAME_BYTES[0])
        burst = max(int(rate / 8 * _CATCH_UP_S), 2 * ahead)
        frame = min(ahead, _FRAME_BYTES[1])
        bucket = f"tbf rate {rate:.0f}bit burst {burst}b latency {_QUEUE_MS}ms"
        frames = f"peakrate {rate * _CATCH_UP_SPEED:.0f}bit mtu {ahead + 1000}b"
        for namespace, device in ((host, "eth0"), (switch, port)):
            _run("ip", "-n", namespace, "link", "set", device, "gso_max_size", str(frame))
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *f"{bucket} {frames}".split())
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")

    def _start_switch(self, switch: str) -> None:
        launch = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", switch, sys.executable]
        ports = [f"port-{host}" for host in self.hosts]
        self._switch = subprocess.Popen(
            [*launch, delay_switch.__file__, str(self.rate_mbit), str(self.delay_ms), *ports],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us: we end it when nobody needs it any more
        )
        assert self._switch.stdout is not None
        said = self._switch.stdout.readline().strip()
        if said != "ready":
            raise LaunchError(f"links with a delay need TAP devices: {said or 'the switch between them ended'}")


def _remove_leftovers() -> None:
    """Clears what runs have left that were killed."""
    folders = Path(tempfile.gettempdir())
    names = {
        match[0] for place in (_NAMESPACES, folders) for path in place.glob("*") if (match := _NAME.match(path.name))
    }
    for name in names:
        owner = name.split("-")[2]
        if not Path("/proc", owner).exists():
            _remove(folders / name)


def _remove(folder: Path) -> None:
    """Removes the namespaces of one run, all processes in them, and the folder whose name they share."""
    namespaces = [path.name for path in _NAMESPACES.glob(f"{folder.name}-*")]
    _kill_all(namespaces)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _kill_all(namespaces: Iterable[str]) -> None:
    """SIGKILL to every process in these namespaces, until there is none."""
    identities = {_identity(_NAMESPACES / name) for name in namespaces} - {None}
    deadline = time.monotonic() + _PATIENCE_S
    while members := [pid for pid in _processes() if _identity(Path(f"/proc/{pid}/ns/net")) in identities]:
        if time.monotonic() > deadline:
            raise LaunchError(f"process {members[0]} does not end, although it was killed")
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _identity(namespace: Path) -> tuple[int, int] | None:
    """What distinguishes a namespace, whichever way it is reached; None if it, or the process it is of, has gone."""
    try:
        found = namespace.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _run(*command: str) -> None:
    """Runs a command that has nothing to say unless it fails.

    Raises:
        LaunchError: It has failed.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LaunchError(f"`{' '.join(command)}` failed: {said[0] if said else f'exit code {done.returncode}'}")
