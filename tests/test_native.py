"""
Shared documents: native types converge, open edits can be taken back, and the guard's rules.

Run as a program, this file damages honest changes and hands them to an engine, in a process
that may crash or hang on them; `test_damaged_changes...` watches it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from pycrdt import UndoManager, XmlFragment

from crdtstate.errors import InvalidUpdate, UsageError
from crdtstate.guard import encode_deletes
from crdtstate.guard import encode_varint as varint
from crdtstate.native import CHANGE_BYTES_GOAL, Array, Native, Text, YMap
from crdtstate.native_guard import (
    CHANGE_BYTES_MAX,
    DEPTH_MAX,
    ROOT_CHARS_MAX,
    Known,
    check_change,
    check_state,
)

WORDS = ["a", "bc", "héllo", "😀", "x😀y", "漢字", "zz top"]
FORMATS: list[dict[str, Any] | None] = [None, None, {"b": True}, {"b": None}, {"i": "x"}, {}]
SHARED = (Text, Array, YMap)


class Member:
    """A native engine with a text, an array and a map, and what it has seen of whom."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.writes = 0
        self.native = Native(writer, self._written)
        self.text = self.native.text("t")
        self.array = self.native.array("a")
        self.map = self.native.map("m")
        self.version: dict[int, int] = {}
        self.inbox: list[tuple[int, dict[int, int], bytes]] = []

    def _written(self) -> None:
        self.writes += 1

    def read(self) -> Any:
        return [content(kind) for kind in (self.text, self.array, self.map)]

    def edit(self, rng: random.Random) -> None:
        edit(rng.choice((self.text, self.array, self.map)), rng)

    def send(self, members: Iterable[Member]) -> None:
        update = self.native.take()
        if not update:
            return
        before = dict(self.version)
        self.version[self.writer] = before.get(self.writer, 0) + 1
        for other in members:
            if other is not self:
                other.inbox.append((self.writer, before, update))

    def receive(self, rng: random.Random) -> bool:
        """Apply a change of which all causes are here; False if there is none."""
        ready = [
            change
            for change in self.inbox
            if all(self.version.get(writer, 0) >= seq for writer, seq in change[1].items())
        ]
        if not ready:
            return False
        writer, before, update = change = rng.choice(ready)
        self.inbox.remove(change)
        self.native.apply(update, writer)
        self.version[writer] = before.get(writer, 0) + 1
        return True

    def join(self, other: Member) -> None:
        self.native.load(self.native.join(other.native.state(), lambda writer: True))
        for writer, seq in other.version.items():
            self.version[writer] = max(seq, self.version.get(writer, 0))
        self.inbox = [
            change
            for change in self.inbox
            if change[1].get(change[0], 0) >= self.version.get(change[0], 0)
        ]


def content(value: Any) -> Any:
    """What a value reads as, in a form that can be compared."""
    match value:
        case Text():
            return [
                (char, repr(attributes or {}))
                for part, attributes in value.diff()
                for char in (part if isinstance(part, str) else [content(part)])
            ]
        case Array() | list():
            return [content(inner) for inner in value]
        case YMap() | dict():
            return {key: content(value[key]) for key in list(value.keys())}
    return repr(value)


def offsets(text: Text) -> list[int]:
    """Where an edit of *text* can begin: not within a character."""
    found = [0]
    for part, _ in text.diff():
        for char in part if isinstance(part, str) else [None]:
            found.append(found[-1] + (len(char.encode()) if char else 1))
    return found


def some_value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(9 if depth < 3 else 6):
        case 0:
            return rng.choice([None, True, False, -1.5, 7, 2**53 - 1])
        case 1 | 2:
            return rng.choice(WORDS)
        case 3:
            return b"\0bytes"
        case 4:
            return [1, {"a": [True, None, b"q"]}, "😀"]
        case 5:
            return {"k": rng.random(), "l": []}
        case 6:
            return Text(rng.choice(WORDS))
        case 7:
            return Array([some_value(rng, depth + 1) for _ in range(rng.randrange(3))])
    return YMap({f"k{n}": some_value(rng, depth + 1) for n in range(rng.randrange(3))})


def edit(shared: Any, rng: random.Random) -> None:
    """Make a random edit of a shared type, or of one inside it."""
    kind = rng.randrange(10)
    if isinstance(shared, Text):
        at = offsets(shared)
        start, end = sorted(rng.choices(range(len(at)), k=2))
        end = min(end, start + 4)
        match kind:
            case 0 | 1 if start < end:
                del shared[at[start] : at[end]]
            case 2 if start < end:
                shared.format(at[start], at[end], rng.choice(FORMATS) or {"b": None})
            case 3:
                shared.insert_embed(at[start], rng.choice([{"img": "é😀"}, [1, 2], 5]))
            case _:
                shared.insert(at[start], rng.choice(WORDS), rng.choice(FORMATS))
    elif isinstance(shared, Array):
        at = rng.randrange(len(shared) + 1)
        if kind < 5 or at == len(shared):
            shared.insert(at, some_value(rng))
        elif kind < 7:
            del shared[at : min(len(shared), at + rng.randrange(1, 4))]
        elif isinstance(shared[at], SHARED):
            edit(shared[at], rng)
        else:
            shared[at] = some_value(rng)
    else:
        key = rng.choice("abcd😀")
        if kind < 5 or key not in shared:
            shared[key] = some_value(rng)
        elif kind < 7:
            del shared[key]
        elif isinstance(shared[key], SHARED):
            edit(shared[key], rng)


