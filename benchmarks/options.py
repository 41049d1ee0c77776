"""What questions over sizes can be asked with, and what cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mpipar.errors import ConfigError

Entrant = TypeVar("Entrant")


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """Sizes, rounds and contestants."""

    min_bytes: int = 4096
    """Smallest array, in bytes; each is rounded to an equal number of elements for every rank."""
    max_bytes: int = 64 << 20
    """Largest array."""
    factor: int = 4
    """Each size is so many times the one before."""
    rounds: int = 15
    """Measurements of each size."""
    warmup: int = 3
    """Measurements of each size before these, which are not kept."""
    algorithms: str = ""
    """Contestants, with commas between: arena,ring,mpi; all that can be had if empty."""

    def validate(self, num_ranks: int) -> None:
        """Refuses what cannot be measured.

        Raises:
            ConfigError: Says what and why.
        """
        if not 1 <= self.min_bytes <= self.max_bytes:
            raise ConfigError(
                f"--min-bytes {self.min_bytes} must be at least 1 and at most --max-bytes {self.max_bytes}"
            )
        require_at_least(self, factor=2, rounds=1, warmup=0)
        if num_ranks == 1:
            raise ConfigError("one rank has nobody to communicate with: mpirun -n 2 python -m benchmarks ...")

    def sizes(self, itemsize: int, num_ranks: int) -> list[int]:
        """Elements of the arrays, ascending: the same number for each rank, at least one.

        Args:
            itemsize: Bytes of an element.
            num_ranks: Ranks.
        """
        found, size = set(), self.min_bytes
        while size <= self.max_bytes:
            found.add(max(1, size // itemsize // num_ranks) * num_ranks)
            size *= self.factor
        return sorted(found)

    def choose(self, found: Mapping[str, Entrant | str]) -> tuple[dict[str, Entrant], list[str]]:
        """(the contestants that take part, by name; why others do not).

        Args:
            found: Contestants by name, or the reason why there is none of that name.

        Raises:
            ConfigError: One was asked for that does not exist, or not here.
        """
        asked = [name.strip() for name in self.algorithms.split(",") if name.strip()]
        for name in asked:
            if name not in found:
                raise ConfigError(f"--algorithms: there is no {name!r} here, only {', '.join(found)}")
            reason = found[name]
            if isinstance(reason, str):
                raise ConfigError(f"--algorithms: no {name}: {reason}")
        chosen = present(found, asked or list(found))
        absent = [f"no {name}: {reason}" for name, reason in found.items() if isinstance(reason, str)]
        return chosen, [] if asked else absent


def present(found: Mapping[str, Entrant | str], names: Sequence[str]) -> dict[str, Entrant]:
    """Those of these names that there are, in the order of `found`."""
    return {name: entrant for name, entrant in found.items() if name in names and not isinstance(entrant, str)}


def require_at_least(options: object, **least: int) -> None:
    """Refuses options that are less than they have to be.

    Args:
        options: What has them as attributes.
        least: Of each.

    Raises:
        ConfigError: One is less.
    """
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {value}")
