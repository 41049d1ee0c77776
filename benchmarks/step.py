"""Question: what does data parallelism cost a training step, here and in torch DDP over gloo?

The same model takes the same step (forward, backward, AdamW) on the same microbatches in five ways, in turn: alone,
with no communication; as a replica of ours, its gradients in memory that the ranks of a host share, in ordinary
memory, and summed without rounding; as a replica of DDP's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gloo import start_gloo, stop_gloo
from benchmarks.machine import Environment, begin
from benchmarks.measure import Seconds, ratio, take_turns
from benchmarks.options import require_at_least
from mpipar.comm import Communicator, agreement
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.parallel import DataParallel, Grids
from mpipar.processor import bf16_is_fast
from mpipar.train.memory import keep_freed_memory

_TITLES = {
    "alone": "no communication",
    "arena": "mpipar, shared memory",
    "private": "mpipar, ordinary memory",
    "exact": "mpipar, reproducible",
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
    """Sequences in a microbatch."""
    microbatches: int = 1
    """Of a rank in a step."""
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
    format: Literal["table", "json"] = "table"
    """A table, or one JSON document."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            config = self._config()
        keep_freed_memory()  # as the trainer does; DDP gains by it as much
        mesh, environment = begin(world)
        start_gloo(mesh)
        if world.rank == 0 and self.format == "table":
            print(environment.header(), flush=True)
            if self.bf16 and not bf16_is_fast():
                print(
                    "# no bf16 instructions: products are made by other ones, which takes many times as long",
                    flush=True,
                )
        tokens = torch.randint(
            self.vocab_size, (self.batch, self.seq_len + 1), generator=torch.Generator().manual_seed(world.rank)
        )
        model = Transformer(config, vocab_size=self.vocab_size)
        initialise(model, seed=1)
        steps = {
            "alone": self._alone(copy.deepcopy(model), tokens),
            "arena": self._ours(copy.deepcopy(model), tokens, world, share=True),
            "private": self._ours(copy.deepcopy(model), tokens, world, share=False),
            "exact": self._ours(copy.deepcopy(model), tokens, world, share=True, exactly=True),
            "ddp": self._ddp(copy.deepcopy(model), tokens),
        }
        times = take_turns(world, steps, rounds=self.rounds, warmup=self.warmup)
        stop_gloo(world)
        if world.rank > 0:
            return
        if self.format == "table":
            print(self._table(model, times, world.size), flush=True)
        else:
            print(_as_json(model, times, environment), flush=True)

    def _table(self, model: Transformer, times: Mapping[str, Seconds], num_ranks: int) -> str:
        num_tokens = self.microbatches * self.batch * self.seq_len * num_ranks
        precision = "bf16" if self.bf16 else "fp32"
        lines = [
            f"# {self.layers} layers, dim {self.dim}, {self.heads} heads, vocabulary {self.vocab_size:,}: "
            f"{model.num_parameters() / 1e6:.1f} M parameters",
            f"# {self.microbatches} x {self.batch} x {self.seq_len} tokens a rank, {precision}",
            f"# {'step':<24} {'time (ms)':>10} {'tokens/s':>9} {'time / alone':>24} {'time / DDP':>24}",
        ]
        for name, title in _TITLES.items():
            seconds = float(np.median(times[name]))
            cells = [_cell(times[name], times[other]) for other in ("alone", "ddp")]
            rates = f"{seconds * 1e3:>10.1f} {num_tokens / seconds:>9.0f}"
            lines.append(f"  {title:<24} {rates} {cells[0]:>24} {cells[1]:>24}")
        return "\n".join(lines)

    def _config(self) -> ModelConfig:
        require_at_least(self, rounds=1, warmup=0, batch=1, microbatches=1, seq_len=1, vocab_size=2)
        return ModelConfig(layers=self.layers, dim=self.dim, heads=self.heads, max_seq_len=self.seq_len)

    def _loss(self, model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def _alone(self, model: Transformer, tokens: Tensor) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            for _ in range(self.microbatches):
                self._loss(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _ours(
        self, model: Transformer, tokens: Tensor, world: Communicator, *, share: bool, exactly: bool = False
    ) -> Callable[[], None]:
        grids = Grids(self.microbatches * world.size) if exactly else None
        replicas = DataParallel(model, world, bucket_bytes=int(self.bucket_mib * 2**20), share=share, grids=grids)
        if exactly:
            model.as_head = replicas.separate_use("embedding.weight")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            for i in range(self.microbatches):
                loss = self._loss(model, tokens)
                with replicas.final_backward() if i == self.microbatches - 1 else nullcontext():
                    loss.backward()
            replicas.reduce(np.zeros(0))
            if grids is not None:
                grids.move_on(replicas.largest)
            replicas.scale_gradients(1 / world.size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _ddp(self, model: Transformer, tokens: Tensor) -> Callable[[], None]:
        # Its gradients are views of its buckets too: the fastest DDP there is.
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = torch.optim.AdamW(replica.parameters(), fused=True)

        def step() -> None:
            for i in range(self.microbatches):
                with nullcontext() if i == self.microbatches - 1 else replica.no_sync():
                    self._loss(replica, tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def _as_json(model: Transformer, times: Mapping[str, Seconds], environment: Environment) -> str:
    """One document; `size` is that of the gradients."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rows = [
        {"contestant": name, "size": size, "time_us": float(np.median(times[name])) * 1e6, "rounds": len(times[name])}
        for name in _TITLES
    ]
    answer = {"question": "step", "environment": asdict(environment), "titles": _TITLES, "rows": rows}
    return json.dumps(answer, indent=1)


def _cell(times: Seconds, reference: Seconds) -> str:
    return "{:.3f} ({:.3f} .. {:.3f})".format(*ratio(times, reference))
