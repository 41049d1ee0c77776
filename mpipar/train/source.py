"""What a run reads: this rank's microbatches of each step, its share of the validation sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpipar.comm.counter import Counter
from mpipar.data import Inventory, Loader, Microbatch, Samples, Sequences, ShardSet, Tokenizer, validation_loader
from mpipar.data.shards import entropy, take_inventory
from mpipar.errors import ConfigError, DataError
from mpipar.storage import ArrayFiles, OpenFiles, room_for_files
from mpipar.train.config import Config
from mpipar.train.dealing import Dealing, Team

_VALIDATION_SEED = 0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stock:
    """What a run's data sets hold, as one rank has seen it for all: they need not all open a thousand files.

    Args:
        train: Of each data set, what shards the training split has.
        val: The same of the validation split.
        end_of_text: The token at which documents are kept apart; None if they are joined.
    """

    train: tuple[Inventory, ...]
    val: tuple[Inventory, ...]
    end_of_text: int | None

    @classmethod
    def take(cls, config: Config) -> Stock:
        """Looks at the data sets of the settings.

        Raises:
            DataError: One is missing or damaged.
        """
        train, val = (tuple(take_inventory(folder, split) for folder in config.data.dir) for split in ("train", "val"))
        end_of_text = None
        if config.data.documents == "separate":
            end_of_text = ShardSet(config.data.dir[0], "train", train[0]).read_tokenizer().end_of_text
        return cls(train, val, end_of_text)


class Source:
    """The data sets of a run, dealt to the ranks of the dp axis.

    Which tokens a microbatch holds depends on the seed, the step and its index alone.

    Args:
        config: The settings.
        stock: What the data sets hold.
        team: Who computes.
        counter: Of this host, to claim microbatches from; None to deal them statically.
        device: Where this rank computes.

    Attributes:
        sets: The training splits.
        samples: What the steps are made of.

    Raises:
        ConfigError: The data ends before the last step does.
        DataError: The data sets are of several tokenizers, or too small for a single step or evaluation.
    """

    def __init__(self, config: Config, stock: Stock, team: Team, counter: Counter | None, device: torch.device = _CPU):
        data, train = config.data, config.train
        self._files: ArrayFiles = OpenFiles(room_for_files())
        self.sets = self._open(data.dir, "train", stock.train)
        self.samples = Samples(
            self.sets,
            train.seq_len,
            train.seed,
            weights=data.weights,
            epochs=data.epochs,
            end_of_text=stock.end_of_text,
        )
        _require_enough(config, self.samples)
        held_out = self._open(data.dir, "val", stock.val)
        mixed = Samples(
            held_out,
            train.seq_len,
            _VALIDATION_SEED,
            weights=data.weights,
            epochs=[1] * len(data.dir),
            end_of_text=stock.end_of_text,
        )
        self._loader = Loader(self.samples, train.microbatch, train.num_microbatches, device)
        self._validation = validation_loader(mixed, train.microbatch, train.eval_sequences, device)
        _require_answers(self._validation)
        self._validation_of = _each_alone(config, held_out, stock.end_of_text, device)
        self.dealing = Dealing(team, train.num_microbatches, counter)
        self.vocab_size = self.sets[0].vocab_size
        self.unigram_entropy = self._unigram_entropy()
        self.identity = {
            "vocab_size": self.vocab_size,
            "tokenizer": self.sets[0].tokenizer_id,
            "num_tokens": [shards.num_tokens for shards in self.sets],
            "shares": self.samples.mixture.shares,
            "epochs": list(data.epochs),
            "documents": data.documents,
        }
        """What tells one sequence of samples from another, beside the settings of the section train."""

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of a step, read while the one before computes."""
        return self._loader.microbatches(step, self.dealing.begin(), then=self.dealing.first)

    def microbatch(self, step: int, index: int) -> Sequences:
        """Any microbatch of a step."""
        return self._loader.microbatch(step, index)

    @property
    def validations(self) -> dict[str, Validation]:
        """What an evaluation reads: under "" the mixture; where several data sets are mixed, each alone by its folder.

        The same at every evaluation.
        """
        team = self.dealing.team
        return {
            name: Validation(loader, team) for name, loader in {"": self._validation, **self._validation_of}.items()
        }

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer of all data sets."""
        return self.sets[0].read_tokenizer()

    def close(self) -> None:
        """Ends the background reading and closes the files."""
        for loader in (self._loader, self._validation, *self._validation_of.values()):
            loader.close()
        self._files.close()

    def _open(self, folders: tuple[Path, ...], split: str, inventories: tuple[Inventory, ...]) -> list[ShardSet]:
        return [
            ShardSet(folder, split, inventory, self._files)
            for folder, inventory in zip(folders, inventories, strict=True)
        ]

    def _unigram_entropy(self) -> float:
        """In nats a token: the loss of a model that knows how frequent each token is in the mixture, and nothing else.

        Shares are of samples, so of tokens.
        """
        shares = self.samples.mixture.shares
        frequencies = [shards.unigrams / shards.num_tokens for shards in self.sets]
        return entropy(np.average(frequencies, axis=0, weights=shares))


class Validation:
    """Validation sequences, and the team that shares them.

    Args:
        loader: Gives them.
        team: Who computes.

    Attributes:
        num_microbatches: Over all ranks.
    """

    def __init__(self, loader: Loader, team: Team):
        self.num_microbatches = loader.num_microbatches
        self._loader = loader
        self._team = team

    def microbatches(self) -> list[tuple[int, Sequences]]:
        """This rank's, with their indices."""
        return [(i, self._loader.microbatch(0, i)) for i in self._team.share(self.num_microbatches)]


