"""Writing a checkpoint: what one rank does of it, in three phases, none of which communicates.

    write      every rank     its parts of the slices, into the file of its host, flushed; it keeps their checksums
               ---            all ranks have ended, and know all checksums
    seal       leaders        the file's header and table of checksums, flushed; rank 0 also index.json and the texts
               ---            all leaders have ended
    publish    rank 0         the hidden folder takes its name, in one rename; older checkpoints are given up for it

So a phase can run in a thread while the run goes on, and a kill at any instant leaves a hidden folder, which the next
start removes, or a whole checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.checkpoint import dtypes
from mpipar.checkpoint.box import Box
from mpipar.checkpoint.folder import discard_old, folder_of
from mpipar.checkpoint.index import INDEX, Index, StoredSlice, StoredTensor, Text, encode, file_name
from mpipar.checkpoint.plan import Held, Part, Plan, Slice, plan
from mpipar.errors import CheckpointError
from mpipar.storage import (
    BLOCK_BYTES,
    ArrayWriter,
    Blueprint,
    Checksums,
    flush,
    partial_folder,
    publish_folder,
    remove_folder,
    remove_partials,
    table_checksum,
)

_WRITE_BYTES = 16 << 20  # between two looks whether the work is still wanted


@dataclass(frozen=True)
class Notes:
    """What belongs to a checkpoint beside its tensors.

    Args:
        step: Number of finished steps.
        attributes: What else is needed to go on, as JSON.
        texts: Text files to lie beside the tensors, by name.
        keep: How many of the latest checkpoints are kept, this one included.
        keep_every: Checkpoints of multiples of this step are kept for good; 0 for none.
    """

    step: int
    attributes: Mapping[str, Any]
    texts: Mapping[str, str]
    keep: int
    keep_every: int = 0


@dataclass(frozen=True)
class Written:
    """What a rank tells the others of what it has written.

    Args:
        crcs: The CRC-32 of its blocks, part after part.
        file_bytes: The length that its host's file will have.
    """

    crcs: Checksums
    file_bytes: int


class AbandonedError(Exception):
    """The checkpoint that was being written is not wanted any more."""


def hold(tensors: Mapping[str, Tensor]) -> list[Held]:
    """What a rank holds that has whole tensors."""
    return [Held(name, dtypes.name_of(x.dtype), tuple(x.shape), Box.whole(x.shape)) for name, x in tensors.items()]


class Share:
    """This rank's share of the checkpoints of one plan.

    Args:
        shared: Who writes what.
        rank: This rank.
    """

    def __init__(self, shared: Plan, rank: int):
        self.plan = shared
        self.rank = rank
        self.file = shared.file_of[rank]
        self.parts = shared.parts[rank]

    @cached_property
    def blueprint(self) -> Blueprint:
        """Of the file. HDF5 takes a millisecond for each data set: this is left to the first phase."""
        held = [(own.dataset, own.held) for own in self.plan.files[self.file]]
        shapes = {name: (own.box.extent, dtypes.stored(own.dtype)) for name, own in held}
        return Blueprint(shapes, {"format": "mpipar-checkpoint", "file": self.file})

    @property
    def leads(self) -> bool:
        """Whether this rank seals its host's file."""
        return self.plan.leaders[self.file] == self.rank

    def sources(self, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> list[Tensor]:
        """The bytes of each part, [bytes] uint8, where the tensors lie if they lie in one piece.

        Args:
            tensors: What this rank has, by name.
            boxes: Which part of a tensor that is; not needed for whole ones.
        """
        return [_bytes_of(tensors[part.slice.held.name], boxes, part) for part in self.parts]

    def write(self, partial: Path, sources: Sequence[Tensor], abandoned: Event) -> Written:
        """The first phase.

        Args:
            partial: The hidden folder.
            sources: The bytes of each part, on the CPU.
            abandoned: Set when the work is not wanted any more.

        Raises:
            OSError: There is no room, or no permission.
            AbandonedError: It is not wanted.
        """
        crcs: list[Checksums] = []
        with ArrayWriter(partial / file_name(self.file), self.blueprint) as writer:
            if self.leads:
                writer.reserve()
            for part, source in zip(self.parts, sources, strict=True):
                data = source.cpu().numpy().data
                for at in range(0, len(data), _WRITE_BYTES):
                    if abandoned.is_set():
                        raise AbandonedError
                    crcs.append(writer.write(part.slice.dataset, part.begin + at, data[at : at + _WRITE_BYTES]))
            writer.flush()
        return Written(np.concatenate([np.empty(0, np.uint32), *crcs]), self.blueprint.file_bytes)

    def seal(self, partial: Path, written: Sequence[Written], notes: Notes) -> None:
        """The second phase; without effect on ranks that neither lead on their host nor are rank 0.

        Args:
            partial: The hidden folder.
            written: Of every rank, what it has told.
            notes: What lies beside the tensors.
        """
        if not self.leads and self.rank != 0:
            return
        crcs = _crcs_of(self.plan, written)
        if self.leads:
            table = np.empty(self.blueprint.num_blocks, np.uint32)
            for own in self.plan.files[self.file]:
                table[self.blueprint.blocks(own.dataset)] = crcs[own]
            with ArrayWriter(partial / file_name(self.file), self.blueprint) as writer:
                writer.seal(table)
                writer.flush()
        if self.rank == 0:
            contents = {name: text.encode() for name, text in notes.texts.items()}
            index = Index(
                step=notes.step,
                attributes=dict(notes.attributes),
                texts={name: Text.of(content) for name, content in contents.items()},
                file_bytes=tuple(written[leader].file_bytes for leader in self.plan.leaders),
                tensors=_tensors(crcs),
            )
            for name, content in {**contents, INDEX: encode(index)}.items():
                (partial / name).write_bytes(content)
                flush(partial / name)

    def publish(self, partial: Path, notes: Notes) -> None:
        """The third phase; without effect on all ranks but 0. When it returns, the checkpoint survives whatever comes.

        Older checkpoints are given up for it only then.
        """
        if self.rank == 0:
            publish_folder(partial, folder_of(partial.parent, notes.step))
            with suppress(OSError):  # this one is there; old ones that are left are tried again with the next
                discard_old(partial.parent, notes.step, notes.keep, notes.keep_every)


def begin(root: Path, step: int) -> Path:
    """Makes the hidden folder for a checkpoint of a step. For one rank. Nobody else may be writing below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    remove_partials(root)
    partial = partial_folder(folder_of(root, step))
    partial.mkdir()
    return partial


def cannot_write(root: Path, step: int, error: OSError, rank: int | None = None) -> CheckpointError:
    """The error of a checkpoint that could not be written, by a rank if there are several."""
    return CheckpointError(
        f"checkpoint {folder_of(root, step)} cannot be written: {error.strerror or error}. Earlier checkpoints are as "
        "they were",
        rank=rank,
    )


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    *,
    files: Mapping[str, str],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Writes the checkpoint of a step below `root`, by this process alone, and gives up older ones for it.

    Args:
        root: The folder of a run's checkpoints; made if it is not there. Nobody else may be writing in it.
        step: Number of finished steps.
        tensors: By name, of any dtype and device; `capture` gives those of a model and its optimizer.
        attributes: What else is needed to go on, as JSON.
        files: Text files to lie beside the tensors, by name.
        keep: How many of the latest checkpoints are kept, at least 1.
        keep_every: Checkpoints of multiples of this step are kept for good; 0 for none.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: It cannot be written. The earlier checkpoints are as they were.
    """
    assert keep >= 1
    notes = Notes(step, attributes, files, keep, keep_every)
    share = Share(plan([hold(tensors)], [0]), 0)
    json.dumps(notes.attributes)  # what cannot be kept is found before anything is written
    partial = None
    try:
        partial = begin(root, step)
        written = share.write(partial, share.sources(tensors, {}), Event())
        share.seal(partial, [written], notes)
        share.publish(partial, notes)
    except BaseException as error:
        if partial is not None and partial.exists():
            remove_folder(partial)
        if isinstance(error, OSError):
            raise cannot_write(root, step, error) from error
        raise
    return folder_of(root, step)


def _bytes_of(tensor: Tensor, boxes: Mapping[str, Box], part: Part) -> Tensor:
    held = part.slice.held
    box = held.box.within(boxes[held.name]) if held.name in boxes else held.box
    own = tensor.detach()
    rows = own if box.extent == tuple(own.shape) else own[box.index]
    return rows.contiguous().view(-1).view(torch.uint8)[part.begin : part.end]


def _crcs_of(shared: Plan, written: Sequence[Written]) -> dict[Slice, Checksums]:
    """The checksums of each slice's blocks, put together from what the ranks have written."""
    crcs = {
        own: np.empty(-(-own.held.num_bytes // BLOCK_BYTES), np.uint32) for slices in shared.files for own in slices
    }
    for parts, told in zip(shared.parts, written, strict=True):
        at = 0
        for part in parts:
            first, last = part.begin // BLOCK_BYTES, -(-part.end // BLOCK_BYTES)
            crcs[part.slice][first:last] = told.crcs[at : at + last - first]
            at += last - first
    return crcs


def _tensors(crcs: Mapping[Slice, Checksums]) -> dict[str, StoredTensor]:
    slices: dict[str, list[StoredSlice]] = {}
    facts: dict[str, Held] = {}
    for own, blocks in crcs.items():
        stored = StoredSlice(own.file, own.dataset, own.held.box, table_checksum(blocks))
        slices.setdefault(own.held.name, []).append(stored)
        facts[own.held.name] = own.held
    return {name: StoredTensor(facts[name].dtype, facts[name].shape, tuple(slices[name])) for name in sorted(slices)}
