"""A switch in software, between hosts on one machine: what links with a delay are made of.

Linux has netem for that, but many kernels are built without it. This is a process that holds one TAP device for each
host and carries frames between them. A link has the same rate in both directions:

    upload      the host may send when its link is free. Until then frames wait in the host, as they do for a real card
    delay       one way, the same between any two hosts
    download    frames wait in the switch for the receiver's link. Those that would wait for too long are dropped

A frame that TCP leaves to the card to be cut (up to 64 KiB) passes whole: at 1 Gbit/s a few thousand frames a second,
which Python can carry. `namespaces` starts it, in a namespace of its own, and moves the devices to their hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import select
import struct
import sys
import time

# Of linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4, _OFFLOAD_TCP6 = 0x01, 0x02, 0x04

# Each frame comes with a header of 10 bytes (struct virtio_net_hdr); we need of it into what pieces it is to be cut.
_VNET_HEADER = struct.Struct("=BBHHHH")
_FRAME_LIMIT = 1 << 17
_TCP_HEADERS = 66  # bytes before the payload, of which each piece gets its own: Ethernet, IP, TCP with timestamps

_UPLOAD_AHEAD_S = 1e-3  # frames are taken over early, to go out one right after the other however late a timer is
_DOWNLOAD_QUEUE_S = 0.02
_DOWNLOAD_QUEUE_BYTES = 1e6  # where the rate is so low that few frames make up the time


def serve(ports: list[int], rate_mbit: float, delay_ms: float) -> None:
    """Carries frames between ports, for ever."""
    bytes_per_s, delay_s = rate_mbit * 1e6 / 8, delay_ms / 1e3
    queue_s = max(_DOWNLOAD_QUEUE_S, _DOWNLOAD_QUEUE_BYTES / bytes_per_s)
    places: dict[bytes, int] = {}  # which address was seen behind which port
    upload_free = dict.fromkeys(ports, 0.0)  # when the link will have sent all that was given to it
    download_free = dict.fromkeys(ports, 0.0)
    on_the_way: list[tuple[float, int, int, bytes]] = []  # when, a number (so that order is kept), to whom, what
    number = 0
    while True:
        now = time.monotonic()
        while on_the_way and on_the_way[0][0] <= now:
            _, _, port, frame = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # its host is going down, or is full: frames may be lost
                os.write(port, frame)
        free = [port for port in ports if upload_free[port] <= now + _UPLOAD_AHEAD_S]
        events = [upload_free[port] - _UPLOAD_AHEAD_S for port in ports if port not in free]
        if on_the_way:
            events.append(on_the_way[0][0])
        timeout = max(0.0, min(events) - time.monotonic()) if events else None
        for sender in select.select(free, [], [], timeout)[0]:
            try:
                frame = os.read(sender, _FRAME_LIMIT)
            except BlockingIOError:  # what was there has been dropped meanwhile
                continue
            now = time.monotonic()
            seconds = _bytes_on_wire(frame) / bytes_per_s
            target, source = frame[10:16], frame[16:22]
            places[source] = sender
            upload_free[sender] = max(now, upload_free[sender]) + seconds
            known = target in places and not target[0] & 1  # the lowest bit says: to everybody
            for receiver in [places[target]] if known else ports:
                # The first bytes of a frame leave the switch while its last are not yet in: both links are busy with
                # it at the same time, and it is there when the later of them is done.
                there = max(upload_free[sender] + delay_s, download_free[receiver] + seconds)
                if receiver != sender and there - upload_free[sender] - delay_s <= queue_s:
                    download_free[receiver] = there
                    number += 1
                    heapq.heappush(on_the_way, (there, number, receiver, frame))


def _open_port(name: str) -> int:
    """A new TAP device in this process's namespace; it goes when the file is closed."""
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(port, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TCP4 | _OFFLOAD_TCP6)
    return port


def _bytes_on_wire(frame: bytes) -> int:
    """The length of a frame, or of the frames into which a network card would have cut it."""
    _, kind, _, piece_bytes, _, _ = _VNET_HEADER.unpack_from(frame)
    size = len(frame) - _VNET_HEADER.size
    pieces = -(-(size - _TCP_HEADERS) // piece_bytes) if kind and piece_bytes else 1
    return size + (pieces - 1) * _TCP_HEADERS


def main(rate_mbit: float, delay_ms: float, names: list[str]) -> None:
    """Says "ready" when frames are carried, or what is wrong."""
    with contextlib.suppress(PermissionError):
        # A wire does not wait until the ranks leave it a core. Of a process that ranks so high, timers are also exact.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        ports = [_open_port(name) for name in names]
    except OSError as error:
        print(error, flush=True)
        sys.exit(1)
    print("ready", flush=True)
    serve(ports, rate_mbit, delay_ms)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
