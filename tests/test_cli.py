"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import asyncio
import configparser
import importlib
import json
import os
import pty
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import apsw
import pytest
from test_relay import BARE

from crdtstate import (
    Config,
    Retention,
    __version__,
    blocking,
    cli,
    conflict,
    strategy,
    validators,
)
from crdtstate.change import Origin, encode_change
from crdtstate.cli.places import parse_value
from crdtstate.clock import Dot
from crdtstate.relay.settings import KEYS, Settings
from crdtstate.stores import Entry
from crdtstate.stores.journal import Journal
from crdtstate.tiers import open_tier

LOCAL = "ws://127.0.0.1:0"
NOBODY = "ws://127.0.0.1:9"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def relay() -> Iterator[str]:
    """A relay's address."""
    command = [sys.executable, "-m", "crdtstate", "relay", "--listen", LOCAL, "--attached"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # It notes that it keeps everything in memory.
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.communicate(timeout=20)


@pytest.fixture
def run(
    relay: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs a command line against the relay, in this process."""
    monkeypatch.setenv("CRDTSTATE_PEER", relay)
    monkeypatch.setenv("COLUMNS", "100")

    def run(line: str, *more: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["crdtstate", *shlex.split(line), *more])
        code = cli.main()
        return Result(code, *capsys.readouterr())

    return run


def lines(text: str) -> list[str]:
    return text.splitlines()


# Reading and writing


def test_what_is_set_can_be_got(run):
    assert run("set rw/map/plan/goal 'ship it'") == (0, 'rw/map/plan/goal = "ship it"\n', "")
    assert run("set rw/map/plan/a/b '{\"n\": [1, 2.5, null]}'").code == 0
    assert run("set rw/register/leader agent-7").code == 0
    assert run("set rw/set/skills python").code == 0
    assert run("set rw/set/skills 7").code == 0

    assert run("get rw/map/plan/goal") == (0, "ship it\n", "")
    assert run("get rw/map/plan") == (0, 'a/b = {"n": [1, 2.5, null]}\ngoal = "ship it"\n', "")
    assert run("get rw/register/leader") == (0, "agent-7\n", "")
    assert run("get rw/set/skills") == (0, "python\n7\n", "")


def test_json_is_for_scripts(run):
    assert json.loads(run("set js/map/plan/goal 4 --json").out) == {
        "place": "js/map/plan/goal",
        "value": 4,
    }
    assert json.loads(run("get js/map/plan --json").out) == {"goal": 4}
    assert json.loads(run("get js/map/plan/goal --json").out) == 4
    assert json.loads(run("get js/set/nothing --json").out) == []
    assert json.loads(run("increment js/counter/n 2 --json").out)["value"] == 2


def test_a_counter_is_incremented(run):
    assert run("increment ct/counter/tokens 120") == (0, "120\n", "")
    assert run("increment ct/counter/tokens") == (0, "121\n", "")
    assert run("increment ct/counter/tokens -21") == (0, "100\n", "")
    assert run("get ct/counter/tokens") == (0, "100\n", "")


def test_values_that_json_does_not_know_are_shown_in_types_it_does(run, relay):
    with blocking.Replica("agent", peers=[relay]) as replica:
        values = replica.document("ty").map("values")
        values["bytes"] = b"\x00\xff"
        values["time"] = datetime(2024, 5, 6, tzinfo=UTC)
        values["number"] = float("inf")
        values["keys"] = {1: "one", None: "none"}
        replica.synced(timeout=20)

    assert json.loads(run("get ty/map/values --json").out) == {
        "bytes": {"base64": "AP8="},
        "time": "2024-05-06T00:00:00+00:00",
        "number": "inf",
        "keys": {"1": "one", "null": "none"},
    }


def test_text_that_is_not_json_is_a_string():
    found = {t: parse_value(t) for t in ("4", '"4"', "four", "[1", "NaN", "null", "1e2", "")}

    assert found == {
        "4": 4,
        '"4"': "4",
        "four": "four",
        "[1": "[1",
        "NaN": "NaN",
        "null": None,
        "1e2": 100.0,
        "": "",
    }


def test_nothing_that_a_terminal_would_obey_is_printed(run, relay):
    evil = "a\x1b[31mred\x07 [bold]x[/bold]\x9b2J\u202e\r\nend"
    with blocking.Replica("evil [red]", peers=[relay]) as replica:
        replica.document("ev").map("plan")["k\x1b]0;title\x07"] = evil
        replica.document("ev").register("text").value = evil
        replica.document("ev").set("items").add(evil)
        replica.synced(timeout=20)
        peers = run("peers").out

    shown = [run(f"get ev/{what}").out for what in ("map/plan", "register/text", "set/items")]
    shown += [run("get ev/map/plan --json").out, peers]
    for text in shown:
        assert all(c.isprintable() or c == "\n" for c in text), repr(text)
    assert shown[1] == "a\\x1b[31mred\\x07 [bold]x[/bold]\\x9b2J\\u202e\\r\nend\n"
    assert "[bold]x[/bold]" in shown[0] and "k\\x1b]0;title\\x07" in shown[0]
    assert "[red]" in peers
    assert json.loads(shown[3]) == {"k\x1b]0;title\x07": evil}


def at_odds(relay: str, document: str, known: str) -> None:
    """Let two agents write at once into a map and a register, under a strategy of their own."""
    strategy(known)(lambda candidates: candidates[0].value)
    with blocking.Replica("a") as a, blocking.Replica("b", peers=[relay]) as b:
        for replica, value in ((a, "older"), (b, "newer")):
            replica.document(document).map("plan", strategy=known)["goal"] = value
            replica.document(document).map("plan")["same"] = 1
            replica.document(document).register("text", strategy=known).value = value
            # Stamps of one millisecond would be told apart by the writers' random numbers.
            written = time.time_ns() // 1_000_000
            while time.time_ns() // 1_000_000 <= written:
                pass
        a.document(document).map("plan")["other"] = 1
        a.connect(relay)
        a.synced(timeout=20)
        b.synced(timeout=20)


def test_a_strategy_that_only_the_agents_know_does_not_make_a_map_unreadable(relay):
    at_odds(relay, "sy", "the oldest of test_cli")
    note = (
        "crdtstate: {}: unknown strategy 'the oldest of test_cli'; "
        "of several values, the newest is shown\n"
    )

    with start("get", "sy/map/plan", "--peer", relay) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, note.format("plan"))
    assert out == 'goal = "newer"\nother = 1\nsame = 1\n'
    with start("get", "sy/register/text", "--peer", relay) as process:
        assert process.communicate(timeout=20) == ("newer\n", note.format("text"))


def test_watching_it_is_possible_too(relay):
    at_odds(relay, "wy", "the first of test_cli")

    with start("watch", "wy/map/plan", "--peer", relay) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "unknown strategy 'the first of test_cli'" in process.stderr.readline()
        assert "watching" in process.stderr.readline()
        at_odds(relay, "wy", "the first of test_cli")
        lines = {process.stdout.readline().split("  ")[0] for _ in range(4)}
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=20)[1]

    assert err == ""
    assert 'wy/map/plan/goal = "newer"' in lines


# Failing


@pytest.mark.parametrize(
    "line",
    [
        "get main/map",
        "get main/list/x",
        "get main//x",
        "get main/counter/x/key",
        "set main/map/plan value",
        "set main/counter/tokens 4",
        "set main/map/plan/goal",
        "increment main/map/plan",
        "increment main/counter/n four",
        "get main/map/plan --peer http://127.0.0.1:80",
        "get main/map/plan --peer ws://127.0.0.1:99999",
        "get main/map/plan --timeout 0",
        f"get main/map/plan --peer {NOBODY} --store agent.db",
        "relay --listen nonsense",
        "relay --durability hope",
        "simulate --agents 1",
        "demo --agents 2",
        "bogus",
        "--bogus",
    ],
)
def test_wrong_usage_is_2(run, line):
    result = run(line)

    assert (result.code, result.out) == (2, "")
    assert "Usage: crdtstate" in result.err and "Traceback" not in result.err


def test_a_peer_must_be_named(run, monkeypatch):
    monkeypatch.delenv("CRDTSTATE_PEER")

    assert run("get main/map/plan").code == 2
    assert "--peer" in run("status").err


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("get no/map/plan/goal", "no/map/plan/goal: nothing there"),
        ("get no/register/leader", "no/register/leader: nothing there"),
        (
            f"get no/map/x --timeout 0.3 --peer {NOBODY}",
            f"{NOBODY}: connection refused: is a relay",
        ),
        (f"increment no/counter/x --timeout 0.3 --peer {NOBODY}", f"{NOBODY}: connection refused"),
        (f"status --peer {NOBODY}", f"{NOBODY}: connection refused: is a relay listening there?"),
        (f"peers --peer {NOBODY}", f"{NOBODY}: connection refused: is a relay listening there?"),
        ("get no/map/x --store absent.db", "absent.db: there is no such file"),
        ("verify absent.db", "absent.db: there is no such file"),
        ("get no/map/x --store /tmp", "/tmp: this is a directory"),
        ("verify /tmp", "/tmp: this is a directory"),
        ("verify /etc/passwd", "/etc/passwd: this is not an SQLite file, so not a crdtstate store"),
        ("demo --path absent", "is not a directory"),
    ],
)
def test_failing_is_1_with_one_clear_line(run, line, error):
    result = run(line)

    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("crdtstate: ") and error in result.err
    assert result.err.count("\n") == 1


def test_an_unshareable_value_is_refused(run):
    result = run("set no/map/plan/goal", '"\\ud800"')

    assert result.code == 1 and "no/map/plan" not in result.out
    assert result.err.startswith("crdtstate: plan['goal']: ")


# Looking


def test_status_and_peers_say_how_a_relay_is_doing(run, relay):
    with blocking.Replica("agent-7", listen=LOCAL, peers=[relay]) as replica:
        replica.document("st").map("plan")["goal"] = 1
        replica.synced(timeout=20)

        status = lines(run("status").out)
        assert status[:3] == ["agent      relay (relay)", f"address    {relay}", "ready      yes"]
        assert "document   st: 1 change" in status
        assert json.loads(run("status --json").out)["documents"]["st"] == 1

        (peer,) = json.loads(run("peers --json").out)
        while peer["lag"]:  # The agent has not acknowledged all of it yet.
            (peer,) = json.loads(run("peers --json").out)
        assert (peer["agent"], peer["role"], peer["address"]) == (
            "agent-7",
            "agent",
            replica.address,
        )
        header, row = lines(run("peers").out)
        assert header.split() == ["AGENT", "ROLE", "LAG", "QUEUED", "BYTES", "ADDRESS"]
        assert row.split() == ["agent-7", "agent", "0", "0", str(replica.address)]


def test_status_of_an_agent_is_what_the_mesh_tells(run):
    with blocking.Replica("agent-7", listen=LOCAL) as replica:
        replica.map("plan")["goal"] = "ship it"
        found = json.loads(run(f"status --json --peer {replica.address}").out)
        assert (found["agent"], found["documents"]) == ("agent-7", {"main": 1})
        assert lines(run(f"status --peer {replica.address}").out)[0] == "agent      agent-7 (agent)"

        result = run(f"peers --peer {replica.address}")
        assert result.code == 1 and "an agent, not a relay" in result.err


def test_a_store_is_verified(run, tmp_path):
    store = tmp_path / "agent.db"
    with blocking.Replica("agent-7", store=store) as replica:
        replica.map("plan")["goal"] = "ship it"
        replica.map("plan")["blob"] = b"x" * 100_000
    assert run(f"verify {store}").out.startswith(f"{store}: sound (1 document, 0 snapshots, ")
    found = json.loads(run(f"verify {store} --json").out)
    assert (found["documents"], found["problems"]) == (1, [])

    data = bytearray(store.read_bytes())
    at = data.index(b"x" * 1000)
    data[at] ^= 1
    store.write_bytes(data)

    result = run(f"verify {store}")
    assert result.code == 1 and len(lines(result.out)) >= 1
    assert result.err.startswith(f"crdtstate: {store} is damaged: ")
    assert result.err.count("\n") == 1
    result = run(f"verify {store} --json")
    assert result.code == 1 and json.loads(result.out)["problems"]


def test_conflicts_are_listed_explained_and_audited(run, relay, tmp_path):
    store = tmp_path / "ann.db"
    config = Config(voters=["ann", "bob"])
    with (
        blocking.Replica("ann", store=store, peers=[relay], config=config) as ann,
        blocking.Replica("bob", peers=[relay], config=config) as bob,
    ):

        def even() -> None:
            for one, other in ((ann, bob), (bob, ann)):
                other.wait_for(one.version(), timeout=20)
                one.synced(timeout=20)

        even()
        ann.document("cf").register("leader", strategy="vote")
        with ann.transaction():
            ann.document("cf").register("leader").value = "ann\x1b[2J"
            # Now: what the transaction says has not left yet.
            bob.document("cf").register("leader").value = "bob"
        even()
        assert ann.conflicts() != []
        for agent in (ann, bob):
            (conflict,) = [each for each in agent.conflicts() if each.document == "cf"]
            agent.vote(conflict, "ann\x1b[2J")
        even()
        deadline = time.monotonic() + 20
        # Once each has heard of the other: that comes by way of the relay.
        while ann.is_responsible(conflict) == bob.is_responsible(conflict):
            assert time.monotonic() < deadline

        shown = run("conflicts")
        assert shown.code == 0 and "\x1b" not in shown.out
        assert 'cf/register/leader = "ann\\u001b[2J"  (vote)\n' in shown.out
        assert ", votes: ann, bob\n" in shown.out
        (found,) = [c for c in json.loads(run("conflicts --json").out) if c["place"][:3] == "cf/"]
        assert (found["rule"], found["strategy"]) == ("vote", "vote")
        assert found["votes"] == [
            {"agent": name, "value": "ann\x1b[2J", "counts": True} for name in ("ann", "bob")
        ]
        told = run("explain cf/register/leader")
        assert told.code == 0 and "(vote)" in told.out and "vote of bob for" in told.out
        assert "\x1b" not in told.out
        told = json.loads(run("explain cf/register/leader --json").out)
        assert [c["agent"] for c in told["candidates"]] in (["ann", "bob"], ["bob", "ann"])
        assert run("explain cf/map/plan").code == 2

        ann.resolve(conflict, "ann")
        assert [r.kind for r in ann.audit(document="cf")] == ["vote", "decision", "resolution"]
        ann.durable()
        audited = run(f"audit {store} --kind resolution --document cf")
        assert audited.code == 0 and "\x1b" not in audited.out
        assert len(lines(audited.out)) == 1 and "leader = 'ann' (resolve)" in audited.out
        (record,) = map(json.loads, lines(run(f"audit {store} --limit 1 --json").out))
        assert (record["rule"], record["chosen"]) == ("resolve", "ann")
        assert run(f"audit {store} --kind nothing").code == 2
        assert run(f"audit {tmp_path / 'absent.db'}").code == 1
        even()
    with closing(apsw.Connection(str(store), vfs="cksmvfs")) as db:
        db.execute("UPDATE audit SET agent = 'eve' WHERE id = ?", (record["number"],))
    result = run(f"verify {store}")
    assert result.code == 1
    assert lines(result.out) == [
        f"table audit, row {record['number']}: was altered, or what is before it (wrong SHA-256)"
    ]


def test_another_programs_file_is_no_store(run, tmp_path):
    diary = tmp_path / "diary.db"
    with closing(apsw.Connection(str(diary))) as db:
        db.execute("CREATE TABLE diary(day, entry)")

    for line in (f"verify {diary}", f"get main/map/plan --store {diary}"):
        code, out, err = run(line)

        assert (code, out) == (1, "")
        assert "not a crdtstate store" in err and "damaged" not in err and err.count("\n") == 1


def test_a_store_can_be_read_and_shows_no_trace_of_it(run, tmp_path):
    store = tmp_path / "agent.db"
    with blocking.Replica("agent-7", store=store) as replica:
        replica.map("plan")["goal"] = "ship it"
        replica.durable()
        assert run(f"get main/map/plan/goal --store {store}") == (0, "ship it\n", "")
    Path(f"{store}.lock").unlink()
    before = store.read_bytes()

    assert run(f"get main/map/plan/goal --store {store}") == (0, "ship it\n", "")

    assert list(tmp_path.iterdir()) == [store] and store.read_bytes() == before


def test_reading_makes_no_store_of_an_empty_file(run, tmp_path):
    store = tmp_path / "agent.db"
    store.touch()

    result = run(f"get main/map/plan --store {store}")

    assert (result.code, result.out) == (1, "") and "not a crdtstate store" in result.err
    assert list(tmp_path.iterdir()) == [store] and store.read_bytes() == b""


def test_a_change_that_does_not_fit_is_named_with_what_to_do(run, tmp_path):
    store = tmp_path / "agent.db"
    evil = encode_change("main", Dot(7, 1), {}, 1, 0, False, b"evil", Origin("agent-7"))
    with closing(Journal(store)) as journal:
        journal.start("agent-7", 7, lambda: None)
        journal.append([Entry("main", 7, 1, evil.data)])

    result = run(f"get main/map/plan --store {store}")

    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"crdtstate: {store}: document 'main': change 7:1: ")
    assert f"; check it with: crdtstate verify {store}" in result.err
    result = run(f"verify {store}")
    assert result.code == 1 and result.out.startswith("document 'main': change 7:1: ")
    assert "crdtstate verify" not in result.out + result.err


# Running


def test_help_is_for_people(run):
    whole = run("--help")
    assert whole.code == 0
    commands = ("demo", "relay", "get", "set", "increment", "watch", "peers", "status", "verify")
    for command in (*commands, "simulate", "conflicts", "explain", "audit"):
        assert command in whole.out
        result = run(f"{command} --help")
        assert result.code == 0
        assert f"Example: crdtstate {command} " in result.out
        assert "--json" in result.out
    assert run("--version") == (0, f"crdtstate {__version__}\n", "")


# Checkpoints


def test_checkpoints_are_made_listed_and_verified(run, tmp_path):
    store = tmp_path / "agent 7.db"
    with blocking.Replica("agent-7", store=store) as replica:
        replica.map("plan")["goal"] = "ship"
    quoted = shlex.quote(str(store))

    first = run(f"checkpoints create {quoted} --label before")
    assert first.code == 0 and first.err == ""
    second = json.loads(run(f"checkpoints create {quoted} --json").out)
    found = json.loads(run(f"checkpoints list {quoted} --json").out)

    assert [each["id"] for each in found] == [first.out.strip(), second["id"]]
    assert [each["label"] for each in found] == ["before", ""]
    assert found[0]["agent"] == "agent-7" and found[0]["documents"] == {"main": 1}
    table = lines(run(f"checkpoints list {shlex.quote(f'{store}.checkpoints')}").out)
    assert table[0].split() == ["AGENT", "ID", "MADE", "BYTES", "LABEL"]
    assert table[1].split()[:2] == ["agent-7", first.out.strip()] and len(table) == 3
    verified = run(f"checkpoints verify {quoted}")
    assert verified.code == 0
    assert lines(verified.out) == [f"agent-7 {each['id']}: intact" for each in found]
    assert run(f"checkpoints list {quoted} --agent other --json").out == "[]\n"

    code, out, err = run(f"checkpoints verify {quoted} {1:016x}-{1:016x}")
    assert (code, out) == (1, "") and "there is no checkpoint" in err
    assert run(f"checkpoints list {tmp_path}/none.db").err.endswith("none.db.checkpoints\n")
    assert not (tmp_path / "none.db").exists()
    assert "no such file" in run(f"checkpoints create {tmp_path}/none.db").err


def test_damaged_checkpoints_are_named(run, tmp_path):
    url = f"sqlite:///{tmp_path}/c.db"
    store = tmp_path / "agent.db"
    with blocking.Replica("agent", store=store, checkpoints=[url]) as replica:
        replica.map("plan")["goal"] = "ship"
        id = replica.checkpoint().id
    part = alter(url, "/parts/")

    code, out, err = run(f"checkpoints verify {url}")
    assert code == 1 and "damaged: 1 checkpoint" in err
    assert out.startswith(f"agent {id}: ") and part in out
    alter(url, "/manifests/")
    found = json.loads(run(f"checkpoints verify {url} --json").out)
    assert [(each["agent"], each["id"]) for each in found] == [("agent", id)]
    assert found[0]["problem"].startswith("its manifest: ")
    assert run(f"checkpoints list {url} --json").out == "[]\n"


@pytest.fixture
def archive(tmp_path) -> tuple[str, str, str]:
    """A store, and the ids of two checkpoints beside it."""
    store = tmp_path / "agent-7.db"
    with blocking.Replica("agent-7", store=store) as replica:
        plan = replica.map("plan")
        with replica.transaction():
            plan["goal"], plan["step"] = "ship", 1
            replica.counter("tokens").increment(120)
        first = replica.checkpoint("before")
        with replica.transaction(message="re\x1b[31mplan", run="run-42"):
            plan["goal"] = "ship it \x1b[31m"
            replica.document("other").map("x")["y"] = b"\0"
        second = replica.checkpoint()
        with replica.transaction():
            del plan["step"]
            replica.counter("tokens").increment(5)
    return shlex.quote(str(store)), first.id, second.id


def test_checkpoints_are_compared_with_each_other_and_with_now(run, archive):
    store, first, second = archive

    assert run(f"checkpoints diff {store} {first}") == (
        0,
        "main: tokens: 120 -> 125 (+5)\n"
        "main: plan['goal']: 'ship' -> 'ship it \\x1b[31m'\n"
        "main: plan['step']: 1 removed\n"
        "other: x['y'] = b'\\x00' (new)\n",
        "",
    )
    tier = f"sqlite:///{store}.checkpoints"
    for where in (store, f"{store}.checkpoints", tier, f"{store} --tier {tier}"):
        found = json.loads(run(f"checkpoints diff {where} {first} {second} --json").out)
        assert found == [
            {"document": "main", "kind": "map", "name": "plan", "key": "goal", "before": "ship"}
            | {"after": "ship it \x1b[31m"},
            {"document": "other", "kind": "map", "name": "x", "key": "y"}
            | {"after": {"base64": "AA=="}},
        ]
    narrow = f"checkpoints diff {store} {first} --document main --path plan"
    assert len(lines(run(narrow).out)) == 2
    assert run(f"checkpoints diff {store} {second} {second}") == (0, "", "")

    assert run(f"checkpoints diff {tier} {first}").code == 2
    code, out, err = run(f"checkpoints diff {store} {1:016x}-{1:016x}")
    assert (code, out) == (1, "")
    assert f"there is no checkpoint '{1:016x}-{1:016x}'; see: crdtstate checkpoints list" in err
    assert "there is no document 'none'" in run(narrow.replace("main", "none")).err


def test_a_checkpoint_is_restored_into_a_store_as_a_new_change(run, archive):
    store, first, _ = archive
    narrow = f"checkpoints restore {store} {first} --path \"plan['goal']\" --message oops"
    code, out, err = run(narrow)

    assert (code, out) == (0, "main: plan['goal']: 'ship it \\x1b[31m' -> 'ship'\n")
    assert err.endswith("agent-7.db: 1 place restored\n")
    assert run(f"get main/map/plan --store {store}").out == 'goal = "ship"\n'
    rest = json.loads(run(f"checkpoints restore {store} {first} --json").out)
    assert [(each["name"], each["key"]) for each in rest] == [
        ("tokens", None),
        ("plan", "step"),
        ("x", "y"),
    ]
    assert run(f"checkpoints diff {store} {first}") == (0, "", "")
    assert run(f"checkpoints restore {store} {first}").err.endswith(": 0 places restored\n")
    told = lines(run(f"history main --store {store}").out)
    assert told[-2].endswith("agent-7 write plan['goal']: oops")
    assert told[-1].endswith(f": restore of {first}")
    assert "plan['step']" in told[-1] and "tokens" in told[-1]


def test_restoring_fails_with_one_clear_line_and_alters_nothing(run, archive, tmp_path):
    store, first, _ = archive
    before = run(f"get main/map/plan --store {store}").out
    none = f"{2:016x}-{2:016x}"
    redis = "--tier redis://127.0.0.1:9/0"
    for line, error in [
        (f"{store} {none}", f"there is no checkpoint '{none}'; see: crdtstate checkpoints list"),
        (f"{store} {first} {redis}", "redis://127.0.0.1:9/0: it cannot be reached"),
        (f"{store} {first} --tier none.db", "none.db: no such file"),
        (f"{store} {first} --document none", "there is no document 'none'"),
        (f"{store} {first} --path nothing", "nothing"),
        (f"{tmp_path}/none.db {first}", "there is no such file"),
    ]:
        code, out, err = run(f"checkpoints restore {line}")
        assert (code, out) == (1, "") and error in err and len(lines(err)) == 1, err
    with blocking.Replica("agent-7", store=shlex.split(store)[0]):
        code, _, err = run(f"checkpoints restore {store} {first}")
        assert code == 1 and "agent-7.db" in err and len(lines(err)) == 1
        # Looking is possible meanwhile.
        assert run(f"checkpoints diff {store} {first}").code == 0
        assert run(f"history main --store {store}").code == 0
    assert run(f"checkpoints restore {store}").code == 2
    assert run(f"get main/map/plan --store {store}").out == before


def test_the_agent_says_which_checkpoints_are_kept_not_the_command_line(run, tmp_path):
    store = tmp_path / "agent.db"
    rule = Retention(count=30)
    with blocking.Replica("agent", store=store, retention=rule) as replica:
        ids = []
        for number in range(25):
            replica.map("plan")["n"] = number
            ids.append(replica.checkpoint().id)
    ids.append(run(f"checkpoints create {store}").out.strip())
    assert run(f"checkpoints restore {store} {ids[0]}").code == 0

    assert [c["id"] for c in json.loads(run(f"checkpoints list {store} --json").out)] == ids


def test_history_tells_who_wrote_what_and_why(run, archive, relay):
    store, _, _ = archive
    told = lines(run(f"history main --store {store}").out)

    assert [line.partition("agent-7 ")[2] for line in told] == [
        "write plan['goal'], plan['step'], tokens",
        "[run-42] write plan['goal']: re\\x1b[31mplan",
        "write plan['step'], tokens",
    ]
    (change,) = map(json.loads, lines(run(f"history main --store {store} --run run-42 --json").out))
    assert change["agent"] == "agent-7" and change["message"] == "re\x1b[31mplan"
    assert change["paths"] == ["plan['goal']"] and change["change"].endswith(":2")
    assert len(lines(run(f"history main --store {store} --limit 1").out)) == 1
    assert len(lines(run(f"history main --store {store} --path \"plan['step']\"").out)) == 2
    assert run(f"history main --store {store} --agent x") == (
        0,
        "",
        "crdtstate: no such changes\n",
    )
    code, out, err = run(f"history none --store {store}")
    assert (code, out) == (1, "") and "there is no document 'none'; there are: @check" in err
    assert run(f"history main --store {store} --peer {relay}").code == 2


def test_history_can_be_asked_of_a_peer(run):
    run("set hi/map/plan/goal ship --agent ann")
    run("set hi/map/plan/goal sail --agent bob")

    told = lines(run("history hi").out)
    assert [line.split()[1:] for line in told] == [
        ["ann", "write", "plan['goal']"],
        ["bob", "write", "plan['goal']"],
    ]
    code, out, err = run("history nothing-there")
    assert (code, out) == (1, "") and "there is no document 'nothing-there'" in err


@pytest.mark.parametrize("log_bytes", [1000, 2**26])
def test_history_begins_where_the_journal_does(run, tmp_path, log_bytes):
    store = tmp_path / "agent.db"
    small = Config(snapshot_after_bytes=2000, log_bytes=log_bytes)
    with blocking.Replica("agent", store=store, config=small) as replica:
        for number in range(100):
            with replica.transaction(message=f"number {number}"):
                replica.map("plan")[f"key-{number % 7}"] = "x" * 50
                replica.map("plan").pop(f"key-{(number + 3) % 7}", None)
        replica.durable()
        expected = replica.call(lambda inner: [str(c) for c in inner.history("main")])
        assert (len(expected) < 100) == (log_bytes == 1000)
        deadline = time.monotonic() + 20
        # A thread deletes what is forgotten; until then it can still be told.
        while told := lines(run(f"history main --store {store} --limit 1000").out):
            if len(told) <= len(expected) or time.monotonic() > deadline:
                break

    assert [line.removesuffix(" +") for line in told] == expected


def test_documents_of_the_system_can_be_read_and_not_written(run, archive, relay):
    store, _, second = archive
    newest = json.loads(run(f"get @checkpoints/map/newest --store {store} --json").out)
    assert newest["agent-7"]["id"] == second
    with blocking.Replica("agent", peers=[relay]) as replica:
        replica.map("plan")["goal"] = 1
        replica.checkpoint()
        replica.synced(timeout=20)
        assert "agent" in json.loads(run("get @checkpoints/map/newest --json").out)
    for line in ("set @checkpoints/map/newest/x 1", "increment @x/counter/n"):
        code, _, err = run(line)
        assert code == 2 and "read, not written" in " ".join(err.replace("│", "").split())
    code, out, err = run("get @nothing/map/newest")
    assert (code, out) == (1, "") and "names that begin with '@' are the system's" in err


def alter(url: str, kind: str) -> str:
    """Put something else in a tier in place of what is there; returns its key."""

    async def put() -> str:
        tier = await open_tier(url)
        (key,) = [item.key for item in await tier.items("") if kind in item.key]
        await tier.put(key, b"something else")
        await tier.close()
        return key

    return asyncio.run(put())


# What only a module of the user's knows


RULES = """
import crdtstate

@crdtstate.strategy("cli-longest")
def longest(found):
    return max((each.value for each in found), key=len)

@crdtstate.validator("cli-short")
def short(proposal):
    return None if all(len(str(each.value)) < 9 for each in proposal.writes) else "too long"
"""


def test_a_module_brings_the_strategies_and_validators_that_documents_name(tmp_path, monkeypatch):
    (tmp_path / "house_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("house_rules")

    def ask(line: str) -> Result:
        command = [sys.executable, "-m", "crdtstate", *line.split()]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    try:
        with (
            blocking.Replica("one", listen=LOCAL) as one,
            blocking.Replica("two") as two,
        ):
            for replica, value in ((one, "longest"), (two, "short")):
                replica.document("main").map("plan", strategy="cli-longest")["a"] = value
            two.connect(one.address)
            two.synced(timeout=20)
            with_it = f"--peer {one.address} --module house_rules"
            without = f"--peer {one.address}"
            assert ask(f"get main/map/plan/a {with_it}") == (0, "longest\n", "")
            code, out, err = ask(f"get main/map/plan/a {without}")
            assert (code, out) == (0, "short\n") and "unknown strategy 'cli-longest'" in err

            one.document("main").use_validator("cli-short")
            one.map("plan")["b"] = 1
            assert ask(f"get main/map/plan/b {with_it}") == (0, "1\n", "")
            code, out, err = ask(f"set main/map/plan/c 2 {without} --timeout 2")
            assert code == 1 and "--module" in err
            code, out, err = ask(f"set main/map/plan/c too-long-by-far {with_it}")
            assert code == 1 and "too long" in err and "c" not in one.map("plan")
            assert ask(f"set main/map/plan/c 2 {with_it}").code == 0
            assert one.map("plan")["c"] == 2
            code, out, err = ask(f"get main/map/plan/a --peer {one.address} --module no_such")
            assert code == 2 and "no_such" in err
    finally:
        del conflict._registry["cli-longest"], validators._registry["cli-short"]
        del sys.modules["house_rules"]


# The settings of a relay

CERTIFICATE = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
SAN = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def test_a_flag_goes_before_a_variable_and_that_before_the_file(run, tmp_path, monkeypatch):
    file = tmp_path / "relay.toml"
    file.write_text(
        'name = "filed"\ndurability = "power"\ndrain = 1.5\npeers = ["ws://10.0.0.5:1"]\n'
        'mesh = "relay.join"\n[config]\nheartbeat = 2\noutbox_bytes = 4096\n'
        "[limits]\nhalf_open = 32\nspare_loopback = false\n"
    )
    monkeypatch.setenv("CRDTSTATE_RELAY_NAME", "varied")
    monkeypatch.setenv("CRDTSTATE_RELAY_DRAIN", "2")
    monkeypatch.setenv("CRDTSTATE_RELAY_CONFIG_HEARTBEAT", "3")
    monkeypatch.setenv("CRDTSTATE_RELAY_LIMITS_HALF_OPEN", "16")
    monkeypatch.setenv("CRDTSTATE_RELAY_STORE", "")

    code, out, err = run(f"relay --config {file} --drain 0 --check-config")

    assert (code, err) == (0, "")
    found = tomllib.loads(out)
    assert found["listen"] == "ws://127.0.0.1:8765" and "store" not in found
    assert (found["name"], found["durability"], found["drain"]) == ("varied", "power", 0)
    assert found["peers"] == ["ws://10.0.0.5:1"]
    assert (found["config"]["heartbeat"], found["config"]["outbox_bytes"]) == (3, 4096)
    assert found["config"]["link_timeout"] == 10
    assert (found["limits"]["half_open"], found["limits"]["spare_loopback"]) == (16, False)
    for line in (
        "drain = 0.0  # --drain",
        'name = "varied"  # CRDTSTATE_RELAY_NAME',
        f'durability = "power"  # {file}',
        "# store is not set",
        "heartbeat = 3  # CRDTSTATE_RELAY_CONFIG_HEARTBEAT",
        "link_timeout = 10.0  # default",
    ):
        assert line in lines(out)

    again = tmp_path / "again.toml"
    again.write_text(out)
    monkeypatch.setenv("CRDTSTATE_RELAY_CONFIG", str(again))
    told = json.loads(run("relay --check-config --json").out)
    assert told["sources"]["durability"] == str(again) and told["json"] is True
    # TOML has no null.
    set_ = {key: value for key, value in told["config"].items() if value is not None}
    assert set_ == found["config"] and told["limits"] == found["limits"]


def test_each_setting_can_come_from_everywhere(run, tmp_path, monkeypatch):
    texts = {
        "listen": ("ws://127.0.0.1:0", "ws://127.0.0.1:0"),
        "advertise": ("wss://relay.example/mesh", "wss://relay.example/mesh"),
        "mesh": ("relay.join", "relay.join"),
        "token-file": ("relay.token", "relay.token"),
        "store": ("a.db", "a.db"),
        "peers": (["ws://a:1", "ws://b:1"], "ws://a:1, ws://b:1"),
        "checkpoints": (["memory://", "sqlite:///c.db"], "memory:// sqlite:///c.db"),
        "origins": (["https://a.example", "http://[::1]:80"], "https://a.example http://[::1]:80"),
        "modules": (["json", "re"], "json re"),
        "durability": ("power", "power"),
        "name": ("n", "n"),
        "drain": (0.5, "0.5"),
        "attached": (True, "true"),
        "json": (True, "1"),
    }
    assert {*texts, "tls-certificate", "tls-key"} == {key.replace("_", "-") for key in KEYS}
    file = tmp_path / "relay.toml"
    file.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, (v, _) in texts.items()))

    filed = json.loads(run(f"relay --check-config --config {file}").out)
    for key, (_, text) in texts.items():
        monkeypatch.setenv(f"CRDTSTATE_RELAY_{key.upper().replace('-', '_')}", text)
    varied = json.loads(run("relay --check-config").out)

    for found in (filed, varied):
        assert {key: found[key] for key in texts} == {key: v for key, (v, _) in texts.items()}
    assert set(filed["sources"].values()) == {str(file)}
    assert {source.partition("RELAY")[0] for source in varied["sources"].values()} == {"CRDTSTATE_"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("sore = 'x'", "unknown key 'sore'; there are advertise, attached, checkpoints, drain, "),
        ("[config]\nheart = 1", "unknown key 'heart' in [config]; there are "),
        ("[relay]", "unknown key 'relay'"),
        ("config = 3", "config is a table: write [config]"),
        ("listen =", "not valid TOML: "),
        ("listen = 8765", "listen must be a string, not 8765"),
        ("listen = '8765'", "listen must be a URL like ws://127.0.0.1:8765, not '8765'"),
        ("peers = 'ws://a:1'", "peers must be a list of strings, not 'ws://a:1'"),
        ("peers = ['ws://a:1', 'b']", "peers must be a URL like ws://127.0.0.1:8765, not 'b'"),
        ("origins = ['a.example']", "origins must be an origin, such as https://app.example, not "),
        ("durability = 'hope'", 'durability must be "process" or "power", not \'hope\''),
        ("checkpoints = ['ftp://x']", "checkpoints: 'ftp://x' is no tier: there are memory://"),
        ("checkpoints = ['memory://', 'memory://']", "checkpoints names 1 to 8 tiers, each once"),
        ("drain = '5'", "drain must be a number, not '5'"),
        ("drain = nan", "drain must be a number from 0 to 600, not nan"),
        ("drain = true", "drain must be a number, not True"),
        ("attached = 1", "attached must be true or false, not 1"),
        ("name = ''", "name must be 1 to 100 printable characters, not ''"),
        ("store = '/tmp'", "store must be the path of a file, not '/tmp'"),
        ("[config]\nlog_bytes = 1.5", "config.log_bytes must be a whole number, not 1.5"),
        ("[config]\nlog_bytes = '1'", "config.log_bytes must be a whole number, not '1'"),
        ("[config]\nheartbeat = -1", "config.heartbeat: Config.heartbeat must be a number above 0"),
        ("tls-key = 'k'", "tls-key needs tls-certificate as well"),
        ("tls-certificate = 'c'", "tls-certificate: only wss:// takes it, not ws://127.0.0.1:8765"),
        ("listen = 'wss://localhost:1'", "listen: wss:// needs tls-certificate and tls-key"),
        (
            "listen = 'wss://localhost:1'\ntls-certificate = 'absent'",
            "tls-certificate 'absent': No such file or directory",
        ),
    ],
)
def test_a_wrong_setting_is_named_on_one_line(run, tmp_path, content, error):
    file = tmp_path / "relay.toml"
    file.write_text(content + "\n")

    code, out, err = run(f"relay --config {file}")

    assert (code, out) == (2, "")
    assert err.startswith("crdtstate: ") and err.count("\n") == 1
    assert error in err and str(file) in err


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("SORE", "x", "unknown variable CRDTSTATE_RELAY_SORE; there are CRDTSTATE_RELAY_LISTEN, "),
        ("DRAIN", "soon", "CRDTSTATE_RELAY_DRAIN must be a number, not 'soon'"),
        ("ATTACHED", "maybe", "CRDTSTATE_RELAY_ATTACHED must be true or false, not 'maybe'"),
        ("CONFIG_LOG_BYTES", "1.5", "CRDTSTATE_RELAY_CONFIG_LOG_BYTES must be a whole number"),
        ("CONFIG_HEARTBEAT", "9", "CRDTSTATE_RELAY_CONFIG_HEARTBEAT: Config.link_timeout must be"),
        ("CONFIG", "absent.toml", "absent.toml: No such file or directory"),
    ],
)
def test_so_is_a_wrong_variable(run, monkeypatch, variable, value, error):
    monkeypatch.setenv(f"CRDTSTATE_RELAY_{variable}", value)

    code, out, err = run("relay")

    assert (code, out) == (2, "")
    assert err.startswith(f"crdtstate: {error}") and err.count("\n") == 1


def test_without_the_extra_settings_are_the_same(tmp_path):
    file = tmp_path / "relay.toml"
    file.write_text('name = "filed"\n')
    told = []
    for bare in (False, True):
        flags = (
            "--config",
            str(file),
            "--drain",
            "0",
            "--peer",
            "ws://localhost:1",
            "--check-config",
        )
        with start("relay", *flags, bare=bare) as process:
            told.append(process.communicate(timeout=20))

    assert told[0] == told[1]
    assert 'name = "filed"' in told[0][0] and "drain = 0.0  # --drain" in told[0][0]

    file.write_text("sore = 1\n")
    with start("relay", "--config", str(file), bare=True) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"crdtstate: {file}: unknown key 'sore'; ") and err.count("\n") == 1


def test_a_relay_can_show_a_certificate(tmp_path):
    certificate, key = tmp_path / "relay.crt", tmp_path / "relay.key"
    command = [*CERTIFICATE.split(), "-addext", SAN, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    flags = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    trust = ssl.create_default_context(cafile=certificate)

    with start("relay", "--listen", "wss://127.0.0.1:0", "--json", *flags) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        assert address.startswith("wss://127.0.0.1:")
        url = address.replace("wss", "https") + "/healthz"
        with urllib.request.urlopen(url, context=trust, timeout=20) as answer:
            assert json.load(answer)["ready"]
        process.terminate()
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_of_a_file_can_be_used(run):
    found = json.loads(run(f"relay --config {EXAMPLES / 'relay.toml'} --check-config --json").out)

    assert (found["store"], found["name"], found["drain"]) == ("relay.db", "relay-1", 5)


def test_the_unit_for_systemd_starts_what_there_is(run, tmp_path):
    unit = EXAMPLES / "crdtstate-relay.service"
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment]
    found.read(unit)
    service = found["Service"]
    program, command, *flags = shlex.split(service["ExecStart"])
    known = run("relay --help").out

    assert (Path(program).name, command) == ("crdtstate", "relay")
    assert flags and all(flag in known for flag in flags if flag.startswith("--"))
    assert Path(flags[flags.index("--config") + 1]).name == "relay.toml"
    assert (service["Type"], service["Restart"]) == ("notify", "on-failure")
    assert int(service["TimeoutStopSec"]) > Settings().drain + 5 < int(service["WatchdogSec"])

    if analyze := shutil.which("systemd-analyze"):
        # It looks for the program, which is not installed here.
        text = unit.read_text().replace(program, sys.executable)
        checked = tmp_path / unit.name
        checked.write_text(text)
        result = subprocess.run([analyze, "verify", str(checked)], capture_output=True, text=True)
        assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_simulate_reports_its_campaign(run):
    result = run("simulate --agents 3 --seed 7 --seeds 2 --changes 10 --no-faults --json")

    report = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    assert (report["seeds"], report["failures"]) == (2, [])
    assert {"redundancy", "delivery_ms", "last_ms", "bytes_per_change", "trace"} <= report.keys()
    assert lines(run("simulate --changes 5 --no-faults").out)[0] == "seeds             1"


def start(*arguments: str, bare: bool = False) -> subprocess.Popen[str]:
    how = ["-c", BARE] if bare else ["-m", "crdtstate"]
    return subprocess.Popen(
        [sys.executable, "-W", "error", *how, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_simulation_that_is_terminated_ends_quietly():
    with start("simulate", "--seeds", "100000") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (pids := children.read_text().split()):
            assert process.poll() is None
        process.terminate()
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out, err) == (143, "", "")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("bare", [False, True], ids=["with the extra", "without"])
def test_a_relay_says_who_can_reach_it_and_what_it_keeps(tmp_path, bare):
    def noted(*arguments: str) -> str:
        with start("relay", "--listen", *arguments, bare=bare) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.terminate()
            return process.communicate(timeout=20)[1]

    assert noted(LOCAL, "--store", str(tmp_path / "relay.db")) == noted(LOCAL, "--json") == ""
    assert noted(LOCAL) == "crdtstate: everything is kept in memory only; see --store\n"
    words = tmp_path / "words"
    words.write_text("what all of us know")
    words.chmod(0o600)
    warning = noted("ws://0.0.0.0:0", "--json", "--mesh", str(words))
    assert warning.startswith("crdtstate: warning: what is said at ws://0.0.0.0:")
    assert warning.endswith(" is not encrypted; see wss://\n") and warning.count("\n") == 1


@pytest.mark.parametrize("bare", [False, True], ids=["with the extra", "without"])
@pytest.mark.parametrize("flag", ["--listen ws://0.0.0.0:0", "--peer ws://10.0.0.5:1"])
def test_a_relay_without_a_mesh_stays_on_this_machine_and_says_how_to_make_one(flag, bare):
    with start("relay", *flag.split(), bare=bare) as process:
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert f"crdtstate: {flag.split()[0]}: {flag.split()[1]}: beyond this machine" in err
    assert "`crdtstate mesh create`" in err and "`crdtstate invite NAME`" in err


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("", 2, "pip install 'crdtstate[cli]'"),
        ("bogus", 2, "pip install 'crdtstate[cli]'"),
        ("--bogus", 2, "usage: crdtstate"),
        ("relay --listen nonsense", 2, "'nonsense' is not a URL like ws://127.0.0.1:8765"),
        ("relay --peer http://127.0.0.1:80", 2, "is not a URL like"),
        ("relay --listen ws://127.0.0.1:99999", 2, "is not a URL like"),
        ("--version", 0, f"crdtstate {__version__}\n"),
        ("--help", 0, "Only relays run like this: the command line needs more packages"),
    ],
)
def test_without_the_extra_wrong_usage_is_2_as_well(monkeypatch, line, code, said):
    monkeypatch.setenv("COLUMNS", "200")
    with start(*line.split(), bare=True) as process:
        out, err = process.communicate(timeout=20)

    assert process.returncode == code
    assert said in (err if code else out) and not (out if code else err)


@pytest.mark.parametrize("mode", ["text", "json"])
def test_watch_prints_changes_until_ctrl_c(run, relay, mode):
    run(f"set wa/map/{mode}/before 1")
    flags = ["--json"] if mode == "json" else []
    with start("watch", f"wa/map/{mode}", "--peer", relay, *flags) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"crdtstate: watching wa/map/{mode} at {relay}\n"
        with blocking.Replica("agent-7", peers=[relay]) as replica:
            replica.document("wa").counter("other").increment()
            replica.document("wa").map(mode)["goal"] = "[red]\x1b[0m"
            replica.synced(timeout=20)
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out, err) == (130, "", "")
    if mode == "text":
        assert line == 'wa/map/text/goal = "[red]\\u001b[0m"  (agent-7)\n'
    else:
        assert json.loads(line) == {
            "document": "wa",
            "kind": "map",
            "name": "json",
            "key": "goal",
            "value": "[red]\x1b[0m",
            "agent": "agent-7",
        }


def test_watch_says_when_it_loses_the_peer():
    with blocking.Replica("agent-7", listen=LOCAL) as replica:
        process = start("watch", "main/map/plan/goal", "--peer", str(replica.address))
        assert process.stderr is not None
        process.stderr.readline()
    with process:
        line = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)

    assert line == f"crdtstate: {replica.address}: they said: closing; dialling again\n"


def test_whoever_stops_reading_is_not_told_off(relay):
    with blocking.Replica("agent-7", peers=[relay]) as replica:
        replica.document("br").map("plan").update({f"key-{n}": "x" * 1000 for n in range(300)})
        replica.synced(timeout=20)
    with start("get", "br/map/plan", "--peer", relay) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()

    assert (process.returncode, err) == (1, "")


def test_on_a_terminal_nothing_hostile_comes_through(run, relay):
    """A pseudo-terminal gets what a person's would."""
    with blocking.Replica("agent-7", peers=[relay]) as replica:
        replica.document("tty").map("plan")["goal"] = "\x1b]0;owned\x07"
        replica.synced(timeout=20)
    ours, theirs = pty.openpty()
    line = "get tty/map/plan --timeout 30 --peer"
    command = [sys.executable, "-m", "crdtstate", *line.split(), relay]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:
            pass  # How Linux says that the other side is closed.
        os.close(ours)

    assert process.returncode == 0
    assert shown == b'goal = "\\u001b]0;owned\\u0007"\r\n'
