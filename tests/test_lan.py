"""Finding each other by multicast DNS, on the loopback interface."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from harness import asynchronous

from crdtstate import MemberUp, Replica, UsageError
from crdtstate.transports import lan
from crdtstate.transports.lan import Lan

LOOPBACK = ["127.0.0.1"]


@asynccontextmanager
async def running(found: Lan) -> AsyncIterator[None]:
    task = asyncio.create_task(found.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def listener(space: str, name: str, address: str | None = None) -> tuple[Lan, asyncio.Queue[str]]:
    heard: asyncio.Queue[str] = asyncio.Queue()
    found = Lan(
        space,
        name,
        address,
        lambda url: heard.put_nowait(f"+{url}"),
        lambda url: heard.put_nowait(f"-{url}"),
        LOOPBACK,
    )
    return found, heard


@asynchronous
async def test_who_comes_is_found_and_who_leaves_is_lost() -> None:
    one, heard = listener("team", "one")
    two, _ = listener("team", "two", "ws://127.0.0.1:8765")

    async with running(one):
        async with running(two):
            assert await asyncio.wait_for(heard.get(), 20) == "+ws://127.0.0.1:8765"
        assert await asyncio.wait_for(heard.get(), 20) == "-ws://127.0.0.1:8765"


@asynchronous
async def test_those_of_another_space_and_oneself_are_not_found() -> None:
    one, heard = listener("team", "one", "ws://127.0.0.1:1")
    other, _ = listener("others", "other", "ws://127.0.0.1:2")
    two, _ = listener("team", "two", "wss://127.0.0.1:3")

    async with running(one), running(other), running(two):
        assert await asyncio.wait_for(heard.get(), 20) == "+wss://127.0.0.1:3"
        assert heard.empty()


@asynchronous
async def test_replicas_on_one_network_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnLoopback(Lan):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, interfaces=LOOPBACK)  # type: ignore[arg-type]

    monkeypatch.setattr(lan, "Lan", OnLoopback)
    async with (
        Replica("ann", listen="ws://127.0.0.1:0", lan="team") as ann,
        Replica("bob", lan="team") as bob,
    ):
        ann.map("plan")["goal"] = "ship it"

        async with asyncio.timeout(20):
            async for event in bob.events(MemberUp):
                if event.agent == "ann":
                    break
            await bob.wait_for(ann.version())

        assert bob.map("plan")["goal"] == "ship it"


def test_without_zeroconf_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)

    with pytest.raises(UsageError, match=r"crdtstate\[lan\]"):
        Replica("ann", lan="team")


def test_a_space_is_a_word() -> None:
    with pytest.raises(UsageError, match="a word"):
        Replica("ann", lan="")
