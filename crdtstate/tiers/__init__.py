"""
Where checkpoints are kept: a tier holds bytes under names, on the same host or far away.

A tier knows nothing of checkpoints; `checkpoints` above decides what is written where, verifies
what it reads, and lives with tiers that are slow, full, gone or lie. The URL chooses:

    memory://                            memory.py, in this process
    shm://name                           shm.py, memory of this host: survives the process
    sqlite:///path/of/a.db               sqlite.py, a file
    redis://:password@host:6379/0        redis.py, extra ``crdtstate[redis]``
    s3://bucket/prefix                   s3.py, extra ``crdtstate[s3]``

Some take options behind a ``?``; their modules tell. To add one: a module with `check_url` and
`open_tier` as below, its scheme in `_MODULES`, and its URL among the parameters of
tests/test_tiers.py, which runs the contract against the real thing. What keeps calls short and
off the event loop stands in calls.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable
from urllib.parse import SplitResult, parse_qsl, urlsplit

from crdtstate.errors import TierError, UsageError

VALUE_BYTES_MAX = 256 * 2**20
"""The most that is kept under one key."""

KEY = re.compile(r"[A-Za-z0-9_.~%-]+(/[A-Za-z0-9_.~%-]+)*")
KEY_CHARS_MAX = 400

_MODULES = {
    "memory": "memory",
    "shm": "shm",
    "sqlite": "sqlite",
    "redis": "redis",
    "rediss": "redis",
    "s3": "s3",
}


@dataclass(frozen=True, slots=True)
class Item:
    """A value that a tier holds: its key, its size, and when it was put, in seconds of Unix time
    by the tier's own clock."""

    key: str
    size_bytes: int
    put_at: float


@runtime_checkable
class Tier(Protocol):
    """Bytes under keys. All of its methods may be called at once from one event loop.

    Keys are paths of printable ASCII, see `check_key`; values have up to VALUE_BYTES_MAX bytes.
    Whatever goes wrong is a `TierError` that names the tier. What was asked for may then have
    happened, or not, or happen later, over what was put since: a server may hang and go on. So
    always put the same under one key. No call takes longer than its own time limit, and none
    blocks the event loop.
    """

    url: str
    """Which it is, for people: without a password."""

    async def put(self, key: str, data: bytes) -> None:
        """Keep *data* under *key*, in place of what was there: all of it or nothing, also if this
        process is killed meanwhile."""

    async def get(self, key: str) -> bytes | None:
        """What is kept under *key*; None if nothing is."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Keep nothing under *key*. It need not be there."""

    async def items(self, prefix: str) -> list[Item]:
        """All whose key begins with *prefix*, in the order of their keys."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of what it takes to reach it; what it holds stays. Idempotent."""


async def open_tier(url: str) -> Tier:
    """The tier at *url*. It need not be reachable now.

    Raises:
        UsageError: This is not the URL of a tier, or an extra has to be installed for it.
    """
    module: Any = _module(url)
    tier: Tier = await module.open_tier(url)
    return tier


def check_url(url: object) -> None:
    """Raise UsageError if this is not the URL of a tier, or an extra has to be installed for it."""
    module: Any = _module(url)
    module.check_url(url)


def check_extra(scheme: str, package: str) -> None:
    """Raise UsageError if the *package* that a tier needs is not installed."""
    try:
        import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        reason = f"{scheme}:// needs {name}: pip install 'crdtstate[{scheme}]'"
        raise UsageError(reason) from None


def check_key(key: str) -> None:
    """Raise UsageError if this cannot be a key."""
    if not isinstance(key, str) or len(key) > KEY_CHARS_MAX or not KEY.fullmatch(key):
        rule = f"names of letters, digits and _.~%- between /, {KEY_CHARS_MAX} characters at most"
        raise UsageError(f"{key!r} cannot be a key: {rule}")


def check_value(key: str, data: bytes) -> None:
    """Raise UsageError if this is more than a tier keeps under one key."""
    if len(data) > VALUE_BYTES_MAX:
        raise UsageError(f"{key}: {len(data)} bytes are more than the {VALUE_BYTES_MAX} of a value")


def check_size(url: str, key: str, size: int) -> None:
    """Raise `TierError` if what a tier holds is larger than whatever it was given."""
    if size > VALUE_BYTES_MAX:
        raise TierError(url, f"{key} has {size} bytes there, so crdtstate did not write it")


def split_url(url: str, *options: str) -> tuple[SplitResult, dict[str, str]]:
    """The parts of a URL, and which of *options* it gives.

    Raises:
        UsageError: It is no URL, or has other options.
    """
    if not url.isprintable():
        raise UsageError(f"{without_password(url)!r} is no URL: it has control characters")
    try:
        parts = urlsplit(url)
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        _ = parts.port
    except ValueError as exc:
        raise UsageError(f"{without_password(url)} is no URL: {exc}") from None
    if parts.fragment:
        raise UsageError(f"{without_password(url)}: write %23 for # in a URL")
    if len(dict(given)) < len(given) or not dict(given).keys() <= set(options):
        allowed = f"once each: {', '.join(options)}" if options else "none"
        raise UsageError(f"{without_password(url)}: the options that it may have are {allowed}")
    return parts, dict(given)


def bytes_option(url: str, options: dict[str, str], default: int | None) -> int | None:
    """The option ``bytes_max``."""
    given = options.get("bytes_max")
    if given is None:
        return default
    if not given.isdecimal() or not 0 < int(given) < 2**63:
        raise UsageError(f"{url}: bytes_max is a number of bytes above 0, not {given!r}")
    return int(given)


def without_password(url: str) -> str:
    """The URL as it may be shown, also if it is none."""
    return url if url.startswith("sqlite:") else re.sub("://.*@", "://***@", url, flags=re.DOTALL)


def _module(url: object) -> Any:
    if not isinstance(url, str):
        raise UsageError(f"a tier is named by a URL such as sqlite:///agent.ckpt.db, not {url!r}")
    scheme = url.partition("://")[0]
    if scheme not in _MODULES:
        known = ", ".join(f"{each}://" for each in _MODULES)
        raise UsageError(f"{without_password(url)!r} is no tier: there are {known}")
    return import_module(f"crdtstate.tiers.{_MODULES[scheme]}")
