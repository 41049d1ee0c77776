"""Checkpoints while the run goes on: phases in the background, agreements at step boundaries.

    begin       all ranks     each copies its share of the state, at a step boundary; writing starts in a thread
    ...         steps         the thread of a phase (`checkpoint.write`) makes no MPI call, and touches no tensor
    settle      all ranks     after a step: have all ended the phase? Then the next begins, or the checkpoint is there

A phase begins when all ranks have ended the one before, so the folder takes its name only when every byte of every rank
is on the disk. The copy is of 1 / n of the state on each of n replicas, and its memory is kept for the next. Without
`--checkpoint.asynchronous` the same phases run one after the other, on the tensors themselves.

What the disk refuses is not the end of a run: it is told, what was written is removed, and the next checkpoint is
another try.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpipar.checkpoint.plan import Held, plan
from mpipar.checkpoint.snapshot import Snapshot
from mpipar.checkpoint.write import AbandonedError, Notes, Share, Written, begin, cannot_write, hold
from mpipar.comm import Communicator, decide_on_root
from mpipar.errors import CheckpointError, StorageError
from mpipar.storage import remove_partials


@dataclass(frozen=True)
class Ending:
    """What came of a checkpoint.

    Args:
        step: Of which step.
        failure: Why it could not be written; None if it is there.
    """

    step: int
    failure: CheckpointError | None = None


@dataclass
class Pending:
    """A checkpoint that is being written.

    Args:
        notes: What belongs to it beside the tensors.
        folder: Its hidden folder.
        share: What this rank writes; None if it does not see the folder.
        written: What the ranks have told of what they have written: [ranks that write].
        phase: Which phase runs.
        work: This rank's work in it.
    """

    notes: Notes
    folder: Path
    share: Share | None
    written: list[Written]
    phase: int
    work: Work


class Saver:
    """Writes the checkpoints of a run, of which every rank is a replica.

    Args:
        root: The folder of the run's checkpoints.
        comm: The replicas.
        asynchronous: Write while the run goes on.
        cores: That this rank may use: so many threads copy the state for that.
    """

    def __init__(self, root: Path, comm: Communicator, *, asynchronous: bool, cores: int = 1):
        self._root = root
        self._comm = comm
        self._asynchronous = asynchronous
        self._pending: Pending | None = None
        self._abandoned = threading.Event()
        self._snapshot = Snapshot(threads=cores)
        self._planned: tuple[tuple[list[Held], list[bool]], Share | None] | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._pending is not None

    def move_to(self, comm: Communicator) -> None:
        """Goes on with the ranks that are left; `abandon` follows."""
        self._comm = comm
        self._planned = None

    def begin(self, notes: Notes, tensors: Mapping[str, Tensor]) -> Ending | None:
        """Collective: begins to write a checkpoint of the tensors as they are now. None is being written.

        Args:
            notes: What belongs to it beside them, the same on all ranks.
            tensors: By name; the same on all ranks.

        Returns:
            What came of it, if that is known already.
        """
        assert self._pending is None
        folder = decide_on_root(self._comm, lambda: self._make_folder(notes.step))
        if isinstance(folder, CheckpointError):
            return Ending(notes.step, folder)
        share = self._share(folder, hold(tensors))
        self._abandoned = threading.Event()
        work = self._start(self._writing(share, folder, tensors))
        self._pending = Pending(notes, folder, share, [], 0, work)
        return None if self._asynchronous else self.settle(wait=True)

    def settle(self, *, wait: bool) -> Ending | None:
        """Collective, at a step boundary: takes what is being written further.

        Args:
            wait: Until it is there; else what all ranks have ended is looked at, and nobody waits.

        Returns:
            What came of it, if that is known by now.
        """
        while self._pending is not None:
            now = self._pending
            if wait:
                self._join(now.work)
            state = np.array([not now.work.ended, now.work.failed], dtype=np.int64)
            running, failed = self._comm.all_reduce(state, "max").tolist()
            if running:
                return None
            if failed:
                return self._fail(now)
            now.phase += 1
            if now.phase == 1:
                told: list[Written | None] = self._comm.all_gather_object(now.work.result)
                now.written = [written for written in told if written is not None]
                now.work = self._start(self._sealing(now))
            elif now.phase == 2:
                now.work = self._start(self._publishing(now))
            else:
                self._pending = None
                return Ending(now.notes.step)
            if not wait and self._asynchronous:
                return None
        return None

    def abandon(self) -> bool:
        """Collective: gives up what is being written, and removes it. Returns whether there was anything."""
        was_pending = self._pending is not None
        self._abandoned.set()
        if self._pending is not None:
            self._join(self._pending.work)
        self._pending = None
        self._comm.barrier()
        if self._comm.rank == 0 and self._root.is_dir():
            with suppress(OSError):  # a disk that is out of order; the next checkpoint tries again
                remove_partials(self._root)
        return was_pending

    def _make_folder(self, step: int) -> Path | CheckpointError:
        try:
            return begin(self._root, step)
        except OSError as error:
            return cannot_write(self._root, step, error)

    def _share(self, folder: Path, held: list[Held]) -> Share | None:
        """Collective: what this rank writes. Hosts that do not see the run folder leave the work to the others."""
        sees: list[bool] = self._comm.all_gather_object(folder.is_dir())
        if self._planned is None or self._planned[0] != (held, sees):
            writers = [rank for rank, its in enumerate(sees) if its]
            hosts = [self._comm.roster.hosts[rank] for rank in writers]
            mine = sees[self._comm.rank]
            share = Share(plan([held] * len(writers), hosts), writers.index(self._comm.rank)) if mine else None
            self._planned = (held, sees), share
        return self._planned[1]

    def _writing(self, share: Share | None, folder: Path, tensors: Mapping[str, Tensor]) -> Action | None:
        """The first phase: writes the tensors as they are now."""
        if share is None:
            return None
        for device in {tensor.device for tensor in tensors.values()}:
            self._comm.catch_up(device)  # so that copies from a GPU wait for nothing but each other
        sources = share.sources(tensors, {})
        if self._asynchronous:
            sources = self._snapshot.take(sources)
        return partial(share.write, folder, sources, self._abandoned)

    def _sealing(self, now: Pending) -> Action | None:
        if now.share is None or not (now.share.leads or now.share.rank == 0):
            return None
        return partial(now.share.seal, now.folder, now.written, now.notes)

    def _publishing(self, now: Pending) -> Action | None:
        if now.share is None or now.share.rank != 0:
            return None
        return partial(now.share.publish, now.folder, now.notes)

    def _start(self, action: Action | None) -> Work:
        with self._comm.progress.pulse.silent():
            return Work(action, background=self._asynchronous)

    def _join(self, work: Work) -> None:
        with self._comm.progress.pulse.silent():
            work.join(self._comm.progress.timeout_s)
        if not work.ended:
            raise StorageError(
                f"{self._root}: a checkpoint has been written for {self._comm.progress.timeout_s:.0f} s, and the disk "
                "has not taken it: look at the file system; --comm.timeout-s makes the wait longer"
            )

    def _fail(self, now: Pending) -> Ending:
        """Collective: what was written is removed, and the lowest rank that failed is named."""
        errors: list[OSError | None] = self._comm.all_gather_object(now.work.error)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        self.abandon()
        guilty = rank if self._comm.size > 1 else None
        return Ending(now.notes.step, cannot_write(self._root, now.notes.step, error, guilty))


Action = Callable[[], Any]

_HEAD_START_S = 0.001


class Work:
    """One rank's part of a phase.

    Args:
        action: What is to be done, if anything.
        background: Do it in a thread; else it is done when this returns.

    Attributes:
        result: What the action has returned.
        error: Why it failed: a refusal of the system.
    """

    def __init__(self, action: Action | None, *, background: bool):
        self.result: Any = None
        self.error: OSError | None = None
        self._bug: Exception | None = None
        self._thread: threading.Thread | None = None
        if action is not None and background:
            self._thread = threading.Thread(target=self._do_behind, args=(action,), name="checkpoint", daemon=True)
            self._thread.start()
        elif action is not None:
            self._do(action)

    @property
    def ended(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has ended in a refusal of the system. Any other error is raised here, in the run's own thread."""
        if self.ended and self._bug is not None:
            raise self._bug
        return self.ended and self.error is not None

    def join(self, timeout_s: float) -> None:
        """Waits for the end, not for ever."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _do_behind(self, action: Action) -> None:
        # The run goes on first. Else it waits 5 ms, Python's turn of a thread, to get the interpreter back.
        time.sleep(_HEAD_START_S)
        self._do(action)

    def _do(self, action: Action) -> None:
        try:
            self.result = action()
        except OSError as error:
            self.error = OSError(error.errno, error.strerror or str(error))
        except AbandonedError:
            return
        except Exception as error:
            self._bug = error
