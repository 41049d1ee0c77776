"""Measures links with plain sockets: `wire.py receive SENDERS BYTES`, and `wire.py send HOST BYTES` on each sender.

The receiver says "ready", answers pings, and then takes BYTES from each sender at the same time. What it prints last
is the rate at which they came in, in Mbit/s; a sender prints the median round trip of a ping before that, in ms.
"""

from __future__ import annotations

import socket
import statistics
import sys
import threading
import time

PORT = 5000
PINGS = 20


def receive(senders: int, num_bytes: int) -> None:
    connected = threading.Barrier(senders + 1)
    with socket.create_server(("", PORT)) as server:
        print("ready", flush=True)
        threads = []
        for _ in range(senders):
            peer, _ = server.accept()
            threads.append(threading.Thread(target=take, args=(peer, num_bytes, connected)))
            threads[-1].start()
        connected.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
    print(senders * num_bytes * 8 / 1e6 / (time.perf_counter() - start))


def take(peer: socket.socket, num_bytes: int, connected: threading.Barrier) -> None:
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is small waits for no acknowledgement
        for _ in range(PINGS):
            peer.sendall(peer.recv(1))
        connected.wait()
        peer.sendall(b"!")
        left = num_bytes
        while left:
            left -= len(peer.recv(min(left, 1 << 20)))


def send(host: str, num_bytes: int) -> None:
    with socket.create_connection((host, PORT)) as peer:
        round_trips = []
        for _ in range(PINGS):
            start = time.perf_counter()
            peer.sendall(b".")
            peer.recv(1)
            round_trips.append(time.perf_counter() - start)
        print(statistics.median(round_trips) * 1e3)
        peer.recv(1)
        peer.sendall(bytes(num_bytes))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(int(sys.argv[2]), int(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]))
