"""The supervisor over whole jobs: whatever happens, the end is that of an undisturbed run, and nothing stays."""

from __future__ import annotations

import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpipar.comm.environment import mpi_facts
from tests.jobs.conftest import TINY
from tests.jobs.launch import MARK, Job, Outcome, descendants, marked
from tests.jobs.results import assert_same_run, metrics

pytestmark = pytest.mark.timeout(600)

Arguments = Callable[..., list[str]]

SETTINGS = ("--train.steps", 200, "--train.eval-every", 100, "--checkpoint.every", 20, "--train.precision", "fp32")

OWN = "mpipar-launch-*"

TIME_LIMIT_S = 240.0

# A rank that leaves a process of its own behind, and a file in shared memory that it has mapped, and then dies.
LITTERING = """
import mmap, os, subprocess, sys, time
subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("littered", flush=True)
time.sleep(2.5)
os.abort()
"""

# Of two ranks one dies before it has come to MPI, the first time.
DIES_EARLY = """
import os, sys
from pathlib import Path
if os.environ["MPIPAR_LAUNCH"].endswith("start-1") and "1" in (os.environ.get("PMIX_RANK"), os.environ.get("PMI_RANK")):
    os.abort()
from mpipar.comm import run_job
run_job(lambda world: print("all are there", flush=True))
"""

NOTHING = "from mpipar.comm import run_job; run_job(lambda world: None)"


class Supervised:
    """Jobs under the supervisor. Whatever they leave can be told from what others leave on this machine."""

    def __init__(self, temporary: Path):
        self.mark = secrets.token_hex(8)
        self.temporary = temporary
        self.names: set[str] = set()

    def start(self, *arguments: str, options: str = "-n 2") -> Job:
        """`python -m mpipar.launch OPTIONS -- python ARGUMENTS`."""
        return Job(0, "-m", "mpipar.launch", *options.split(), "--", sys.executable, *arguments)

    def finish(self, job: Job) -> Outcome:
        """Waits for the end, after which nothing is left."""
        outcome = job.finish(TIME_LIMIT_S)
        assert not self.processes()
        assert not list(self.temporary.glob(OWN))
        assert not {name for name in os.listdir("/dev/shm") if name in self.names}
        return outcome

    def note_files(self) -> None:
        """Remembers how the supervisor calls its folders, while they are there."""
        self.names.update(path.name for path in self.temporary.glob(OWN))
        assert self.names

    def processes(self) -> list[int]:
        """Those of this test that are there."""
        return marked(self.mark)


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    made = Supervised(temporary)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv(MARK, made.mark)
    yield made
    for pid in made.processes():  # of a test that has failed
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is when nothing happens to it, under the supervisor."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    begun = time.monotonic()
    arguments = ["-m", "mpipar.train", "--data.dir", str(data), "--run.dir", str(folder), *TINY, *map(str, SETTINGS)]
    outcome = Job(0, "-m", "mpipar.launch", "-n", "2", "--", sys.executable, *arguments).finish(TIME_LIMIT_S).ok()
    assert outcome.lines[-1].startswith("done: 200 steps") and "launch: " not in outcome.text
    (folder / "seconds").write_text(f"{time.monotonic() - begun}")
    return folder


def mpirun_of(job: Job) -> int:
    """The first child of the supervisor."""
    return descendants(job.process.pid)[0]


def said(outcome: Outcome) -> list[str]:
    """The supervisor's own lines. What the job was writing when it was killed may stand before one."""
    return [line[line.index("launch: ") :] for line in outcome.lines if "launch: " in line]


@pytest.mark.parametrize("what", ["mpirun", "a rank", "all ranks", "a rank hangs"])
def test_a_job_that_is_lost_goes_on(
    what: str, supervised: Supervised, train: Arguments, tmp_path: Path, undisturbed: Path
) -> None:
    if what == "a rank":  # an earlier run is moved aside by the first start, and not by the second
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()
    resume = "never" if what == "a rank" else "auto"
    # A start has to fit into that too, also on a machine that is busy.
    hang_s = 2 * math.ceil(float((undisturbed / "seconds").read_text())) + 5
    hanging = f"-n 2 --hang-s {hang_s} --restarts 9"
    options = {"a rank hangs": hanging, "a rank": "-n 2 --no-in-place"}.get(what, "-n 2")
    job = supervised.start(*train(*SETTINGS, "--resume", resume), options=options)
    job.wait_for("step     25/200", TIME_LIMIT_S)
    supervised.note_files()
    ranks = job.ranks()
    if what == "mpirun":
        os.kill(mpirun_of(job), signal.SIGKILL)
    for rank in {"mpirun": [], "all ranks": ranks}.get(what, ranks[1:]):
        os.kill(rank, signal.SIGSTOP if what == "a rank hangs" else signal.SIGKILL)
    outcome = supervised.finish(job).ok()
    first, *_, last = said(outcome)
    how = r"ended without a word \(exit code \d+ of .*\)"
    if what == "a rank hangs":
        how = f"gave no sign of life for {hang_s} s"
    assert re.fullmatch(rf"launch: the job {how} after step \d+: starting again on 2 ranks \(1 of \d\)", first)
    assert last == f"launch: done, in {len(said(outcome))} starts"
    assert outcome.text.count("a fresh start") == 1 and "goes on from step " in outcome.text
    assert_same_run(tmp_path / "run", undisturbed)
    assert (tmp_path / "run.old-1").is_dir() == (what == "a rank") and not (tmp_path / "run.old-2").exists()


