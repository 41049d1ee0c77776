"""Question: what does a checkpoint cost, beside a plain write of the same bytes, and how long does it hold up a run?

    plain      one file, written and read in pieces of 8 MiB
    mpipar     `--checkpoint.asynchronous false`: checksums, the folder's rename
    torch      torch.distributed.checkpoint with sync_files=True; for a job of one rank

Each write ends with an fsync, and each read begins with nothing of the files in the system's memory (as far as
posix_fadvise drops it). What a run waits for is a synchronous save, or, of one in the background, the copy of the state
and a look after each step; and its steps, here a product of matrices, may take longer while another core writes. How
much longer they take while a thread writes the plain file is the limit of that; a copy of the same arrays by numpy is
what the copy is compared with.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.machine import begin
from benchmarks.measure import Seconds, ratio, take_turns
from mpipar.checkpoint import capture
from mpipar.checkpoint.write import Notes
from mpipar.comm import Communicator, Mesh, agreement
from mpipar.errors import ConfigError
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.train import resume
from mpipar.train.config import TrainConfig
from mpipar.train.optimizer import build_optimizer
from mpipar.train.saver import Saver

_PIECE_BYTES = 8 << 20
_STEP_DIM = 1024  # of the matrices that stand for a step
_STEPS = 30  # before a save and after it, to know how long they take


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Times checkpoints against plain files and torch.distributed.checkpoint."""

    layers: int = 12
    """Transformer layers; with the other defaults the model has 124 M parameters."""
    dim: int = 768
    """Width of the residual stream."""
    vocab_size: int = 50_304
    """Token ids."""
    rounds: int = 5
    """Measurements of each contestant."""
    folder: Path | None = None
    """Where to write: on the disk that is in question; by default a temporary folder."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            if self.rounds < 1:
                raise ConfigError(f"--rounds {self.rounds} must be at least 1")
        mesh, environment = begin(world)
        if world.rank == 0:
            print(environment.header(), flush=True)
        tensors = self._state()
        made = tempfile.mkdtemp(prefix="mpipar-checkpoint-", dir=self.folder) if world.rank == 0 else None
        root = Path(world.broadcast_object(made))
        try:
            bench = Bench(root, mesh, tensors, self.rounds)
            lines = [*bench.throughput(), *bench.delay()]
        finally:
            world.barrier()
            if world.rank == 0:
                shutil.rmtree(root)
        if world.rank == 0:
            print("\n".join(lines), flush=True)

    def _state(self) -> dict[str, Tensor]:
        """Weights and both moments of AdamW."""
        config = ModelConfig(family="gpt2", layers=self.layers, dim=self.dim, heads=self.dim // 64)
        model = Transformer(config, vocab_size=self.vocab_size)
        initialise(model, seed=1)
        optimizer = build_optimizer(model, TrainConfig())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return capture(model, optimizer)


class Bench:
    """What is timed.

    Args:
        root: A folder that all ranks see.
        mesh: All ranks.
        tensors: The state, on each.
        rounds: Measurements.
    """

    def __init__(self, root: Path, mesh: Mesh, tensors: dict[str, Tensor], rounds: int):
        world = mesh.world
        self._root = root
        self._world = world
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._rounds = rounds
        self._num_bytes = sum(x.numel() * x.element_size() for x in self._tensors.values())
        self._at_once = Saver(root / "mpipar", world, asynchronous=False)
        self._saver = Saver(root / "mpipar", world, asynchronous=True, cores=mesh.cores_per_rank)
        self._share = world.chunk(self._num_bytes)
        self._plain = np.empty(self._share.stop - self._share.start, np.uint8)
        self._factors = torch.ones(2, _STEP_DIM, _STEP_DIM).unbind()
        self._product = torch.empty(_STEP_DIM, _STEP_DIM)
        self._copy()

    def throughput(self) -> list[str]:
        """A table of writes and reads."""
        writes: dict[str, Callable[[], object]] = {"plain": self._write_plain, "mpipar": self._save}
        reads: dict[str, Callable[[], object]] = {"plain": self._read_plain, "mpipar": self._load}
        if self._world.size == 1:
            writes["torch"], reads["torch"] = self._write_torch, self._read_torch
        written = take_turns(self._world, writes, rounds=self._rounds, warmup=1, prepare=self._remove)
        read = take_turns(self._world, reads, rounds=self._rounds, warmup=1, prepare=self._forget)
        lines = [
            f"# {self._num_bytes / 1e6:,.0f} MB: {len(self._tensors)} tensors; medians of {self._rounds} rounds, with "
            "quartiles of the ratios",
            f"# {'':<8} {'write MB/s':>11} {'of plain':>20} {'read MB/s':>11} {'of plain':>20}",
        ]
        for name in writes:
            cells = [self._rate(times[name]) + _of(times["plain"], times[name]) for times in (written, read)]
            lines.append(f"  {name:<8} {' '.join(cells)}")
        return lines

    def delay(self) -> list[str]:
        """How long a run is held up by a save."""
        rounds = np.array([self._delay() for _ in range(self._rounds + 1)][1:])  # the first is to warm up
        sync, copy, looks, slower, plain_copy, slower_beside_plain = rounds.T
        meanwhile = looks + slower
        return [
            "# a run of steps on one thread a rank, held up by a save; s, medians, and parts of a synchronous one",
            f"  synchronous                                {np.median(sync):7.3f}",
            f"  in the background: the copy of the state   {np.median(copy):7.3f}",
            f"    looks at what was written                {np.median(looks):7.3f}",
            f"    steps meanwhile, longer than others      {np.median(slower):7.3f}",
            f"    looks and steps                          {_part(meanwhile, sync)}",
            f"    all of it, less a copy by numpy          {_part(copy + meanwhile - plain_copy, sync)}",
            f"  a copy by numpy, one thread                {np.median(plain_copy):7.3f}",
            f"  a thread writes a plain file, steps longer {np.median(slower_beside_plain):7.3f}",
            f"    of the synchronous one                   {_part(slower_beside_plain, sync)}",
        ]

    def _delay(self) -> list[float]:
        """Seconds: of a synchronous save; of one in the background the copy, the looks, and what steps took longer.

        The last two: a copy by numpy; and what steps took longer while a thread wrote the plain file.
        """
        self._remove("mpipar")
        sync = self._timed(self._save)
        self._remove("mpipar")
        copy: list[float] = []
        looks: list[float] = []

        def begin() -> None:
            copy.append(self._timed(partial(self._saver.begin, self._notes(), self._tensors)))

        def goes_on() -> bool:
            looks.append(self._timed(partial(self._saver.settle, wait=False)))
            return self._saver.pending

        longer = self._longer(begin, goes_on)
        plain_copy = self._timed(self._copy)
        self._remove("plain")
        plain = threading.Thread(target=self._write_plain)
        longer_beside_plain = self._longer(
            plain.start, lambda: bool(self._world.all_reduce(np.array([plain.is_alive()], np.int64), "max")[0])
        )
        return [sync, *copy, sum(looks), longer, plain_copy, longer_beside_plain]

    def _longer(self, begin: Callable[[], object], goes_on: Callable[[], bool]) -> float:
        """How much longer all steps take while something goes on than as many of those before and after."""
        usual = self._usual()
        begin()
        steps = []
        while goes_on():
            steps.append(self._timed(self._step))
        usual += self._usual()
        return sum(steps) - len(steps) * float(np.mean(usual))

    def _usual(self) -> list[float]:
        """Of steps while nobody writes."""
        return [self._timed(self._step) for _ in range(_STEPS)]

    def _step(self) -> None:
        """Stands for a step of training: one thread multiplies matrices, in memory that it keeps."""
        torch.mm(*self._factors, out=self._product).clamp_(0, 1)

    def _copy(self) -> None:
        """Of this rank's share of the arrays, into what it writes to the plain file."""
        begin = at = 0
        for tensor in self._tensors.values():
            source = tensor.reshape(-1).view(torch.uint8).numpy()
            mine = source[max(self._share.start - begin, 0) : max(self._share.stop - begin, 0)]
            np.copyto(self._plain[at : at + len(mine)], mine)
            begin, at = begin + len(source), at + len(mine)

    def _notes(self) -> Notes:
        return Notes(1, {}, {}, keep=1)

    def _save(self) -> None:
        ending = self._at_once.begin(self._notes(), self._tensors)
        assert ending is not None and not ending.failure

    def _load(self) -> None:
        resume.read(self._root / "mpipar" / "step-00000001", self._world)

    def _write_plain(self) -> None:
        descriptor = os.open(self._root / "plain", os.O_WRONLY | os.O_CREAT, 0o666)
        for at in range(0, len(self._plain), _PIECE_BYTES):
            os.pwrite(descriptor, self._plain[at : at + _PIECE_BYTES].data, self._share.start + at)
        os.fsync(descriptor)
        os.close(descriptor)

    def _read_plain(self) -> None:
        target = np.empty_like(self._plain)
        descriptor = os.open(self._root / "plain", os.O_RDONLY)
        for at in range(0, len(target), _PIECE_BYTES):
            os.preadv(descriptor, [target[at : at + _PIECE_BYTES].data], self._share.start + at)
        os.close(descriptor)

    def _write_torch(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group is meant
            writer = FileSystemWriter(self._root / "torch", sync_files=True)
            dcp_save(dict(self._tensors), storage_writer=writer, no_dist=True)

    def _read_torch(self) -> None:
        into = {name: torch.empty_like(tensor) for name, tensor in self._tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(into, storage_reader=FileSystemReader(self._root / "torch"), no_dist=True)

    def _remove(self, name: str) -> None:
        """Before each write: what is there is gone, and the disk has nothing left to do."""
        self._world.barrier()
        if self._world.rank == 0:
            for entry in self._root.iterdir():
                if entry.name == name:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            os.sync()
        self._world.barrier()

    def _forget(self, name: str) -> None:
        """Before each read: what is read comes from the disk."""
        for path in self._root.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def _rate(self, times: Seconds) -> str:
        return f"{self._num_bytes / 1e6 / np.median(times):>11,.0f} "

    def _timed(self, action: Callable[[], object]) -> float:
        """The slowest rank's seconds."""
        self._world.barrier()
        began = time.perf_counter()
        action()
        return float(self._world.all_reduce(np.array([time.perf_counter() - began]), "max")[0])


def _part(times: Seconds, synchronous: Seconds) -> str:
    low, middle, high = np.percentile(times / synchronous * 100, [25, 50, 75])
    return f"{middle:7.1f} % ({low:.1f} .. {high:.1f})"


def _of(plain: Seconds, times: Seconds) -> str:
    middle, low, high = (value * 100 for value in ratio(plain, times))
    return f"{f'{middle:.0f} % ({low:.0f} .. {high:.0f})':>20}"
