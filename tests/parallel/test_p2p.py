"""Messages between two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpipar.comm import Communicator
from mpipar.errors import MessageError, StallError


def test_ring_shift_of_tensors(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        given = (torch.arange(1001) + comm.rank).to(dtype)
        taken = torch.zeros(1001, dtype=dtype)
        work = comm.start_receive(taken, left, tag=3)
        comm.send(given, right, tag=3)
        work.wait()
        assert torch.equal(taken, (torch.arange(1001) + left).to(dtype))


def test_a_receive_that_waits_does_not_hold_up_its_own_answer(comm: Communicator) -> None:
    """Both of a pair first start to receive; each then sends what the other waits for."""
    peer = comm.rank ^ 1
    if peer >= comm.size:
        return
    taken = np.zeros(200_000)
    work = comm.start_receive(taken, peer)
    comm.send(np.full(200_000, float(comm.rank)), peer)
    work.wait()
    assert (taken == peer).all()


def test_messages_arrive_in_order_and_by_tag(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sends = [comm.start_send(np.array([float(i), float(tag)]), right, tag) for i in range(5) for tag in (0, 9)]
    for tag in (9, 0):
        for i in range(5):
            assert comm.receive(np.zeros(2), left, tag).tolist() == [i, tag]
    for work in sends:
        work.wait()


def test_non_contiguous_and_empty(comm: Communicator) -> None:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sends = [comm.start_send(torch.eye(4).t()[::2], right), comm.start_send(np.zeros(0), right)]
    target = torch.zeros(2, 8)[:, ::2]
    comm.receive(target, left)
    comm.receive(np.zeros(0), left)
    for work in sends:
        work.wait()
    assert torch.equal(target, torch.eye(4)[::2])


def test_large_arrays_are_cut(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts past MPI's 32 bits, in miniature: the limit is lowered, the code is the same."""
    monkeypatch.setattr("mpipar.comm.p2p.LARGEST_MESSAGE_BYTES", 1000)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    work = comm.start_send(np.arange(10_007) + comm.rank, right)
    assert (comm.receive(np.zeros(10_007, np.int64), left) == np.arange(10_007) + left).all()
    work.wait()


def test_a_silent_peer_is_named(comm: Communicator) -> None:
    if comm.size == 1:
        return
    lone = comm.duplicate("lone")
    lone.progress.timeout_s, before = 0.3, lone.progress.timeout_s
    try:
        if comm.rank == 0:
            with pytest.raises(StallError, match=r"receive from rank 1 .*nothing moved.*Rank 1 did not arrive"):
                lone.receive(np.zeros(3), 1)
    finally:
        lone.progress.timeout_s = before


def test_what_cannot_be_sent_is_refused(comm: Communicator) -> None:
    for array, reason in [
        ("text", "not an array"),
        ([1, 2], "not an array"),
        (np.array(["a"]), "dtype"),
        (np.zeros(2, ">f4"), "dtype"),
        (np.zeros(2, complex), "dtype"),
        (torch.zeros(2, 2).to_sparse(), "layout"),
        (torch.zeros(2, device="meta"), "device"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), "masked"),
    ]:
        with pytest.raises(MessageError, match=reason):
            comm.start_send(array, 0)
    read_only = np.zeros(2)
    read_only.flags.writeable = False
    with pytest.raises(MessageError, match="read-only"):
        comm.all_reduce(read_only)
    for repeated in (torch.zeros(1).expand(4), np.broadcast_to(np.zeros(1), 4).view()):
        with pytest.raises(MessageError, match=r"repeats elements|read-only"):
            comm.all_reduce(repeated)
    with pytest.raises(MessageError, match="booleans"):
        comm.all_reduce(np.zeros(2, bool))
    with pytest.raises(MessageError, match="operation"):
        comm.all_reduce(np.zeros(2), "product")  # type: ignore[arg-type]
    with pytest.raises(MessageError, match=f"ranks are 0 to {comm.size - 1}"):
        comm.send(np.zeros(2), comm.size)
    with pytest.raises(MessageError, match="tag"):
        comm.send(np.zeros(2), 0, tag=1 << 20)
