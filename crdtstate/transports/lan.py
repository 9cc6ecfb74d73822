"""
Finding each other on a local network, by multicast DNS (RFC 6762, 6763).

Replicas that give the same *space*, a word, announce where they listen and dial whom they hear of.
Only for those who ask for it: it tells everybody on the network that they are there. What comes is
a hint and no more: who answers at an address has to be let in like anybody else.

Needs the extra ``crdtstate[lan]`` (zeroconf, which does the protocol).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from crdtstate.errors import UsageError

if TYPE_CHECKING:
    from zeroconf import Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo

LOG = logging.getLogger("crdtstate")

TYPE = "_crdtstate._tcp.local."
ASK_MS = 3000
FOUND_MAX = 1000
"""Announcements taken in at a time."""


class Lan:
    """One replica's announcement, and its ear for those of others.

    Args:
        space: Whom to find: those who give the same.
        name: What tells this replica from all others.
        address: The URL where it listens; None only looks for others.
        found: Called with the URL of somebody who is there.
        lost: Called with a URL that was found, when that is said to be gone.
        interfaces: Addresses of the network interfaces to use; None: all.

    Raises:
        UsageError: zeroconf is not installed.
    """

    def __init__(
        self,
        space: str,
        name: str,
        address: str | None,
        found: Callable[[str], object],
        lost: Callable[[str], object],
        interfaces: Sequence[str] | None = None,
    ) -> None:
        check_extra()
        self._space = hashlib.blake2b(space.encode(), digest_size=8).hexdigest()
        self._name = f"{name}.{TYPE}"
        self._address = address
        self._found = found
        self._lost = lost
        self._interfaces = interfaces
        # Name of an announcement -> its URL.
        self._urls: dict[str, str] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Announce and listen until cancelled. Takes no part in the network's troubles: what
        fails is logged."""
        from zeroconf import InterfaceChoice
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        choice = list(self._interfaces) if self._interfaces else InterfaceChoice.All
        try:
            zeroconf = AsyncZeroconf(interfaces=choice)
        except OSError as exc:
            LOG.error("the local network cannot be searched: %s", exc)
            return
        try:
            browser = AsyncServiceBrowser(zeroconf.zeroconf, TYPE, handlers=[self._changed])
            if self._address is not None:
                await zeroconf.async_register_service(self._info(self._address))
            try:
                await asyncio.Event().wait()
            finally:
                await browser.async_cancel()
        finally:
            for task in self._asking:
                task.cancel()
            # Says goodbye for what was announced.
            await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()

    def _info(self, address: str) -> AsyncServiceInfo:
        from zeroconf.asyncio import AsyncServiceInfo

        parts = urlsplit(address)
        label = self._name.partition(".")[0]
        return AsyncServiceInfo(
            TYPE,
            self._name,
            parsed_addresses=_addresses(parts.hostname or ""),
            port=parts.port or 0,
            properties={"space": self._space, "scheme": parts.scheme},
            server=f"{label}.local.",
        )

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        """Somebody came, changed or left."""
        if name == self._name:
            return
        if state_change.name == "Removed":
            if (url := self._urls.pop(name, None)) is not None:
                self._lost(url)
        elif len(self._asking) < FOUND_MAX and len(self._urls) < FOUND_MAX:
            task = asyncio.get_running_loop().create_task(self._look(zeroconf, name))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _look(self, zeroconf: Zeroconf, name: str) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(TYPE, name)
        if not await info.async_request(zeroconf, ASK_MS):
            return
        told = info.properties
        scheme = (told.get(b"scheme") or b"").decode(errors="replace")
        addresses = info.parsed_addresses()
        if told.get(b"space") != self._space.encode() or scheme not in ("ws", "wss"):
            return
        if addresses and info.port:
            host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
            url = f"{scheme}://{host}:{info.port}"
            if self._urls.get(name) != url:
                self._urls[name] = url
                self._found(url)


def check_extra() -> None:
    """Raise UsageError if zeroconf is not installed."""
    try:
        import zeroconf  # noqa: F401
    except ImportError:
        raise UsageError("lan= needs zeroconf: pip install 'crdtstate[lan]'") from None


def _addresses(host: str) -> list[str]:
    """The addresses to announce for what is listened on."""
    try:
        found: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        return sorted({str(each[4][0]) for each in socket.getaddrinfo(host, None)})
    if not found.is_unspecified:
        return [str(found)]
    # All interfaces: a connected datagram socket knows which address leads out, and sends nothing.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return [str(probe.getsockname()[0])]
        except OSError:
            return ["127.0.0.1"]
