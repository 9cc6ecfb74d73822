"""
User values as bytes: which Python values can be shared, and how they are written.

A value is packed with msgpack and has, on every replica, the type it had: None, bool, int
(to 4,298 digits), float, str, bytes, aware datetime, list, and dict with keys of None, bool,
int, float, str or bytes. Only a tuple comes back as a list. All else is refused at the door,
with the path of the offending part and what to use instead: a value that changes on its way
(a set, a subclass, a naive time) would be another value on another machine.

`pack` and `unpack` are for values. `pack_key` and `unpack_key` write an element of a set as
text, and elements that are equal in Python, such as 1, 1.0 and True, get the same text.
"""

from __future__ import annotations

import dataclasses
import functools
import zoneinfo
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgpack

from crdtstate.errors import InvalidUpdate, UnsupportedValue

VALUE_BYTES_MAX = 1 << 20
"""What one value may measure when packed. Larger things are better shared by reference."""

DEPTH_MAX = 64
"""How deep lists and dicts may nest: far below where repr() and json give up."""

INT_BYTES_MAX = 1785
"""Larger ints exist, but Python refuses to print them: a trap for whoever reads the value."""

_EXT_INT = 1
_EXT_DATETIME = 2

_OPENING = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
"""The bytes that begin a list or a dict."""

_KEYS = frozenset({type(None), bool, int, float, str, bytes})
_SCALARS = _KEYS | {datetime}

_HINTS = {
    "set frozenset": "use replica.set() or a sorted list",
    "bytearray memoryview": "use bytes(...)",
    "Decimal Fraction UUID PurePath": "use str(...)",
    "date time": "use an aware datetime or .isoformat()",
    "timedelta": "use .total_seconds()",
    "complex": "use a list of two floats",
    "generator": "use list(...)",
    "ndarray": "use .tolist()",
    "BaseModel": "use .model_dump()",
    "Enum": "use its .value",
    "object": "use None, bool, int, float, str, bytes, datetime, list or dict",
}
"""What to do instead, by the names of classes, or of one of their bases."""


# Values


def pack(value: Any, where: str) -> bytes:
    """Write *value* as bytes.

    Args:
        value: What to write.
        where: What to call it in an error, such as ``plan['goal']``.

    Raises:
        UnsupportedValue: It, or a part of it, cannot be shared. Names the part.
    """
    # msgpack alone is too kind: it takes an IntEnum for an int, and a tuple as a key.
    if type(value) in _SCALARS or _is_plain(value):
        try:
            packed: bytes = msgpack.packb(value, default=_extend)
        except (ValueError, OverflowError):
            pass  # a lone surrogate, a naive datetime or a huge int: _explain finds it
        else:
            if len(packed) <= VALUE_BYTES_MAX:
                return packed
    _explain(value, where, 0, {})
    raise UnsupportedValue(
        where, f"larger than {VALUE_BYTES_MAX} bytes when packed; split it, or share a reference"
    )


def unpack(data: bytes) -> Any:
    """Read what `pack` wrote.

    Raises:
        InvalidUpdate: The bytes are not those of a value that can be shared. Whatever a peer
            sends, nothing else is raised.
    """
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidUpdate(f"a value of {len(data)} bytes; at most {VALUE_BYTES_MAX}")
    try:
        # msgpack bounds every stated length by the length of the data, and nesting by 1,024.
        value = msgpack.unpackb(data, strict_map_key=False, timestamp=3, ext_hook=_restore)
    except Exception as exc:
        raise InvalidUpdate(f"not a packed value: {type(exc).__name__} {exc}") from None
    if type(value) in _SCALARS or _is_plain(value):
        return value
    raise InvalidUpdate(f"a packed value nests deeper than {DEPTH_MAX}, or has keys that cannot be")


def check(data: bytes) -> None:
    """Raise `InvalidUpdate` unless `unpack` can read *data*."""
    check_all((data,))


