"""Commands where there are certificates: who may give one is told by the lane that it stands in."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from crdtstate import Controller
from crdtstate.certificates import Grant
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.events import CommandSettled
from tests.fleet_mesh import HOUR_MS, Members, Mesh, even
from tests.harness import asynchronous

BOSS = ("*:rws", "*:c")


def of(mesh: Mesh, agent: str, *grants: str, seconds_ago: int) -> Credentials:
    """What an agent has to show that was invited some time ago."""
    ms = time.time_ns() // 1_000_000 - seconds_ago * 1000
    found = []
    for each in grants:
        pattern, _, roles = each.partition(":")
        found.append(Grant(pattern, frozenset(roles)))
    return open_credentials(mesh.root.invite(agent, found, ms, ms + HOUR_MS).encode())


@asynchronous
async def test_a_command_is_judged_by_the_certificate_it_was_written_under() -> None:
    async with Members() as members:
        await members.open("relay")
        ann = await members.open("ann")
        obeyed: list[str] = []
        ann.serve_command("work", lambda command: obeyed.append(command.arguments["of"]))
        boss = members.member("boss", mesh=of(members.mesh, "boss", *BOSS, seconds_ago=10))
        async with boss:
            work = {"of": "boss"}
            await Controller(boss).issue("work", target=["ann"], timeout=20, arguments=work)
        # Of the same name, and with an older certificate, which lets it do less.
        other = members.member("boss", mesh=of(members.mesh, "boss", "*:rws", seconds_ago=60))
        async with other:
            other.is_controller = lambda agent: True  # type: ignore[method-assign]
            harm = {"of": "other"}
            results = await Controller(other).issue(
                "work", target=["ann"], timeout=20, arguments=harm
            )
            assert "not a controller" in str(results["ann"])
        assert obeyed == ["boss"]


@asynchronous
async def test_a_command_is_not_taken_back_by_what_its_author_may_do_later() -> None:
    async with Members() as members:
        relay = await members.open("relay")
        boss = members.member("boss", mesh=of(members.mesh, "boss", *BOSS, seconds_ago=60))
        async with boss:
            await Controller(boss).issue("work", target=["ann"], timeout=0)
            await even(boss, relay)
        again = members.member("boss", mesh=of(members.mesh, "boss", "*:rws", seconds_ago=10))
        async with again:
            again.system_document("@control").map("keys")["boss"] = 1
            await even(again, relay)
        obeyed: list[str] = []
        done = asyncio.Event()
        ann = await members.open("ann")
        ann.on(CommandSettled, lambda event: done.set())
        ann.serve_command("work", lambda command: obeyed.append(command.by))
        await asyncio.wait_for(done.wait(), 20)
        assert obeyed == ["boss"]


@asynchronous
async def test_a_command_in_another_s_name_is_refused_and_recorded(tmp_path: Path) -> None:
    async with Members() as members:
        await members.open("relay")
        queen = await members.open("queen", *BOSS)
        eve = await members.open("eve")
        obeyed: list[str] = []
        mine = {"mesh": members.mesh.credentials("ann"), "store": tmp_path / "ann.db"}
        async with members.member("ann", **mine) as ann:
            ann.serve_command("work", lambda command: obeyed.append(command.by))
            results = await Controller(queen).issue("work", target=["ann"], timeout=20)
            await even(queen, ann, eve)
        # What it has executed it finds when it is back.
        ann = await members.open("ann", **mine)
        ann.serve_command("work", lambda command: obeyed.append(command.by))
        await even(queen, ann, eve)
        recorded: list[tuple[str, str]] = []
        is_all = asyncio.Event()
        record = ann._record_command

        def recording(agent: str, detail: str) -> None:
            record(agent, detail)
            recorded.append((agent, detail))
            if len(recorded) == 2:
                is_all.set()

        ann._record_command = recording  # type: ignore[method-assign]
        view = eve.system_document("@control").map("commands")
        said = view[results.id]
        # Once over what was done, once by itself.
        for id in (results.id, "another"):
            view[id] = said | {"arguments": {"harm": 1}}
        await asyncio.wait_for(is_all.wait(), 20)

        wanted = {f"{id}: refused: in the name of queen" for id in (results.id, "another")}
        assert {detail for _, detail in recorded} == wanted
        records = [each for each in ann.audit(kind="command") if each.agent == "eve"]
        assert {each.detail for each in records} == wanted and obeyed == ["queen"]
