"""How the commands of the benchmarks end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from benchmarks.command import ENDING, path_of, run_command
from mpipar.errors import ConfigError, LaunchError

# Says when it can be asked to leave, and that it has come through the end of its `with`.
WAITS = """
import contextlib, time
from benchmarks.command import leave_when_asked
leave_when_asked()
with contextlib.ExitStack() as undo:
    undo.callback(print, "left")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_what_a_command_returns_is_its_exit_code(returned: int | None, code: int) -> None:
    assert run_command(lambda: returned) == code


def test_an_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise ConfigError("--hosts 0 must be at least 1")

    assert run_command(run) == ConfigError.exit_code == 2
    out, err = capsys.readouterr()
    assert not out and err == "mpipar: error: --hosts 0 must be at least 1\n"


def test_an_error_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_leads_through_the_end_of_every_with(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == "left\n"
    assert process.returncode == 128 + number


def test_a_program_that_is_nowhere() -> None:
    with pytest.raises(LaunchError, match="there is no nix-such-program"):
        path_of("nix-such-program")