def check_all(packed: Iterable[bytes]) -> None:
    """Raise `InvalidUpdate` unless `unpack` can read each of *packed*."""
    # Whole states pass here. What has text or bytes for keys, and too few bytes that open something
    # to nest too deep, needs no looking at.
    for data in packed:
        size = len(data)
        if size <= DEPTH_MAX or size - len(data.translate(None, _OPENING)) <= DEPTH_MAX:
            try:
                msgpack.unpackb(data, strict_map_key=True, timestamp=3, ext_hook=_restore)
            except Exception:  # noqa: S110
                pass  # there may be other keys in it
            else:
                if size <= VALUE_BYTES_MAX:
                    continue
        unpack(data)


def _is_plain(value: Any) -> bool:
    """Whether *value* consists of lists, tuples and dicts of exact types, not too deep or many."""
    # A level of nesting at a time, and bounded: a small graph of shared lists can be a huge
    # tree, and one that contains itself an endless one.
    count = 0
    level = [value]
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for container in level:
            if type(container) is dict:
                for key in container:
                    if type(key) is not str and not _is_key(key):
                        return False
                container = container.values()
            elif type(container) is not list and type(container) is not tuple:
                return False
            count += len(container)
            if count > VALUE_BYTES_MAX:
                return False
            for part in container:
                if type(part) not in _SCALARS:
                    below.append(part)
        if not below:
            return True
        level = below
    return False


def _is_key(key: Any) -> bool:
    # Not equal to itself is NaN: nobody could look it up.
    return type(key) in _KEYS and key == key


def _explain(value: Any, where: str, depth: int, fine: dict[int, int]) -> None:
    """Raise for the first part of *value* that cannot be shared. Slow, and exact."""
    kind = type(value)
    if kind in _SCALARS:
        _explain_scalar(value, where)
    elif kind not in (dict, list, tuple):
        raise UnsupportedValue(where, f"a {kind.__name__} cannot be shared; {_hint(value)}")
    elif fine.get(id(value), -1) < depth:
        # Else it was found fine at this depth already, as a part of something else.
        if depth >= DEPTH_MAX:
            raise UnsupportedValue(where, f"nests deeper than {DEPTH_MAX}, or contains itself")
        for key in value if kind is dict else ():
            if not _is_key(key):
                what = "NaN" if key != key else f"a {type(key).__name__}"
                raise UnsupportedValue(where, f"has {what} for a key; use a str")
            _explain_scalar(key, f"a key in {where}")
        for key, part in value.items() if kind is dict else enumerate(value):
            _explain(part, f"{where}[{key!r}]", depth + 1, fine)
        fine[id(value)] = depth


def _explain_scalar(value: Any, where: str) -> None:
    reason = None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            reason = "has a lone surrogate, which is not text; use bytes"
    elif isinstance(value, int) and value.bit_length() >= INT_BYTES_MAX * 8:
        reason = "an int of more than 4,298 digits; use bytes"
    elif isinstance(value, datetime) and value.utcoffset() is None:
        reason = "a datetime without timezone; add one, as in datetime.now(UTC)"
    if reason:
        raise UnsupportedValue(where, reason)


