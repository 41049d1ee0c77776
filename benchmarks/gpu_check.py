"""All that needs a GPU, in one go: `make gpu-check`.

    tests            pytest -m gpu, without MPI and on 1, 2 and 4 ranks that share what there is
    collectives      the all-reduce of 256 MiB on 1, 2 and 4 ranks, beside its limit
    training         GPTs of 124 M and 1 B parameters, beside a bare compiled loop and the GPU's peak
    reproducible     one run on 1 and on 2 ranks, compared bit by bit

It needs no network. Each part is a job of its own, which is ended, to its last process, when its time or that for all
is over. What came of them is a table, and gpu-NAME-DATE.json; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import leave_when_asked, run_command
from benchmarks.watched import Watched
from mpipar.comm.device.cuda import open_gpu
from mpipar.command_line import parse
from mpipar.errors import ConfigError

_LIMIT_S = 470.0
_RESULTS = Path(__file__).parent / "results"
_KEPT_LINES = 100  # of what failed
_LOOK_S = 0.02
_SIZE = str(256 << 20)

# What mpirun of a bare Open MPI has to be told on a machine of one's own, as .venv/bin/mpirun tells it.
_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_btl": "^ofi",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        name: For people.
        ranks: Under mpirun; 0 without it.
        words: What Python runs.
        limit_s: After this time it has failed.
    """

    name: str
    ranks: int
    words: tuple[str, ...]
    limit_s: float


@dataclass
class Outcome:
    """What came of a part.

    Args:
        name: Its name.
        seconds: How long it took.
        failure: What went wrong; nothing if nothing did.
        answer: The JSON document that it has printed, if it has; of tests what pytest says at their end.
    """

    name: str
    seconds: float
    failure: str = ""
    answer: dict[str, Any] = field(default_factory=dict)


def parts() -> Iterator[Part]:
    """All of them, those first that others rest on."""
    reproducible = "-m", "benchmarks.gpu_reproducible"
    for ranks in (1, 2):
        yield Part(f"reproducible, {_ranks(ranks)}", ranks, reproducible, 90)
    for model in ("124M", "1B"):
        yield Part(f"training, {model}", 0, ("-m", "benchmarks.gpu_training", "--model", model), 150)
    sizes = "--min-bytes", _SIZE, "--max-bytes", _SIZE
    for ranks in (1, 2, 4):
        asked = ("-m", "benchmarks", "allreduce", "--device", "cuda", *sizes, "--format", "json")
        yield Part(f"all-reduce, {_ranks(ranks)}", ranks, asked, 60)
    tests = "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-m", "gpu"
    yield Part("tests without MPI", 0, (*tests, "tests/single"), 60)
    for ranks in (1, 2, 4):
        yield Part(f"tests, {_ranks(ranks)}", ranks, (*tests, "tests/gpu", "tests/parallel/test_reads.py"), 90)


def run_part(part: Part, mpirun: Sequence[str], left_s: float) -> Outcome:
    """Runs one.

    Args:
        part: Which.
        mpirun: The launcher, and what it is given beside -n.
        left_s: Of the time for all. When that or the part's own is over it is ended, with all that it has started.
    """
    if left_s <= 0:
        return Outcome(part.name, 0.0, "not started: the time for all was over")
    launcher = [*mpirun, "-n", str(part.ranks)] if part.ranks else []
    command = [*launcher, sys.executable, *part.words]
    began = time.monotonic()
    limit_s = min(left_s, part.limit_s)
    try:
        with Watched(command, {name: value for name, value in _SETTINGS.items() if name not in os.environ}) as job:
            while not job.is_over and time.monotonic() - began < limit_s:
                time.sleep(_LOOK_S)
            code = job.code
    except OSError as error:
        return Outcome(part.name, 0.0, f"{command[0]} cannot be started: {error.strerror}")
    text = "\n".join(line.text for line in job.lines)
    outcome = Outcome(part.name, time.monotonic() - began, answer=find_json(text))
    if "pytest" in part.words:
        outcome.answer = {"tests": _summary(text)}
    said = "\n".join(text.splitlines()[-_KEPT_LINES:])
    if code is None:
        outcome.failure = f"not done in {limit_s:.0f} s: {shlex.join(command)}\n{said}"
    elif code != 0:
        outcome.failure = f"exit code {code} from: {shlex.join(command)}\n{said}"
    elif "pytest" in part.words and "passed" not in outcome.answer["tests"]:
        outcome.failure = f"no test has run: {shlex.join(command)}\n{said}"
    return outcome


