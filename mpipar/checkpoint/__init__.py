"""Checkpoints: folders that are whole or not there, with every tensor under its single-process name."""

from __future__ import annotations

from mpipar.checkpoint.digest import digest
from mpipar.checkpoint.folder import Checkpoint, discard_after, latest, load, save
from mpipar.checkpoint.state import capture, restore

__all__ = ["Checkpoint", "capture", "digest", "discard_after", "latest", "load", "restore", "save"]
