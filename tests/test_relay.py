"""The relay: as a process with and without the extra, and what it answers to plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from harness import asynchronous

from crdtstate import Config, PeerDisconnected, Replica, blocking
from crdtstate.relay import digest, digests, pages

LOCAL = "ws://127.0.0.1:0"

# Runs ``python -m crdtstate`` where typer and rich cannot be imported.
BARE = """
import runpy, sys
sys.modules["typer"] = sys.modules["rich"] = None
runpy.run_module("crdtstate", run_name="__main__", alter_sys=True)
"""


def start(*arguments: str, bare: bool = False, **options: Any) -> subprocess.Popen[str]:
    how = ["-c", BARE] if bare else ["-m", "crdtstate"]
    return subprocess.Popen(
        [sys.executable, "-W", "error", *how, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@contextmanager
def running(*arguments: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A relay, and the address that it announces."""
    with start("relay", "--listen", LOCAL, *arguments, **options) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("relay listening on ws://127.0.0.1:"), process.communicate()
            yield process, line.split()[-1]
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def fetch(address: str, page: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address.replace("ws:", "http:") + page, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


@pytest.mark.parametrize(
    ("bare", "number"),
    [(False, signal.SIGTERM), (True, signal.SIGINT)],
    ids=["with the extra", "without"],
)
def test_it_joins_agents_keeps_what_it_gets_and_ends_in_order(tmp_path, bare, number):
    store = tmp_path / "relay.db"
    with running("--store", str(store), bare=bare) as (process, address):
        reasons: list[str] = []
        with (
            blocking.Replica("a", peers=[address]) as a,
            blocking.Replica("b", peers=[address]) as b,
        ):
            a.on(PeerDisconnected, lambda event: reasons.append(event.reason))
            a.map("plan")["goal"] = "ship it"
            a.synced(timeout=20)
            b.wait_for(a.version(), timeout=20)
            assert b.map("plan")["goal"] == "ship it"
            assert [(p.agent, p.role) for p in a.peers()] == [("relay", "relay")]

            assert end(process, number) == (0, "", "")
            assert a.call(lambda _: reasons) == ["they said: closing"]

    with blocking.Replica("reader", store=store) as kept:
        assert kept.map("plan")["goal"] == "ship it"


def test_relays_that_are_peers_are_one_mesh():
    with (
        running() as (_, one),
        running("--peer", one, "--name", "relay-2") as (_, two),
        blocking.Replica("a", peers=[one]) as a,
        blocking.Replica("b", peers=[two]) as b,
    ):
        a.counter("tokens").increment(3)
        b.wait_for(a.version(), timeout=20)

        assert b.counter("tokens").value == 3
        assert [peer.agent for peer in b.peers()] == ["relay-2"]


def test_it_ends_with_the_program_that_started_it():
    with running("--attached", stdin=subprocess.PIPE) as (process, _):
        out, err = process.communicate(timeout=20)

        assert (process.returncode, out) == (0, "")
        assert err == "crdtstate: everything is kept in memory only; see --store\n"


def test_it_announces_its_address_as_json():
    with start("relay", "--listen", LOCAL, "--json", bare=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]

        assert fetch(address, "/healthz")[0] == 200
        assert end(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("bare", [False, True], ids=["with the extra", "without"])
def test_what_keeps_it_from_starting_is_one_clear_line(tmp_path, bare):
    with running() as (_, address), start("relay", "--listen", address, bare=bare) as process:
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (1, "")
        assert err == f"crdtstate: {address}: something listens there already\n"

    store = str(tmp_path / "absent" / "relay.db")
    with start("relay", "--listen", LOCAL, "--store", store, bare=bare) as process:
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (1, "") and err.count("\n") == 1 and store in err


@pytest.mark.parametrize("arguments", [["get", "main/map/plan"], ["demo"], []])
def test_without_the_extra_other_commands_say_what_to_install(arguments):
    with start(*arguments, bare=True) as process:
        out, err = process.communicate(timeout=20)

    assert (process.returncode, out) == (2, "")
    assert err == (
        "crdtstate: the command line needs more packages: pip install 'crdtstate[cli]'\n"
    )


def test_without_the_extra_relay_explains_itself():
    with start("relay", "--help", bare=True, env={**os.environ, "COLUMNS": "80"}) as process:
        out, err = process.communicate(timeout=20)

    assert (process.returncode, err) == (0, "")
    for option in ("--listen", "--store", "--peer", "--durability", "--attached"):
        assert option in out


def test_it_tells_its_health_status_and_digests():
    with running() as (_, address), blocking.Replica("a", peers=[address]) as a:
        a.map("plan")["goal"] = "ship it"
        a.synced(timeout=20)

        code, health = fetch(address, "/healthz")
        assert (code, health["ready"], health["why"]) == (200, True, [])
        assert (health["agent"], health["peers"], health["documents"]) == ("relay", 1, 1)

        _, status = fetch(address, "/status")
        assert status["documents"] == {"main": 1} and status["version"] == str(a.version())
        assert [(p["agent"], p["lag"]) for p in status["peers"]] == [("a", 0)]

        assert fetch(address, "/digest") == (200, a.call(digests))
        assert fetch(address, "/nothing") == (404, "Nothing here.\n")


@asynchronous
async def test_one_that_is_closed_is_not_healthy():
    async with Replica("relay", role="relay") as replica:
        assert pages.health(replica)["ready"]

    answer = pages.answer(replica, "/healthz")
    assert answer is not None and answer.status == 503
    assert json.loads(answer.body)["why"] == ["it is closing"]


@asynchronous
async def test_one_whose_store_fails_says_why_it_is_not_healthy(tmp_path):
    async with Replica("relay", role="relay", store=tmp_path / "relay.db") as replica:
        assert replica._store.failure is None
        replica._store.failure = OSError("the disk is full")

        answer = pages.answer(replica, "/healthz")
        replica._store.failure = None

    assert answer is not None and answer.status == 503
    assert json.loads(answer.body)["why"] == ["the store fails: the disk is full"]


@asynchronous
async def test_digests_are_equal_where_the_content_is_and_only_there():
    config = Config(tidy_delay=0.01)
    async with (
        Replica("a", listen=LOCAL, config=config) as a,
        Replica("b", peers=[a.address], config=config) as b,
    ):
        a.map("plan")["goal"] = "left"
        b.map("plan")["goal"] = "right"
        b.counter("tokens").increment()
        while str(a.version()) != str(b.version()) or not a.map("plan").conflicts():
            await b.synced(timeout=20)
            await b.wait_for(a.version(), timeout=20)
        assert digests(a) == digests(b)

        before = digest(a.document("main"))
        a.map("plan")["other"] = 1
        assert digests(a) != digests(b) and digest(a.document("main")) != before
        assert digest(a.document("notes", shared=True)) is None
