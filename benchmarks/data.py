"""Question: what do random reads of tokens cost, the start with a thousand shards, and memory?

A data set of random tokens is made and read in windows of 2,049 tokens: by `ShardSet`, and by numpy's memmap at the
place where the tokens lie in the same files. All of it is in the page cache: what is compared is the work of reading,
not the disk.

    stored     a window as it is stored, in an array of its own
    batch      eight of them in one array, converted to int64, as a model takes it; the time is that of one
    first      the first of a shard: the file is opened, and a block of 256 KiB is read and its checksum looked at
    all        eight in one array too, from all shards, other windows in each measurement, so that no cache has them
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.litdata_peer import open_litdata
from benchmarks.machine import Environment, begin, comments
from benchmarks.measure import Seconds, ratio, take_turns
from mpipar.comm import Communicator, agreement, decide_on_root
from mpipar.data import Inventory, ShardSet, tokenizer
from mpipar.data.shard import write_shard
from mpipar.data.shards import index_name, take_inventory, write_indices
from mpipar.errors import ConfigError
from mpipar.storage import room_for_files

LENGTH = 2049
_FEW = 16  # shards, all of which stay open
_BATCH = 8  # windows
_WINDOW_LISTS = 20
_OURS, _NUMPY, _LITDATA = "mpipar", "numpy memmap", "litdata"

Window = tuple[int, int]
"""(shard, number of the window in it)."""
Read = Callable[[int, int], NDArray[Any]]
"""The tokens of a window."""
Fill = Callable[[NDArray[np.int64], list[Window]], None]
"""Puts the tokens of windows into rows."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Compares random reads of tokens with numpy's memmap; says what the start with many shards takes, and memory."""

    shards: int = 1000
    """Shards of the data set that is made."""
    tokens: int = 131072
    """Tokens in a shard."""
    vocab_size: int = 32000
    """Of which so many are different."""
    reads: int = 500
    """Windows in one measurement."""
    rounds: int = 30
    """Measurements."""
    warmup: int = 3
    """Measurements before these, which are not kept."""
    folder: Path | None = None
    """Where the data set is made and removed again; the system's folder for temporary files if not given."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            self._validate()
        _, environment = begin(world)
        gc.freeze()  # else a collection of all that torch has made, 0.1 s, falls into one start or another
        with self._data_set(world) as folder:
            inventory = decide_on_root(world, lambda: take_inventory(folder, "train"))
            memory = self._memory(folder, inventory)  # first: nothing has been read yet
            reads, absent = self._reads(world, folder, inventory)
            starts = self._starts(world, folder, inventory)
        if world.rank == 0:
            lines = [*self._described(environment, absent), *_table(reads, 1e6, "us"), *_table(starts, 1e3, "ms")]
            print("\n".join([*lines, *memory]), flush=True)

    def _validate(self) -> None:
        least = {"shards": _FEW, "tokens": LENGTH, "vocab_size": 300, "reads": 1, "rounds": 1, "warmup": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {value}")

    @contextmanager
    def _data_set(self, world: Communicator) -> Iterator[Path]:
        """Collective: a data set of random tokens, of which each rank writes a part, for as long as the block lasts."""
        made_by = tokenizer.train(["some text " * 9], 300)
        made_by.vocab_size = self.vocab_size  # nothing is encoded
        folder = decide_on_root(world, lambda: Path(tempfile.mkdtemp(prefix="mpipar-benchmark-", dir=self.folder)))
        try:
            with agreement(world):
                if world.rank == 0:
                    (folder / "tokenizer.json").write_text(made_by.text, encoding="utf-8")
                for index in range(world.rank, self.shards, world.size):
                    tokens = np.random.default_rng(index).integers(self.vocab_size, size=self.tokens, dtype=np.uint32)
                    write_shard(folder, "train", index, self.shards, [tokens], made_by, self.tokens)
            decide_on_root(world, lambda: write_indices(folder))
            yield folder
            world.barrier()
        finally:
            if world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _windows(self, num_shards: int, seed: int) -> list[Window]:
        rng = np.random.default_rng(seed)
        shards, places = rng.integers(num_shards, size=self.reads), rng.integers(self.tokens // LENGTH, size=self.reads)
        return list(zip(shards.tolist(), places.tolist(), strict=True))

    def _reads(
        self, world: Communicator, folder: Path, inventory: Inventory
    ) -> tuple[dict[str, dict[str, Seconds]], list[str]]:
        """Collective: by what is read, and by whom, the seconds of a read; and who does not take part."""
        few = self._windows(_FEW, seed=0)
        many = [self._windows(self.shards, seed) for seed in range(1, _WINDOW_LISTS + 1)]
        of_few = replace(inventory, headers=inventory.headers[:_FEW])
        with ShardSet(folder, "train", of_few) as shards, ShardSet(folder, "train", inventory) as all_shards:
            maps = _maps(all_shards)
            readers: dict[str, Read] = {
                _OURS: lambda shard, place: shards.read(shard, place * LENGTH, LENGTH),
                _NUMPY: lambda shard, place: np.array(maps[shard][place * LENGTH : (place + 1) * LENGTH]),
            }
            per_shard = self.tokens // LENGTH
            windows = [readers[_NUMPY](*divmod(number, per_shard)) for number in range(_FEW * per_shard)]
            peer = open_litdata(folder / f"litdata-{world.rank}", windows)
            absent = [f"no {_LITDATA}: {peer}"] if isinstance(peer, str) else []
            if not isinstance(peer, str):
                readers[_LITDATA] = lambda shard, place: peer(shard * per_shard + place)
            for read in readers.values():
                assert all(np.array_equal(read(*at), windows[at[0] * per_shard + at[1]]) for at in few)

            def fill(of: ShardSet, rows: NDArray[np.int64], batch: list[Window]) -> None:  # as data/samples.py does
                stored = np.empty(rows.shape, of.dtype)
                for row, (shard, place) in zip(stored, batch, strict=True):
                    of.tokens[shard].read_into(place * LENGTH, row)
                rows[:] = stored

            def fill_from_maps(rows: NDArray[np.int64], batch: list[Window]) -> None:  # without a copy before
                for row, (shard, place) in zip(rows, batch, strict=True):
                    row[:] = maps[shard][place * LENGTH : (place + 1) * LENGTH]

            fills: dict[str, Fill] = {_OURS: partial(fill, shards), _NUMPY: fill_from_maps}
            fills_of_all: dict[str, Fill] = {_OURS: partial(fill, all_shards), _NUMPY: fill_from_maps}
            firsts = [(shard, 0) for shard in range(_FEW)]
            for every in fills_of_all.values():  # what a run does once is not in question
                _fill_all(every, [(shard, 0) for shard in range(self.shards)])
            asked: dict[str, dict[str, Callable[[], object]]] = {
                "stored": {name: partial(_read_all, read, few) for name, read in readers.items()},
                "batch": {name: partial(_fill_all, fill, few) for name, fill in fills.items()},
                "first": {_OURS: lambda: _read_first(folder, of_few, firsts)},
                "all": {
                    # Who comes second may not find what the first has brought into the cache.
                    name: partial(_fill_next, every, cycle(many[first:] + many[:first]))
                    for first, (name, every) in zip((0, len(many) // 2), fills_of_all.items(), strict=True)
                },
            }
            operations = {what: len(firsts) if what == "first" else self.reads for what in asked}
            return self._times(world, asked, operations), absent

    def _starts(self, world: Communicator, folder: Path, inventory: Inventory) -> dict[str, dict[str, Seconds]]:
        """Collective: from nothing to the first token, by what is known before."""
        index, hidden = folder / index_name("train"), folder / "hidden.h5"

        def unindexed() -> None:  # on one rank, as in a run
            if world.rank == 0:
                index.rename(hidden)
                ShardSet.open(folder, "train").close()
                hidden.rename(index)

        def indexed() -> None:
            if world.rank == 0:
                ShardSet.open(folder, "train").close()

        with ShardSet(folder, "train", inventory) as shards:
            asked: dict[str, dict[str, Callable[[], object]]] = {
                "start": {
                    "rank 0, of the index": indexed,
                    "the others, of what it sends": lambda: ShardSet(
                        folder, "train", world.broadcast_object(inventory if world.rank == 0 else None)
                    ).close(),
                    f"{_NUMPY}, each file": lambda: _maps(shards),
                },
                "no index": {"rank 0, each shard": unindexed},
            }
            few = replace(self, rounds=min(5, self.rounds), warmup=min(1, self.warmup))
            return few._times(world, asked, dict.fromkeys(asked, 1))

    def _times(
        self,
        world: Communicator,
        asked: Mapping[str, Mapping[str, Callable[[], object]]],
        operations: Mapping[str, int],
    ) -> dict[str, dict[str, Seconds]]:
        """Collective: seconds of one operation, of so many each. All take turns, so that any two can be compared."""
        flat = {f"{what}\n{who}": call for what, calls in asked.items() for who, call in calls.items()}
        times = take_turns(world, flat, rounds=self.rounds, warmup=self.warmup)
        return {
            what: {who: times[f"{what}\n{who}"] / operations[what] for who in calls} for what, calls in asked.items()
        }

    def _memory(self, folder: Path, inventory: Inventory) -> list[str]:
        """What this process holds more than before, with every block of all shards read once."""
        lines = ["# memory    of a process, MB              its own    mapped files"]
        with ShardSet(folder, "train", inventory) as shards:
            before = _resident_mb()
            for shard, known in enumerate(shards.shards):
                for start in range(0, known.num_tokens - LENGTH, LENGTH):
                    shards.read(shard, start, LENGTH)
            lines.append(_grown(f"{_OURS}, all read", before))
            before = _resident_mb()
            maps = _maps(shards)
            total = sum(int(array[::1024].sum()) for array in maps)  # touches every page
            lines.append(_grown(f"{_NUMPY}, all read", before))
            assert total >= 0
        return lines

    def _described(self, environment: Environment, absent: list[str]) -> list[str]:
        megabytes = self.shards * self.tokens * 2 / 1e6
        return [
            environment.header(),
            comments(
                [
                    f"{self.shards:,} shards of {self.tokens:,} tokens, {megabytes:,.0f} MB; {self.reads} random reads "
                    f"of {LENGTH:,} tokens a measurement, {self.rounds} measurements; medians",
                    f"stored, batch, first: of {_FEW} shards; all: of {self.shards:,}, of which at most "
                    f"{room_for_files()} are open",
                    "ratio: median over measurements, of times taken side by side (lower to upper quartile)",
                    *absent,
                ]
            ),
        ]


def _read_all(read: Read, windows: list[Window]) -> None:
    for shard, place in windows:
        read(shard, place)


def _fill_all(fill: Fill, windows: list[Window]) -> None:
    for first in range(0, len(windows), _BATCH):
        batch = windows[first : first + _BATCH]
        fill(np.empty((len(batch), LENGTH), np.int64), batch)


def _fill_next(fill: Fill, lists: Iterator[list[Window]]) -> None:
    _fill_all(fill, next(lists))


def _read_first(folder: Path, inventory: Inventory, windows: list[Window]) -> None:
    with ShardSet(folder, "train", inventory) as shards:
        for shard, place in windows:
            shards.read(shard, place * LENGTH, LENGTH)


def _maps(shards: ShardSet) -> list[NDArray[Any]]:
    """The tokens of every shard in memory that is mapped."""
    found: list[NDArray[Any]] = []
    for shard in shards.shards:
        (place,) = (extent for extent in shard.header.layout.extents if extent.name == "tokens")
        found.append(np.memmap(shard.path, dtype=place.dtype, mode="r", offset=place.offset, shape=place.shape))
    return found


def _table(found: Mapping[str, Mapping[str, Seconds]], factor: float, unit: str) -> list[str]:
    """A line for each contestant, beside numpy's where it did the same."""
    lines = [f"# {'what':9} {'who':30} {'time':>7} {unit}    ratio to {_NUMPY}"]
    for what, times in found.items():
        reference = next((seconds for who, seconds in times.items() if who.startswith(_NUMPY)), None)
        for who, seconds in times.items():
            compared = ""
            if reference is not None and seconds is not reference:
                middle, low, high = ratio(seconds, reference)
                compared = f"    {middle:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"  {what:9} {who:30} {float(np.median(seconds)) * factor:7.2f}{' ' * len(unit)}{compared}")
    return lines


def _resident_mb() -> tuple[float, float]:
    """(private, of mapped files) memory of this process that is in use."""
    lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(int(fields[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def _grown(who: str, before: tuple[float, float]) -> str:
    private, mapped = (now - then for now, then in zip(_resident_mb(), before, strict=True))
    return f"  memory    {who:30} {private:7.1f} {mapped:15.1f}"
