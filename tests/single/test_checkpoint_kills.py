"""SIGKILL at seeded instants around saves: whatever is listed is whole, and the last good one is never lost.

    python -m tests.single.test_checkpoint_kills FOLDER 100

Ranks are threads of one process here, which write one checkpoint after the other, as the ranks of a job do, and die
together.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch

from mpipar.checkpoint import latest, load
from mpipar.checkpoint.folder import steps
from mpipar.checkpoint.plan import plan
from mpipar.checkpoint.write import Notes, Share, begin, hold
from tests.single.crash_points import run_as_program

HOSTS = [0, 0, 1, 1]
KEEP = 2
SAVES = 3  # as long as so many take, it goes on at most before a kill


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weights/x": torch.full((900, 1000), float(step)), "weights/y": torch.arange(5) + step}


def test_ten_kills(tmp_path: Path) -> None:
    assert run_as_program("tests.single.test_checkpoint_kills", str(tmp_path / "run"), "10") > SAVES


def go_on(root: Path, num_saves: int | None = None) -> None:
    """Saves so many times, from the last checkpoint on; for ever if no number is given."""
    step = first = max(steps(root), default=0)
    shared = plan([hold(state(0))] * len(HOSTS), HOSTS)
    shares = [Share(shared, rank) for rank in range(len(HOSTS))]
    with ThreadPoolExecutor(len(HOSTS)) as ranks:
        while num_saves is None or step < first + num_saves:
            step += 1
            tensors, notes = state(step), Notes(step, {"seen": step}, {"config.toml": f"step = {step}\n"}, KEEP)
            partial = begin(root, step)
            writes = [ranks.submit(own.write, partial, own.sources(tensors, {}), Event()) for own in shares]
            written = [write.result() for write in writes]
            for seal in [ranks.submit(own.seal, partial, written, notes) for own in shares]:
                seal.result()
            shares[0].publish(partial, notes)


def check(root: Path, before: int) -> int:
    """Everything that is listed is whole, and the last one from before is there, or later ones. Returns the last."""
    listed = steps(root)
    assert len(listed) <= KEEP + 1, listed
    for step in listed:
        with load(root / f"step-{step:08d}") as found:
            found.verify()
            assert found.step == found.attributes["seen"] == step
            assert all(torch.equal(found[name], tensor) for name, tensor in state(step).items())
    last = listed[-1] if listed else 0
    assert last >= before, f"step {before} was there, and now {listed}"
    assert last == 0 or latest(root) == root / f"step-{last:08d}"
    return last


def wait_for(root: Path, step: int) -> None:
    """Until there is a checkpoint of this step, or a later one."""
    deadline = time.monotonic() + 60.0
    while max(steps(root), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} does not come"
        time.sleep(0.001)


def main(root: Path, count: int) -> None:
    """Prints the last step of which there is a checkpoint."""
    torch.set_num_threads(1)
    rng = random.Random(count)
    began = time.perf_counter()
    go_on(root, SAVES)
    took_s, last = (time.perf_counter() - began) / SAVES, SAVES
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            go_on(root)
        wait_for(root, last + rng.randint(0, SAVES - 1))  # and not for a time alone: the machine may be busy by now
        time.sleep(rng.uniform(0, took_s))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it ended by itself"
        last = check(root, last)
    print(last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