def _each_alone(
    config: Config, held_out: Sequence[ShardSet], end_of_text: int | None, device: torch.device
) -> dict[str, Loader]:
    """Where several data sets are mixed, the first validation sequences of each, in its order in the mixture.

    Together as many as of the mixture, so that an evaluation takes twice as long. A data set whose validation split
    does not fill a microbatch is left out.
    """
    train = config.train
    if len(held_out) == 1:
        return {}
    each = max(train.microbatch, train.eval_sequences // len(held_out))
    alone = {
        str(shards.folder): Samples([shards], train.seq_len, _VALIDATION_SEED + number, end_of_text=end_of_text)
        for number, shards in enumerate(held_out)
    }
    return {
        folder: validation_loader(samples, train.microbatch, each, device)
        for folder, samples in alone.items()
        if samples.num_samples >= train.microbatch
    }


def _require_answers(validation: Loader) -> None:
    """Raises an error if no prediction of the validation sequences counts. As a rule the first microbatch has some."""
    if all(source.num_counted == source.num_tokens for source in validation.samples.sources):
        return
    for index in range(validation.num_microbatches):
        counted = validation.microbatch(0, index).counted
        if counted is None or counted.any():
            return
    folders = ", ".join(str(source.folder) for source in validation.samples.sources)
    num_sequences = validation.num_microbatches * len(validation.microbatch(0, 0).tokens)
    raise DataError(
        f"{folders}: none of the {num_sequences} validation sequences has a token of an answer in it. Ask for more by "
        "--train.eval-sequences, or pack with a larger --val-fraction"
    )


def _require_enough(config: Config, samples: Samples) -> None:
    """Raises an error if there are not samples for one step, or data that ends has not enough for all."""
    train, last = config.train, samples.mixture.num_samples
    folders = ", ".join(map(str, config.data.dir))
    if samples.num_samples < train.global_batch:
        raise DataError(
            f"{folders}: {samples.num_samples} training sequences of --train.seq-len {train.seq_len}, fewer than one "
            f"step's --train.global-batch {train.global_batch}: pack more text, or ask for less"
        )
    if last is not None and train.steps * train.global_batch > last:
        raise ConfigError(
            f"--data.epochs {' '.join(map(str, config.data.epochs))} ends the data after {last:,} sequences, which is "
            f"{last // train.global_batch:,} steps of --train.global-batch {train.global_batch}; --train.steps is "
            f"{train.steps:,}. Ask for fewer steps, or for more epochs of a data set (0 is without end)"
        )
