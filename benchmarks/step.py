"""Question: what does data parallelism cost a training step, here and in torch DDP over gloo?

The same model takes the same step (forward, backward, AdamW) on the same microbatch in four ways, in turn: alone,
with no communication; as a replica of ours, reduced in shared memory where the ranks are on one host, and round the
ring; as a replica of DDP's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gloo import stop_gloo
from benchmarks.measure import begin, ratio, take_turns
from mpipar.comm import Communicator
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.parallel import DataParallel

_TITLES = {
    "alone": "no communication",
    "arena": "mpipar, shared memory",
    "ring": "mpipar, ring",
    "ddp": "torch DDP, gloo",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Times a data-parallel training step against torch DDP over gloo and against no communication."""

    layers: int = 8
    """Transformer layers."""
    dim: int = 512
    """Width of the residual stream."""
    heads: int = 8
    """Attention heads."""
    vocab_size: int = 4096
    """Token ids."""
    batch: int = 4
    """Sequences in a step of one rank."""
    seq_len: int = 256
    """Tokens in a sequence."""
    bf16: bool = False
    """Autocast matrix products to bfloat16."""
    rounds: int = 7
    """Steps of each contestant that are timed."""
    warmup: int = 2
    """Steps of each contestant before, that are not."""
    bucket_mib: float = 16.0
    """Of our replicas; DDP has its default of 25 MiB, the first of 1 MiB."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        begin(world, self.rounds)
        tokens = torch.randint(
            self.vocab_size, (self.batch, self.seq_len + 1), generator=torch.Generator().manual_seed(world.rank)
        )
        config = ModelConfig(layers=self.layers, dim=self.dim, heads=self.heads, max_seq_len=self.seq_len)
        model = Transformer(config, vocab_size=self.vocab_size)
        initialise(model, seed=1)
        steps = {
            "alone": self._alone(copy.deepcopy(model), tokens),
            "arena": self._ours(copy.deepcopy(model), tokens, world, share=True),
            "ring": self._ours(copy.deepcopy(model), tokens, world, share=False),
            "ddp": self._ddp(copy.deepcopy(model), tokens),
        }
        times = take_turns(world, steps, rounds=self.rounds, warmup=self.warmup)
        stop_gloo(world)
        if world.rank > 0:
            return
        num_tokens = self.batch * self.seq_len * world.size
        precision = "bf16" if self.bf16 else "fp32"
        millions = model.num_parameters() / 1e6
        print(f"# {millions:.1f} M parameters, {self.batch} x {self.seq_len} tokens a rank, {precision}")
        print(f"# {'step':<24} {'time (ms)':>10} {'tokens/s':>9} {'time / alone':>24} {'time / DDP':>24}")
        for name, title in _TITLES.items():
            seconds = float(np.median(times[name]))
            cells = ["{:.3f} ({:.3f} .. {:.3f})".format(*ratio(times, name, other)) for other in ("alone", "ddp")]
            rates = f"{seconds * 1e3:>10.1f} {num_tokens / seconds:>9.0f}"
            print(f"  {title:<24} {rates} {cells[0]:>24} {cells[1]:>24}", flush=True)

    def _loss(self, model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _alone(self, model: Transformer, tokens: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            self._loss(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _ours(self, model: Transformer, tokens: Tensor, world: Communicator, *, share: bool) -> Callable[[], None]:
        replicas = DataParallel(model, world, bucket_bytes=int(self.bucket_mib * 2**20), share=share)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            loss = self._loss(model, tokens)
            with replicas.final_backward():
                loss.backward()
            replicas.reduce(np.zeros(0))
            replicas.scale_gradients(1 / world.size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _ddp(self, model: Transformer, tokens: Tensor) -> Callable[[], None]:
        # Its gradients are views of its buckets too: the fastest DDP there is.
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(replica.parameters(), fused=True)

        def step() -> None:
            self._loss(replica, tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
