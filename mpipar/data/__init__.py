"""From text to batches of tokens.

    shards       the data set on disk: HDF5 shards and their tokenizer; shard is one of them
    index        what the shards of a split hold, in one file
    mix          which of several data sets a sample is of
    order        which sample of it comes when: a permutation that is computed, not stored
    samples      from a number to the tokens of a sample
    loader       microbatches, prepared while the last one computes
    tokenizer    byte-level BPE: trained here, or given

and how `python -m mpipar.data pack | import` makes a data set:

    recipe       the input files and the settings
    corpus       files -> pieces
    documents    pieces -> documents; parquet
    templates    what stands around the messages of a conversation
    conversations
                 records -> messages -> tokens, and which of them count
    skipped      what could not be read, counted and listed
    survey       what documents there are; which are for validation
    dedup        documents that resemble each other
    plan         which shard is made of what
    workshop     the hidden folder where it is made, and found again after a kill
    write        the shards, by all ranks
    make         what packing and importing have in common
    pack         text, all of the above
    importing    tokens of other programs; megatron
    words        byte-level BPE that remembers
    report       what a data set holds, and whether it is whole
    progress     how far a long command is
"""

from mpipar.data.index import Inventory
from mpipar.data.loader import Loader, Microbatch, validation_loader
from mpipar.data.order import SampleOrder
from mpipar.data.samples import Samples, Sequences
from mpipar.data.shard import Shard
from mpipar.data.shards import ShardSet
from mpipar.data.tokenizer import Tokenizer

__all__ = [
    "Inventory",
    "Loader",
    "Microbatch",
    "SampleOrder",
    "Samples",
    "Sequences",
    "Shard",
    "ShardSet",
    "Tokenizer",
    "validation_loader",
]
