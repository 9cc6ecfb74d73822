"""The contract of a tier, kept by every one of them against the real thing, and how each fails."""

# ruff: noqa: ASYNC240 (files that are in memory anyway; nobody else waits for the loop of a test)

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from fault_vfs import Disk, FaultHost
from harness import asynchronous
from servers import (
    SHM,
    Gateway,
    RedisServer,
    S3Server,
    free_port,
    make_certificate,
    stopped,
    url_of,
)
from tier_child import number_in, whole

import crdtstate.tiers.redis
import crdtstate.tiers.s3
import crdtstate.tiers.shm
import crdtstate.tiers.sqlite
from crdtstate.errors import TierError, UsageError
from crdtstate.stores.file import Host, connect
from crdtstate.stores.journal import Journal
from crdtstate.tiers import VALUE_BYTES_MAX, Tier, check_url, open_tier
from crdtstate.tiers.sqlite import SqliteTier

SHARED = ["shm", "sqlite", "redis", "s3"]
CHILD = Path(__file__).with_name("tier_child.py")

SLACK_SECONDS = 5.0
"""By which a call may be later than its limit on a machine that is busy."""


@pytest.fixture(params=["memory", *SHARED])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from url_of(request.param, request)


@pytest.fixture(params=SHARED)
def shared_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from url_of(request.param, request)


@pytest.fixture
def shm_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from url_of("shm", request)


@pytest.fixture
def s3_url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from url_of("s3", request)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Tier]:
    tier = await open_tier(url)
    try:
        yield tier
    finally:
        await tier.close()


@asynccontextmanager
async def failing(match: str, seconds: float, at_least: float = 0) -> AsyncIterator[None]:
    """What is done in here has to raise a `TierError` that says *match*, in time."""
    start = time.monotonic()
    with pytest.raises(TierError, match=match):
        yield
    elapsed = time.monotonic() - start
    assert at_least <= elapsed <= seconds + SLACK_SECONDS, f"it took {elapsed:.2f} s"


async def keys(tier: Tier, prefix: str = "") -> list[str]:
    return [item.key for item in await tier.items(prefix)]


# The contract


@pytest.mark.parametrize("size", [0, 1, 1000, 65537, 2**20, 9 * 2**20 + 3])
@asynchronous
async def test_what_was_put_is_there(url: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    async with opened(url) as tier:
        await tier.put("anna/parts/1", data)

        assert await tier.get("anna/parts/1") == data
        assert await tier.get("anna/parts/2") is None
        (item,) = await tier.items("")
        assert (item.key, item.size_bytes) == ("anna/parts/1", size)


@asynchronous
async def test_a_value_replaces_what_was_there(url: str) -> None:
    async with opened(url) as tier:
        for data in (b"first", b"longer than the first", b"", b"z"):
            await tier.put("k", data)

            assert await tier.get("k") == data
            (item,) = await tier.items("")
            assert item.size_bytes == len(data)


@asynchronous
async def test_what_was_deleted_is_gone_and_deleting_again_does_no_harm(url: str) -> None:
    async with opened(url) as tier:
        await tier.put("a/1", b"1")
        await tier.put("a/2", b"2")

        await tier.delete("a/1")
        await tier.delete("a/1")
        await tier.delete("never/there")

        assert await tier.get("a/1") is None
        assert await keys(tier) == ["a/2"]


@asynchronous
async def test_items_begin_with_the_prefix_and_are_in_order(url: str) -> None:
    names = ["a", "a/b", "a/b/c", "a/bc", "a-b", "ab", "a.b/c", "B", "a/parts/9", "a/manifests/1"]
    async with opened(url) as tier:
        for name in names:
            await tier.put(name, name.encode() * 3)

        for prefix in (
            "",
            "a",
            "a/",
            "a/b",
            "a/b/",
            "a/man",
            "a/b/c",
            "a/b/cd",
            "none/",
            "none",
            "/",
        ):
            found = await tier.items(prefix)
            expected = sorted(name for name in names if name.startswith(prefix))
            assert [(item.key, item.size_bytes) for item in found] == [
                (name, 3 * len(name)) for name in expected
            ], prefix


@asynchronous
async def test_items_tell_when_each_was_put_last(url: str) -> None:
    async with opened(url) as tier:
        before = time.time()
        await tier.put("old", b"1")
        await tier.put("new", b"2")
        first = {item.key: item.put_at for item in await tier.items("")}
        while (await tier.items("old"))[0].put_at <= first["new"]:
            assert time.time() < before + 20, "putting again does not count"
            await tier.put("old", b"3")
        after = time.time()

        for item in await tier.items(""):
            # S3 servers may tell whole seconds.
            assert before - 1 <= item.put_at <= after + 1
        assert first["old"] <= first["new"]


@asynchronous
async def test_more_items_than_fit_into_one_answer(url: str) -> None:
    # Redis and S3 give a thousand at a time; on a disk, every put is a sync.
    numbers = range(1100 if url.startswith(("redis", "s3")) else 300)
    async with opened(url) as tier:
        for first in range(0, len(numbers), 100):
            some = numbers[first : first + 100]
            await asyncio.gather(*(tier.put(f"n/{n:04}", b"x" * (n % 7)) for n in some))

        found = await tier.items("n/")
        assert [(item.key, item.size_bytes) for item in found] == [
            (f"n/{number:04}", number % 7) for number in numbers
        ]
        assert len(await tier.items("n/02")) == 100


STRANGE = [
    *(
        ".",
        "..",
        "...",
        "a/../b",
        "../../etc/passwd",
        "a/./b",
        "./a",
        "..a",
        "a..",
        "%..",
        "%.",
        "%%..",
    ),
    *(
        "%",
        "%%",
        "%2E%2E",
        "%2F",
        "a%2Fb",
        "%zz",
        "100%25",
        "-",
        "--help",
        "~",
        "~root/x",
        "_",
        "0",
    ),
    *(
        "A",
        "a",
        "aA/Aa",
        "CON",
        "x" * 400,
        "/".join("x" * 200),
        "y" * 300 + "/" + "z" * 99,
        "a.new",
    ),
]


@asynchronous
async def test_strange_keys_are_kept_apart(url: str) -> None:
    async with opened(url) as tier:
        for key in STRANGE:
            await tier.put(key, f"value of {key}".encode())

        assert await keys(tier) == sorted(STRANGE)
        for key in STRANGE:
            assert await tier.get(key) == f"value of {key}".encode(), key
            assert await keys(tier, key) == sorted(k for k in STRANGE if k.startswith(key)), key
        for key in STRANGE:
            await tier.delete(key)
            assert await tier.get(key) is None, key
        assert await keys(tier) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "a b",
        "ä",
        "a\n",
        "a\0b",
        "a?b",
        "a*",
        "a\\b",
        "x" * 401,
        7,
        b"a",
    ],
)
@asynchronous
async def test_what_cannot_be_a_key_is_refused(url: str, key: str) -> None:
    async with opened(url) as tier:
        with pytest.raises(UsageError, match="cannot be a key"):
            await tier.put(key, b"x")
        with pytest.raises(UsageError, match="cannot be a key"):
            await tier.get(key)
        with pytest.raises(UsageError, match="cannot be a key"):
            await tier.delete(key)

        assert await tier.items("") == []


