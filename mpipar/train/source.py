"""What a run reads: this rank's microbatches of each step, its share of the validation sequences."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mpipar.comm.counter import Counter
from mpipar.data import Loader, Microbatch, SampleOrder, ShardSet, validation_loader
from mpipar.errors import DataError
from mpipar.train.config import Config
from mpipar.train.dealing import Dealing, Team


class Source:
    """The data set of a run, dealt to the ranks of the dp axis.

    Which tokens a microbatch holds depends on the seed, the step and its index alone.

    Args:
        config: The settings.
        team: Who computes.
        counter: Of this host, to claim microbatches from; None to deal them statically.

    Raises:
        DataError: The data set is missing, damaged, or too small for a single step or evaluation.
    """

    def __init__(self, config: Config, team: Team, counter: Counter | None):
        folder, train = config.data.dir, config.train
        shards = ShardSet.open(folder, "train")
        order = SampleOrder(shards.num_tokens_per_shard, train.seq_len, train.seed)
        if order.num_samples < train.global_batch:
            raise DataError(
                f"{folder} has {order.num_samples} training sequences of --train.seq-len {train.seq_len}, fewer than "
                f"one step's --train.global-batch {train.global_batch}: pack more text, or ask for less"
            )
        self._loader = Loader(shards, order, train.microbatch, train.num_microbatches)
        held_out = ShardSet.open(folder, "val")
        self._validation = validation_loader(held_out, train.seq_len, train.microbatch, train.eval_sequences)
        self.shards = shards
        self.num_samples = order.num_samples
        self.dealing = Dealing(team, train.num_microbatches, counter)

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of a step, read while the one before computes."""
        return self._loader.microbatches(step, self.dealing.begin(), then=self.dealing.first)

    def microbatch(self, step: int, index: int) -> Tensor:
        """Any microbatch of a step."""
        return self._loader.microbatch(step, index)

    @property
    def num_validation(self) -> int:
        """Microbatches in an evaluation, over all ranks."""
        return self._validation.num_microbatches

    def validation(self) -> list[tuple[int, Tensor]]:
        """This rank's validation microbatches, with their indices; the same at every evaluation."""
        mine = self.dealing.team.share(self.num_validation)
        return [(i, self._validation.microbatch(0, i)) for i in mine]

    def close(self) -> None:
        """Ends the background reading and closes the files."""
        self._loader.close()
        self._validation.close()
