"""
A bad cable: what `tc netem` does to a link, done by a process, for kernels that have no netem.

    python netns_cable.py NUMBER ...

For each number it makes two TAP devices in the network namespace it runs in, ``host<n>`` and
``port<n>``, and carries frames between them, until standard input ends. A line ``LOSS SECONDS``
there lets it lose that part of the frames from host to port, and hold the others back for so long,
as netem on the host's device does. It says ``ready`` once, and after each line.
"""

from __future__ import annotations

import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_MAX = 65536


def make_tap(name: str) -> int:
    """Make a TAP device; each read and write of what is returned is one Ethernet frame."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


class Cable:
    """All pairs of devices, and what is on its way between them."""

    def __init__(self, numbers: list[str]) -> None:
        self.loss = self.delay = 0.0
        self.late: deque[tuple[float, int, bytes]] = deque()
        self.selector = selectors.DefaultSelector()
        for number in numbers:
            host, port = make_tap(f"host{number}"), make_tap(f"port{number}")
            self.selector.register(host, selectors.EVENT_READ, (port, True))
            self.selector.register(port, selectors.EVENT_READ, (host, False))

    def carry(self, source: int, target: int, is_bad: bool) -> None:
        """Take in what is there, for now or for later."""
        try:
            while True:
                frame = os.read(source, FRAME_MAX)
                if is_bad and self.delay:
                    if random.random() >= self.loss:
                        self.late.append((time.monotonic() + self.delay, target, frame))
                else:
                    put(target, frame)
        except BlockingIOError:
            pass
        except OSError:
            # The device is down: it has not been set up yet, or its namespace is gone.
            time.sleep(0.001)

    def deliver(self) -> float | None:
        """Hand over what is due; return how long the next takes. All are late by the same, so
        whoever came first leaves first."""
        now = time.monotonic()
        while self.late and self.late[0][0] <= now:
            _, target, frame = self.late.popleft()
            put(target, frame)
        return self.late[0][0] - now if self.late else None

    def run(self) -> None:
        self.selector.register(0, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in self.selector.select(self.deliver()):
                if key.fd != 0:
                    self.carry(key.fd, *key.data)
                    continue
                # Each line is written at once, and awaited before the next.
                line = os.read(0, 100).decode()
                if not line:
                    return
                self.loss, self.delay = map(float, line.split())
                print("ready", flush=True)


def put(target: int, frame: bytes) -> None:
    try:
        os.write(target, frame)
    except OSError:
        # No room, or the device is down: cables lose frames.
        pass


if __name__ == "__main__":
    Cable(sys.argv[1:]).run()
