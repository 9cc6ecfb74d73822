"""
The process in which changes of native documents are tried before the agent takes them in.

The guard lowers the risk that pycrdt crashes or hangs on a well-formed edit of a sequence, and
cannot rule it out (see `native_guard`). So a process of its own takes in first what others send:
it holds a copy of each native document, applies the change, reads everything, saves it, loads that
and writes to it. What it survives, the agent takes in. It has no files, sockets or secrets; memory
and time are limited; and the time is that of the processor, so a busy machine condemns nobody.

Requests come through standard input, answers leave through standard output: frames of a length
(4 bytes) and an msgpack array. `examiner` is the other end. All that has come together is tried
together, as one reading of a document does for many changes to it; whose fault it was when the
process died is found out by trying one at a time.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgpack

from crdtstate.errors import InvalidUpdate
from crdtstate.native import Native

LOAD, FEED, CHANGE, SNAPSHOT = range(4)
"""Requests: hold this state; take in this change, which is known to be good; try this change; try
this snapshot. ``[what, number, document, writer, bytes]``; a feed gets no answer."""

SOUND, REFUSED = range(2)
"""Verdicts. An answer is ``[number, verdict, reason]``."""

MEMORY = 2 << 30
"""Bytes of address space, of which Python and pycrdt take 60 MB; a document takes up to twenty
times its encoded size here."""

SECONDS = 1.0
"""Processor time for what is tried together, and a second more for this many bytes of it, or of
the documents it belongs to:"""
BYTES_PER_SECOND = 256 * 1024

BATCH = 256
"""Requests that are tried together."""

READ = 1 << 20

NOBODY = 0
"""No writer: as whom the copies are held."""


def frame(*values: Any) -> bytes:
    """A request or an answer as bytes."""
    body: bytes = msgpack.packb(values)
    return len(body).to_bytes(4, "big") + body


class Frames:
    """Takes frames out of a stream.

    Args:
        size_max: What one may weigh.
    """

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The frames that are whole now. Raises ValueError for what is none."""
        held = self._held
        held += data
        at = 0
        while len(held) - at >= 4:
            end = at + 4 + int.from_bytes(held[at : at + 4], "big")
            if end - at > self._size_max:
                raise ValueError(f"a frame of {end - at} bytes")
            if end > len(held):
                break
            yield msgpack.unpackb(bytes(held[at + 4 : end]))
            at = end
        del held[:at]


class Trial:
    """The copies, and what is tried on them."""

    def __init__(self) -> None:
        self._copies: dict[str, Native] = {}
        # How large they are, encoded.
        self._sizes: dict[str, int] = {}

    def try_all(self, requests: list[Any]) -> list[bytes]:
        """Take in what was asked for, then use it; returns the answers."""
        names = {name for _, _, name, _, _ in requests}
        size = sum(len(data) for *_, data in requests)
        _limit(size + sum(self._sizes.get(name, 0) for name in names))
        answers = []
        for what, number, name, writer, data in requests:
            try:
                self._take(what, name, writer, data)
                verdict, reason = SOUND, ""
            except InvalidUpdate as exc:
                verdict, reason = REFUSED, str(exc)
            if what != FEED:
                answers.append(frame(number, verdict, reason))
        for name in sorted(names & self._copies.keys()):
            self._sizes[name] = self._copies[name].exercise()
        _limit(None)
        return answers

    def _take(self, what: int, name: str, writer: int, data: bytes) -> None:
        if what == LOAD:
            old = self._copies.pop(name, None)
            if old is not None:
                old.close()
            copy = self._copies[name] = Native(NOBODY, lambda: None)
            copy.load(data)
        elif (held := self._copies.get(name)) is None:
            raise InvalidUpdate("its document is not held here")
        elif what == SNAPSHOT:
            held.load(data)
        else:
            held.apply(data, writer)


def _limit(size: int | None) -> None:
    """End this process, whatever holds it up, after the time that *size* bytes may take; None: let
    it take as long as it wants."""
    seconds = 0.0 if size is None else SECONDS + size / BYTES_PER_SECOND
    # What happens at SIGPROF by default needs no Python, which a hang does not let run.
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _give_up_everything() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        # Beyond standard input, output and error there is to be nothing: no file, no socket.
        resource.RLIMIT_NOFILE: 3,
    }
    for limit, value in limits.items():
        # macOS has no limit of memory; there the one of time has to do.
        with suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Answer until standard input ends."""
    warm = Native(NOBODY, lambda: None)
    # Whatever is imported late is imported now.
    warm.text("t").insert(0, "é", {"b": True})
    warm.array("a").append({"k": [1, None, b"x"]})
    warm.exercise()
    warm.close()
    _give_up_everything()
    trial, frames = Trial(), Frames(MEMORY)
    while data := os.read(0, READ):
        requests = list(frames.feed(data))
        for first in range(0, len(requests), BATCH):
            answers = b"".join(trial.try_all(requests[first : first + BATCH]))
            while answers:
                answers = answers[os.write(1, answers) :]
