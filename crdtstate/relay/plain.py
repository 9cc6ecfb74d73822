"""
Values as JSON, for browsers: what JSON lacks has a form of its own.

    {"$int": "9007199254740993"}   an int beyond 2**53, a BigInt there
    {"$bytes": "aGk="}             bytes, a Uint8Array there
    {"$datetime": "2026-..."}      an aware datetime, a Date there, to the millisecond
    {"$float": "nan"}              not a number, or "inf" and "-inf"
    {"$dict": [[key, value]...]}   a dict with other keys than text, or with one that begins with $;
                                   a Map there

A number without fraction is an int here if it is one exactly there, below 2**53; beyond, a float.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import datetime
from typing import Any, NoReturn

from crdtstate.errors import UnsupportedValue

SAFE_MAX = 2**53 - 1
INT_CHARS_MAX = 4300


def encode(value: Any) -> Any:
    """What stands for a value in JSON."""
    match value:
        case bool() | None | str():
            return value
        case int():
            return value if -SAFE_MAX <= value <= SAFE_MAX else {"$int": str(value)}
        case float():
            return value if abs(value) < float("inf") else {"$float": repr(value)}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime():
            return {"$datetime": value.isoformat()}
        case list() | tuple():
            return [encode(each) for each in value]
        case dict():
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: encode(each) for key, each in value.items()}
            return {"$dict": [[encode(key), encode(each)] for key, each in value.items()]}
    raise TypeError(f"no value: {value!r}")


def decode(found: Any) -> Any:
    """The value that something in JSON stands for. Raises UnsupportedValue."""
    if type(found) is list:
        return [decode(each) for each in found]
    if type(found) is not dict:
        return found
    if not any(key.startswith("$") for key in found):
        return {key: decode(each) for key, each in found.items()}
    try:
        ((form, content),) = found.items()
        match form, content:
            case "$int", str() if len(content) <= INT_CHARS_MAX:
                return int(content)
            case "$bytes", str():
                return base64.b64decode(content, validate=True)
            case "$datetime", str():
                return datetime.fromisoformat(content)
            case "$float", "nan" | "inf" | "-inf":
                return float(content)
            case "$dict", list():
                return {decode(key): decode(each) for key, each in content}
    except (ValueError, TypeError, binascii.Error):
        pass
    raise UnsupportedValue(str(next(iter(found)))[:40], "not one of the forms of a value")


def write(message: Any) -> str:
    """A message as text."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


def read(text: str) -> Any:
    """A message from its text. Raises ValueError."""
    try:
        return json.loads(text, parse_int=_number, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _number(text: str) -> int | float:
    # As JavaScript reads it: there is no other kind of number.
    number = int(text) if len(text) <= 17 else float(text)
    return number if -SAFE_MAX <= number <= SAFE_MAX else float(number)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