def _summary(text: str) -> str:
    """The line in which pytest says how many tests passed."""
    ends = re.compile(r"\d+ (passed|failed|skipped|errors?)\b")
    found = [line.strip("= ") for line in text.splitlines() if ends.search(line)]
    return found[-1] if found else ""


def find_json(text: str) -> dict[str, Any]:
    """The first JSON object that begins a line of an output; an empty one if there is none."""
    for match in re.finditer(r"^\{", text.replace("\0", ""), re.MULTILINE):  # which mpirun sometimes adds
        try:
            answer, _ = json.JSONDecoder().raw_decode(text.replace("\0", ""), match.start())
        except ValueError:
            continue
        assert isinstance(answer, dict)
        return answer
    return {}


def compare(outcomes: Sequence[Outcome]) -> str:
    """What differs between the reproducible runs; nothing if they are one."""
    runs = {outcome.name: outcome.answer for outcome in outcomes if outcome.name.startswith("reproducible")}
    (first, one), *others = runs.items()
    for name, other in others:
        if not one or not other:
            return "one of the runs has left no result"
        if one != other:
            pairs = enumerate(zip(one["losses"], other["losses"], strict=True))
            differing = [str(step + 1) for step, (a, b) in pairs if a != b]
            return f"{first} and {name}: other bits from step {differing[0] if differing else 'the last'} on"
    return ""


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    lines = [f"# {'part':<22} {'s':>6}  result"]
    for outcome in outcomes:
        result = outcome.failure.splitlines()[0] if outcome.failure else _result(outcome.answer)
        lines.append(f"  {outcome.name:<22} {outcome.seconds:>6.1f}  {'FAILED: ' if outcome.failure else ''}{result}")
    return "\n".join(lines)


def _result(answer: dict[str, Any]) -> str:
    if answer.get("question") == "gpu_training":
        rates = [
            f"{name} {answer['tokens_per_s'][name]:,.0f} tokens/s" + (f", {mfu:.1%} of the peak" if mfu else "")
            for name, mfu in answer["mfu"].items()
        ]
        return f"{'; '.join(rates)}; time / bare loop {answer['ours_over_bare']:.3f}"
    if "digest" in answer:
        return str(answer["digest"])
    if "rows" in answer:
        rows = [f"{row['contestant']} {row['size'] / row['time_us'] / 1e3:.1f} GB/s" for row in answer["rows"]]
        return ", ".join(rows)
    return str(answer.get("tests", "passed"))


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options."""

    mpirun: str = "mpirun"
    """The launcher, and options of it."""
    out: Path = _RESULTS
    """The folder for the JSON file."""


def main() -> int:
    asked = parse(Asked, "python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device (nvidia-smi -L)"
        raise ConfigError(f"gpu-check needs a GPU: torch {torch.__version__} {built}")
    open_gpu(0)  # or says what CuPy lacks
    leave_when_asked()
    name = torch.cuda.get_device_name()
    print(f"# {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    began, outcomes = time.monotonic(), []
    for part in parts():
        left_s = _LIMIT_S - (time.monotonic() - began)
        print(f"# {part.name} ...", file=sys.stderr, flush=True)
        outcomes.append(run_part(part, shlex.split(asked.mpirun), left_s))
        if outcomes[-1].failure:
            print(outcomes[-1].failure, file=sys.stderr, flush=True)
    outcomes.append(Outcome("the same bits", 0.0, compare(outcomes), {}))
    path = asked.out / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{time.strftime('%Y-%m-%d')}.json"
    document = {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(table(outcomes), f"# {path}", sep="\n", flush=True)
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(run_command(main))