@asynchronous
async def test_a_value_that_is_too_large_is_refused(url: str) -> None:
    async with opened(url) as tier:
        with pytest.raises(UsageError, match="268435457 bytes are more than"):
            await tier.put("k", bytes(VALUE_BYTES_MAX + 1))

        assert await tier.items("") == []


@asynchronous
async def test_a_value_larger_than_any_that_was_put_is_not_taken_in(
    shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(shared_url) as tier:
        await tier.put("k", b"x" * 1001)
        await tier.put("fits", b"x" * 1000)
        monkeypatch.setattr(crdtstate.tiers, "VALUE_BYTES_MAX", 1000)

        async with failing("k has 1001 bytes there, so crdtstate did not write it", 0):
            await tier.get("k")
        assert await tier.get("fits") == b"x" * 1000


@asynchronous
async def test_of_many_puts_at_once_one_whole_value_stays(url: str) -> None:
    async with opened(url) as tier:

        async def look() -> None:
            for _ in range(20):
                if (seen := await tier.get("k")) is not None:
                    number_in("k", seen)

        puts = (tier.put("k", whole("k", number, 200_000 + number)) for number in range(40))
        await asyncio.gather(*puts, look(), look())

        last = await tier.get("k")
        assert last is not None and number_in("k", last) < 40
        assert [item.size_bytes for item in await tier.items("")] == [len(last)]


@asynchronous
async def test_many_operations_end_as_in_a_dict(url: str) -> None:
    rng = random.Random(4)
    model: dict[str, bytes] = {}
    names = [f"{a}/{b}{c}" for a in "ab" for b in "xy" for c in ("", "/1", ".")]
    async with opened(url) as tier:
        for _ in range(150):
            key = rng.choice(names)
            match rng.choice(("put", "put", "get", "delete", "items")):
                case "put":
                    model[key] = rng.randbytes(rng.choice((0, 10, 5000)))
                    await tier.put(key, model[key])
                case "get":
                    assert await tier.get(key) == model.get(key)
                case "delete":
                    model.pop(key, None)
                    await tier.delete(key)
                case "items":
                    prefix = key[: rng.randrange(len(key) + 1)]
                    found = {item.key: item.size_bytes for item in await tier.items(prefix)}
                    assert found == {
                        k: len(data) for k, data in model.items() if k.startswith(prefix)
                    }


@asynchronous
async def test_a_closed_tier_says_so_and_closing_again_does_no_harm(url: str) -> None:
    tier = await open_tier(url)
    await tier.put("k", b"x")

    await tier.close()
    await tier.close()

    for call in (tier.put("k", b"y"), tier.get("k"), tier.delete("k"), tier.items("")):
        with pytest.raises(TierError, match="closed"):
            await call


@asynchronous
async def test_cancelled_calls_leave_the_tier_usable(url: str) -> None:
    async with opened(url) as tier:
        for turns in range(30):
            put = asyncio.ensure_future(tier.put("k", whole("k", turns, 100_000)))
            get = asyncio.ensure_future(tier.get("k"))
            for _ in range(turns):
                await asyncio.sleep(0)
            for call in (put, get):
                call.cancel()
                with suppress(asyncio.CancelledError):
                    await call
            if (seen := await tier.get("k")) is not None:
                number_in("k", seen)

        await tier.put("after", b"after")
        assert await tier.get("after") == b"after"
        assert set(await keys(tier)) <= {"k", "after"}


async def longest_gap(work: Callable[[], object]) -> float:
    """The part of the time of *work* for which the loop stood still at a stretch."""
    longest, last = 0.0, time.perf_counter()

    async def tick() -> None:
        nonlocal longest, last
        while True:
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            await asyncio.sleep(0)

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0)
    start = time.perf_counter()
    await work()  # type: ignore[misc]
    await asyncio.sleep(0)
    elapsed = time.perf_counter() - start
    ticking.cancel()
    return longest / elapsed


