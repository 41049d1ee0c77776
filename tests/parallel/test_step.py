"""A step that is computed again."""

from __future__ import annotations

from pathlib import Path

from mpipar.comm import Communicator
from tests.parallel.small_data import small_step


def test_on_coarser_grids_it_has_the_bits_of_one_that_had_them_at_once(comm: Communicator, shared_path: Path) -> None:
    tops, found = {"norm.weight": -40, "layers.0.attention.wq.weight": -40}, []
    for fits in (False, True):
        step, source = small_step(comm, shared_path, reproducible=True)
        assert step.grids is not None
        step.grids.tops = dict(tops)
        computed = step.compute(0, source, stop=False)
        assert step.fits() == fits
        if not fits:
            tops = dict(step.grids.tops)
            computed = step.compute(0, source, stop=False)
            assert step.fits()
        step.apply(computed)
        found.append((computed.norm, step.grids.tops, step.digest()))
        source.close()
        step.replicas.close()
    assert found[0] == found[1]
