"""Amounts as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is one, in powers of 1,000: 812 bytes, 3.1 kB, 20.0 GB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = 1
    while power < len(units) and num_bytes / 1000**power >= 999.95:  # which would be rounded to 1000.0
        power += 1
    return f"{num_bytes / 1000**power:,.1f} {units[power - 1]}"


def plural(number: int, noun: str) -> str:
    """So many of something: 1 rank, 2 ranks, 1,024 microbatches."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"
