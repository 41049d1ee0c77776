"""Question: how fast does a GPU train, beside a bare loop, and beside what it could do at best?

The same GPT takes the same steps in two ways, in turn: through `TrainStep`, and in the shortest compiled loop of plain
torch that does the same (forward, backward, clipping, AdamW) on tokens that lie on the GPU already. Both in bf16,
through torch.compile, with fused AdamW. One JSON document a model.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.random_tokens import RandomTokens
from mpipar.comm import Communicator, Grid, Mesh, decide_on_root, run_job
from mpipar.command_line import parse
from mpipar.model import ModelConfig, Transformer
from mpipar.train.config import Config, TrainConfig
from mpipar.train.device import start
from mpipar.train.loop import build_model
from mpipar.train.optimizer import build_optimizer
from mpipar.train.resolve import resolve
from mpipar.train.step import TrainStep

_VOCAB_SIZE = 50304  # GPT-2's, up to a multiple of 64


def _gpt(layers: int, dim: int, heads: int, microbatch: int, seq_len: int = 1024) -> Config:
    model = ModelConfig(family="gpt2", layers=layers, dim=dim, heads=heads, max_seq_len=seq_len)
    sizes = TrainConfig(global_batch=2 * microbatch, microbatch=microbatch, seq_len=seq_len)
    return Config(model=model, train=replace(sizes, device="cuda", reproducible=False, compile=True, warmup_steps=1))


_MODELS = {
    "124M": _gpt(12, 768, 12, microbatch=32),
    "1B": _gpt(24, 1792, 14, microbatch=16),
    "tiny": _gpt(1, 16, 2, microbatch=1, seq_len=32),  # to try this file out
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options."""

    model: Literal["124M", "1B", "tiny"] = "124M"
    """By its number of parameters."""
    rounds: int = 12
    """Measurements of each way."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where to compute."""
    compile: bool = True
    """Run the model through torch.compile, in both."""


def main(world: Communicator) -> None:
    asked = decide_on_root(world, lambda: parse(Asked, "python -m benchmarks.gpu_training", description=__doc__))
    config = _MODELS[asked.model]
    train = replace(config.train, device=asked.device, precision="bf16", compile=asked.compile)
    config, placement = resolve(replace(config, train=train), Mesh(world, Grid.of(world.size)))
    device = placement.device(world.rank)
    start(device, config.train.precision)
    model = build_model(config, _VOCAB_SIZE).to(device)
    bare = _bare(copy.deepcopy(model), config, device)
    step = TrainStep(model, config, world, placement)
    source = RandomTokens(config.train, _VOCAB_SIZE, device, range(config.train.num_microbatches))

    def ours(number: int) -> None:
        step.apply(step.compute(number, source, stop=False))

    seconds = _take_turns({"ours": ours, "bare": bare}, device, rounds=asked.rounds, warmup=3)
    tokens = config.train.global_batch * config.train.seq_len
    flops = model.flops_per_token(config.train.seq_len) * tokens
    medians = {name: statistics.median(its) for name, its in seconds.items()}
    answer = {
        "question": "gpu_training",
        "model": asked.model,
        "parameters": model.num_parameters(),
        "tokens_a_step": tokens,
        "precision": config.train.precision,
        "tokens_per_s": {name: tokens / its for name, its in medians.items()},
        "mfu": {name: step.peak_flops and flops / its / step.peak_flops for name, its in medians.items()},
        "ours_over_bare": statistics.median(a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "rounds": asked.rounds,
    }
    if world.rank == 0:
        print(json.dumps(answer), flush=True)


def _bare(model: Transformer, config: Config, device: torch.device) -> Callable[[int], None]:
    """A step of plain torch; the losses are not looked at."""
    train = config.train
    optimizer = build_optimizer(model, train)
    parameters = list(model.parameters())
    loss_of = torch.compile(model.loss) if train.compile else model.loss
    source = RandomTokens(train, _VOCAB_SIZE, device, range(train.num_microbatches))
    batches = [microbatch.sequences.tokens for microbatch in source.microbatches(0)]
    num_tokens = train.global_batch * train.seq_len

    def step(_: int) -> None:
        for tokens in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss, _count = loss_of(tokens)
            (loss / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _take_turns(
    steps: dict[str, Callable[[int], None]], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each step, by contestant; those of one round were taken side by side."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step(number)
            _wait(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_job(main)
