"""Who writes what: any cut of a state over any ranks and hosts, read back in any other."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpipar.checkpoint import Box, load
from mpipar.checkpoint.box import reads
from mpipar.checkpoint.folder import folder_of
from mpipar.checkpoint.plan import Held, Plan, plan
from mpipar.checkpoint.write import Notes, Share, begin, hold
from mpipar.storage import BLOCK_BYTES


def cut(draw, length):
    """Where a side is cut, with its ends."""
    inner = draw(st.lists(st.integers(0, length), max_size=2))
    return sorted({0, length, *inner}) if length else [0, 0]


@st.composite
def boxes(draw, shape):
    """A grid of boxes that make up a tensor."""
    grid: list[list[tuple[int, int]]] = [[]]
    for length in shape:
        grid = [[*before, run] for before in grid for run in pairwise(cut(draw, length))]
    return [Box(tuple(first for first, _ in box), tuple(last - first for first, last in box)) for box in grid]


@st.composite
def box_of(draw, shape):
    """Any box of a tensor, empty ones too."""
    runs = [sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for length in shape]
    return Box(tuple(first for first, _ in runs), tuple(last - first for first, last in runs))


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
DTYPES = ["float32", "bfloat16", "float64", "int64", "bool", "uint8"]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_reads_of_a_box_give_the_box(data):
    shape = data.draw(shapes)
    box = data.draw(box_of(shape))
    array = np.arange(math.prod(shape)).reshape(shape)
    out = np.full(box.extent, -1)
    flat = array.reshape(-1)
    num_read = 0
    gap, most = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
    for read in reads(shape, box, gap, most):
        assert 0 <= read.begin < read.end <= array.size
        out[read.into] = flat[read.begin : read.end].reshape(read.shape)[read.index]
        num_read += read.end - read.begin
    assert np.array_equal(out, array[box.index])
    if gap == 0:
        assert num_read == box.size, "without a gap nothing else is read"


@given(data=st.data())
def test_common_parts_and_rows(data):
    shape = data.draw(shapes)
    one, other = data.draw(box_of(shape)), data.draw(box_of(shape))
    array = np.arange(math.prod(shape)).reshape(shape)
    both = one.common(other)
    assert both.fits(shape) or both.size == 0
    if both.size:
        assert np.array_equal(array[one.index][both.within(one).index], array[both.index])
    assert both.size == len(np.intersect1d(array[one.index], array[other.index]))
    if one.num_rows > 1:
        bounds = [0, one.num_rows // 3, one.num_rows]
        rows = [array[one.rows(*run).index].reshape(-1) for run in pairwise(bounds)]
        assert np.array_equal(np.concatenate(rows), array[one.index].reshape(-1)), "rows lie one behind the other"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_saved_in_one_cut_and_read_in_another(tmp_path, data):
    """Tensors cut into any boxes, each with any replicas, on any hosts: then any box is read."""
    num_ranks = data.draw(st.integers(1, 5), label="ranks")
    hosts = data.draw(st.lists(st.integers(0, 2), min_size=num_ranks, max_size=num_ranks), label="hosts")
    tensors: dict[str, torch.Tensor] = {}
    held: list[list[Held]] = [[] for _ in range(num_ranks)]
    for number in range(data.draw(st.integers(1, 4), label="tensors")):
        name, shape = f"weights/{number}", data.draw(shapes)
        dtype = data.draw(st.sampled_from(DTYPES))
        raw = torch.arange(math.prod(shape)).reshape(shape) + number
        tensors[name] = raw.to(getattr(torch, dtype))
        free = set(range(num_ranks))
        for box in data.draw(boxes(shape)):
            replicas = data.draw(st.sets(st.sampled_from(sorted(free)), min_size=1)) if free else {0}
            free -= replicas
            for rank in replicas:
                held[rank].append(Held(name, dtype, shape, box))
    path = write(tmp_path, plan(held, hosts), tensors)
    with load(path) as checkpoint:
        checkpoint.verify()
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint[name], tensor)
            box = data.draw(box_of(tensor.shape))
            assert torch.equal(checkpoint.read(name, box), tensor[box.index])


def write(root: Path, shared: Plan, tensors: dict[str, torch.Tensor]) -> Path:
    """All ranks' phases, one after the other, by this process: parts in the order of ranks turned round."""
    shares = [Share(shared, rank) for rank in range(len(shared.parts))]
    notes = Notes(7, {"seen": 1}, {"config.toml": "a = 1\n"}, keep=1)
    partial = begin(root, 7)
    written = {share.rank: share.write(partial, share.sources(tensors, {}), Event()) for share in shares[::-1]}
    for share in shares:
        share.seal(partial, [written[rank] for rank in sorted(written)], notes)
    for share in shares[::-1]:
        share.publish(partial, notes)
    return folder_of(root, 7)


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 1], [0, 0, 1, 1, 1], list(range(8))])
def test_replicas_write_equal_shares_and_every_byte_once(hosts):
    tensors = {f"weights/{i}": torch.empty(300, 1000) for i in range(24)}
    tensors |= {f"optimizer/{i}/step": torch.empty(()) for i in range(24)}
    num_bytes = sum(x.numel() * 4 for x in tensors.values())
    shared = plan([hold(tensors)] * len(hosts), hosts)
    shares = [sum(part.end - part.begin for part in parts) for parts in shared.parts]
    assert sum(shares) == num_bytes
    assert max(shares) - min(shares) <= 2 * BLOCK_BYTES
    assert sum(own.held.num_bytes for slices in shared.files for own in slices) == num_bytes
    for slices in shared.files:
        assert len({own.dataset for own in slices}) == len(slices)
    cut = [own for slices in shared.files for own in slices if own.held.box.extent != own.held.shape]
    assert len(cut) <= 2 * (len(set(hosts)) - 1), "what is cut between hosts is what lies on a border"
    assert all(own.dataset.endswith("]") for own in cut)
    assert [shared.file_of[leader] for leader in shared.leaders] == list(range(len(shared.files)))