@asynchronous
async def test_the_loop_goes_on_meanwhile(shared_url: str) -> None:
    # Blocking, all of it would be one stretch. Redis has its bytes copied on the loop.
    data = random.Random(1).randbytes(24 * 2**20)
    async with opened(shared_url) as tier:
        await tier.put("first", b"")
        assert min([await longest_gap(partial(tier.put, "k", data)) for _ in range(3)]) < 0.6
        assert min([await longest_gap(partial(tier.get, "k")) for _ in range(3)]) < 0.6


@asynchronous
async def test_what_one_handle_put_another_sees(shared_url: str) -> None:
    async with opened(shared_url) as one, opened(shared_url) as other:
        await one.put("k", b"one")
        assert await other.get("k") == b"one"
        await other.put("k", b"other")
        assert await one.get("k") == b"other"
        await other.delete("k")
        assert await one.get("k") is None
        await one.put("stays", b"x")

    async with opened(shared_url) as later:
        assert await later.get("stays") == b"x"


@asynchronous
async def test_many_handles_may_be_opened_at_once(shared_url: str) -> None:
    async def use(number: int) -> None:
        async with opened(shared_url) as tier:
            await tier.put(f"k/{number}", b"x" * number)

    await asyncio.gather(*(use(number) for number in range(12)))

    async with opened(shared_url) as tier:
        assert sorted(item.size_bytes for item in await tier.items("k/")) == list(range(12))


KILLS = 12


@asynchronous
async def test_whoever_is_killed_leaves_whole_values(shared_url: str) -> None:
    rng = random.Random(9)
    nursery = await asyncio.create_subprocess_exec(
        *(sys.executable, CHILD), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert nursery.stdin and nursery.stdout

    async def told() -> list[str]:
        return (await nursery.stdout.readline()).decode().split()

    unfinished = 0
    async with opened(shared_url) as tier:
        for number in range(KILLS):
            prefix = f"round{number}"
            nursery.stdin.write(f"{shared_url} {prefix} {number}\n".encode())
            word, pid = await told()
            assert word == "open"
            put: dict[str, int] = {}
            for _ in range(rng.choice((0, 1, 1, 5, 12))):
                _, key, value = await told()
                put[key] = int(value)
            # Not a wait for something: the moment is the point.
            await asyncio.sleep(rng.random() * 0.02)
            os.kill(int(pid), signal.SIGKILL)
            while (line := await told())[0] != "reaped":
                put[line[1]] = int(line[2])

            found = {key: await tier.get(key) for key in await keys(tier, prefix)}
            assert found.keys() >= put.keys()
            for key, data in found.items():
                assert data is not None and number_in(key, data) >= put.get(key, 0)
                unfinished += number_in(key, data) > put.get(key, 0)
            await tier.put(f"{prefix}/after", b"x")
            assert await tier.get(f"{prefix}/after") == b"x"
            for key in await keys(tier, prefix):
                await tier.delete(key)
        assert await keys(tier) == []
    nursery.stdin.close()
    await nursery.wait()


# URLs


@pytest.mark.parametrize(
    "bad",
    [
        *(
            "",
            "memory",
            "memory:",
            "memory://x",
            "memory:///",
            "file:///x",
            "http://x",
            "redis3://h",
            "C:\\x",
        ),
        *(
            "shm://",
            "shm://..",
            "shm://.",
            "shm://.x",
            "shm://a/b",
            "shm://a/..",
            "shm:///a",
            "shm://a%2Fb",
        ),
        *(
            "shm://a b",
            "shm://" + "a" * 101,
            "shm://a?x=1",
            "shm://a?bytes_max=",
            "shm://a?bytes_max=0",
        ),
        *(
            "shm://a?bytes_max=-1",
            "shm://a?bytes_max=1&bytes_max=2",
            "shm://a#b",
            "shm://a\nb",
            "shm:a",
        ),
        *("sqlite://", "sqlite:///", "sqlite://a.db", "sqlite://host/a.db", "sqlite:///:memory:"),
        *(
            "sqlite:///a.db?mode=ro",
            "sqlite:///a.db?bytes_max=many",
            "sqlite:///a%00b",
            "sqlite:///a#b",
        ),
        *(
            "redis://",
            "redis:///0",
            "redis://h/x",
            "redis://h/0/1",
            "redis://h:port",
            "redis://h:99999",
        ),
        *("redis://h?db=1", "redis://h?prefix=*", "redis://h?prefix=" + "p" * 101, "redis://[::1"),
        *("s3://", "s3:///b", "s3://b", "s3://b ucket", "s3://bucket/a//b", "s3://bucket/a b"),
        *(
            "s3://bucket?endpoint=host:9000",
            "s3://bucket?endpoint=ftp://host",
            "s3://bucket?region=a&x=b",
        ),
        *(
            "s3://bucket?endpoint=http://u:p@host",
            "s3://bucket/" + "p" * 401,
            None,
            7,
            b"memory://",
        ),
    ],
)
@asynchronous
async def test_what_is_no_url_of_a_tier_is_refused(bad: str) -> None:
    with pytest.raises(UsageError):
        check_url(bad)
    with pytest.raises(UsageError):
        await open_tier(bad)


@pytest.mark.parametrize(
    "good",
    [
        *("memory://", "shm://fleet", "shm://Fleet_7.x-y?bytes_max=1000", "sqlite:///a.db"),
        *(
            "sqlite:////tmp/with%20space/a.db?bytes_max=1000000",
            "sqlite:///../a.db",
            "sqlite:///a@b.db",
        ),
        *(
            "redis://localhost",
            "redis://:secret@localhost:1/15",
            "rediss://user:s%2Fecret@h:6380/0",
        ),
        *(
            "redis://[::1]:6379/0?prefix=",
            "redis://h?prefix={fleet}:7/",
            "s3://bucket",
            "s3://bucket/",
        ),
        *(
            "s3://my.bucket-1/a/b/../c?endpoint=https://host:9000&region=eu-central-1",
            "s3://bucket?region=x",
        ),
    ],
)
@asynchronous
async def test_a_tier_need_not_be_reachable_to_be_opened(
    good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    check_url(good)
    tier = await open_tier(good)

    assert "ecret" not in tier.url
    await tier.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["redis9://", "redis://", "rediss://", "s3://"])
def test_no_password_is_in_what_is_said_of_a_bad_url(bad: str) -> None:
    for rest in (":s3cret@host/x", "me:s3cret@host:port", "me:s3/cr@et@h?x=1", "me:s3cret@[::1"):
        with pytest.raises(UsageError) as raised:
            check_url(bad + rest)
        assert "cret" not in str(raised.value) and "cr@et" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "module", "line"),
    [
        ("redis://localhost", "redis.asyncio", r"pip install 'crdtstate\[redis\]'"),
        ("s3://bucket", "obstore", r"pip install 'crdtstate\[s3\]'"),
    ],
)
@asynchronous
async def test_an_extra_that_is_missing_is_named(
    url: str, module: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(UsageError, match=line):
        check_url(url)
    with pytest.raises(UsageError, match=line):
        await open_tier(url)


# Shared memory


def directory_of(shm_url: str) -> Path:
    return SHM / shm_url.removeprefix("shm://").partition("?")[0]


@asynchronous
async def test_shared_memory_is_bounded(shm_url: str) -> None:
    async with opened(f"{shm_url}?bytes_max=10000") as tier:
        await tier.put("a", b"x" * 6000)

        async with failing("it is full: 60.. of 10000 bytes are taken; .*bytes_max=", 0):
            await tier.put("b", b"x" * 6000)

        assert await tier.get("a") == b"x" * 6000
        await tier.put("a", b"y" * 9000)  # What is replaced does not count.
        async with failing("it is full", 0):
            await tier.put("a", b"z" * 11000)
        assert await tier.get("a") == b"y" * 9000
        await tier.delete("a")
        await tier.put("b", b"x" * 6000)
        assert await keys(tier) == ["b"]


@asynchronous
async def test_shared_memory_is_the_users_alone(shm_url: str) -> None:
    async with opened(shm_url) as tier:
        await tier.put("k", b"x")
        directory = directory_of(shm_url)
        for path in (SHM, directory):
            assert path.stat().st_mode & 0o777 == 0o700
        assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o600]

        directory.chmod(0o755)
        async with failing("others may enter .*remove it", 0):
            await tier.get("k")
        directory.chmod(0o700)
        assert await tier.get("k") == b"x"


