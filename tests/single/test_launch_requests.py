"""Signals as requests: none is lost, none comes at a bad moment, and children get theirs."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Sends itself signals, and says which requests came of them, and which of the signals a child has blocked.
PROGRAM = """
import os, signal, subprocess, sys
ignored, sent = sys.argv[1], sys.argv[2].split(",")
for name in ("SIGHUP", "SIGINT"):  # a job in the background, or under nohup, has them ignored
    signal.signal(signal.Signals[name], signal.SIG_DFL)
if ignored:
    signal.signal(signal.Signals[ignored], signal.SIG_IGN)
from mpipar.launch.requests import Requests
requests = Requests()
for name in sent:
    os.kill(os.getpid(), signal.Signals[name])
found = [requests.wait(0) for _ in sent]
print(found, requests.wait(0.01))
blocked = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
for prepare in (None, requests.unblock):
    child = subprocess.run([sys.executable, "-c", blocked], preexec_fn=prepare, stdout=subprocess.PIPE, text=True)
    print(child.stdout.strip() == "[]")
print(requests.wait(30))  # a child has ended: this is no request, and no time to wait
"""


def lines(ignored: str, *sent: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ignored, ",".join(sent)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("sent", "request_"), [("SIGTERM", "stop"), ("SIGUSR1", "stop"), ("SIGHUP", "stop"), ("SIGINT", "interrupt")]
)
def test_what_signals_ask_for(sent: str, request_: str) -> None:
    found, inherited, unblocked, ended = lines("", sent)
    assert found == f"['{request_}'] None"
    assert (inherited, unblocked) == ("False", "True"), "only a child that asks for it gets signals as usual"
    assert ended == "None"


def test_several_wait_for_their_turn() -> None:
    assert lines("", "SIGTERM", "SIGINT")[0] in ("['stop', 'interrupt'] None", "['interrupt', 'stop'] None")


@pytest.mark.parametrize("number", ["SIGHUP", "SIGINT"])
def test_what_was_ignored_stays_so(number: str) -> None:
    assert lines(number, number, "SIGTERM")[0] == "['stop', None] None"
