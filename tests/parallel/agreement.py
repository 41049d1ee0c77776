"""A pytest plugin: ranks that run the same tests agree on each verdict, and rank 0 reports for all.

Each phase of a test (set-up, call, tear-down) ends with an exchange of outcomes. A test that failed on one rank has
failed on all, so that all go on with the same next test; the report names the ranks and holds their tracebacks.

    a rank fails, the others come to the exchange      one report, on rank 0
    a rank fails, the others are stuck in the test     it says so alone after `PATIENCE_S`
    nobody comes                                       the time limit: every rank says where it is, and the job ends
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from typing import Any, NoReturn

import pytest

from mpipar.comm import Communicator

PATIENCE_S = 30.0  # longer than it takes an operation in a test to find that its peer is silent

FAILED = pytest.StashKey[bool]()
"""Set in the stash of an item one of whose phases has failed on any rank."""


class Agreement:
    """The plugin.

    Args:
        ranks: All ranks, on a communicator that no test uses.
    """

    def __init__(self, ranks: Communicator) -> None:
        self.ranks = ranks
        self.collection_errors: list[str] = []
        self.failures: list[str] = []
        self.stderr = os.dup(2)  # the terminal: pytest redirects file descriptor 2 while tests run

    def pytest_report_header(self) -> str:
        return f"ranks: {self.ranks.size}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Ends the session on all ranks unless all have collected the same tests."""
        found = self.ranks.all_gather_object(([item.nodeid for item in session.items], self.collection_errors))
        errors = {rank: "\n".join(errors) for rank, (_, errors) in enumerate(found) if errors}
        if errors:
            pytest.exit(f"tests cannot be collected\n{by_speaker(errors)}", returncode=2)
        for rank, (tests, _) in enumerate(found):
            if tests != found[0][0]:
                differing = sorted(set(tests) ^ set(found[0][0])) or "in another order"
                pytest.exit(f"ranks 0 and {rank} have collected different tests: {differing}", returncode=2)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self.ranks.size > 1:
            self.agree(report)
        if report.failed:
            item.stash[FAILED] = True
            self.failures.append(f"{item.nodeid}: {report.longreprtext}")
        return report

    def agree(self, report: pytest.TestReport) -> None:
        """Collective: the worst outcome on any rank becomes the outcome on all."""
        # To pytest, what xfail expects is a skip with a mark; here it is an outcome of its own.
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        text = describe(report) if report.failed else ""
        impatient = threading.Timer(PATIENCE_S, self.say_alone, [report.nodeid, text])
        impatient.daemon = True
        if report.failed:
            impatient.start()
        everyones = self.ranks.all_gather_object((outcome, text))
        impatient.cancel()
        outcomes = [outcome for outcome, _ in everyones]
        if "failed" in outcomes:
            report.longrepr = by_speaker({rank: text for rank, (_, text) in enumerate(everyones) if text})
        elif len(set(outcomes)) > 1:
            report.longrepr = f"by rank: {', '.join(outcomes)}. A test has one outcome, the same on all ranks"
        else:
            return
        report.outcome = "failed"

    def say_alone(self, test: str, text: str) -> None:
        """The exchange may never come, and the reason must not be lost with it."""
        self.write(f"{test} failed on rank {self.ranks.rank}; other ranks are still in it\n{text}")

    @pytest.hookimpl
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        timer = threading.Timer(settings.timeout, self.give_up, [item, settings.timeout])
        timer.daemon = True
        timer.start()
        item.cancel_timeout = timer.cancel  # type: ignore[attr-defined]  # what pytest-timeout calls after the test
        return True

    def give_up(self, item: pytest.Item, limit_s: float) -> NoReturn:
        """The limit passes on all ranks at about the same time: each waits until those before it have spoken."""
        time.sleep(0.2 * self.ranks.rank)
        if self.ranks.rank == 0:
            self.write("\n\n".join(self.failures))
        self.write(
            f"{item.nodeid} is not done after {limit_s:.0f} s. Rank {self.ranks.rank} is here:\n{where_main_is()}"
        )
        time.sleep(0.2 * (self.ranks.size - self.ranks.rank))
        os._exit(1)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The verdict is rank 0's to give: a launcher ends the job when any rank exits with an error, and rank 0 still
        has to print its report."""
        if self.ranks.rank > 0 and session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            session.exitstatus = pytest.ExitCode.OK

    def write(self, text: str) -> None:
        os.write(self.stderr, f"\n{text.rstrip()}\n".encode())


def describe(report: pytest.TestReport) -> str:
    """The error, the traceback, and what the test has printed; the same on ranks where the same happened."""
    crash = getattr(report.longrepr, "reprcrash", None)
    error = crash.message.partition("\n")[0] if crash else ""
    captured = [f"{title}:\n{text}" for title, text in report.sections if text.strip()]
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join([error, report.longreprtext, *captured]))


def where_main_is() -> str:
    """The stack of the main thread, from where pytest calls into the test or into this file."""
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    callers = [i for i, frame in enumerate(frames) if "_pytest" in frame.filename or "pluggy" in frame.filename]
    return "".join(traceback.format_list(frames[callers[-1] + 1 if callers else 0 :]))


def by_speaker(texts: Mapping[int, str]) -> str:
    """The texts of ranks, each said once."""
    speakers: dict[str, list[str]] = {}
    for rank, text in texts.items():
        speakers.setdefault(text, []).append(str(rank))
    return "\n\n".join(f"on rank {', '.join(ranks)}: {text}" for text, ranks in speakers.items())
