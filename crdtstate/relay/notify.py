"""
Telling systemd how a service is doing: the protocol of ``sd_notify``, a datagram of lines.

Without ``NOTIFY_SOCKET`` in the environment nobody wants to know, and nothing is done.
"""

from __future__ import annotations

import logging
import os
import socket

LOG = logging.getLogger(__name__)

STATUS_EVERY = 10.0


def tell(*lines: str) -> None:
    """Send *lines* such as ``READY=1``."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.settimeout(1.0)
            # "@" stands for the zero byte of an abstract socket.
            telling.connect("\0" + address[1:] if address[0] == "@" else address)
            telling.send("\n".join(lines).encode(errors="replace"))
    except OSError as exc:
        LOG.warning("systemd cannot be told %s: %s", lines[0], exc)


def every() -> float | None:
    """How often to tell, in seconds: before the watchdog, if there is one, takes us for dead. None:
    nobody listens."""
    if "NOTIFY_SOCKET" not in os.environ:
        return None
    watchdog = os.environ.get("WATCHDOG_USEC", "")
    return min(STATUS_EVERY, int(watchdog) / 2e6) if watchdog.isdecimal() else STATUS_EVERY
