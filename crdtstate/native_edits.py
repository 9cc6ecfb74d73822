"""
Edits that make a native Yjs type read as another one does: how a text of today becomes the text
of last week again, without a stroke more than it takes.

What both have stays what it is, so cursors, observers and other people's concurrent edits in it
live on. Texts are compared by lines and, where few characters differ, by these; arrays by items.
Each comparison is bounded: what differs too much is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import partial
from itertools import groupby
from typing import Any

from crdtstate.native import (
    SHARED,
    Array,
    Text,
    YMap,
    cells_of,
    content,
    mend_formats,
    plain,
    put_copy,
    size_of,
)

PRODUCT_MAX = 4_000_000
"""How many pairs a comparison may look at: comparing takes that many steps at worst."""

PIECE = 64 * 1024
"""Characters of a text inserted in one edit."""

_LINES = re.compile(r"[^\n]*\n|[^\n]+")

Edit = tuple[int, Callable[[], Any]]
"""About how many bytes an edit writes, and what makes it."""

Opcode = tuple[int, int, int, int]
"""What is at ``[0]:[1]`` here is to be what is at ``[2]:[3]`` there."""


def edits(living: Any, wanted: Any) -> Iterator[Edit]:
    """What makes *living* read as *wanted*, a value of the same type from another Doc. Each edit
    has to be made before the next is asked for."""
    match living, wanted:
        case Text(), Text():
            yield from _text_edits(living, wanted)
        case Array(), Array():
            yield from _array_edits(living, wanted)
        case YMap(), YMap():
            yield from _map_edits(living, wanted)


def _text_edits(living: Text, wanted: Text) -> Iterator[Edit]:
    if _is_plain(living) and _is_plain(wanted):
        yield from _plain_edits(living, str(living), str(wanted))
    else:
        yield from _formatted_edits(living, wanted)
    if content(living) != content(wanted):
        # An embed that looks like text, or a format that stays: write the whole anew.
        yield 0, partial(_delete, living, 0, len(living))
        yield from _cell_inserts(living, 0, cells_of(wanted))
        yield 0, partial(mend_formats, living, wanted)


def _is_plain(text: Text) -> bool:
    return all(isinstance(part, str) and not attributes for part, attributes in text.diff())


def _plain_edits(living: Text, before: str, after: str) -> Iterator[Edit]:
    # From the end, so that what is left to do stays where it is. Indices count UTF-8 bytes.
    for start, end, first, last in reversed(_text_opcodes(before, after)):
        at = len(before[:start].encode())
        size = len(before[start:end].encode())
        if size:
            yield 16, partial(_delete, living, at, at + size)
        for piece in range(first, last, PIECE):
            text = after[piece : min(piece + PIECE, last)]
            size = len(text.encode())
            yield size + 32, partial(living.insert, at, text)
            at += size


def _delete(text: Text, start: int, end: int) -> None:
    if end > start:
        del text[start:end]


def _text_opcodes(before: str, after: str) -> list[Opcode]:
    """Where two texts differ, in characters."""
    lines, others = _LINES.findall(before), _LINES.findall(after)
    found: list[Opcode] = []
    starts, ends = _offsets(lines), _offsets(others)
    for one, two, three, four in opcodes(lines, others):
        start, end, first, last = starts[one], starts[two], ends[three], ends[four]
        if (end - start) * (last - first) <= PRODUCT_MAX // 100:
            inner = opcodes(before[start:end], after[first:last])
            found += [(start + a, start + b, first + c, first + d) for a, b, c, d in inner]
        else:
            head = _common(before[start:end], after[first:last])
            found.append((start + head, end, first + head, last))
    return found


def _offsets(parts: Sequence[str]) -> list[int]:
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return offsets


def opcodes(before: Sequence[Any], after: Sequence[Any]) -> list[Opcode]:
    """Where two sequences of hashable things differ."""
    head = _common(before, after)
    tail = _common(before[head:][::-1], after[head:][::-1])
    one, other = before[head : len(before) - tail], after[head : len(after) - tail]
    if not one and not other:
        return []
    if len(one) * len(other) > PRODUCT_MAX:
        return [(head, head + len(one), head, head + len(other))]
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    return [
        (head + a, head + b, head + c, head + d)
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal"
    ]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many parts two sequences have in common at their beginning."""
    limit = min(len(one), len(other))
    return next((at for at in range(limit) if one[at] != other[at]), limit)


