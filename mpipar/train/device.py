"""Which processor or GPU each rank trains on: decided for all ranks alike, from what all of them see.

A rank takes, of the GPUs that it sees, the one that has the fewest ranks of its host so far. So where all see all GPUs
of the host, rank i of it takes GPU i; where Slurm or CUDA_VISIBLE_DEVICES shows each its own, it takes that one; and
where there are more ranks than GPUs, they share them evenly.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from mpipar.comm import Communicator, agreement
from mpipar.comm.device.cuda import import_cupy
from mpipar.comm.environment import require_other_threads
from mpipar.errors import ConfigError
from mpipar.train.config import DeviceName, PrecisionName


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        uuid: By which two ranks know that they see the same one.
        name: What is sold, as "NVIDIA H200".
        capability: CUDA's compute capability, as (9, 0).
    """

    uuid: str
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """What one rank sees.

    Args:
        host: The name of its host.
        gpus: In CUDA's order.
        why_none: Why there are none; nothing if there are.
        unusable: Whether there are some all the same, of which something is missing to use them.
    """

    host: str
    gpus: tuple[Gpu, ...]
    why_none: str = ""
    unusable: bool = False

    @classmethod
    def here(cls) -> Seen:
        """By this process. Makes no CUDA context yet."""
        if torch.version.cuda is None:
            return cls(platform.node(), (), f"torch {torch.__version__} is built without CUDA")
        if not torch.cuda.is_available():
            return cls(platform.node(), (), "no driver, or CUDA_VISIBLE_DEVICES hides all GPUs")
        try:
            require_other_threads()
            import_cupy()
        except ConfigError as error:
            return cls(platform.node(), (), str(error), unusable=True)
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = [Gpu(str(getattr(gpu, "uuid", i)), gpu.name, (gpu.major, gpu.minor)) for i, gpu in enumerate(found)]
        return cls(platform.node(), tuple(gpus))


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a job compute.

    Args:
        indices: By rank, its GPU as CUDA numbers those that the rank sees; none on the CPU.
        gpus: By rank, that GPU.
        hosts: By rank, a number for its host.
        note: What is to be said of it, if anything.
    """

    indices: tuple[int, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    hosts: tuple[int, ...] = ()
    note: str = ""

    @property
    def on_gpus(self) -> bool:
        return bool(self.indices)

    def device(self, rank: int) -> torch.device:
        """Of one rank."""
        return torch.device("cuda", self.indices[rank]) if self.on_gpus else torch.device("cpu")

    def gpus_of(self, ranks: Sequence[int]) -> list[Gpu]:
        """The GPUs on which these ranks compute, each once."""
        return [self.gpus[rank] for rank in {self._places[rank]: rank for rank in ranks}.values()]

    def sharing(self, rank: int) -> int:
        """How many ranks have the GPU of one; 1 on the CPU."""
        return self._places.count(self._places[rank]) if self.on_gpus else 1

    def said(self) -> str:
        """For people: the GPUs, and how many ranks have one."""
        kinds = Counter(gpu.name for gpu in self.gpus_of(range(len(self.gpus))))
        which = ", ".join(f"{count} x {name}" for name, count in kinds.items())
        shares = Counter(self._places).values()
        if max(shares) == 1:
            return f"{which}, one for each rank"
        most, least = max(shares), min(shares)
        return f"{which}, SHARED by {most if most == least else f'{least} to {most}'} ranks each, which take turns"

    @cached_property
    def _places(self) -> tuple[tuple[int, str], ...]:
        """By rank, host and GPU."""
        return tuple(zip(self.hosts, (gpu.uuid for gpu in self.gpus), strict=True))


def place(asked: DeviceName, seen: Sequence[Seen], hosts: Sequence[int]) -> Placement:
    """Where the ranks compute. Pure.

    Args:
        asked: auto takes GPUs where all ranks see some.
        seen: By rank, what it sees.
        hosts: By rank, a number for its host.

    Raises:
        ConfigError: GPUs are asked for, and a rank sees none.
    """
    if asked == "cpu":
        return Placement()
    without = [rank for rank, its in enumerate(seen) if not its.gpus]
    if without:
        rank = without[0]
        problem = "cannot use its GPUs" if seen[rank].unusable else "sees no CUDA device"
        lacking = f"rank {rank} on host {seen[rank].host} {problem}: {seen[rank].why_none}"
        others = f", nor do {len(without) - 1} more" if len(without) > 1 else ""
        if asked == "cuda":
            raise ConfigError(
                f"--train.device cuda: {lacking}{others}. Start ranks only where there are GPUs (nvidia-smi -L), or "
                "give --train.device cpu"
            )
        there_are_some = len(without) < len(seen) or any(its.unusable for its in seen)
        return Placement(note=f"GPUs are left alone: {lacking}{others}" if there_are_some else "")
    taken: Counter[tuple[int, str]] = Counter()
    indices = []
    for host, its in zip(hosts, seen, strict=True):
        index = min(range(len(its.gpus)), key=lambda i: taken[host, its.gpus[i].uuid])
        taken[host, its.gpus[index].uuid] += 1
        indices.append(index)
    gpus = tuple(its.gpus[index] for its, index in zip(seen, indices, strict=True))
    return Placement(tuple(indices), gpus, tuple(hosts))


def place_all(asked: DeviceName, world: Communicator) -> Placement:
    """Where the ranks of this job compute. Collective.

    Raises:
        ConfigError: As `place`.
    """
    seen = world.all_gather_object(Seen.here() if asked != "cpu" else Seen(platform.node(), ()))
    with agreement(world):
        placement = place(asked, seen, world.roster.hosts)
    return placement


def start(device: torch.device, precision: PrecisionName) -> None:
    """Makes the GPU of this rank the current one, and says what a product of float32 matrices may round to."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
