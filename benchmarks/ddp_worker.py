"""A worker as a user of torch writes it to survive deaths: DDP over gloo, started by torchrun, a checkpoint a step.

    torchrun --max-restarts 3 --nproc-per-node 8 -m benchmarks.ddp_worker --checkpoint FILE

When a worker dies, torchrun ends the others and starts all of them again; they go on from the last checkpoint. It
trains our model on random tokens, and says when a step begins. `recovery` kills it.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.command import run_command
from mpipar.command_line import parse
from mpipar.model import ModelConfig, Transformer, initialise


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process of a data-parallel run."""

    checkpoint: Path
    """Where rank 0 keeps the state after each step, and where all go on from."""
    vocab_size: int = 4096
    """Token ids."""
    batch: int = 2
    """Sequences of a worker in a step."""
    seq_len: int = 128
    """Tokens in a sequence."""
    steps: int = 1_000_000
    """When to end."""
    bf16: bool = False
    """Autocast matrix products to bfloat16."""

    def run(self) -> None:
        """Trains."""
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = Transformer(ModelConfig(), vocab_size=self.vocab_size)
        initialise(model, seed=1)
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(replica.parameters(), fused=True)
        done = self._load(model, optimizer)
        generator = torch.Generator().manual_seed(rank)
        start = os.environ["TORCHELASTIC_RESTART_COUNT"]
        for step in range(done + 1, self.steps + 1):
            if rank == 0:
                print(f"start {start}, step {step} begun", flush=True)
            tokens = torch.randint(self.vocab_size, (self.batch, self.seq_len + 1), generator=generator)
            with self._precision():
                logits = replica(tokens[:, :-1])
            nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if rank == 0:
                self._save(model, optimizer, step)

    def _load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Goes on from the checkpoint, if there is one; returns the steps that are done."""
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done: int = state["step"]
        return done

    def _save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """A kill in the middle of it leaves the checkpoint before."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
        partial.replace(self.checkpoint)

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)


if __name__ == "__main__":
    sys.exit(run_command(lambda: parse(Worker, "torchrun -m benchmarks.ddp_worker").run()))