def _formatted_edits(living: Text, wanted: Text) -> Iterator[Edit]:
    before, after = cells_of(living), cells_of(wanted)
    keys = [repr(content(value)) for value, _, _ in before]
    others = [repr(content(value)) for value, _, _ in after]
    for start, end, first, last in reversed(opcodes(keys, others)):
        at = sum(size_of(value) for value, _, _ in before[:start])
        size = sum(size_of(value) for value, _, _ in before[start:end])
        if size:
            yield 16, partial(_delete, living, at, at + size)
        yield from _cell_inserts(living, at, after[first:last])
    if content(living) != content(wanted):
        yield len(after), partial(mend_formats, living, wanted)


def _cell_inserts(living: Text, at: int, cells: Sequence[Any]) -> Iterator[Edit]:
    for (is_text, _), run in groupby(cells, key=lambda cell: cell[2]):
        group = list(run)
        attributes = plain(group[0][1])
        if is_text:
            for start in range(0, len(group), PIECE):
                text = "".join(value for value, _, _ in group[start : start + PIECE])
                size = len(text.encode())
                yield size + 64, partial(living.insert, at, text, attributes)
                at += size
        else:
            for value, _, _ in group:
                embed = partial(living.insert_embed, at, attrs=attributes)
                yield _weight(value), partial(put_copy, value, embed)
                at += size_of(value)


def _array_edits(living: Array[Any], wanted: Array[Any]) -> Iterator[Edit]:
    keys = [repr(content(value)) for value in living]
    others = [repr(content(value)) for value in wanted]
    for start, end, first, last in reversed(opcodes(keys, others)):
        yield from _block_edits(living, start, end, [wanted[at] for at in range(first, last)])


def _block_edits(living: Array[Any], start: int, end: int, wanted: list[Any]) -> Iterator[Edit]:
    """Edits after which the items at *start* to *end* read as *wanted*. A nested type goes on
    as what stands for it now, so that who holds it goes on, too."""
    keys = [_key(living[at]) for at in range(start, end)]
    others = [_key(value) for value in wanted]
    here, there = len(keys), len(others)
    for one, two, three, four in [*reversed(opcodes(keys, others)), (0, 0, 0, 0)]:
        # What lies after this part is alike, item by item.
        for offset in range(1, here - two + 1):
            yield from edits(living[start + here - offset], wanted[there - offset])
        if two > one:
            yield 16, partial(living.__delitem__, slice(start + one, start + two))
        for at in range(three, four):
            insert = partial(living.insert, start + one + at - three)
            yield _weight(wanted[at]), partial(put_copy, wanted[at], insert)
        here, there = one, three


def _key(value: Any) -> str:
    return type(value).__name__ if isinstance(value, SHARED) else repr(content(value))


def _map_edits(living: YMap[Any], wanted: YMap[Any]) -> Iterator[Edit]:
    for key in sorted(set(living.keys()) - set(wanted.keys())):
        yield 16, partial(living.__delitem__, key)
    for key in sorted(wanted.keys()):
        value = wanted[key]
        if key in living:
            if content(living[key]) == content(value):
                continue
            if isinstance(value, SHARED) and type(living[key]) is type(value):
                yield from edits(living[key], value)
                continue
        yield _weight(value) + len(key), partial(put_copy, value, partial(living.__setitem__, key))


def _weight(value: Any) -> int:
    """About how many bytes it takes to write *value*."""
    return 32 + len(repr(content(value)))
