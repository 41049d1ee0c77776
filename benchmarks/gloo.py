"""torch.distributed over gloo, between the ranks of an MPI job: the peer."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mpipar.comm import Communicator, Mesh

TITLE = "torch.distributed, gloo"


def start_gloo(mesh: Mesh) -> None:
    """Joins the ranks in torch's default process group. Collective.

    The ranks find each other through rank 0: on one host by the loopback device, which also carries the messages.
    """
    world, alone = mesh.world, mesh.num_hosts == 1
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = "127.0.0.1" if alone else _own_address()
    store = None
    if world.rank == 0:
        store = TCPStore(address, 0, world.size, is_master=True, wait_for_workers=False)
    address, port = world.broadcast_object((address, store.port) if store else None)
    if store is None:
        store = TCPStore(address, port, world.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=120))
    world.barrier()


def renamed(new: str, old: str) -> Callable[..., Any]:
    """A function of torch.distributed under its new name, or in an earlier torch under its old one."""
    function: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return function


def _own_address() -> str:
    """The address from which this host reaches others: a host's name often stands for its loopback device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unconnected:
        unconnected.connect(("192.0.2.1", 9))  # of the range for documentation; a datagram socket sends nothing yet
        return str(unconnected.getsockname()[0])


def stop_gloo(world: Communicator) -> None:
    """Leaves the process group. Collective."""
    world.barrier()
    dist.destroy_process_group()