def _hint(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "use dataclasses.asdict(...)"
    for base in type(value).__mro__:
        if base in _SCALARS or base in (list, tuple, dict):
            return f"it would come back as {base.__name__}: use {base.__name__}(...)"
        for names, hint in _HINTS.items():
            if base.__name__ in names.split():
                return hint
    raise AssertionError("every class derives from object")


# What msgpack has no type for


def _extend(value: Any) -> msgpack.ExtType:
    if type(value) is int and value.bit_length() < INT_BYTES_MAX * 8:
        size = value.bit_length() // 8 + 1
        return msgpack.ExtType(_EXT_INT, value.to_bytes(size, "big", signed=True))
    if type(value) is datetime and value.utcoffset() is not None:
        # RFC 9557: the offset as it was, and the zone by name if it is one that has a name.
        zone = value.tzinfo.key if isinstance(value.tzinfo, zoneinfo.ZoneInfo) else None
        text = f"{value.isoformat()}[{zone}]" if zone else value.isoformat()
        return msgpack.ExtType(_EXT_DATETIME, text.encode())
    raise ValueError("refused")


def _restore(code: int, data: bytes) -> Any:
    if code == _EXT_INT and len(data) <= INT_BYTES_MAX:
        return int.from_bytes(data, "big", signed=True)
    if code != _EXT_DATETIME:
        raise ValueError(f"extension type {code} of {len(data)} bytes")
    text, _, zone = data.decode().partition("[")
    fixed = datetime.fromisoformat(text)
    if fixed.utcoffset() is None:
        raise ValueError("a datetime without timezone")
    if text[-15:-6] == "00:00:00." and text[-16:-15] in ("+", "-"):
        # fromisoformat drops an offset of less than a second.
        offset = timedelta(microseconds=int(text[-16] + text[-6:]))
        fixed = fixed.replace(tzinfo=timezone(offset))
    return _in_zone(fixed, zone.removesuffix("]")) if zone else fixed


def _in_zone(fixed: datetime, name: str) -> datetime:
    """Put a datetime into its zone, if the time zone data of this machine agree with it."""
    # Names come from peers. Looking up an unknown one searches the disk, each time anew.
    if name in _zone_names():
        for fold in (0, 1):
            local = fixed.replace(tzinfo=_zone(name), fold=fold)
            if local.utcoffset() == fixed.utcoffset():
                return local
    return fixed


@functools.cache
def _zone_names() -> set[str]:
    return zoneinfo.available_timezones()


@functools.cache
def _zone(name: str) -> zoneinfo.ZoneInfo:
    return zoneinfo.ZoneInfo(name)


# Elements of sets


def pack_key(value: Any, where: str) -> str:
    """Write an element of a set as text; equal elements get equal text.

    Equal as in a Python set: 1, 1.0 and True are one element, and so are two datetimes that
    name the same instant. `unpack_key` gives one of the equal ones back: the int, and UTC.

    Raises:
        UnsupportedValue: Not a str, int, float, bool, None, bytes, datetime, or tuple of those.
    """
    kind = type(value)
    if isinstance(value, str) and kind is str:
        if not value.isascii():
            _explain_scalar(value, where)
        return "s" + value
    if kind is tuple:
        keys = [pack_key(part, f"{where}[{at}]") for at, part in enumerate(value)]
        return "t" + "".join(f"{len(key)}:{key}" for key in keys)
    if kind not in _SCALARS or value != value:
        what = f"a {kind.__name__}" if kind not in _SCALARS else "NaN"
        hint = "use a tuple" if kind is list else "use a str, number, bytes, datetime or tuple"
        raise UnsupportedValue(where, f"{what} cannot be an element of a set; {hint}")
    _explain_scalar(value, where)
    if kind is bytes:
        return f"b{value.hex()}"
    if kind is datetime:
        try:
            return f"d{value.astimezone(UTC).replace(tzinfo=None).isoformat()}"
        except OverflowError:
            raise UnsupportedValue(where, "a datetime that is out of range in UTC") from None
    if value is None:
        return "n"
    if kind is float and not value.is_integer():
        return f"f{value!r}"
    return f"i{int(value)}"


def unpack_key(key: str) -> Any:
    """Read what `pack_key` wrote.

    Raises:
        InvalidUpdate: It did not write this. Nothing else is raised, whatever a peer sends.
    """
    if key[:1] == "s":
        return key[1:]
    try:
        value = _read_key(key)
        if pack_key(value, "") == key:
            return value
    except Exception as exc:
        raise InvalidUpdate(f"not an element of a set: {exc}") from None
    raise InvalidUpdate("an element of a set that is not written in the one way it can be")


def _read_key(key: str) -> Any:
    text = key[1:]
    match key[:1]:
        case "s":
            return text
        case "n":
            return None
        case "i":
            return int(text)
        case "f":
            return float(text)
        case "b":
            return bytes.fromhex(text)
        case "d":
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        case "t":
            parts = []
            while text:
                size, _, rest = text.partition(":")
                parts.append(_read_key(rest[: int(size)]))
                text = rest[int(size) :]
            return tuple(parts)
    raise ValueError(f"unknown prefix {key[:1]!r}")