def bridged(*members: Member) -> None:
    """Let members without open changes have all that the others have."""
    for one in members:
        for other in members:
            if one is not other:
                one.join(other)


# Convergence


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_three_members_read_the_same_in_the_end(first: int) -> None:
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        members = [Member(writer) for writer in (7, 2**32 + 5, rng.randrange(1, 2**53))]
        for _ in range(rng.randrange(5, 50)):
            member = rng.choice(members)
            match rng.randrange(10):
                case 0 | 1 | 2 | 3:
                    for _ in range(rng.randrange(1, 4)):
                        member.edit(rng)
                case 4:
                    with member.text.doc.transaction():
                        for _ in range(rng.randrange(1, 6)):
                            member.edit(rng)
                case 5:
                    member.native.rollback()
                case 6 | 7:
                    member.send(members)
                case 8:
                    member.receive(rng)
                case _:
                    member.join(rng.choice(members))
        for member in members:
            member.send(members)

        while any(member.receive(rng) for member in members):
            pass

        late = Member(99)
        late.native.load(members[0].native.state())
        assert not any(member.inbox for member in members)
        assert members[0].read() == members[1].read() == members[2].read() == late.read(), seed


def test_apply_tells_which_roots_a_change_touches() -> None:
    one, two = Member(1), Member(2)
    one.text += "hello"
    one.map["todo"] = Array(["a", "b"])

    assert two.native.apply(one.native.take(), 1) == ["ym\0", "yt\0"]

    del one.map["todo"][0]
    assert two.native.apply(one.native.take(), 1) == ["ym\0"]
    del one.text[1:3]
    assert two.native.apply(one.native.take(), 1) == ["yt\0"]
    late = Member(3)
    assert late.native.load(two.native.state()) == ["ym\0", "yt\0"]


def test_own_changes_come_back_from_a_store() -> None:
    before = Member(1)
    before.text += "kept"
    changes = [before.native.take()]
    before.array.append(1)
    changes.append(before.native.take())

    again = Member(1)
    for update in changes:
        again.native.apply(update, 1)
    again.text += " lost"
    again.native.rollback()
    again.text += " and more"

    assert str(again.text) == "kept and more"
    before.native.apply(again.native.take(), 1)
    assert before.read() == again.read()


def test_own_changes_from_elsewhere_are_refused_beside_open_edits() -> None:
    one, twin = Member(1), Member(1)
    twin.text += "theirs"
    update = twin.native.take()
    one.text += "mine"

    with pytest.raises(InvalidUpdate):
        one.native.apply(update, 1)
    with pytest.raises(InvalidUpdate):
        one.native.load(twin.native.state())

    assert str(one.text) == "mine"


# Taking


def test_an_edit_opens_a_change_once_and_a_take_closes_it() -> None:
    member = Member(1)
    assert not member.native.is_open and member.native.take() == b""

    member.text += "a"
    member.text += "b"
    member.array.append(1)

    assert member.writes == 1 and member.native.is_open
    assert member.native.take() and not member.native.is_open
    assert member.native.take() == b""
    member.text += "c"
    assert member.writes == 2


def test_what_others_write_opens_no_change() -> None:
    one, two = Member(1), Member(2)
    one.text += "a"

    two.native.apply(one.native.take(), 1)
    two.native.load(one.native.state())

    assert two.writes == 0 and not two.native.is_open


def test_hundreds_of_edits_are_one_update() -> None:
    one, two = Member(1), Member(2)
    for n in range(700):
        one.text.insert(n // 2, "é")
        one.array.append(n)
        one.map[f"k{n % 9}"] = n
        if n % 3 == 0:
            del one.array[0]

    update = one.native.take()
    two.native.apply(update, 1)

    assert one.writes == 1
    assert len(str(two.text)) == 700 and two.read() == one.read()


def test_open_edits_are_not_in_the_state() -> None:
    one, two = Member(1), Member(2)
    one.text += "sealed"
    first = one.native.take()
    one.text += " open"
    del one.text[:2]

    two.native.load(one.native.state())

    assert str(two.text) == "sealed"
    update = one.native.take()
    two.native.apply(update, 1)
    assert str(two.text) == str(one.text) == "aled open"
    assert first != update


def test_large_edits_are_announced_again_and_can_be_taken_at_once() -> None:
    taken: list[bytes] = []
    native = Native(1, lambda: taken.append(native.take()) if native.text("t") else None)
    text = native.text("t")
    announced: list[int] = []
    native._on_write = lambda: announced.append(len(text_size))
    text_size: list[int] = []

    def written() -> None:
        announced.append(len(taken))
        if len(announced) > 1:
            taken.append(native.take())

    native._on_write = written
    for _ in range(5):
        text += "x" * (CHANGE_BYTES_GOAL // 2)

    assert taken and taken[0]
    other = Member(2)
    for update in taken:
        other.native.apply(update, 1)
    if native.is_open:
        other.native.apply(native.take(), 1)
    assert str(other.text) == str(text)
