"""A controller and its fleet over real websockets: what is promised, and what others do to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous

from crdtstate import (
    AgentReport,
    Command,
    CommandError,
    CommandReceived,
    CommandSettled,
    Config,
    Controller,
    Fulfilled,
    Rejected,
    Replica,
    Report,
    Results,
    StoreUnavailable,
    SystemCheckpoint,
    SystemRestore,
    TimedOut,
    UsageError,
    casebook,
    commands,
)

LOCAL = "ws://127.0.0.1:0"
QUICK: dict[str, Any] = {
    "heartbeat": 0.2,
    "link_timeout": 1.0,
    "have_delay": 0.01,
    "want_delay": 0.05,
    "tidy_delay": 0.1,
    "command_grace": 0.05,
}


def url(replica: Replica) -> str:
    assert replica.address is not None
    return replica.address


async def until(replica: Replica, ready: Callable[[], bool]) -> None:
    """Wait until something is so at a replica."""
    await replica._wait_until(ready, "the test", 10)


def sees(replica: Replica, count: int) -> Callable[[], bool]:
    return lambda: sum(member.state == "up" for member in replica.members()) >= count


class Fleet:
    """A queen and her agents: all in this process, each with a store."""

    def __init__(self, folder: Path, stack: AsyncExitStack, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.stack = stack
        self.settings = settings
        self.replicas: dict[str, Replica] = {}

    def __getitem__(self, agent: str) -> Replica:
        return self.replicas[agent]

    async def open(self, agent: str, *peers: Replica, **more: Any) -> Replica:
        options: dict[str, Any] = {
            "store": self.folder / f"{agent}.db",
            "listen": LOCAL,
            "config": Config(**{**QUICK, **self.settings}),
        }
        replica = Replica(agent, peers=[url(peer) for peer in peers], **{**options, **more})
        self.replicas[agent] = await self.stack.enter_async_context(replica)
        return replica

    async def met(self, count: int | None = None) -> None:
        """Wait until everybody sees everybody."""
        for replica in self.replicas.values():
            if replica._state == "open":
                await until(replica, sees(replica, count or len(self.replicas)))


@asynccontextmanager
async def fleet(folder: Path, *agents: str, **settings: Any) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        found = Fleet(folder, stack, settings)
        queen = await found.open("queen")
        for agent in agents:
            await found.open(agent, queen)
        await found.met()
        yield found


def reason(results: Results, agent: str) -> str:
    outcome = results[agent]
    assert isinstance(outcome, Rejected), outcome
    return outcome.reason


def value(results: Results, agent: str) -> Any:
    outcome = results[agent]
    assert isinstance(outcome, Fulfilled), outcome
    return outcome.value


# Commands of their own


@asynchronous
async def test_agents_execute_a_command_and_say_what_came_of_it(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2", "agent-3") as found:
        got: list[Command] = []

        async def slow(command: Command) -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"paused": command.arguments["reason"]}

        def failing(command: Command) -> None:
            raise ValueError("not while I am landing \ud800")

        found["agent-1"].serve_command("pause", lambda command: got.append(command))
        found["agent-2"].serve_command("pause", slow)
        found["agent-3"].serve_command("pause", failing)
        results = await Controller(found["queen"]).issue("pause", target="agent-*", reason="budget")

        assert value(results, "agent-1") is None
        assert value(results, "agent-2") == {"paused": "budget"}
        assert reason(results, "agent-3") == "ValueError: not while I am landing ?"
        assert (results.missing, len(results)) == (("agent-3",), 3)
        assert [(c.id, c.verb, c.by) for c in got] == [(results.id, "pause", "queen")]
        assert abs((got[0].issued - datetime.now(UTC)).total_seconds()) < 60
        for agent, said in (("agent-1", "fulfilled"), ("agent-3", "rejected: ValueError")):
            (record,) = found[agent].audit(kind="command")
            assert record.agent == "queen"
            assert record.detail.startswith(f"pause {results.id}: {said}")


@asynchronous
async def test_what_nobody_serves_is_refused_but_for_a_moment_after_opening(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen = Controller(found["queen"])
        results = await queen.issue("dance", target="agent-1")
        assert reason(results, "agent-1") == "no handler for 'dance' here"

        late = await found.open("agent-2", found["queen"], config=Config(command_grace=60))
        await found.met()
        asked = asyncio.create_task(queen.issue("dance", target="agent-2"))
        await until(late, lambda: bool(late._docket._queue))
        late.serve_command("dance", lambda command: "waltz")

        assert value(await asked, "agent-2") == "waltz"


@asynchronous
async def test_commands_run_one_after_the_other_in_the_order_they_were_issued(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        running, seen = 0, list[int]()

        async def note(command: Command) -> None:
            nonlocal running
            running += 1
            assert running == 1
            for _ in range(5):
                await asyncio.sleep(0)
            running -= 1
            seen.append(command.arguments["number"])

        found["agent-1"].serve_command("note", note)
        queen = Controller(found["queen"])
        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(queen.issue("note", target="agent-1", number=number))

        assert seen == list(range(12))
        listed = queen.commands()
        assert [each.verb for each in listed] == ["note"] * 12
        assert all(each.is_complete for each in listed)


@asynchronous
async def test_who_was_away_executes_on_return_unless_it_expired(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        queen = Controller(found["queen"])
        seen: list[str] = []

        def note(command: Command) -> str:
            seen.append(command.arguments["text"])
            return "noted"

        for agent in ("agent-1", "agent-2"):
            found[agent].serve_command("note", note)
        await found["agent-2"].close()
        results = await queen.issue("note", target=["agent-1", "agent-2"], timeout=0.05, text="old")
        short = await queen.issue("note", target="agent-2", timeout=0, expires=0.001, text="short")

        assert (results["agent-1"], results["agent-2"]) == (Fulfilled("noted"), TimedOut())
        assert results.missing == ("agent-2",)
        back = await found.open("agent-2", found["queen"], config=Config(command_grace=60))
        back.serve_command("note", note)
        told = await queen.result(results.id, timeout=5)

        assert told["agent-2"] == Fulfilled("noted")
        assert results["agent-2"] == TimedOut()
        assert reason(await queen.result(short.id, timeout=5), "agent-2") == "expired"
        assert seen == ["old", "old"]


@asynchronous
async def test_a_handler_that_hangs_is_cancelled_when_the_command_expires(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        cancelled = asyncio.Event()

        async def hang(command: Command) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        found["agent-1"].serve_command("hang", hang)
        found["agent-1"].serve_command("wave", lambda command: "hello")
        queen = Controller(found["queen"])
        hung = await queen.issue("hang", target="agent-1", timeout=5, expires=0.1)
        after = await queen.issue("wave", target="agent-1")

        assert cancelled.is_set()
        assert "had not ended when the command expired" in reason(hung, "agent-1")
        assert value(after, "agent-1") == "hello"


@asynchronous
async def test_results_that_cannot_be_told_are_named(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        agent, queen = found["agent-1"], Controller(found["queen"])

        async def give_up(command: Command) -> None:
            raise asyncio.CancelledError

        agent.serve_command("odd", lambda command: {1, 2})
        agent.serve_command("huge", lambda command: "x" * 70_000)
        agent.serve_command("give up", give_up)

        odd = reason(await queen.issue("odd", target="agent-1"), "agent-1")
        huge = reason(await queen.issue("huge", target="agent-1"), "agent-1")
        assert "was done, but its result: a set cannot be shared" in odd
        assert "70005 bytes packed; at most 65536. Write it into a document" in huge
        left = await queen.issue("give up", target="agent-1")
        assert reason(left, "agent-1") == "it was cancelled"


@asynchronous
async def test_only_those_who_may_are_obeyed(tmp_path: Path) -> None:
    async with fleet(tmp_path, controllers=["queen"]) as found:
        strict = await found.open("agent-1", found["queen"])
        rogue = await found.open("rogue", found["queen"], config=Config(**QUICK))
        await found.met()
        strict.serve_command("pause", lambda command: pytest.fail("it obeyed"))
        results = await Controller(rogue).issue("pause", target="agent-1")

        assert reason(results, "agent-1") == "not a controller"
        (record,) = strict.audit(kind="command")
        assert record.agent == "rogue"
        assert record.detail == f"pause {results.id}: rejected: not a controller"
        with pytest.raises(CommandError, match="'agent-1' is not a controller.*queen"):
            Controller(strict)
        assert Controller(found["queen"])


@asynchronous
async def test_what_is_issued_in_anothers_name_is_on_record_and_not_executed(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        agent = found["agent-2"]
        agent.serve_command("pause", lambda command: pytest.fail("it obeyed"))
        rogue = found["agent-1"]._docket.board
        made = Controller(found["agent-1"])._dispatch.make("pause", {}, "agent-2", 60)
        rogue.put(replace(made, by="queen"))
        await until(agent, lambda: any(id == made.id for id, _ in agent._docket._forged))

        (record,) = agent.audit(kind="command")
        assert record.agent == "agent-1"
        assert record.detail == f"{made.id}: refused: in the name of queen"


@asynchronous
async def test_both_sides_hear_of_a_command(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        heard: list[Any] = []
        found["agent-1"].on(CommandReceived, heard.append)
        found["agent-1"].on(CommandSettled, heard.append)
        found["agent-1"].serve_command("wave", lambda command: "hello")
        told: asyncio.Queue[CommandSettled] = asyncio.Queue()
        found["queen"].on(CommandSettled, told.put_nowait)
        results = await Controller(found["queen"]).issue("wave", target="agent-1")
        settled = CommandSettled(results.id, "wave", "queen", "agent-1", Fulfilled("hello"))

        assert await told.get() == settled
        assert heard == [CommandReceived(results.id, "wave", "queen"), settled]


@asynchronous
async def test_another_controller_goes_on_where_one_has_stopped(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        await found["agent-2"].close()
        issued = await Controller(found["queen"]).issue(
            "wave", target=["agent-1", "agent-2"], timeout=0.05
        )
        await found["agent-1"].synced(5)
        await found["queen"].close()
        heir = Controller(found["agent-1"])

        assert [(each.id, each.by, each.verb) for each in heir.commands()] == [
            (issued.id, "queen", "wave")
        ]
        back = await found.open("agent-2", found["agent-1"], config=Config(command_grace=60))
        back.serve_command("wave", lambda command: "hello")
        assert (await heir.result(issued.id, timeout=5))["agent-2"] == Fulfilled("hello")


@asynchronous
async def test_what_was_interrupted_is_not_simply_executed_again(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        agent, queen = found["agent-1"], Controller(found["queen"])
        begun = {"once": 0, "again": 0}
        both = asyncio.Event()

        async def hang(command: Command) -> None:
            begun[command.verb] += 1
            both.set()
            await asyncio.Event().wait()

        for verb, is_idempotent in (("once", False), ("again", True)):
            agent.serve_command(verb, hang, idempotent=is_idempotent)
            results = await queen.issue(verb, target="agent-1", timeout=0)
            await both.wait()
            both.clear()
            await agent.close()
            agent = await found.open("agent-1", found["queen"])
            agent.serve_command("again", lambda command: begun["again"], idempotent=True)
            told = await queen.result(results.id, timeout=5)
            if is_idempotent:
                assert value(told, "agent-1") == 1
            else:
                assert "was interrupted" in reason(told, "agent-1")
                agent._docket._served.pop("again")

        assert begun == {"once": 1, "again": 1}


@asynchronous
async def test_nothing_is_executed_that_a_full_disk_would_make_us_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crdtstate.obeying.RETRY", 0.01)
    async with fleet(tmp_path, "agent-1") as found:
        agent = found["agent-1"]
        asked, acted = list[int](), list[str]()

        async def refuse(timeout: float | None = None) -> None:
            asked.append(len(acted))
            if len(asked) < 4:
                raise StoreUnavailable("agent-1.db", "database or disk is full")

        monkeypatch.setattr(agent, "durable", refuse)
        agent.serve_command("act", lambda command: acted.append(command.id))
        results = await Controller(found["queen"]).issue("act", target="agent-1")

        assert results.is_complete
        assert asked == [0, 0, 0, 0]
        assert acted == [results.id]


@asynchronous
async def test_a_handler_may_close_its_replica(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        agent = found["agent-1"]
        closed = asyncio.Event()

        async def stop(command: Command) -> None:
            try:
                await agent.close()
            finally:
                closed.set()

        agent.serve_command("stop", stop)
        results = await Controller(found["queen"]).issue("stop", target="agent-1", timeout=0.05)
        await closed.wait()

        assert results["agent-1"] == TimedOut()


@asynchronous
async def test_a_command_can_be_withdrawn(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen = Controller(found["queen"])
        await found["agent-1"].close()
        results = await queen.issue("wave", target="agent-1", timeout=0)
        with pytest.raises(CommandError, match="cannot be withdrawn: there is none"):
            queen.withdraw("nonsense")
        queen.withdraw(results.id)
        back = await found.open("agent-1", found["queen"])
        back.serve_command("wave", lambda command: pytest.fail("it waved"))

        assert reason(await queen.result(results.id, timeout=5), "agent-1") == "withdrawn"
        with pytest.raises(CommandError, match="cannot be withdrawn: it is queen's"):
            Controller(back).withdraw(results.id)


@asynchronous
async def test_commands_that_are_over_go(tmp_path: Path) -> None:
    settings = {"command_retention": 0.1, "command_expiry": 0.2}
    async with fleet(tmp_path, "agent-1", **settings) as found:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("crdtstate.board.MARGIN_MS", 0)
            agent, queen = found["agent-1"], Controller(found["queen"])
            agent.serve_command("wave", lambda command: "hello")
            results = [await queen.issue("wave", target="agent-1") for _ in range(5)]
            await queen.report()
            assert len(queen.commands()) == 5
            document = agent.document(commands.CONTROL)
            for name in (commands.COMMANDS, commands.RESULTS):
                view = document.map(name)
                await until(agent, lambda view=view: len(view) == 0)  # type: ignore[misc]

            with pytest.raises(CommandError, match=r"there is no command .* \(any more\)"):
                await queen.result(results[0].id)


@asynchronous
async def test_a_controller_is_told_what_cannot_be(tmp_path: Path) -> None:
    async with fleet(tmp_path) as found:
        queen = Controller(found["queen"])
        for verb in ("", "@checkpoint", "x" * 101, 7):
            with pytest.raises(CommandError, match="a verb has 1 to 100 printable characters"):
                await queen.issue(verb)  # type: ignore[arg-type]
        for wrong in ({"target": []}, {"target": 7}, {"target": [""]}, {"target": ["a\n"]}):
            with pytest.raises(UsageError, match="target"):
                await queen.issue("wave", **wrong)  # type: ignore[arg-type]
        for wrong in ({"timeout": -1}, {"timeout": "1"}, {"expires": 0}, {"expires": 1e9}):
            with pytest.raises(UsageError, match="timeout|expires"):
                await queen.issue("wave", **wrong)  # type: ignore[arg-type]
        for ask in (queen.report, queen.resolve_conflicts, queen.checkpoint_all):
            with pytest.raises(UsageError, match="timeout is a number of seconds, not None"):
                await ask(timeout=None)  # type: ignore[operator]
        with pytest.raises(CommandError, match="no agent is known that could agree to 'wave'"):
            await queen.issue("wave", target="nobody-*", exclusive=True)
        with pytest.raises(CommandError, match="arguments.*a set cannot be shared"):
            await queen.issue("wave", places={1})
        with pytest.raises(UsageError, match="a label is text"):
            await queen.checkpoint_all("x" * 190)
        with pytest.raises(UsageError, match="a list of names"):
            await queen.resolve_conflicts(documents="main")
        with pytest.raises(CommandError, match="no checkpoint of the system 'nonsense'"):
            await queen.restore_system("nonsense")
        with pytest.raises(UsageError, match="needs a crdtstate.Replica"):
            Controller("queen")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="a handler is a function"):
            found["queen"].serve_command("wave", "hello")  # type: ignore[arg-type]
        end = found["queen"].serve_command("wave", lambda command: 1)
        with pytest.raises(UsageError, match="'wave' has a handler already"):
            found["queen"].serve_command("wave", lambda command: 2)
        end()
        found["queen"].serve_command("wave", lambda command: 3)
        assert value(await queen.issue("wave", target="queen"), "queen") == 3
        assert repr(queen) == "<Controller queen>"
        assert (await queen.issue("wave", target="nobody-*")).is_complete

    async with Replica("reader", subscribe=["plan"]) as reader:
        with pytest.raises(UsageError, match="commands need the document @control"):
            reader.serve_command("wave", lambda command: 1)


# Checkpoints of the whole system


@asynchronous
async def test_what_anybody_wrote_before_is_in_everybodys_checkpoint(tmp_path: Path) -> None:
    agents = ("agent-1", "agent-2", "agent-3")
    async with fleet(tmp_path, *agents) as found:
        for number, agent in enumerate((*agents, "queen")):
            found[agent].map("plan")[agent] = number
            found[agent].document(f"of {agent}").counter("tokens").increment(number + 1)
        result = await Controller(found["queen"]).checkpoint_all("nightly")

        assert isinstance(result, SystemCheckpoint)
        assert (result.missing, result.unheard, result.label) == ((), (), "nightly")
        assert result.is_complete and set(result) == {*agents, "queen"}
        for agent, made in result.checkpoints.items():
            (saved,) = found[agent].checkpoints()
            assert (saved.id, saved.label) == (made.id, f"nightly [{result.id}]")
            assert made.id.endswith(made.hash[:16])
            assert result.cut <= made.version == saved.version
            past = await found[agent].at(made.id)
            assert dict(past.map("plan")) == {**{a: n for n, a in enumerate(agents)}, "queen": 3}
            for number, each in enumerate((*agents, "queen")):
                assert past.document(f"of {each}").counter("tokens").value == number + 1


@asynchronous
async def test_who_is_away_is_missing_and_makes_its_checkpoint_later(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        queen = Controller(found["queen"])
        await found["agent-2"].close()
        away = found.folder / "agent-2.db"
        result = await queen.checkpoint_all("weekly", target=["*", "agent-2"], timeout=1.2)

        assert result.missing == ("agent-2",)
        assert result.unheard == ("agent-2",)
        assert result["agent-2"] == TimedOut()
        assert set(result.checkpoints) == {"agent-1", "queen"}
        assert away.exists()
        back = await found.open("agent-2", found["queen"])
        later = await queen.result(result.id, timeout=5)
        assert isinstance(later, SystemCheckpoint)
        assert later.checkpoints["agent-2"].id == back.checkpoints()[0].id
        assert later.missing == ()
        await back.close()
        again = await found.open("agent-2", found["queen"])
        await again.synced(5)
        assert len(again.checkpoints()) == 1


@asynchronous
async def test_an_agent_without_a_working_tier_is_rejected_and_holds_up_nobody(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path) as found:
        tier = tmp_path / "no" / "such" / "folder" / "x.db"
        await found.open("agent-1", found["queen"], checkpoints=[f"sqlite:///{tier}"])
        await found.met()
        result = await Controller(found["queen"]).checkpoint_all()

        assert set(result.checkpoints) == {"queen"}
        assert "folder" in reason(result, "agent-1")


@asynchronous
async def test_another_controller_restores_the_system(tmp_path: Path) -> None:
    agents = ("agent-1", "agent-2")
    async with fleet(tmp_path, *agents) as found:
        only = await found.open("agent-3", found["queen"], subscribe=["@control", "private"])
        await found.met()
        only.document("private").map("notes")["mine"] = "before"
        found["agent-1"].map("plan")["goal"] = "before"
        found["agent-2"].counter("tokens").increment(5)
        saved = await Controller(found["queen"]).checkpoint_all()
        found["agent-1"].map("plan")["goal"] = "after"
        found["agent-2"].counter("tokens").increment(7)
        found["agent-1"].document("new").map("notes")["x"] = 1
        await found["agent-1"].synced(5)
        await found["queen"].close()
        only.connect(url(found["agent-1"]))
        await until(only, sees(only, 3))
        heir = found["agent-2"]
        await until(heir, sees(heir, 3))
        result = await Controller(heir).restore_system(saved.id, electorate=[*agents, "agent-3"])

        assert isinstance(result, SystemRestore)
        assert result.has_begun
        assert {a: type(result[a]) for a in (*agents, "agent-3")} == {
            a: Fulfilled for a in (*agents, "agent-3")
        }
        assert result.executors["main"] == result.executors["new"] == "agent-2"
        for agent in agents:
            assert dict(found[agent].map("plan")) == {"goal": "before"}
            assert found[agent].counter("tokens").value == 5
            assert dict(found[agent].document("new").map("notes")) == {}
        (change,) = [each async for each in heir.history("main", run=f"restore {result.id}")]
        assert change.message == f"restore of the system to {saved.id}"
        listed = Controller(found["agent-1"]).commands()
        assert [type(each) for each in listed] == [SystemCheckpoint, SystemRestore]


@asynchronous
async def test_who_made_its_checkpoint_late_restores_nothing_that_others_can(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        found["agent-1"].counter("tokens").increment(5)
        saved = await Controller(found["queen"]).checkpoint_all()
        found["agent-1"].counter("tokens").increment(7)
        await found["queen"].synced(5)
        late = await found.open("agent-2", found["queen"])
        await found.met()
        queen = Controller(found["queen"])
        await until(found["queen"], lambda: "agent-2" in queen._checkpoints_of(saved.id)[0])
        result = await Controller(late).restore_system(saved.id)

        assert result.executors["main"] in ("agent-1", "queen")
        assert late.counter("tokens").value == 5


@asynchronous
async def test_while_an_exclusive_command_is_under_way_others_are_refused(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def deploy(command: Command) -> str:
            begun.set()
            await go_on.wait()
            return command.state

        for agent in ("agent-1", "agent-2"):
            found[agent].serve_command("deploy", deploy)
        found["agent-1"].counter("tokens").increment(5)
        one, two = Controller(found["queen"]), Controller(found["agent-1"])
        saved = await one.checkpoint_all()
        found["agent-1"].counter("tokens").increment(2)
        deployed = asyncio.create_task(one.issue("deploy", target="agent-*", exclusive=True))
        await begun.wait()
        refused = await two.restore_system(saved.id, timeout=5)
        in_between = found["agent-1"].counter("tokens").value
        go_on.set()

        assert {agent: value(await deployed, agent) for agent in await deployed} == {
            "agent-1": "going",
            "agent-2": "going",
        }
        assert (refused.has_begun, in_between) == (False, 7)
        under_way = f"deploy {(await deployed).id} of queen is under way; only one such at a time"
        assert reason(refused, "agent-1") == reason(refused, "agent-2") == under_way
        assert reason(refused, "queen") == "withdrawn"
        done = await two.restore_system(saved.id, timeout=5)
        assert done.has_begun and done.is_complete
        assert {replica.counter("tokens").value for replica in found.replicas.values()} == {5}


@asynchronous
async def test_two_that_restore_at_once_do_not_mix(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2", "agent-3") as found:
        found["agent-1"].counter("tokens").increment(5)
        one, two = Controller(found["queen"]), Controller(found["agent-1"])
        saved = await one.checkpoint_all()
        await found["agent-1"].synced(5)
        for _ in range(3):
            found["agent-2"].counter("tokens").increment(2)
            results = await asyncio.gather(
                one.restore_system(saved.id, timeout=5), two.restore_system(saved.id, timeout=5)
            )
            begun = [each for each in results if each.has_begun]
            assert all(each.is_complete for each in begun)
            for refused in (each for each in results if not each.has_begun):
                said = " ".join(reason(refused, agent) for agent in refused)
                assert "is under way; only one such at a time" in said or "withdrawn" in said
            values = {replica.counter("tokens").value for replica in found.replicas.values()}
            assert values == {5} or not begun
        last = await one.restore_system(saved.id, timeout=5)

        assert last.has_begun and last.is_complete
        assert {replica.counter("tokens").value for replica in found.replicas.values()} == {5}


@asynchronous
async def test_a_minority_restores_nothing_unless_it_is_told_who_is_left(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        queen = Controller(found["queen"])
        found["queen"].map("plan")["goal"] = "before"
        saved = await queen.checkpoint_all()
        found["queen"].map("plan")["goal"] = "after"
        for agent in ("agent-1", "agent-2"):
            # As a crash: nobody says goodbye.
            found[agent]._sync.leave = lambda now: None  # type: ignore[method-assign]
            await found[agent].close()
        await until(
            found["queen"],
            lambda: [m.state for m in found["queen"].members()].count("down") == 2,
        )
        refused = await queen.restore_system(saved.id, timeout=0.2)

        assert not refused.has_begun
        assert reason(refused, "queen") == "withdrawn"
        assert refused.missing == ("agent-1", "agent-2", "queen")
        assert found["queen"].map("plan")["goal"] == "after"
        done = await queen.restore_system(saved.id, electorate=["queen"])
        assert done.has_begun and done.is_complete
        assert found["queen"].map("plan")["goal"] == "before"


@asynchronous
async def test_users_exclusive_commands_run_where_they_were_accepted(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2", "agent-3") as found:
        for agent in ("agent-1", "agent-2", "agent-3"):
            found[agent].serve_command("deploy", lambda command: command.state)
        results = await Controller(found["queen"]).issue("deploy", target="agent-*", exclusive=True)

        assert {agent: value(results, agent) for agent in results} == {
            "agent-1": "going",
            "agent-2": "going",
            "agent-3": "going",
        }


# Conflicts


def quarrel(one: Replica, two: Replica, keys: int) -> None:
    """Let two who do not hear each other write the same keys."""
    for at in range(keys):
        one.map("plan")[f"k{at}"] = {"one": at}
        two.map("plan")[f"k{at}"] = {"two": at}


@asynchronous
async def test_conflicts_are_resolved_each_by_one_agent(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        quarrel(found["agent-1"], found["agent-2"], 20)
        queen = Controller(found["queen"])
        await found["agent-1"].synced(5)
        await found["agent-2"].synced(5)
        await until(found["queen"], lambda: found["queen"].count_conflicts() == 20)
        unknown = await queen.resolve_conflicts(strategy="no such")
        elsewhere = await queen.resolve_conflicts("merge", documents=["other"])
        results = await queen.resolve_conflicts(strategy="merge")
        twice = await queen.resolve_conflicts(strategy="merge")

        assert "unknown strategy 'no such'" in reason(unknown, "agent-1")
        assert sum(value(elsewhere, agent) for agent in elsewhere) == 0
        counts = [value(results, agent) for agent in results]
        assert sum(counts) == 20 and all(counts)
        assert [value(twice, agent) for agent in twice] == [0, 0, 0]
        await found["queen"].synced(5)
        assert found["queen"].map("plan")["k3"] == {"one": 3, "two": 3}
        assert found["queen"].count_conflicts() == 0


# Reports


@asynchronous
async def test_a_report_tells_of_those_who_are_there_and_of_those_who_are_not(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2") as found:
        queen = Controller(found["queen"])
        checkpoint = await found["agent-2"].checkpoint("mine")
        await found["agent-2"].synced(5)
        book = found["queen"].system_document(casebook.DOCUMENT)
        escalation = {"attempts": [["store", "is damaged"], ["peers", "nobody has it"]]}
        book.map(casebook.ESCALATIONS)["agent-9"] = escalation
        book.map(casebook.ADOPTIONS)["agent-2"] = {"by": "agent-1"}
        await found["agent-2"].close()
        before = datetime.now(UTC)
        await until(found["queen"], lambda: not sees(found["queen"], 3)())
        report = await queen.report()

        assert isinstance(report, Report)
        assert list(report) == ["agent-1", "agent-2", "agent-9", "queen"]
        here, away, gone = report["agent-1"], report["agent-2"], report["agent-9"]
        assert isinstance(here, AgentReport) and here.has_answered and here.is_ready
        assert (here.state, here.conflicts, here.checkpoints) == ("up", 0, 0)
        assert here.metrics is not None and here.metrics["peers"] >= 1
        assert not away.has_answered and away.checkpoint == checkpoint.id
        assert away.last_seen is not None and abs((away.last_seen - before).total_seconds()) < 5
        assert away.adoption == {"by": "agent-1"}
        assert gone.escalation == escalation
        table = str(report).splitlines()
        assert len(table) == 5 and table[0].split()[0] == "agent"
        assert "adopted by agent-1" in str(away)
        assert "could not recover: peers: nobody has it" in table[3]
        assert repr(report) == "<Report 4 agents, 2 up>"


@asynchronous
async def test_reports_leave_nothing_behind(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen = Controller(found["queen"])
        for _ in range(20):
            await queen.report()
        document = found["agent-1"].document(commands.CONTROL)
        for name in (commands.COMMANDS, commands.RESULTS):
            view = document.map(name)
            await until(found["agent-1"], lambda view=view: len(view) == 0)  # type: ignore[misc]
        await until(found["queen"], lambda: len(document.own_slots(document.writer)) == 0)
