"""A decoder-only transformer in plain torch, whose families (llama, gpt2) are data."""

from __future__ import annotations

from mpipar.model.config import ModelConfig
from mpipar.model.dropout import begin_microbatch
from mpipar.model.generate import generate
from mpipar.model.init import initialise
from mpipar.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer", "begin_microbatch", "generate", "initialise"]
