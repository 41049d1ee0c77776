"""The stand-in for a GPU sees what a GPU would let pass."""

from __future__ import annotations

import pytest
import torch

from mpipar.comm import Communicator
from tests.stand_in.board import Misuse
from tests.stand_in.runtime import StandIn


def test_misuse_is_seen(comm: Communicator, device: StandIn) -> None:
    stream = device.stream()
    x = device.array(10, torch.float32)
    device.put(x, torch.ones(10))
    with pytest.raises(Misuse, match="missing wait"):
        device.zero(x.data_ptr(), 40, stream)
    address = device.allocate(100)
    device.free(address)
    with pytest.raises(Misuse, match="freed twice"):
        device.free(address)
    with pytest.raises(Misuse, match="closed twice"):
        device.close_memory(address)
    with pytest.raises(Misuse, match="not the device's"):
        device.zero(address, 100, stream)
    event = device.event()
    with pytest.raises(Misuse, match="never recorded"):
        device.wait(stream, event)
    device.destroy_event(event)
    with pytest.raises(Misuse, match="after it was destroyed"):
        device.record(event, stream)
