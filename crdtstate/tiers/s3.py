"""
A tier in a bucket of S3, or of whoever speaks its protocol: far away, slow, and the last to go.

    s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=eu-central-1

The credentials come from the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, or what
else obstore reads there. The bucket has to exist.

A request whose connection fails or breaks off is tried three times; all of them may be repeated,
as the answer may have been lost after the server did what was asked. A put that was given up may
still take effect later, so under one key there should only ever be one value, as is so with
checkpoints. Large values go up in parts. If the
process ends in between, the parts stay, unseen: let a lifecycle rule of the bucket abort incomplete
uploads. Needs ``crdtstate[s3]``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from crdtstate.errors import TierError, UsageError
from crdtstate.tiers import (
    KEY,
    Item,
    check_extra,
    check_key,
    check_size,
    check_value,
    split_url,
    without_password,
)
from crdtstate.tiers.calls import closed, within

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Store

CONNECT_SECONDS = 1.0

REQUEST_SECONDS = 2.0
"""The limit of one try. The library's defaults hang for 45 seconds."""

RETRIES = 2
PAUSE_SECONDS = 0.25
RETRY_SECONDS = 5.0
"""No try begins later than this."""

CALL_SECONDS = 7.0
"""The limit of a call: three tries of two seconds, and the pauses between."""

SMALL_BYTES_MAX = 2**20
"""Up to here a value is sent within REQUEST_SECONDS."""

LARGE_REQUEST_SECONDS = 30.0
"""The limit of one try to send a part, or to receive a value."""

PART_BYTES = 8 * 2**20
PARTS_AT_ONCE = 4

BYTES_PER_SECOND = 2**20
"""Large values may take longer: as long as at this speed."""

ITEMS_SECONDS = 30.0
"""The limit of a listing: a thousand keys take a request."""

CALLS_MAX = 32
"""Further calls wait for one that ends, within their limit. A server answers too many at once
with 503."""


