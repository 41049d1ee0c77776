"""What a run reads: this rank's microbatches of each step, its share of the validation sequences."""

from __future__ import annotations

from torch import Tensor

from mpipar.data import Loader, SampleOrder, ShardSet, validation_loader
from mpipar.errors import DataError
from mpipar.train.config import Config
from mpipar.train.team import Team


class Source:
    """The data set of a run, dealt to the ranks of the dp axis. Nothing is communicated.

    Microbatch i of a step is rank i mod n's, if n ranks compute. Which tokens it holds depends on the seed and the step
    alone.

    Args:
        config: The settings.
        team: Who computes.

    Raises:
        DataError: The data set is missing, damaged, or too small for a single step or evaluation.
    """

    def __init__(self, config: Config, team: Team):
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
        self.deal(team)

    def deal(self, team: Team) -> None:
        """Deals the microbatches to another team."""
        self.mine = team.share(self._loader.num_microbatches)
        self._my_validation = team.share(self._validation.num_microbatches)

    def microbatches(self, step: int) -> list[tuple[int, Tensor]]:
        """This rank's microbatches of a step: their indices, and [B, T + 1] tokens. The next step's are read ahead."""
        return list(zip(self.mine, self._loader.microbatches(step, self.mine), strict=True))

    @property
    def num_validation(self) -> int:
        """Microbatches in an evaluation, over all ranks."""
        return self._validation.num_microbatches

    def validation(self) -> list[tuple[int, Tensor]]:
        """This rank's validation microbatches, with their indices; the same at every evaluation."""
        return [(i, self._validation.microbatch(0, i)) for i in self._my_validation]

    def close(self) -> None:
        """Ends the background reading and closes the files."""
        self._loader.close()
        self._validation.close()
