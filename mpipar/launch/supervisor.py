"""Start, watch, judge, and again."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mpipar.errors import ConfigError
from mpipar.launch.folders import Folders, removal_script, remove_dead
from mpipar.launch.hosts import Host, Remote, allocated_hosts, kill_script, parse_hosts
from mpipar.launch.job import Job
from mpipar.launch.mpirun import find_mpirun, forwarded
from mpipar.launch.options import Options
from mpipar.launch.processes import end_descendants
from mpipar.launch.requests import Requests
from mpipar.launch.verdict import EXIT_DONE, End, Limits, judge
from mpipar.launch.watch import Patience, Watch
from mpipar.supervised import AGAIN, FOLDER


class Supervisor:
    """A command, run to its end over as many starts as it takes. A context: what it has made is removed at its end.

    Args:
        options: The limits that the user gives.
        command: What a rank runs.
        requests: Signals.

    Raises:
        ConfigError: The options do not fit together.
        LaunchError: There is no mpirun.
    """

    def __init__(self, options: Options, command: Sequence[str], requests: Requests):
        self._options = options
        self._command = command
        self._requests = requests
        self._hosts = parse_hosts(options.hosts) if options.hosts else allocated_hosts(os.environ)
        self._ranks = _num_ranks(options, self._hosts)
        self._mpirun = find_mpirun(options.mpirun, survives=options.in_place)
        self._remote = Remote(options.agent, os.environ, requests.unblock)
        self._lost: list[Host] = []
        self._starts = 0
        # A job that the batch system has put back into the queue goes on, as one that was lost here.
        self._again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0

    def __enter__(self) -> Supervisor:
        below = self._options.scratch
        if below is None and self._remote.others(self._hosts):
            below = Path.cwd()
        if dead := remove_dead(below):
            self._remote.run(self._hosts, removal_script(dead))
        self._folders = Folders(below)
        return self

    def __exit__(self, *error: object) -> None:
        end_descendants()  # of which there are some if an error has led here
        self._folders.remove()
        reports = self._folders.reports
        self._remote.run(self._there(), f"{kill_script(str(reports))}; {removal_script([reports.name])}")

    def run(self) -> int:
        """Runs the command. Returns the exit code of the supervisor."""
        saved, futile = 0, 0
        limits = Limits(self._options.restarts, self._options.min_ranks)
        while True:
            end = self._start()
            new = end.sign.saved if end.sign else 0
            saved, futile = max(saved, new), 1 if new > saved else futile + 1
            if end.outcome is None and end.asked is None:
                self._ask_hosts()
                end = replace(end, asked=self._requests.wait(0))  # meanwhile
            verdict = judge(end, limits, futile=futile, ranks_left=self._ranks_left())
            if verdict.exit_code is None:
                say(verdict.why)
                continue
            if verdict.exit_code == EXIT_DONE and self._starts > 1:
                say(f"done, in {self._starts} starts")
            elif verdict.why:
                say(f"{verdict.why} (exit code {verdict.exit_code})")
            return verdict.exit_code

    def _start(self) -> End:
        """Starts the command on what is left, and waits for its end."""
        self._starts += 1
        # An allocation that is complete is known to mpirun.
        ranks, hosts = self._ranks_left(), self._there() if self._options.hosts or self._lost else []
        # A folder for each start: what is left of an earlier one somewhere must not speak for this one.
        folder = self._folders.reports / f"start-{self._starts}"
        folder.mkdir()
        own = {FOLDER: str(folder), AGAIN: str(int(self._again))}
        files = self._folders.files / folder.name
        environ = {
            **os.environ,
            **own,
            **self._mpirun.variables(files, self._folders.shared_memory, self._options.agent),
        }
        command = self._mpirun.command(
            ranks, hosts, self._command, more=self._options.mpirun_args, variables=forwarded(own)
        )
        job = Job(command, environ, self._requests.unblock)
        patience = Patience(self._options.hang_s, self._options.grace_s)
        end = Watch(job, ranks, folder, self._requests, patience).until_the_end()
        self._again = self._again or end.sign is not None
        return end

    def _there(self) -> list[Host]:
        """The hosts that are left."""
        return [host for host in self._hosts if host not in self._lost]

    def _ranks_left(self) -> int:
        return min(self._ranks, sum(host.slots for host in self._there())) if self._lost else self._ranks

    def _ask_hosts(self) -> None:
        """Finds out which hosts are there; on those, ends what is left of the job."""
        silent = self._remote.run(self._hosts, kill_script(str(self._folders.reports)))
        for host in silent:
            if host not in self._lost:
                say(f"host {host.name} does not answer: going on without it")
        for host in self._lost:
            if host not in silent:
                say(f"host {host.name} is there again")
        self._lost = silent


def say(text: str) -> None:
    """A line for people, among those of the job."""
    sys.stdout.flush()
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _num_ranks(options: Options, hosts: Sequence[Host]) -> int:
    slots = sum(host.slots for host in hosts)
    if options.ranks is None and not hosts:
        raise ConfigError("how many ranks? -n 8")
    if options.ranks is not None and options.hosts and options.ranks > slots:
        raise ConfigError(f"--hosts {options.hosts} takes {slots} ranks, not {options.ranks}: h1:4 is a host with 4")
    ranks = options.ranks or slots
    if ranks < options.min_ranks:
        raise ConfigError(f"{ranks} ranks are fewer than --min-ranks {options.min_ranks}")
    return ranks