@asynchronous
async def test_shared_memory_follows_no_link(shm_url: str, tmp_path: Path) -> None:
    async with opened(shm_url) as tier:
        await tier.put("k", b"x")
        directory = directory_of(shm_url)
        (file,) = directory.iterdir()
        (tmp_path / "secret").write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(tmp_path / "secret")
        async with failing("symbolic links", 0):
            await tier.get("k")
        assert await keys(tier) == []
        await tier.put("k", b"y")
        assert await tier.get("k") == b"y"
        assert (tmp_path / "secret").read_bytes().endswith(b"x")

        shutil.rmtree(directory)
        directory.symlink_to(tmp_path)
        async with failing("Not a directory", 0):
            await tier.put("k", b"z")
        directory.unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@asynchronous
async def test_shared_memory_cleans_up_after_killed_writers(shm_url: str) -> None:
    async with opened(f"{shm_url}?bytes_max=10000") as tier:
        await tier.put("k", b"x")
        leftover = directory_of(shm_url) / ("0" * 64 + ".new")
        leftover.write_bytes(b"x" * 9999)

        assert await keys(tier) == ["k"]
        await tier.put("k", b"y" * 5000)

        assert not leftover.exists()


@asynchronous
async def test_shared_memory_waits_only_so_long_for_another_writer(shm_url: str) -> None:
    limit = crdtstate.tiers.shm.LOCK_SECONDS
    async with opened(shm_url) as tier:
        await tier.put("k", b"x")
        other = os.open(directory_of(shm_url), os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)

        writing = asyncio.ensure_future(tier.put("k", b"y"))
        async with failing("another process has been writing", limit, at_least=limit):
            await writing
        assert await tier.get("k") == b"x"

        os.close(other)
        await tier.put("k", b"y")
        assert await tier.get("k") == b"y"


@asynchronous
async def test_shared_memory_that_was_cleared_is_begun_anew(shm_url: str) -> None:
    async with opened(shm_url) as tier:
        await tier.put("k", b"x")
        shutil.rmtree(directory_of(shm_url))

        assert await tier.get("k") is None
        assert await keys(tier) == []
        await tier.put("k", b"y")
        assert await tier.get("k") == b"y"


@asynchronous
async def test_files_of_others_in_shared_memory_are_no_values(shm_url: str) -> None:
    async with opened(shm_url) as tier:
        await tier.put("k", b"x")
        directory = directory_of(shm_url)
        (file,) = directory.iterdir()
        (directory / "notes.txt").write_text("hello")
        shutil.copy(file, directory / ("1" * 64))
        (directory / "folder").mkdir()

        assert await keys(tier) == ["k"]
        await tier.put("k", b"y")
        file.write_bytes(b"hello")
        async with failing("was not written by crdtstate", 0):
            await tier.get("k")
        assert await keys(tier) == []