class S3Tier:
    """See `crdtstate.tiers.Tier`.

    Args:
        url: For people.
        small: Talks to the bucket about little.
        large: Sends and receives what is large.
        prefix: Before all names, with a slash at its end; or nothing.
    """

    def __init__(self, url: str, small: S3Store, large: S3Store, prefix: str) -> None:
        self.url = url
        self._small = small
        self._large = large
        self._prefix = prefix
        self._slots = asyncio.Semaphore(CALLS_MAX)
        self._is_closed = False

    async def put(self, key: str, data: bytes) -> None:
        check_key(key)
        check_value(key, data)
        store = self._small if len(data) <= SMALL_BYTES_MAX else self._large
        async with self._calling(CALL_SECONDS + len(data) / BYTES_PER_SECOND):
            await store.put_async(
                self._prefix + _escaped(key),
                data,
                use_multipart=len(data) > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    async def get(self, key: str) -> bytes | None:
        check_key(key)
        try:
            async with self._calling(CALL_SECONDS):
                found = await self._large.get_async(self._prefix + _escaped(key))
        except TierError as exc:
            if isinstance(exc.__cause__, FileNotFoundError) and "NoSuchKey" in str(exc.__cause__):
                return None
            raise
        size = found.meta["size"]
        check_size(self.url, key, size)
        async with self._calling(CALL_SECONDS + size / BYTES_PER_SECOND):
            return bytes(await found.bytes_async())

    async def delete(self, key: str) -> None:
        check_key(key)
        async with self._calling(CALL_SECONDS):
            await self._small.delete_async(self._prefix + _escaped(key))

    async def items(self, prefix: str) -> list[Item]:
        # The server is asked for a folder, with what is above the last slash.
        folder = self._prefix + _escaped(prefix.rpartition("/")[0])
        items: list[Item] = []
        async with self._calling(ITEMS_SECONDS):
            async for page in self._small.list(folder.rstrip("/") or None, chunk_size=1000):
                for found in page:
                    key = _unescaped(found["path"].removeprefix(self._prefix))
                    if key.startswith(prefix) and KEY.fullmatch(key):
                        put_at = found["last_modified"].timestamp()
                        items.append(Item(key, found["size"], put_at))
        return sorted(items, key=lambda item: item.key)

    async def close(self) -> None:
        self._is_closed = True

    @asynccontextmanager
    async def _calling(self, seconds: float) -> AsyncIterator[None]:
        """Make a call, within a limit; translate what goes wrong."""
        from obstore.exceptions import BaseError

        if self._is_closed:
            raise closed(self.url)
        try:
            async with within(seconds, self.url), self._slots:
                yield
        except (BaseError, OSError, ValueError) as exc:
            raise TierError(self.url, _reason(exc)) from exc


def _escaped(key: str) -> str:
    """The key without names that URLs take for directions: ``.`` and ``..``."""
    return re.sub(r"(?<![^/])(%*\.\.?)(?![^/])", r"%\1", key)


def _unescaped(name: str) -> str:
    return re.sub(r"(?<![^/])%(%*\.\.?)(?![^/])", r"\1", name)


def _reason(exc: Exception) -> str:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text = str(exc).partition("\n\nDebug source")[0]
    match = re.search(r"<Code>(\w+)</Code>", text)
    code = match[1] if match else ""
    if re.search("Quota|StorageFull|InsufficientStorage", code) or "status code: 507" in text:
        return f"it is full ({code}); keep fewer checkpoints in it, or raise the bucket's quota"
    is_refused = isinstance(exc, PermissionDeniedError | UnauthenticatedError)
    if code == "NoSuchBucket":
        return "there is no such bucket; create it, or correct the URL"
    if is_refused or "status code: 403" in text or "status code: 401" in text:
        reason = f"it refuses the credentials ({code or 'permission denied'})"
        return f"{reason}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "169.254." in text:
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if " - HTTP error" in text:
        reason = f"it cannot be reached, or does not answer in time ({text.rpartition(' - ')[2]})"
        return f"{reason}; check the endpoint and the network"
    return f"it answers {code}" if code else " ".join(text.split())[:300]


def _parse(url: str) -> tuple[str, str, str | None, str | None]:
    """Bucket, prefix, endpoint and region."""
    parts, options = split_url(url, "endpoint", "region")
    shown = without_password(url)
    prefix = unquote(parts.path).strip("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]{3,255}", parts.netloc):
        raise UsageError(
            f"{shown}: write s3://bucket/prefix; credentials are environment variables"
        )
    if prefix and (len(prefix) > 400 or not KEY.fullmatch(prefix)):
        raise UsageError(f"{shown}: a prefix is names of letters, digits and _.~%- between /")
    endpoint = options.get("endpoint")
    if endpoint is not None:
        place = urlsplit(endpoint)
        if place.scheme not in ("http", "https") or not place.hostname or "@" in place.netloc:
            raise UsageError(f"{shown}: write ?endpoint=http://host:9000, without a password")
    return parts.netloc, prefix, endpoint, options.get("region")


def check_url(url: str) -> None:
    """See `crdtstate.tiers.check_url`."""
    _parse(url)
    check_extra("s3", "obstore")


async def open_tier(url: str) -> S3Tier:
    """See `crdtstate.tiers.open_tier`."""
    check_url(url)
    prefix = _parse(url)[1]
    folder = f"{_escaped(prefix)}/" if prefix else ""
    return S3Tier(url, _store(url, REQUEST_SECONDS), _store(url, LARGE_REQUEST_SECONDS), folder)


def _store(url: str, seconds: float) -> S3Store:
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    bucket, _, endpoint, region = _parse(url)
    config: S3Config = {"bucket": bucket, "disable_bulk_delete": True}
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "timeout": timedelta(seconds=seconds),
    }
    if endpoint is not None:
        config["endpoint"] = endpoint
        client["allow_http"] = endpoint.startswith("http://")
    if region is not None:
        config["region"] = region
    retry: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        "backoff": {
            "init_backoff": timedelta(seconds=PAUSE_SECONDS),
            "max_backoff": timedelta(seconds=PAUSE_SECONDS),
            "base": 2,
        },
    }
    try:
        return S3Store(config=config, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as exc:
        raise UsageError(f"{url}: {_reason(exc)}") from exc
