"""What the supervisor decides, reads and calls, without a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipar.errors import ConfigError
from mpipar.launch.hosts import Host, Remote, expand_tasks, parse_hosts
from mpipar.launch.mpirun import Mpirun, find_mpirun
from mpipar.launch.options import Options, parse, split
from mpipar.launch.verdict import End, Limits, judge
from mpipar.supervised import (
    Ending,
    Outcome,
    Sign,
    SignsOfLife,
    read_outcome,
    read_sign,
    started_again,
    write_outcome,
)


def test_the_command_begins_behind_the_first_dashes() -> None:
    assert split(["-n", "2", "--", "env", "--", "x"]) == (["-n", "2"], ["env", "--", "x"])
    assert split(["-n", "2"]) == (["-n", "2"], [])
    options, command = parse(["-n", "2", "--hosts", "a:2", "--no-in-place", "--", "true", "--ranks", "3"])
    assert options == Options(ranks=2, hosts="a:2", in_place=False) and command == ["true", "--ranks", "3"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["-n", "2"], "which command?"),
        (["-n", "2", "--", "no-such-program"], "'no-such-program'"),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        parse(arguments)


@pytest.mark.parametrize("option", ["--ranks 0", "--min-ranks 0", "--restarts -1", "--hang-s -1.0", "--grace-s -1.0"])
def test_options_that_cannot_be(option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} must be at least"):
        parse([*option.split(), "--", "true"])


def test_hosts() -> None:
    assert parse_hosts("h1:2, h2") == (Host("h1", 2), Host("h2", 1))
    for text in ("", "h1:", "h1:0", ":2", "h1:two", "h1,,h2", "h1:1,h1:2"):
        with pytest.raises(ConfigError, match="--hosts"):
            parse_hosts(text)


def test_tasks_of_an_allocation() -> None:
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks("4") == [4]
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE"):
        expand_tasks("2(x")


def test_hosts_that_do_not_answer(tmp_path: Path) -> None:
    """Through an agent that knows one host, fails on another, and hangs on a third."""
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\ncase $1 in h2) eval "$2";; h3) exit 255;; *) exec sleep 1000;; esac\n')
    agent.chmod(0o700)
    remote = Remote(str(agent), {}, lambda: None)
    hosts = [Host(name) for name in ("localhost", "h2", "h3", "h4")]
    assert remote.others(hosts) == hosts[1:], "this one is always there"
    assert remote.run(hosts, f"echo here > {tmp_path}/h2", limit_s=2.0) == hosts[2:]
    assert (tmp_path / "h2").read_text() == "here\n"
    assert remote.run(hosts[:2], "exit 3") == [Host("h2")]


@pytest.mark.parametrize(
    ("outcome", "asked", "futile", "ranks_left", "exit_code"),
    [
        ("done", None, 1, 4, 0),
        ("done", "interrupt", 1, 4, 0),
        ("failed", None, 1, 4, 1),
        ("failed", "stop", 1, 4, 1),
        ("stopped", "stop", 9, 4, 75),
        ("stopped", None, 1, 4, 75),
        ("stopped", "interrupt", 1, 4, 130),
        (None, "stop", 1, 4, 75),
        (None, "interrupt", 1, 4, 130),
        (None, None, 1, 4, None),
        (None, None, 3, 4, None),
        (None, None, 4, 4, 1),
        (None, None, 1, 2, None),
        (None, None, 1, 1, 75),
        (None, None, 9, 1, 75),
    ],
)
def test_what_follows_from_an_end(
    outcome: Ending | None, asked: str | None, futile: int, ranks_left: int, exit_code: int | None
) -> None:
    said = Outcome(outcome) if outcome else None
    end = End("ended", said, asked, Sign(1200))  # type: ignore[arg-type]
    verdict = judge(end, Limits(restarts=3, min_ranks=2), futile=futile, ranks_left=ranks_left)
    assert verdict.exit_code == exit_code
    assert verdict.why == "" if outcome == "done" else "after step 1,200" in verdict.why


def test_what_is_said_of_a_new_start() -> None:
    end = End("ended without a word (exit code 137 of mpirun)", None, None, Sign(120, 100))
    verdict = judge(end, Limits(restarts=3, min_ranks=1), futile=1, ranks_left=8)
    assert verdict.why == (
        "the job ended without a word (exit code 137 of mpirun) after step 120: starting again on 8 ranks (1 of 3)"
    )


def test_mpirun_is_called_as_its_mpi_wants_it() -> None:
    hosts = [Host("h1", 2), Host("h2", 1)]
    ours = Mpirun("/bin/mpirun", "Open MPI", survives=True)
    line = " ".join(ours.command(3, hosts, ["python", "x.py"], more="--mca pml 'ob1'", variables=["A", "B"]))
    assert line == (
        "/bin/mpirun --bind-to none --with-ft ulfm -x A -x B --host h1:2,h2:1 --mca pml ob1 -n 3 python x.py"
    )
    hydra = Mpirun("mpirun", "Hydra", survives=False)
    line = " ".join(hydra.command(3, hosts, ["python"], more="", variables=["A"]))
    assert line == "mpirun --bind-to none -hosts h1:2,h2:1 -n 3 python"
    other = Mpirun("mpirun", "unknown", survives=False)
    assert other.command(2, [], ["python"], more="", variables=["A"]) == ["mpirun", "-n", "2", "python"]
    assert not other.variables(Path("a"), Path("b"), None)
    assert ours.variables(Path("a"), Path("b"), "rsh -q")["PRTE_MCA_plm_ssh_agent"] == "rsh -q"


@pytest.mark.parametrize(
    ("version", "ft", "kind", "survives"),
    [
        ("mpirun (Open MPI) 5.0.11", "FT MPI support: yes", "Open MPI", True),
        ("mpirun (Open MPI) 4.1.4", "FT Checkpoint support: no", "Open MPI", False),
        ("HYDRA build details:", "FT MPI support: yes", "Hydra", False),
        ("something else", "", "unknown", False),
    ],
)
def test_mpirun_says_what_it_is(version: str, ft: str, kind: str, survives: bool, tmp_path: Path) -> None:
    for name, says in (("mpirun", version), ("ompi_info", ft)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o700)
    path = str(tmp_path / "mpirun")
    assert find_mpirun(path, survives=True) == Mpirun(path, kind, survives)  # type: ignore[arg-type]
    assert not find_mpirun(path, survives=False).survives
    with pytest.raises(ConfigError, match="--mpirun"):
        find_mpirun(str(tmp_path / "none"), survives=True)


def test_what_a_job_says_is_heard(tmp_path: Path) -> None:
    environ = {"MPIPAR_LAUNCH": str(tmp_path)}
    assert read_outcome(tmp_path) is None and read_sign(tmp_path) is None
    write_outcome("failed", "no room", environ)
    assert read_outcome(tmp_path) == Outcome("failed", "no room")
    (tmp_path / "outcome").write_text('{"outcome": "don')
    assert read_outcome(tmp_path) is None, "half a file"
    signs = SignsOfLife(environ)
    signs.give(7)
    assert read_sign(tmp_path) == Sign(7, 0)
    signs.give(8)
    assert read_sign(tmp_path) == Sign(7, 0), "not more than one a second"
    signs.give(9, saved=9)
    assert read_sign(tmp_path) == Sign(9, 9), "but for a checkpoint"
    assert not list(tmp_path.glob(".*")), "nothing stays beside them"


def test_without_a_supervisor_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_outcome("done", environ={})
    SignsOfLife({}).give(1)
    gone = {"MPIPAR_LAUNCH": str(tmp_path / "gone"), "MPIPAR_LAUNCH_AGAIN": "0"}
    write_outcome("done", environ=gone)
    SignsOfLife(gone).give(1)
    assert not list(tmp_path.iterdir())
    assert not started_again({}) and not started_again(gone) and started_again({"MPIPAR_LAUNCH_AGAIN": "1"})