def test_a_large_tensor_in_many_blocks(tmp_path):
    """Shares that begin in the middle of a data set."""
    tensors = {"weights/x": torch.randn(1000, 1000), "weights/y": torch.randn(700, 300).bfloat16()}
    path = write(tmp_path, plan([hold(tensors)] * 4, [0, 0, 1, 1]), tensors)
    assert len(list(path.glob("state-*.h5"))) == 2
    with load(path) as checkpoint:
        checkpoint.verify()
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint[name], tensor)
        columns = Box((100, 37), (800, 5))
        assert torch.equal(checkpoint.read("weights/x", columns), tensors["weights/x"][columns.index])


def test_ranks_that_have_columns(tmp_path):
    """As tensor parallelism would: each rank has only its own part in memory."""
    whole = torch.randn(40, 30)
    boxes = [Box((0, 0), (40, 10)), Box((0, 10), (40, 20))]
    shared = plan([[Held("weights/x", "float32", (40, 30), box)] for box in boxes], [0, 0])
    partial, written = begin(tmp_path, 3), []
    notes = Notes(3, {}, {}, keep=1)
    shares = [Share(shared, rank) for rank in range(2)]
    for share, box in zip(shares, boxes, strict=True):
        sources = share.sources({"weights/x": whole[box.index].clone()}, {"weights/x": box})
        written.append(share.write(partial, sources, Event()))
    for share in shares[::-1]:
        share.seal(partial, written, notes)
    shares[0].publish(partial, notes)
    with load(folder_of(tmp_path, 3)) as checkpoint:
        assert torch.equal(checkpoint["weights/x"], whole)
        across = Box((3, 5), (30, 12))
        assert torch.equal(checkpoint.read("weights/x", across), whole[across.index])


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """A run of rows of a large tensor costs its blocks, and one more at each end."""
    import os

    tensors = {"weights/x": torch.randn(4096, 1024)}
    path = write(tmp_path, plan([hold(tensors)], [0]), tensors)
    with load(path) as checkpoint:
        checkpoint.read("weights/x", Box((0, 0), (1, 1)))  # opens the file
        num_bytes, preadv = 0, os.preadv

        def counted(descriptor, buffers, offset):
            nonlocal num_bytes
            count = preadv(descriptor, buffers, offset)
            num_bytes += count
            return count

        monkeypatch.setattr(os, "preadv", counted)
        rows = Box((1000, 0), (512, 1024))
        assert torch.equal(checkpoint.read("weights/x", rows), tensors["weights/x"][rows.index])
        assert num_bytes <= 512 * 1024 * 4 + 2 * BLOCK_BYTES
