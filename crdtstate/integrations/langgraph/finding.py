"""
Which items of a store a search finds: filters on their fields, words in their texts.

A filter compares fields by name (``"a.b"`` is the field b in a, if there is none of that name) with
a value, or by operators, ``{"score": {"$gte": 3}}``. A query is words: an item is found if it has
one of them, and ranked by how many it has, how often, and how rare they are among the items looked
at. There are no vectors and no stemming.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import ge, gt, le, lt
from typing import Any

from crdtstate.errors import UsageError

QUERY_WORDS_MAX = 200
"""Different words of a query that count."""

_WORD = re.compile(r"\w+")
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {"$gt": gt, "$gte": ge, "$lt": lt, "$lte": le}


def matches(value: Mapping[str, Any], filter: Mapping[str, Any] | None) -> bool:
    """Whether the fields of *value* are as *filter* says.

    Raises:
        UsageError: The filter has an operator that there is not.
    """
    return all(_compare(field(value, key), wanted) for key, wanted in (filter or {}).items())


def matches_namespace(namespace: Sequence[str], kind: str, path: Sequence[str]) -> bool:
    """Whether a namespace begins (*kind* "prefix") or ends ("suffix") like *path*, in which "*" is
    any one label.

    Raises:
        UsageError: There is no such kind.
    """
    if kind not in ("prefix", "suffix"):
        raise UsageError(f'namespaces match by "prefix" or "suffix", not {kind!r}')
    if len(path) > len(namespace):
        return False
    part = namespace[: len(path)] if kind == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in ("*", label) for label, wanted in zip(part, path, strict=True))


def rank(query: str, texts: Iterable[Iterable[str]]) -> list[float]:
    """How well each item's texts answer a query: from 0, not at all, to below 1."""
    wanted = list(dict.fromkeys(_WORD.findall(query.casefold())))[:QUERY_WORDS_MAX]
    counted = [_count(parts, set(wanted)) for parts in texts]
    weights = {
        word: math.log(1 + len(counted) / (1 + sum(word in words for words in counted)))
        for word in wanted
    }
    total = sum(weights.values()) or 1.0
    return [
        sum(weights[word] * times / (times + 0.5) for word, times in words.items()) / total
        for words in counted
    ]


def texts_in(value: Any) -> Iterator[str]:
    """All texts and numbers in a value, to any depth."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            stack.extend(part.values())
        elif isinstance(part, list):
            stack.extend(part)
        elif isinstance(part, (int, float)):
            yield str(part)


def field(value: Any, key: str) -> Any:
    """The field of a dict by its name, or by a path of names; None if there is none."""
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        first, dot, rest = key.partition(".")
        if dot and first in value:
            return field(value[first], rest)
    return None


def _count(texts: Iterable[str], wanted: set[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in texts:
        found.update(word for word in _WORD.findall(text.casefold()) if word in wanted)
    return found


def _compare(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and any(str(key).startswith("$") for key in wanted):
        return all(_operate(found, name, other) for name, other in wanted.items())
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            _compare(found.get(key), other) for key, other in wanted.items()
        )
    if isinstance(wanted, (list, tuple)):
        return isinstance(found, list) and found == list(wanted)
    return bool(found == wanted)


def _operate(found: Any, name: str, other: Any) -> bool:
    if name == "$eq":
        return _compare(found, other)
    if name == "$ne":
        return not _compare(found, other)
    if name not in _ORDERS:
        known = ", ".join(["$eq", "$ne", *_ORDERS])
        raise UsageError(f"a filter has {known}, not {name!r}")
    is_number = isinstance(found, (int, float)) and isinstance(other, (int, float))
    if is_number or (isinstance(found, str) and isinstance(other, str)):
        return bool(_ORDERS[name](found, other))
    return False
