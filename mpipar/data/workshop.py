"""Where a data set is made: a hidden folder beside its place, in which a killed pack has left what it had finished.

    .partial-KEY-NAME/                 KEY: the first digits of the fingerprint of input and settings
        train-00000.h5 ...             whole, or not there
        tokenizer.json
        .work/survey.h5                what the first pass found
        .work/skipped-RANK             what ranks skip, while they read
        .work/claims/train-00007.h5    somebody writes it, or has written it
    .lock-NAME                         held by rank 0: one pack at a time

When all is there, `.work` goes and the folder takes its name. Whoever makes the same set finds the folder and does what
is missing; whoever makes another one there removes it.

Ranks claim shards by creating files, which is atomic on every file system that hosts share, and outlives whoever did
it. They begin with those that are dealt to them, and go on with those of others: a slow rank has fewer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mpipar.comm import Communicator, decide_on_root
from mpipar.data.plan import ShardPlan, deal
from mpipar.data.shard import Shard, shard_name
from mpipar.errors import DataError
from mpipar.storage import FileLock, partial_folder, put_in_place, remove_partials

_WORK = ".work"


class Workshop:
    """The folder in which the ranks make a data set.

    Args:
        folder: What will be the data set.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder / _WORK
        self.survey = self.work / "survey.h5"
        self._claims = self.work / "claims"
        self._stopped = self._claims / "stopped"

    def finished(self, world: Communicator, plans: Sequence[ShardPlan], tokenizer_id: str) -> set[int]:
        """Collective: which of the plans have their shard already. Each is looked at by one rank, at its header: what
        was written is flushed before it has its name, so a shard that is there is whole.
        """
        mine = range(world.rank, len(plans), world.size)
        found = [index for index in mine if self._is_finished(plans[index], tokenizer_id)]
        return {index for part in world.all_gather_object(found) for index in part}

    def _is_finished(self, plan: ShardPlan, tokenizer_id: str) -> bool:
        path = self.folder / shard_name(plan.split, plan.index)
        if not path.exists():
            return False
        try:
            with Shard(path) as shard:
                return (
                    (shard.split, shard.index, shard.num_shards) == (plan.split, plan.index, plan.num_shards)
                    and (shard.num_documents, shard.text_bytes) == (plan.num_documents, plan.text_bytes)
                    and shard.tokenizer_id == tokenizer_id
                )
        except DataError:
            return False

    def claim(self, plans: Sequence[ShardPlan], left: Sequence[int], rank: int, num_ranks: int) -> Iterator[int]:
        """Which of the plans this rank makes, of those that are left: one after the other, as it comes to them."""
        dealt = deal([plans[index].text_bytes + plans[index].read_bytes for index in left], num_ranks)
        others = (item for other in range(1, num_ranks) for item in reversed(dealt[(rank + other) % num_ranks]))
        for item in (*dealt[rank], *others):
            if self._stopped.exists():
                return
            plan = plans[left[item]]
            if self._create(self._claims / shard_name(plan.split, plan.index)):
                yield left[item]

    def _create(self, path: Path) -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}") from error
        return True

    def stop(self) -> None:
        """This rank has failed: nobody begins another shard."""
        with suppress(OSError):  # the disk may be full; then the others find out by themselves
            self._stopped.touch()

    def clean(self) -> None:
        """Removes what a killed job has left unfinished."""
        self.work.mkdir(parents=True, exist_ok=True)
        remove_partials(self.folder)
        remove_partials(self.work)
        shutil.rmtree(self._claims, ignore_errors=True)
        self._claims.mkdir()
        for notes in self.work.glob("skipped-*"):
            notes.unlink()


@contextmanager
def workshop(world: Communicator, out: Path, fingerprint: str) -> Iterator[Workshop]:
    """Collective: a workshop for the data set at `out`; where the block ends it takes its place.

    If the block raises, what was finished is kept for the next attempt.

    Args:
        world: All ranks.
        out: What the folder will be.
        fingerprint: Of what is made; see `recipe`.

    Raises:
        DataError: Another process makes a data set there, or the folder cannot be made.
    """
    out = out.resolve()
    with ExitStack() as held:  # on rank 0: the lock
        shop = decide_on_root(world, lambda: _open(held, out, fingerprint))
        try:
            yield shop
            decide_on_root(world, lambda: _commit(shop, out))
        except BaseException:
            if world.rank == 0 and not any(shop.folder.rglob("*.h5")):
                shutil.rmtree(shop.folder, ignore_errors=True)
            raise


def kept(shop: Workshop) -> str:
    """What to say of it when the making has failed."""
    return f"What is finished is kept in {shop.folder}: the same command goes on from there"


def _open(held: ExitStack, out: Path, fingerprint: str) -> Workshop:
    shop = Workshop(partial_folder(out, fingerprint))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(out.with_name(f".lock-{out.name}"))
        if isinstance(lock, str):
            raise DataError(f"--out {out} is being made by {lock}: wait for its end, or choose another folder")
        held.callback(lock.release)
        remove_partials(out.parent, out.name, keep=shop.folder)
        shop.clean()
    except OSError as error:
        raise DataError(f"cannot write the data set {out}: {error.strerror}") from error
    return shop


def _commit(shop: Workshop, out: Path) -> None:
    try:
        shutil.rmtree(shop.work)
        put_in_place(shop.folder, out)
    except OSError as error:
        raise DataError(f"cannot write the data set {out}: {error.strerror}") from error
