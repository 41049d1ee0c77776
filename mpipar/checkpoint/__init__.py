"""Checkpoints: folders that are whole or not there, with every tensor under its single-process name.

box, plan       which part of which tensor goes where, and who writes it: arithmetic
write           what one rank does to write one
snapshot        a copy of it, for a run that goes on meanwhile
index, read     what a checkpoint says of itself; tensors, or boxes of them, out of it
folder          the checkpoints of a run, and which of them are kept
state           a model and its optimizer as tensors, and back
digest          one number for all of them
"""

from __future__ import annotations

from mpipar.checkpoint.box import Box
from mpipar.checkpoint.digest import digest
from mpipar.checkpoint.folder import discard_after, latest
from mpipar.checkpoint.read import Checkpoint
from mpipar.checkpoint.state import WEIGHTS, capture, restore
from mpipar.checkpoint.write import save

__all__ = ["WEIGHTS", "Box", "Checkpoint", "capture", "digest", "discard_after", "latest", "load", "restore", "save"]

load = Checkpoint
