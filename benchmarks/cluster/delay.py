"""Carries frames between pairs of interfaces, each after the same delay.

    python -m benchmarks.cluster.delay 0.01 port0 way0 port1 way1

Kernels without netem have nothing of their own that delays. One process does it for all pairs of
its network namespace; it says when it is ready, and ends with its standard input. Frames come as
the kernel hands them over, many packets of one connection at a time, so that one thread of Python
keeps up.
"""

import os
import select
import socket
import sys
import time
from collections import deque

_ALL_PROTOCOLS = 3
_SOL_PACKET = 263
_VNET_HDR = 15  # keep what the kernel knows of checksums and of packets that are several in one
_IGNORE_OUTGOING = 23
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 2**26
_FRAME = 2**16 + 2**10


def attach(device: str) -> socket.socket:
    """A socket for all that comes in through an interface, and for what shall go out."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    for option in (_VNET_HDR, _IGNORE_OUTGOING):
        wire.setsockopt(_SOL_PACKET, option, 1)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        wire.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    wire.bind((device, _ALL_PROTOCOLS))
    wire.setblocking(False)
    return wire


def relay(delay: float, devices: list[str]) -> None:
    """Carry both ways between each two devices that follow each other, until told to end."""
    wires = [attach(device) for device in devices]
    print("ready", flush=True)
    other = {wire: wires[index ^ 1] for index, wire in enumerate(wires)}
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready = select.select([sys.stdin, *wires], [], [], pause)[0]
        if sys.stdin in ready:
            return
        for wire in filter(ready.__contains__, wires):
            _take(wire, other[wire], delay, under_way)
        while under_way and under_way[0][0] <= time.monotonic():
            _, wire, frame = under_way.popleft()
            try:
                wire.send(frame)
            except OSError:  # a full queue, or a link that is down: a frame is lost, as on a wire
                continue


def _take(
    wire: socket.socket,
    to: socket.socket,
    delay: float,
    under_way: deque[tuple[float, socket.socket, bytes]],
) -> None:
    while True:
        try:
            frame = wire.recv(_FRAME)
        except OSError:  # nothing is left, or the link went down
            return
        under_way.append((time.monotonic() + delay, to, frame))


if __name__ == "__main__":
    os.nice(-10)  # or ranks that keep all cores busy would delay it
    relay(float(sys.argv[1]), sys.argv[2:])