# SQLite


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "tier.db"


@asynchronous
async def test_a_sqlite_tier_is_bounded(database: Path) -> None:
    async with opened(f"sqlite:///{database}?bytes_max=1000000") as tier:
        await tier.put("a", b"x" * 600_000)

        async with failing("the disk is full, or its 1000000 bytes are", 0):
            await tier.put("b", b"x" * 600_000)

        assert await tier.get("a") == b"x" * 600_000
        await tier.delete("a")
        await tier.put("b", b"x" * 600_000)
        assert await keys(tier) == ["b"]
    assert database.stat().st_size <= 1_000_000


@asynchronous
async def test_space_in_a_sqlite_tier_is_used_again(database: Path) -> None:
    async with opened(f"sqlite:///{database}") as tier:
        for number in range(30):
            await tier.put(f"k/{number}", os.urandom(2**20))
            await tier.delete(f"k/{number - 1}" if number else "none")
        assert database.stat().st_size < 4 * 2**20

        await tier.put("large", bytes(24 * 2**20))
        for number in range(4):
            await tier.put("small", b"%d" % number)
        assert Path(f"{database}-wal").stat().st_size <= crdtstate.tiers.sqlite.WAL_BYTES_MAX


@asynchronous
async def test_a_file_may_be_made_by_many_at_once(tmp_path: Path) -> None:
    async def use(number: int, path: Path) -> None:
        async with opened(f"sqlite:///{path}") as tier:
            await tier.put(f"k/{number}", b"x")

    for turn in range(25):
        path = tmp_path / f"{turn}.db"
        await asyncio.gather(*(use(number, path) for number in range(12)))

        async with opened(f"sqlite:///{path}") as tier:
            assert len(await tier.items("k/")) == 12


@asynchronous
async def test_a_file_that_somebody_else_makes_at_the_same_moment_is_used(database: Path) -> None:
    class LateHost(Host):
        @property
        def has_shared_memory(self) -> bool:  # type: ignore[override]
            if not self.path.stat().st_size:
                first._put("first", b"x")
            return True

    first = SqliteTier("sqlite:///first", database, None)
    late = SqliteTier("sqlite:///late", database, None, LateHost)

    await late.put("late", b"y")

    assert await late.get("first") == b"x"
    assert await first.get("late") == b"y"
    with closing(connect(database)) as db:
        assert db.pragma("page_size") == crdtstate.tiers.sqlite.PAGE_BYTES
    await first.close()
    await late.close()


@asynchronous
async def test_whoever_reads_a_sqlite_tier_waits_for_no_writer(database: Path) -> None:
    limit = crdtstate.tiers.sqlite.BUSY_SECONDS
    async with opened(f"sqlite:///{database}") as tier:
        await tier.put("k", b"x")
        with closing(connect(database)) as other:
            other.execute("BEGIN IMMEDIATE")

            async with opened(f"sqlite:///{database}") as reader:
                start = time.monotonic()
                assert await reader.get("k") == b"x"
                assert await keys(reader) == ["k"]
                assert time.monotonic() - start < limit
            async with failing("another program is writing", limit, at_least=limit * 0.9):
                await tier.put("k", b"y")

            other.execute("ROLLBACK")
        await tier.put("k", b"y")
        assert await tier.get("k") == b"y"


