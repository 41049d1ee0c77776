"""Signals, as requests to stop. They are blocked and fetched, so none is lost and none comes at a bad moment."""

from __future__ import annotations

import signal
from typing import Literal

Request = Literal["stop", "interrupt"]

_MEANING: dict[int, Request] = {
    signal.SIGTERM: "stop",
    signal.SIGUSR1: "stop",
    signal.SIGHUP: "stop",
    signal.SIGINT: "interrupt",
}


class Requests:
    """From its making on, signals wait here.

    What was ignored before stays so: SIGHUP under nohup, SIGINT in the background of a script.
    """

    def __init__(self) -> None:
        self._numbers = {number for number in _MEANING if signal.getsignal(number) is not signal.SIG_IGN}
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, {*self._numbers, signal.SIGCHLD})

    def wait(self, limit_s: float) -> Request | None:
        """The next request; None after this time, or earlier if a child process has changed its state."""
        received = signal.sigtimedwait({*self._numbers, signal.SIGCHLD}, limit_s)
        return None if received is None else _MEANING.get(received.si_signo)

    def unblock(self) -> None:
        """For a child, before it becomes another program: that gets signals as if it had been started by hand."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