def test_it_is_asked_to_stop(supervised: Supervised, train: Arguments, tmp_path: Path, undisturbed: Path) -> None:
    """First so that it ends at once, then with a checkpoint; then the same command finishes."""
    command = train(*SETTINGS, "--checkpoint.every", 1000)
    for request, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        job = supervised.start(*command)
        job.wait_for("tokens/s", TIME_LIMIT_S)
        supervised.note_files()
        os.kill(job.process.pid, request)
        outcome = supervised.finish(job)
        assert outcome.code == code, outcome.text
        assert len(said(outcome)) == 1 and f"(exit code {code})" in said(outcome)[0]
    reached = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{reached:08d}").is_dir()
    outcome = supervised.finish(supervised.start(*command)).ok()
    assert f"goes on from step {reached}" in outcome.text
    assert_same_run(tmp_path / "run", undisturbed)


def test_what_would_only_fail_again_is_not_repeated(supervised: Supervised, train: Arguments, tmp_path: Path) -> None:
    outcome = supervised.finish(supervised.start(*train("--data.dir", tmp_path / "nowhere")))
    outcome.refused("nowhere")
    assert outcome.code == 1 and said(outcome) == ["launch: failed: the same command would fail again (exit code 1)"]


def test_starts_are_limited(supervised: Supervised) -> None:
    outcome = supervised.finish(supervised.start("-c", "print('here'); 1 / 0", options="-n 1 --restarts 2"))
    assert outcome.code == 1 and outcome.lines.count("here") == 3
    again, once_more, over = said(outcome)
    assert "starting again on 1 rank (1 of 2)" in again and "starting again on 1 rank (2 of 2)" in once_more
    assert "given up after 3 starts in a row without a new checkpoint (exit code 1)" in over


def test_nothing_stays_of_what_a_rank_leaves_behind(supervised: Supervised) -> None:
    """Although mpirun waits for it: it still holds the rank's output."""
    litter = Path("/dev/shm") / f"mpipar-test-{supervised.mark}"
    try:
        outcome = supervised.finish(supervised.start("-c", LITTERING, str(litter), options="-n 1 --restarts 0"))
        assert outcome.code == 1 and "littered" in outcome.text
        assert "lost ranks, and did not notice: given up after 1 start without" in said(outcome)[0]
        assert not litter.exists()
    finally:
        litter.unlink(missing_ok=True)


def test_a_death_before_mpi_is_there(supervised: Supervised) -> None:
    """Of which nobody in the job hears who survives it."""
    outcome = supervised.finish(supervised.start("-c", DIES_EARLY)).ok()
    assert "starting again on 2 ranks" in said(outcome)[0] and outcome.text.count("all are there") == 2


def test_a_supervisor_that_is_killed_takes_the_job_along(supervised: Supervised, train: Arguments) -> None:
    job = supervised.start(*train("--train.steps", 100_000))
    job.wait_for("step      3/", TIME_LIMIT_S)
    supervised.note_files()
    job.process.kill()
    job.process.wait()
    deadline = time.monotonic() + 30
    while supervised.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not supervised.processes()
    assert not list(supervised.temporary.glob("*/start-1/ompi.*")), "mpirun has left in good order"
    assert all(Path("/dev/shm", name).is_dir() for name in supervised.names)
    supervised.finish(supervised.start("-c", NOTHING)).ok()  # which has removed what the first could not


def test_the_wrong_options(supervised: Supervised) -> None:
    for options, fragment in (("", "-n 8"), ("-n 4 --hosts localhost:2", "takes 2 ranks"), ("-n 1 --min-ranks 2", "2")):
        outcome = supervised.finish(supervised.start("-c", "", options=options))
        assert outcome.code == 2 and len(outcome.lines) == 1 and outcome.text.startswith("launch: error: ")
        assert fragment in outcome.text


def test_mpi_keeps_its_files_where_they_can_be_removed(supervised: Supervised, train: Arguments) -> None:
    if "Open MPI" not in mpi_facts().library:
        pytest.skip("files of Open MPI")
    before = set(os.listdir("/tmp"))
    job = supervised.start(*train("--train.steps", 100_000))
    job.wait_for("step      3/", TIME_LIMIT_S)
    supervised.note_files()
    (name,) = supervised.names
    assert len(list(Path("/dev/shm", name).glob("sm_segment.*"))) == 2
    mapped = subprocess.run(["grep", "-h", "/dev/shm/", *(f"/proc/{pid}/maps" for pid in job.ranks())], stdout=-1)
    others = [line for line in mapped.stdout.decode().splitlines() if name not in line and "(deleted)" not in line]
    assert not others
    os.kill(job.process.pid, signal.SIGINT)
    supervised.finish(job)
    assert not [entry for entry in set(os.listdir("/tmp")) - before if entry == name]