@contextmanager
def unprivileged() -> Iterator[None]:
    """Let permissions count, also when the tests run as root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("is_killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("mode", [0o777, 0o555], ids=["file", "directory"])
@asynchronous
async def test_a_read_only_sqlite_tier_is_good_for_reading(mode: int, is_killed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o777)
        writer = await open_tier(f"sqlite:///{place}/made.db")
        await writer.put("k", b"x")
        if is_killed:  # What a killed process leaves, is a WAL.
            for file in place.iterdir():
                shutil.copy(file, place / file.name.replace("made", "tier"))
        await writer.close()
        if not is_killed:
            shutil.copy(place / "made.db", place / "tier.db")
        for file in place.iterdir():
            file.chmod(0o444)
        place.chmod(mode)

        with unprivileged():
            async with opened(f"sqlite:///{place}/tier.db") as tier:
                assert await tier.get("k") == b"x"
                assert await keys(tier) == ["k"]
                for call in (tier.put("k", b"y"), tier.delete("k")):
                    async with failing("read-only|cannot be opened|may only be read", 0):
                        await call
        place.chmod(0o777)
        for file in place.iterdir():
            file.chmod(0o666)
        async with opened(f"sqlite:///{place}/tier.db") as tier:
            assert await tier.get("k") == b"x"
            await tier.put("k", b"y")


@asynchronous
async def test_damage_in_a_sqlite_tier_is_an_error_and_never_a_wrong_value(database: Path) -> None:
    values = {f"k/{number}": os.urandom(40_000) for number in range(8)}
    async with opened(f"sqlite:///{database}") as tier:
        for key, data in values.items():
            await tier.put(key, data)
    intact = database.read_bytes()
    rng = random.Random(2)
    found = 0
    for _ in range(60):
        damaged = bytearray(intact)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        database.write_bytes(damaged)
        async with opened(f"sqlite:///{database}") as tier:
            for key, data in values.items():
                try:
                    assert await tier.get(key) == data
                except TierError as exc:
                    found += 1
                    assert "move" in str(exc) or "newer" in str(exc) or "another" in str(exc), exc
    assert found >= 60


@pytest.mark.parametrize("what", ["text", "journal", "foreign", "newer", "directory", "nowhere"])
@asynchronous
async def test_a_file_that_is_no_tier_is_refused_and_left_alone(what: str, database: Path) -> None:
    match = "another program's SQLite file .*not a tier"
    match what:
        case "text":
            database.write_text("Dear diary, " * 100)
            match = "not an SQLite file"
        case "journal":
            Journal(database).close()
        case "foreign":
            with closing(sqlite3.connect(database)) as db:
                db.execute("CREATE TABLE t(x)")
        case "newer":
            async with opened(f"sqlite:///{database}") as tier:
                await tier.put("k", b"x")
            with closing(connect(database)) as db:
                db.pragma("user_version", 99)
            match = "a newer crdtstate wrote it"
        case "directory":
            database.mkdir()
            match = "this is a directory"
        case "nowhere":
            database = database.parent / "nowhere" / "tier.db"
            match = "cannot be opened"
    before = database.read_bytes() if database.is_file() else None

    async with opened(f"sqlite:///{database}") as tier:
        for call in (tier.put("k", b"y"), tier.get("k"), tier.delete("k"), tier.items("")):
            async with failing(match, 0):
                await call

    assert (database.read_bytes() if database.is_file() else None) == before


@asynchronous
async def test_a_sqlite_tier_that_was_mended_is_used_again(database: Path) -> None:
    database.write_text("Dear diary, " * 100)
    async with opened(f"sqlite:///{database}") as tier:
        async with failing("move it away", 0):
            await tier.put("k", b"x")
        database.unlink()

        await tier.put("k", b"x")
        assert await tier.get("k") == b"x"


@asynchronous
async def test_a_relative_path_is_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with opened("sqlite:///with%20space.db") as tier:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        await tier.put("k", b"x")

    assert (tmp_path / "with space.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


PUTS = [("a", 10), ("b", 40_000), ("a", 20_000), ("c", 100), ("b", 5), ("a", 70_000)]


def on_disk(disk: Disk) -> SqliteTier:
    return SqliteTier("sqlite:////tier.db", Path("/tier.db"), None, partial(FaultHost, disk=disk))


async def write(disk: Disk, kept: dict[str, int]) -> int:
    """Put what PUTS says, note what is kept, and return how many were tried."""
    tier = on_disk(disk)
    tried = 0
    try:
        for number, (key, size) in enumerate(PUTS, 1):
            tried = number
            await tier.put(key, whole(key, number, size))
            kept[key] = number
    except TierError:
        pass
    await tier.close()
    return tried


@pytest.mark.parametrize("survives", ["none", "some", "all"])
@asynchronous
async def test_a_power_cut_at_any_moment_takes_nothing_that_was_put(
    survives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Errors that a dying connection meets in the VFS have nowhere to go.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    disk = Disk()
    assert await write(disk, {}) == len(PUTS)
    operations = disk.operations
    assert operations > 30
    for cut_at in range(1, operations + 1):
        disk, kept = Disk(), dict[str, int]()
        disk.cut_at = cut_at
        tried = await write(disk, kept)
        disk.cut_at, disk.is_dead = None, False
        disk.reboot(survives, random.Random(cut_at))

        tier = on_disk(disk)
        for key, number in kept.items():
            data = await tier.get(key)
            assert data is not None, f"cut at {cut_at}: {key} is gone"
            assert number <= number_in(key, data) <= tried
        await tier.put("after", b"x")
        assert await tier.get("after") == b"x"
        await tier.close()


@asynchronous
async def test_what_is_put_after_a_sync_failed_survives_a_power_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    disk = Disk()
    tier = on_disk(disk)
    await tier.put("a", whole("a", 1, 100))
    disk.failing.add("sync")
    with pytest.raises(TierError, match="a sync failed"):
        await tier.put("a", whole("a", 2, 100))
    disk.failing.clear()
    await tier.put("b", whole("b", 3, 100))
    disk.is_dead = True  # Before closing, which would move the WAL into the file.
    await tier.close()
    disk.is_dead = False
    disk.reboot("none", random.Random(1))

    tier = on_disk(disk)
    data = await tier.get("b")
    assert data is not None and number_in("b", data) == 3
    await tier.close()


# Redis


@contextmanager
def redis(*options: str) -> Iterator[RedisServer]:
    server = RedisServer(*options)
    try:
        yield server
    finally:
        server.stop()


REDIS_SECONDS = crdtstate.tiers.redis.CALL_SECONDS


@asynchronous
async def test_a_redis_that_is_gone_is_told_at_once_and_used_when_it_is_back() -> None:
    with redis() as server:
        async with opened(server.url) as tier:
            await tier.put("k", b"x")
            server.kill()

            for call in (tier.put("k", b"y"), tier.get("k"), tier.delete("k"), tier.items("")):
                async with failing("it cannot be reached", 0.1):
                    await call

            server.start()
            assert await tier.get("k") is None  # It forgets, and no call says otherwise.
            await tier.put("k", b"z")
            assert await tier.get("k") == b"z"


@asynchronous
async def test_a_redis_that_hangs_does_not_hang_us() -> None:
    with redis() as server:
        async with opened(server.url) as tier, opened(server.url) as fresh:
            await tier.put("k", b"x")
            with stopped(server.process):
                calls = [
                    *(tier.put("k", b"y"), tier.get("k"), tier.delete("other"), tier.items("")),
                    *(fresh.get("k"), tier.put("large", bytes(2**22))),
                ]
                async with failing("no answer within 2 s", REDIS_SECONDS + 1):
                    results = await asyncio.gather(*calls, return_exceptions=True)
                    assert all(isinstance(result, TierError) for result in results)
                    raise results[0]

            # What was given up may have been done; the next answers are to the next questions.
            for number in range(30):
                await tier.put(f"n/{number}", b"%d" % number)
                assert await tier.get(f"n/{number}") == b"%d" % number
            assert await fresh.get("k") in (b"x", b"y")


@asynchronous
async def test_a_redis_that_is_full_is_told_and_keeps_what_it_has() -> None:
    with redis("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
        async with opened(server.url) as tier:
            kept = 0
            async with failing("it is full; .*raise its maxmemory", 10):
                for number in range(100):
                    await tier.put(f"k/{number}", whole(f"k/{number}", number, 500_000))
                    kept += 1
            assert kept > 3

            assert await keys(tier) == sorted(f"k/{number}" for number in range(kept))
            for number in range(kept):
                data = await tier.get(f"k/{number}")
                assert data is not None and number_in(f"k/{number}", data) == number
                await tier.delete(f"k/{number}")
            await tier.put("k/0", b"x")
            async with failing("it is full", 0.5):
                await tier.put("k/huge", os.urandom(24 * 2**20))


@asynchronous
async def test_a_redis_that_evicts_lists_what_is_left() -> None:
    with redis("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru") as server:
        async with opened(server.url) as tier:
            for number in range(40):
                await tier.put(f"k/{number}", whole(f"k/{number}", number, 500_000))

            left = await tier.items("k/")
            assert 3 < len(left) < 40
            for item in left:
                data = await tier.get(item.key)
                assert data is not None and len(data) == item.size_bytes


@asynchronous
async def test_a_redis_with_a_password() -> None:
    with redis("--requirepass", "open:se/same") as server:
        place = f"127.0.0.1:{server.port}/0"
        async with opened(f"redis://:open%3Ase%2Fsame@{place}") as tier:
            await tier.put("k", b"x")
            assert await tier.get("k") == b"x"
            assert tier.url == f"redis://***@{place}"
        for login in ("", ":wrong-one@", "someone:open%3Ase%2Fsame@"):
            async with opened(f"redis://{login}{place}") as tier:
                for call in (tier.put("k", b"y"), tier.get("k"), tier.delete("k"), tier.items("")):
                    with pytest.raises(
                        TierError, match="refuses the user or the password"
                    ) as raised:
                        await call
                    assert "wrong-one" not in str(raised.value) and "same" not in str(raised.value)


@asynchronous
async def test_a_redis_behind_tls_shows_a_certificate_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = map(str, make_certificate(tmp_path))
    shown = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
    port = free_port()
    with redis("--tls-port", str(port), *shown):
        url = f"rediss://127.0.0.1:{port}/0"
        async with opened(url) as tier:
            async with failing("it cannot be reached .*(?i:certificate)", 1):
                await tier.put("k", b"x")
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        async with opened(url) as tier:
            await tier.put("k", b"x")
            assert await tier.get("k") == b"x"
            assert await keys(tier) == ["k"]
        async with opened(url.replace("rediss:", "redis:")) as tier:
            async with failing("it cannot be reached", 3):
                await tier.put("k", b"y")


@asynchronous
async def test_a_redis_that_may_not_be_written_to() -> None:
    at_once = ("--repl-diskless-sync-delay", "0")
    with redis(*at_once) as primary, redis("--replicaof", f"127.0.0.1 {primary.port}") as replica:
        async with opened(primary.url) as there, opened(replica.url) as here:
            await there.put("k", b"x")
            deadline = time.monotonic() + 30
            while await here.get("k") is None:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)

            for call in (here.put("k", b"y"), here.delete("k")):
                async with failing("read-only replica; name its primary", 0):
                    await call
            assert await keys(here) == ["k"]


@asynchronous
async def test_what_others_keep_in_a_redis_is_no_value(redis_server: RedisServer) -> None:
    from redis.asyncio import Redis

    prefix = f"test-{uuid.uuid4().hex}:"
    async with opened(f"{redis_server.url}?prefix={prefix}") as tier:
        async with Redis(port=redis_server.port, protocol=2) as other:
            await other.set(f"{prefix}text", "hello")
            await other.hset(f"{prefix}hash", "x", "y")
            await other.hset(f"{prefix}spoilt", mapping={"d": "x", "t": "yesterday"})
            await other.hset(f"{prefix}not a key", mapping={"d": "x", "t": "1.000000"})
            await tier.put("k", b"x")

            assert await keys(tier) == ["k"]
            assert await tier.get("hash") is None
            for call in (tier.get("text"), tier.put("text", b"x")):
                async with failing("WRONGTYPE", 0):
                    await call
            assert await other.get(f"{prefix}text") == b"hello"
            assert await other.exists(f"{prefix}k") == 1


@asynchronous
async def test_a_redis_serves_more_calls_at_once_than_it_has_connections(
    redis_server: RedisServer,
) -> None:
    from redis.asyncio import Redis

    prefix = f"test-{uuid.uuid4().hex}:"
    async with Redis(port=redis_server.port, protocol=2) as other:
        before = (await other.info("clients"))["connected_clients"]
        async with opened(f"{redis_server.url}?prefix={prefix}") as tier:
            await asyncio.gather(*(tier.put(f"k/{number}", b"x") for number in range(300)))
            during = (await other.info("clients"))["connected_clients"]

            assert len(await tier.items("")) == 300
            assert during - before <= crdtstate.tiers.redis.CONNECTIONS_MAX


# S3

S3_SECONDS = crdtstate.tiers.s3.CALL_SECONDS


def everything(tier: Tier) -> list[object]:
    return [tier.put("k", b"y"), tier.get("k"), tier.delete("k"), tier.items("")]


async def all_fail(match: str, tier: Tier, seconds: float) -> None:
    """All calls, at once, have to raise a `TierError` that says *match*, in time."""

    async def one(call: object) -> None:
        async with failing(match, seconds):
            await call  # type: ignore[misc]

    await asyncio.gather(*(one(call) for call in everything(tier)))


@asynchronous
async def test_a_bucket_that_is_not_there_is_no_empty_tier(
    s3_server: S3Server, s3_credentials: None
) -> None:
    async with opened(s3_server.url("no-such-bucket")) as tier:
        await all_fail("there is no such bucket", tier, 1)


@asynchronous
async def test_an_s3_server_that_refuses_the_credentials(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(s3_url) as tier:
        await tier.put("k", b"x")
        for variable, code in (
            ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
            ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"),
        ):
            with monkeypatch.context() as patched:
                patched.setenv(variable, "wrong-one")
                async with opened(s3_url) as other:
                    await all_fail(f"refuses the credentials .{code}.*check AWS_ACCESS", other, 1)

        assert await tier.get("k") == b"x"


@asynchronous
async def test_an_s3_server_that_is_gone(s3_credentials: None) -> None:
    async with opened(f"s3://bucket?endpoint=http://127.0.0.1:{free_port()}") as tier:
        await all_fail("it cannot be reached", tier, 2)


@asynchronous
async def test_an_s3_server_that_hangs_or_restarts(
    s3_server: S3Server, bucket: str, s3_credentials: None
) -> None:
    gateway = Gateway(s3_server, bucket)
    async with opened(gateway.url) as tier:
        await tier.put("k", b"x")
        with stopped(gateway.process):
            await all_fail("no answer within|does not answer in time", tier, S3_SECONDS)
        # Not "k": what was given up may be done now, before or after this.
        await tier.put("z", b"z")
        assert await tier.get("z") == b"z"

        gateway.kill()
        async with failing("it cannot be reached", 2):
            await tier.get("z")
        gateway.start()
        assert await tier.get("z") == b"z"
        await tier.put("after", b"x")
    gateway.stop()


@asynchronous
async def test_a_bucket_that_is_full_is_told_and_keeps_what_it_has(
    s3_server: S3Server, s3_credentials: None
) -> None:
    bucket = s3_server.make_bucket()
    s3_server.limit(bucket, 100_000)
    async with opened(s3_server.url(bucket)) as tier:
        kept = 0
        async with failing("it is full .QuotaExceeded.; .*raise the bucket's quota", 10):
            for number in range(20):
                await tier.put(f"k/{number}", bytes(16_000))
                kept += 1

        assert await keys(tier) == sorted(f"k/{number}" for number in range(kept)) != []
        for number in range(kept):
            await tier.delete(f"k/{number}")
        await tier.put("k/0", b"x")


class LossyProxy:
    """Passes connections on to a server, but loses the first answers."""

    def __init__(self, port: int) -> None:
        self.port, self.losses, self.requests = port, 0, 0
        self.serving: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.serving.add(task)
        there, out = await asyncio.open_connection("127.0.0.1", self.port)
        with suppress(OSError, asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(self.ask(reader, out))
                await self.answer(there, writer)
                asking.cancel()
        out.close()
        writer.close()

    async def ask(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.requests += data.startswith((b"PUT", b"POST", b"DELETE", b"GET"))
            out.write(data)
        out.write_eof()

    async def answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(65536):
            if self.losses:
                self.losses -= 1
                return
            writer.write(data)


@asynccontextmanager
async def lossy(port: int) -> AsyncIterator[tuple[LossyProxy, str]]:
    """A proxy before a server of this machine, and its endpoint."""
    proxy = LossyProxy(port)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as server:
        yield proxy, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for task in proxy.serving:
        task.cancel()
    await asyncio.gather(*proxy.serving)


@pytest.mark.parametrize("size", [10, 2**20, 9 * 2**20])
@asynchronous
async def test_a_lost_answer_is_asked_for_again(
    size: int, s3_server: S3Server, bucket: str, s3_credentials: None
) -> None:
    data = os.urandom(size)
    async with lossy(s3_server.port) as (proxy, endpoint):
        async with opened(f"s3://{bucket}/{uuid.uuid4().hex}?endpoint={endpoint}") as tier:
            proxy.losses = 1
            await tier.put("k", data)
            assert proxy.losses == 0, "nothing was lost, so nothing was shown"
            assert proxy.requests >= 2

            proxy.losses = 1
            assert await tier.get("k") == data
            proxy.losses = 1
            assert await keys(tier) == ["k"]
            proxy.losses = 1
            await tier.delete("k")
            assert proxy.losses == 0
            assert await tier.get("k") is None


@asynchronous
async def test_what_others_keep_in_a_bucket_is_no_value(
    s3_server: S3Server, s3_credentials: None
) -> None:
    bucket = s3_server.make_bucket()
    async with opened(s3_server.url(bucket)) as whole_bucket:
        async with opened(s3_server.url(bucket, "fleet/one")) as tier:
            await whole_bucket.put("fleet/one-more/k", b"x")
            await whole_bucket.put("fleet/k", b"x")
            await tier.put("k", b"y")

            assert await keys(tier) == ["k"]
            assert await keys(whole_bucket) == ["fleet/k", "fleet/one-more/k", "fleet/one/k"]
