"""Question: what should hold a sum of gradients that does not depend on the order of addition?

The gradients are real: a step's microbatches in the training of the default model, after some steps, on grids that come
from the steps before. Each representation sums them, over microbatches and ranks; what it comes to is compared with
a sum in float64 of what was not rounded. A second sum, of the same microbatches dealt to the ranks otherwise and added
in another order, has to have the same bits. Then rounding and adding the gradients of a microbatch is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gradients import Contribution, History, Training, largest_of_blocks
from benchmarks.machine import Environment, begin
from benchmarks.measure import Seconds, ratio, take_turns
from benchmarks.options import require_at_least
from benchmarks.representations import Representation, Sum, has_compiled, representations
from mpipar.comm import Communicator, agreement
from mpipar.comm.exact import carry_bits
from mpipar.train.memory import keep_freed_memory

_USES = 2  # of a weight in one microbatch: a tied embedding


@dataclass(frozen=True)
class Error:
    """Of a sum, relative to the sum in float64."""

    l2: float  # of all elements together
    worst: float  # of the tensor in which that is the largest
    percentile: float  # of single elements, of which 99.9 % are closer


@dataclass(frozen=True)
class Answer:
    """What is known of the sum in one representation."""

    how: Representation
    kept_bits: int
    as_summed: Error
    as_float32: Error  # as the optimizer gets it
    differing: int  # elements whose bits are others in the other order
    redone_steps: int


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Compares what can hold a sum of gradients: its error on real ones, its bits in another order, its cost."""

    data: Path = Path("data/stdlib")
    """The data set to train the default model on."""
    microbatches: int = 16
    """In a step, over all ranks."""
    steps: int = 30
    """Of training, before the one whose gradients are summed."""
    narrow_room: int = 2
    """Bits by which a contribution may be larger than the largest one expected, where sums have 32 bits."""
    processor: str = "native"
    """For which fixed point is compiled, as the C compiler's -march names it: x86-64-v3 has no AVX-512."""
    rounds: int = 15
    """Measurements."""
    warmup: int = 3
    """Measurements before these, which are not kept."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            require_at_least(self, microbatches=world.size, steps=1, rounds=1, warmup=0, narrow_room=0)
        keep_freed_memory()
        mesh, environment = begin(world)
        training = Training(mesh, self.data, self.microbatches)
        histories, redone = self._train(world, training)
        mine = list(training.gradients())
        times = self._time(world, training, histories, mine)
        training.deal_otherwise()
        answers = self._sum(world, training, histories, redone, mine, list(training.gradients()))
        training.close()
        if world.rank == 0:
            print(self._table(training, answers, times, environment), flush=True)

    @property
    def _bits(self) -> int:
        return carry_bits(self.microbatches * _USES)

    @property
    def _hows(self) -> dict[str, Representation]:
        return representations(narrow_room=self.narrow_room, processor=self.processor)

    def _train(self, world: Communicator, training: Training) -> tuple[dict[str, History], dict[str, int]]:
        """Collective: trains. Returns the grids of the next step, and in how many steps a grid was too small."""
        histories = {name: History(how, training.sizes) for name, how in self._hows.items()}
        redone = dict.fromkeys(histories, 0)
        for step in range(self.steps + 1):
            largest = largest_of_blocks(world, training.sizes, training.gradients())
            for name, history in histories.items():
                if history.overflowed(largest):
                    redone[name] += 1
                    history.move_on(largest)
                if step < self.steps:
                    history.move_on(largest)
            if step < self.steps:
                training.step()
        return histories, redone

    def _sum(
        self,
        world: Communicator,
        training: Training,
        histories: Mapping[str, History],
        redone: Mapping[str, int],
        mine: Sequence[Contribution],
        dealt_otherwise: Sequence[Contribution],
    ) -> list[Answer]:
        """Collective: sums in all representations, in two orders."""
        expected = torch.zeros(sum(training.sizes.values()), dtype=torch.float64)
        parts = dict(zip(training.sizes, expected.split(list(training.sizes.values())), strict=True))
        for name, x in mine:
            parts[name].add_(x)
        world.all_reduce(expected)
        answers = []
        for name, how in self._hows.items():
            sums = []
            for contributions in (mine, dealt_otherwise):
                total = Sum(how, training.sizes, histories[name].tops, self._bits, compiled=has_compiled(how))
                for tensor, x in contributions:
                    total.add(tensor, x)
                world.all_reduce(total.totals)
                sums.append(total)
            values = sums[0].values()
            answers.append(
                Answer(
                    how=how,
                    kept_bits=how.kept(self._bits),
                    as_summed=error(values, expected, training.sizes),
                    as_float32=error(values.float().double(), expected, training.sizes),
                    differing=int((sums[0].totals != sums[1].totals).sum()),
                    redone_steps=redone[name],
                )
            )
        return answers

    def _time(
        self, world: Communicator, training: Training, histories: Mapping[str, History], mine: Sequence[Contribution]
    ) -> dict[str, Seconds]:
        """Collective: adding this rank's gradients to those that are there, compiled and plain; of one microbatch."""

        def adding(history: History, *, compiled: bool) -> Callable[[], None]:
            total = Sum(history.how, training.sizes, history.tops, self._bits, compiled=compiled)

            def run() -> None:
                for name, x in mine:
                    total.add(name, x)

            return run

        contestants = {}
        for name, history in histories.items():
            contestants[f"{name} plain"] = adding(history, compiled=False)
            if has_compiled(history.how):
                contestants[f"{name} compiled"] = adding(history, compiled=True)
        times = take_turns(world, contestants, rounds=self.rounds, warmup=self.warmup)
        return {name: seconds / len(training.mine) for name, seconds in times.items()}

    def _table(
        self, training: Training, answers: Sequence[Answer], times: Mapping[str, Seconds], environment: Environment
    ) -> str:
        train, num_elements = training.config.train, sum(training.sizes.values())
        tied = 0 if training.model.head is not None else training.sizes["embedding.weight"]
        lines = [
            environment.header(),
            f"# {num_elements / 1e6:.1f} M parameters, {train.precision}, after {self.steps} steps; "
            f"{self.microbatches} microbatches of {train.microbatch} x {train.seq_len} tokens",
            "#",
            "# error: relative to a float64 sum of what was not rounded; of the sum, and of the float32 made of it",
            "# bits: kept of the largest contribution expected",
            "# differing: elements that have other bits when the microbatches are dealt and added in another order",
            "# redone: steps in which a contribution was too large for a grid",
            f"# {'':<24} {'of the sum':^29}   {'as float32':^29}",
            f"# {'sum':<24} {_ERROR_HEAD}   {_ERROR_HEAD} {'bits':>5} {'differing':>10} {'redone':>9}",
        ]
        for answer in answers:
            errors = "   ".join(_cells(error) for error in (answer.as_summed, answer.as_float32))
            redone = "" if answer.how.rounds else f"{answer.redone_steps} of {self.steps + 1}"
            lines.append(
                f"  {answer.how.title:<24} {errors} {answer.kept_bits:>5} {answer.differing:>10} {redone:>9}".rstrip()
            )
        rounded = num_elements + tied
        lines += [
            "#",
            f"# time: to round and add the gradients of a microbatch, {rounded / 1e6:.2f} M elements (a tied weight "
            "has two), and, but for float32, to find the largest",
            "# memory: of the sums, and of the float32 made of them; wire: of what is reduced; bytes an element",
            f"# {'sum':<24} {'code':<28} {'ns/element':>10} {'ms':>7} {'time / float32':>24} {'memory':>7} {'wire':>5}",
        ]
        for name, how in self._hows.items():
            for kind in ("compiled", "plain"):
                if (seconds := times.get(f"{name} {kind}")) is None:
                    continue
                took = float(np.median(seconds))
                code = _code(how) if kind == "compiled" else "torch"
                against = "{:.2f} ({:.2f} .. {:.2f})".format(*ratio(seconds, times["float32 plain"]))
                size = how.dtype.itemsize
                lines.append(
                    f"  {how.title:<24} {code:<28} {took / rounded * 1e9:>10.3f} {took * 1e3:>7.2f} {against:>24} "
                    f"{size + how.extra_bytes:>7} {size:>5}"
                )
        return "\n".join(lines)


_ERROR_HEAD = f"{'L2':>9} {'worst':>9} {'99.9 %':>9}"


def _code(how: Representation) -> str:
    return "comm/rounding.c" if how.dtype == torch.float64 else f"benchmarks/fixed.c, {how.processor}"


def error(values: Tensor, expected: Tensor, sizes: Mapping[str, int]) -> Error:
    """Of a sum.

    Args:
        values: [n] float64.
        expected: [n] float64.
        sizes: Of the tensors that lie in them, in order.
    """
    off = (values - expected).abs()
    splits = list(sizes.values())
    norms = [[part.norm().item() for part in whole.split(splits)] for whole in (off, expected)]
    there = expected != 0
    single = np.percentile((off[there] / expected[there].abs()).numpy(), 99.9)
    return Error(
        l2=float(np.linalg.norm(norms[0]) / np.linalg.norm(norms[1])),
        worst=max(a / b for a, b in zip(*norms, strict=True) if b > 0),
        percentile=float(single),
    )


def _cells(error: Error) -> str:
    return f"{error.l2:>9.1e} {error.worst:>9.1e} {error.percentile:>9.1e}"
