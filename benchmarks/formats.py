"""What was found, and the forms in which it is printed.

nccl    the columns of nccl-tests, a table for each contestant, and three more at the end
osu     the tables of the OSU microbenchmarks, one for each contestant
json    one document with all of it

size, time      bytes of the array on each rank; microseconds, median over rounds of the slowest rank
algbw           size / time
busbw           algbw times a factor of the operation: the speed of the link that a ring would need
#wrong          elements that are not what they should be, over all ranks
limit%          the time that the machine would need at best, of the time taken
call            what was called: of a peer's alternatives the fastest for this size
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.machine import Environment
from benchmarks.measure import Seconds, ratio

LIMIT = "limit"
"""The contestant that is none: what the machine could do."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contestant took for one size.

    Args:
        contestant: Its short name.
        size: Bytes.
        count: Elements, in the operation's own count.
        call: What was called.
        times: [rounds] of one operation.
        repeat: How many were timed as one.
        wrong: Elements that were; None if it was not looked.
        limit: The fraction of the possible that was reached; None where that is not known.
        bus_factor: busbw / algbw.
    """

    contestant: str
    size: int
    count: int
    call: str
    times: Seconds
    repeat: int
    wrong: int | None
    limit: float | None
    bus_factor: float

    @property
    def seconds(self) -> float:
        return float(np.median(self.times))

    @property
    def algbw(self) -> float:
        """GB/s."""
        return self.size / self.seconds / 1e9

    @property
    def busbw(self) -> float:
        """GB/s."""
        return self.algbw * self.bus_factor


@dataclass(frozen=True, kw_only=True)
class Report:
    """The answer to a question.

    Args:
        question: Its name.
        osu_test: What the OSU benchmarks call their test of it; a test of bandwidth if that is in the name.
        dtype: Of the elements.
        redop: The reduction, or "none".
        environment: On what it was measured.
        notes: What else is to be known.
        titles: Contestants for people, by short name, in the order of the tables.
        ours: Which of them are mpipar.
        rows: By size, then by contestant.
    """

    question: str
    osu_test: str
    dtype: str
    redop: str
    environment: Environment
    notes: Sequence[str]
    titles: dict[str, str]
    ours: Sequence[str]
    rows: Sequence[Row]

    def of(self, contestant: str) -> list[Row]:
        """Its rows, by size."""
        return [row for row in self.rows if row.contestant == contestant]


_COLUMNS = "{} {:>11} {:>12} {:>8} {:>6} {:>5} {:>9} {:>7} {:>7} {:>6} {:>6}  {}"
_NCCL_TYPES = {"float16": "half", "float32": "float", "float64": "double"}  # the others are called as here


def nccl(report: Report) -> str:
    """Tables of nccl-tests, then ratios."""
    lines = []
    for name, title in report.titles.items():
        rows = report.of(name)
        lines += ["#", f"# {title}"]
        lines.append(
            _COLUMNS.format(
                "#", "size", "count", "type", "redop", "root", "time", "algbw", "busbw", "#wrong", "limit%", "call"
            )
        )
        units = _COLUMNS.format("#", "(B)", "(elements)", "", "", "", "(us)", "(GB/s)", "(GB/s)", "", "", "")
        lines.append(units.rstrip())
        lines += [_nccl_row(report, row) for row in rows]
        counts = [row.wrong for row in rows if row.wrong is not None]
        if counts:
            lines.append(f"# Out of bounds values : {sum(counts)} {'FAILED' if any(counts) else 'OK'}")
        lines.append(f"# Avg bus bandwidth    : {np.mean([row.busbw for row in rows]):.3f}")
    return "\n".join([*lines, *_ratios(report)])


def _nccl_row(report: Report, row: Row) -> str:
    return _COLUMNS.format(
        " ",
        row.size,
        row.count,
        _NCCL_TYPES.get(report.dtype, report.dtype),
        report.redop,
        -1,
        f"{row.seconds * 1e6:.2f}",
        f"{row.algbw:.2f}",
        f"{row.busbw:.2f}",
        "N/A" if row.wrong is None else row.wrong,
        "N/A" if row.limit is None else f"{row.limit * 100:.1f}",
        row.call,
    )


def _ratios(report: Report) -> list[str]:
    peers = [name for name in report.titles if name not in report.ours and name != LIMIT]
    lines: list[str] = []
    if not peers:
        return lines
    for name in report.ours:
        lines += ["#", f"# {report.titles[name]}: how many times as fast as its peers (median of rounds, quartiles)"]
        lines.append(" ".join([f"# {'size':>11}", *(f"{peer:>22}" for peer in peers)]))
        for row in report.of(name):
            others = {other.contestant: other for other in report.rows if other.size == row.size}
            cells = [_times_as_fast(row, others.get(peer)) for peer in peers]
            lines.append(" ".join([f"  {row.size:>11}", *(f"{cell:>22}" for cell in cells)]))
    return lines


def _times_as_fast(row: Row, peer: Row | None) -> str:
    return "N/A" if peer is None else "{:.2f} ({:.2f} .. {:.2f})".format(*ratio(peer.times, row.times))


def osu(report: Report) -> str:
    """A table of the OSU microbenchmarks for each contestant. The "Avg" is theirs: here it is a median."""
    bandwidth = "Bandwidth" in report.osu_test
    lines = []
    for name, title in report.titles.items():
        lines += ["", f"# OSU MPI {report.osu_test}: {title}"]
        lines.append("# Size      Bandwidth (MB/s)" if bandwidth else "# Size       Avg Latency(us)")
        for row in report.of(name):
            lines.append(f"{row.size:<10}{row.algbw * 1e3 if bandwidth else row.seconds * 1e6:>20.2f}")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """One document. Times are in microseconds, bandwidths in GB/s (1e9 bytes)."""
    return json.dumps(
        {
            "question": report.question,
            "dtype": report.dtype,
            "redop": report.redop,
            "environment": asdict(report.environment),
            "notes": list(report.notes),
            "contestants": [
                {"name": name, "title": title, "ours": name in report.ours} for name, title in report.titles.items()
            ],
            "rows": [_json_row(row) for row in report.rows],
        },
        indent=1,
    )


def _json_row(row: Row) -> dict[str, Any]:
    low, high = np.percentile(row.times, [25, 75])
    return {
        "contestant": row.contestant,
        "size": row.size,
        "count": row.count,
        "call": row.call,
        "time_us": row.seconds * 1e6,
        "quartiles_us": [low * 1e6, high * 1e6],
        "algbw": row.algbw,
        "busbw": row.busbw,
        "wrong": row.wrong,
        "limit": row.limit,
        "repeat": row.repeat,
        "rounds": len(row.times),
    }
