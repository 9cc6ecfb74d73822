"""
Asking a relay for a writer to write as: the borrower's side of `leases`, before it opens.

It asks on a connection of its own, as a *visitor* that takes part in no document and that no table
of members names. What it gets are the terms: which writer, and how much was written under it so
far, all of which must be here before the borrower may write.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

from crdtstate import wire
from crdtstate.admission import Door
from crdtstate.connections import reach
from crdtstate.errors import LeaseRefused, ProtocolError, TransportError


class Loan(NamedTuple):
    """A writer that was lent: by the relay of which writer, and on which terms."""

    lender: int
    terms: wire.Lend


async def borrow(
    hello: wire.Hello, urls: Iterable[str], door: Door, tls: ssl.SSLContext | None
) -> Loan:
    """Ask at *urls*, one after the other, for a writer.

    Args:
        hello: Who asks.
        door: What it proves.
        tls: Whom to trust, for wss://.

    Raises:
        LeaseRefused: Nobody there lends one; says what the last one said.
    """
    why = "there are none"
    for url in urls:
        try:
            loan = await _borrow_at(hello, url, door, tls)
        except (TransportError, ProtocolError) as exc:
            why = str(exc)
            continue
        if loan.terms.writer:
            return loan
        why = f"{url} is no relay"
    raise LeaseRefused(f"{hello.agent}: no relay among the peers lends a writer: {why}")


async def _borrow_at(hello: wire.Hello, url: str, door: Door, tls: ssl.SSLContext | None) -> Loan:
    connection, _ = await reach(url, door, tls)
    try:
        visitor = replace(hello, documents=())
        frames = [wire.encode_frame(visitor), wire.encode_frame(wire.Borrow())]
        await connection.send(wire.encode_message(frames))
        lender = 0
        while True:
            for frame in wire.decode_message(await connection.receive()):
                if isinstance(frame, wire.Hello):
                    lender = frame.writer
                elif isinstance(frame, wire.Lend):
                    return Loan(lender, frame)
    finally:
        connection.abort()


@asynccontextmanager
async def lease_limit(agent: str, seconds: float) -> AsyncIterator[None]:
    """Raise LeaseRefused if what is inside takes longer than *seconds*."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise LeaseRefused(f"{agent}: no writer could be leased within {seconds} s") from None
