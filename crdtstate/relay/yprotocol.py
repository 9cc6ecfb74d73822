"""
The messages of y-websocket, as bytes: sync (y-protocols/sync) and awareness.

    0 0 <state vector>   sync step 1: what I have; send me what I lack
    0 1 <update>         sync step 2: what you lack
    0 2 <update>         an update, as it is made
    1 <states>           awareness: who shows what, such as where a cursor is
    2 ...                an answer about rights, which only servers send
    3                    a question for all that is shown

Numbers are varints, byte strings come after their length. What is read here may come from anybody:
nothing is allocated before its length is known to be there, and what is left over is an error. A
state that is shown is read as JSON and written anew, so that all others can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, NoReturn

from crdtstate.clock import WRITER_MAX
from crdtstate.errors import InvalidUpdate
from crdtstate.guard import CLOCK_MAX, Range, encode_varint, parse_varint
from crdtstate.native_guard import Ranges

SYNC, AWARENESS, AUTH, QUERY = range(4)
STEP_1, STEP_2, UPDATE = range(3)

STATES_MAX = 1024
"""Clients that one message may tell of."""

VECTOR_MAX = 65_536
"""Clients of a state vector."""

SILENCE = bytes([AWARENESS, 1, 0])
"""Shows nothing, and that the connection stands."""


class State(NamedTuple):
    """What a client shows, as JSON; ``"null"`` when it is gone."""

    client: int
    clock: int
    text: str


class Reader:
    """A position in a message. Raises InvalidUpdate for what is none."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, number_max: int) -> int:
        try:
            number, self._at = parse_varint(self._data, self._at)
        except IndexError:
            raise InvalidUpdate("a message was cut short") from None
        if number > number_max:
            raise InvalidUpdate(f"a number is {number}; at most {number_max}")
        return number

    def bytes(self) -> bytes:
        size = self.number(len(self._data))
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise InvalidUpdate("a message was cut short")
        self._at += size
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise InvalidUpdate("bytes are left over in a message")


def read_vector(data: bytes) -> dict[int, int]:
    """A state vector: client -> its next clock. Raises InvalidUpdate."""
    reader = Reader(data)
    count = reader.number(min(VECTOR_MAX, len(data) // 2))
    found = {reader.number(WRITER_MAX): reader.number(CLOCK_MAX) for _ in range(count)}
    reader.end()
    return found


def read_states(data: bytes, size_max: int) -> list[State]:
    """The states in a message of awareness, without those of more than *size_max* bytes. Raises
    InvalidUpdate."""
    reader = Reader(data)
    found = []
    for _ in range(reader.number(STATES_MAX)):
        client, clock, text = reader.number(WRITER_MAX), reader.number(CLOCK_MAX), reader.bytes()
        if len(text) <= size_max:
            found.append(State(client, clock, _as_json(text)))
    reader.end()
    return found


def _as_json(text: bytes) -> str:
    try:
        return json.dumps(json.loads(text, parse_constant=_refuse), separators=(",", ":"))
    except (ValueError, RecursionError) as exc:
        raise InvalidUpdate(f"what is shown is not JSON: {exc}") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is none")


def sync(kind: int, data: bytes) -> bytes:
    """A message of sync."""
    return bytes([SYNC, kind]) + encode_varint(len(data)) + data


def vector(clocks: Mapping[int, int]) -> bytes:
    """A state vector."""
    pairs = (encode_varint(client) + encode_varint(at) for client, at in clocks.items())
    return encode_varint(len(clocks)) + b"".join(pairs)


def states(shown: Iterable[State]) -> bytes:
    """A message of awareness."""
    found = list(shown)
    body = bytearray(encode_varint(len(found)))
    for state in found:
        text = state.text.encode()
        body += encode_varint(state.client) + encode_varint(state.clock)
        body += encode_varint(len(text)) + text
    return bytes([AWARENESS]) + encode_varint(len(body)) + bytes(body)


def without(ranges: list[Range], known: list[Range]) -> list[Range]:
    """What of *ranges* is not in *known*; both are sorted."""
    found: list[Range] = []
    at = 0
    for start, length in ranges:
        end = start + length
        while at < len(known) and sum(known[at]) <= start:
            at += 1
        here = at
        while start < end:
            gap = min(end, known[here][0]) if here < len(known) else end
            if start < gap:
                found.append((start, gap - start))
            start = max(start, sum(known[here])) if here < len(known) else end
            here += 1
    return found


def union(ranges: list[Range]) -> list[Range]:
    """The same ranges, sorted and with gaps between."""
    found: list[Range] = []
    for start, length in sorted(ranges):
        if found and start <= sum(found[-1]):
            found[-1] = found[-1][0], max(sum(found[-1]), start + length) - found[-1][0]
        else:
            found.append((start, length))
    return found


def clipped(deletes: Ranges, clocks: Mapping[int, int], known: Ranges) -> Ranges:
    """What of *deletes* is below *clocks* and not in *known*."""
    found: Ranges = {}
    for client, ranges in deletes.items():
        # As they came, they need not be sorted.
        ranges = union(ranges)
        end = clocks.get(client, 0)
        below = [(start, min(length, end - start)) for start, length in ranges if start < end]
        if left := without(below, known.get(client, [])):
            found[client] = left
    return found
