"""The relay: as a process with and without the extra, and what it answers to HTTP."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import websockets
from harness import asynchronous
from prometheus_client.parser import text_string_to_metric_families

from crdtstate import Config, PeerDisconnected, Replica, blocking
from crdtstate.credentials import open_host_credentials
from crdtstate.errors import WaitTimeout
from crdtstate.relay import digest, digests, holdings, live, metrics
from crdtstate.relay.pages import DISK_FREE_MIN, Site
from crdtstate.relay.tokens import token_of
from crdtstate.transports import HttpRequest, HttpStream, listen, websocket

LOCAL = "ws://127.0.0.1:0"

TOKEN = "what opens the pages"

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


def bearer() -> dict[str, str]:
    """What opens the pages of all relays on this machine."""
    return {"Authorization": f"Bearer {token_of(open_host_credentials())}"}


def request(address: str, page: str, **headers: str) -> urllib.request.Request:
    return urllib.request.Request(address.replace("ws:", "http:") + page, headers=headers)


def fetch(address: str, page: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request(address, page, **bearer()), timeout=10) as answer:
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
        assert "relay-2" in [peer.agent for peer in b.peers()]


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
    for option in ("--listen", "--store", "--peer", "--durability", "--attached", "--config"):
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


@asynccontextmanager
async def site(**options: Any) -> AsyncGenerator[Site, None]:
    """A relay in this process."""
    replica = Replica("relay", role="relay", http=lambda asked: made.answer(asked), **options)
    made = Site(replica, lambda token: token == TOKEN)
    async with replica:
        yield made


@asynchronous
async def test_one_that_is_closed_is_not_healthy():
    async with site() as relay:
        assert relay.health()["ready"]

    answer = relay.answer(HttpRequest("/healthz"))
    assert answer.status == 503
    assert json.loads(answer.body)["why"] == ["it is closing"]


@asynchronous
async def test_one_whose_store_fails_says_why_it_is_not_healthy(tmp_path):
    async with site(store=tmp_path / "relay.db") as relay:
        store = relay.replica._store
        assert store.failure is None
        store.failure = OSError("the disk is full")

        answer = relay.answer(HttpRequest("/healthz"))
        measured = metrics_of(relay)
        store.failure = None

    assert answer.status == 503
    assert json.loads(answer.body)["why"] == ["the store fails: the disk is full"]
    assert measured["crdtstate_ready"] == 0 and measured["crdtstate_store_failing"] == 1


@asynchronous
async def test_one_whose_disk_is_nearly_full_says_so_before_it_fails(tmp_path, monkeypatch):
    async with site(store=tmp_path / "relay.db") as relay:
        left = SimpleNamespace(free=DISK_FREE_MIN - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: left)

        found = relay.health()

    assert found["why"] == [f"the disk is nearly full: {left.free:,} bytes are left"]


# Metrics


def parsed(text: str) -> dict[str, float]:
    """Every sample, by its name and labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter"), family
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found, f"{name} is there twice"
            found[name] = sample.value
    return found


def metrics_of(relay: Site) -> dict[str, float]:
    answer = relay.answer(HttpRequest("/metrics", TOKEN))
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(answer.body.decode())


def fetch_metrics(address: str) -> dict[str, float]:
    with urllib.request.urlopen(request(address, "/metrics", **bearer()), timeout=10) as answer:
        return parsed(answer.read().decode())


def test_prometheus_can_read_how_it_is_doing(tmp_path):
    evil = 'evil"} 1 # {a="\\"'
    with (
        running("--store", str(tmp_path / "relay.db")) as (_, address),
        blocking.Replica(evil, peers=[address]) as a,
        blocking.Replica("b", peers=[address]) as b,
    ):
        for number in range(5):
            a.document(evil).map("plan")[f"key-{number}"] = "x" * 100
            a.synced(timeout=20)
        b.wait_for(a.version(), timeout=20)
        b.synced(timeout=20)

        found = fetch_metrics(address)

        name = f"crdtstate_peer_lag_changes{{agent={evil},role=agent,writer={a.writer:x}}}"
        assert found[name] == found[name.replace("changes", "seconds", 1)] == 0
        assert found["crdtstate_peers{role=agent}"] == 2
        assert found["crdtstate_members{role=agent,state=up}"] == 2
        assert found["crdtstate_members{role=relay,state=up}"] == 1
        assert found["crdtstate_members{role=agent,state=down}"] == 0
        assert found["crdtstate_received_changes_total"] == 5
        assert found["crdtstate_own_changes_total"] == 0
        assert found["crdtstate_sent_changes_total"] == 5
        assert found["crdtstate_received_bytes_total"] > 500
        assert found["crdtstate_sent_bytes_total"] > 500
        assert found["crdtstate_delivered_changes_total"] == 5
        assert found[f"crdtstate_document_changes{{document={evil}}}"] == 5
        assert found[f"crdtstate_document_bytes{{document={evil},part=live}}"] > 500
        assert 0 < found[f"crdtstate_document_bytes{{document={evil},part=dead}}"] < 1000
        journal = found[f"crdtstate_document_journal_bytes{{document={evil}}}"]
        assert journal == found["crdtstate_journal_bytes"] > 500
        assert found["crdtstate_store_file_bytes{file=database}"] > 0
        assert found["crdtstate_events_total{event=PeerConnected}"] == 2
        assert found["crdtstate_ready"] == 1 and found["crdtstate_conflicts"] == 0
        assert found["process_start_time_seconds"] > 1.7e9


def test_a_label_says_whatever_it_is():
    hostile = ['"', "\\", "\n", '\\"\n', "a\nb 1\n", "{}", "\r", "\u2028", "\\n", ""]
    family = metrics.Family("gauge", "m", "Of\nlines\\.", [({"x": each}, 1) for each in hostile])

    (found,) = text_string_to_metric_families(metrics.encode([family]).decode())

    assert [sample.labels["x"] for sample in found.samples] == hostile
    assert found.documentation == "Of\nlines\\."
    assert metrics.encode([metrics.Family("gauge", "m", "h", [({"x": "\ud800"}, 1)])])


@asynchronous
async def test_only_the_largest_documents_are_told_apart(monkeypatch):
    monkeypatch.setattr(metrics, "DOCUMENTS_MAX", 3)
    async with site() as relay:
        for number in range(6):
            relay.replica.document(f"doc-{number}").map("plan")["key"] = "x" * 100 * number
        relay.replica.version()

        found = metrics_of(relay)

    told = {name: value for name, value in found.items() if "document_changes{" in name}
    assert told == {
        "crdtstate_document_changes{document=doc-5}": 1,
        "crdtstate_document_changes{document=doc-4}": 1,
        "crdtstate_document_changes{document=doc-3}": 1,
        "crdtstate_document_changes{document=}": 3,
    }


class Hand:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynchronous
async def test_a_document_is_looked_at_again_when_it_has_changed_and_rested():
    hand, looks = Hand(), []

    def look(document: Any) -> int:
        looks.append(document.name)
        hand.now += 0.01
        return len(looks)

    async with site() as relay:
        plan = relay.replica.document("plan")
        plan.map("plan")["key"] = 1
        relay.replica.version()
        known = holdings.Looks(look, hand)
        assert known.of([plan]) == known.of([plan]) == {"plan": 1}

        plan.map("plan")["key"] = 2
        relay.replica.version()
        assert known.of([plan]) == {"plan": 1}
        hand.now += 0.01 * holdings.REST
        assert known.of([plan]) == {"plan": 2}


@asynchronous
async def test_looking_at_many_documents_is_done_a_part_at_a_time():
    hand = Hand()

    def look(document: Any) -> str:
        hand.now += holdings.BUDGET / 2.5
        return document.name

    async with site() as relay:
        documents = [relay.replica.document(f"doc-{number}") for number in range(7)]
        known = holdings.Looks(look, hand)

        assert [len(known.of(documents)) for _ in range(4)] == [3, 6, 7, 7]


@asynchronous
async def test_values_of_any_size_and_kind_are_shown_short():
    async with site() as relay:
        plan = relay.replica.map("plan")
        values = [10**4000, [10**4000] * 100, "x" * 10**6, b"y" * 10**6, {"a": {"b": {"c": 1}}}]
        plan.update({str(number): value for number, value in enumerate(values)})

        found = [holdings.shown(plan[key]) for key in sorted(plan)]

    assert all(len(text) <= 400 for text in found)
    assert found[4] == "{'a': {'b': {'c': 1}}}"


# The stream of the page


async def settled(is_so: Callable[[], bool]) -> None:
    """Give way to the loop until something is so."""
    for _ in range(100_000):
        if is_so():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never comes about")


def sections(text: str | bytes) -> dict[str, Any]:
    return json.loads(text)


@asynccontextmanager
async def page_of(address: str | None, token: str = TOKEN) -> AsyncGenerator[Any, None]:
    """The stream of a relay's page, opened as the page does."""
    async with websockets.connect(f"{address}/live", proxy=None) as page:
        await page.send(token)
        yield page


@asynchronous
async def test_the_stream_tells_everything_once_and_then_what_changed():
    async with site(listen=LOCAL) as relay, page_of(relay.replica.address) as page:
        first = sections(await page.recv())
        assert first.keys() == {"relay", "members", "documents", "conflicts", "events"}
        assert [member["agent"] for member in first["members"]] == ["relay"]

        relay.replica.map("plan")["goal"] = "ship it"
        relay.replica.version()
        second = sections(await page.recv())
        assert second["documents"]["rows"][0]["name"] == "main"
        assert second["relay"]["changes"] == 1 and "members" not in second

        assert relay.live.viewers == 1
        async with Replica("a", peers=[relay.replica.address]) as a:
            while "members" not in (third := sections(await page.recv())):
                pass
            a.map("plan")["goal"] = "other"
        assert [member["agent"] for member in third["members"]] == ["a", "relay"]
    assert relay.live.viewers == 0


@asynchronous
async def test_only_so_many_may_watch_and_those_who_leave_make_room(monkeypatch):
    monkeypatch.setattr(live, "VIEWERS_MAX", 2)
    monkeypatch.setattr("crdtstate.relay.pages.VIEWERS_MAX", 2)
    async with site(listen=LOCAL) as relay:
        address = relay.replica.address
        async with page_of(address) as one, page_of(address) as two:
            await one.recv(), await two.recv()

            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(f"{address}/live", proxy=None)
            assert refused.value.response.status_code == 503
        await settled(lambda: relay.live.viewers == 0)

        async with page_of(address) as three:
            assert sections(await three.recv())


@asynchronous
async def test_the_stream_is_for_those_who_know_the_token():
    async with site(listen=LOCAL) as relay:
        for wrong in ("", "what opens", TOKEN + " ", TOKEN.upper(), "\u2028"):
            async with page_of(relay.replica.address, wrong) as page:
                with pytest.raises(websockets.ConnectionClosed):
                    await page.recv()
                assert (page.close_code, page.close_reason) == (4401, "it needs the token")
        async with websockets.connect(f"{relay.replica.address}/live", proxy=None) as page:
            await page.send(TOKEN.encode())
            with pytest.raises(websockets.ConnectionClosed):
                await page.recv()
        assert relay.live.viewers == 0


def test_other_users_of_the_machine_are_told_its_health_and_nothing_else():
    with running() as (_, address):
        for page in ("/metrics", "/status", "/digest"):
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic eDp4"}):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request(address, page, **headers), timeout=10)
                with refused.value as answer:
                    assert answer.code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                    assert b"relay" not in answer.read()
            assert asked(address, page, f"Host: {address[5:]}") == 401
        for page in ("/", "/page.js", "/healthz"):
            urllib.request.urlopen(request(address, page), timeout=10).close()


def test_a_relay_of_members_has_a_token_of_its_own(tmp_path):
    root, join = tmp_path / "root", tmp_path / "relay.join"
    for command in (
        ["mesh", "create", str(root)],
        ["invite", "relay", "--root", str(root), "--roles", "*:rw", "--out", str(join)],
    ):
        with start(*command) as process:
            assert process.wait(timeout=20) == 0, process.communicate()
    store, operator = tmp_path / "relay.db", tmp_path / "ops.join"
    with start("invite", "ops", "--root", str(root), "--out", str(operator)) as process:
        assert process.wait(timeout=20) == 0, process.communicate()
    told = tmp_path / "relay.db.token"

    def say(*command: str) -> tuple[int, str]:
        with start(*command, "--peer", address, "--mesh", str(operator)) as process:
            out, err = process.communicate(timeout=20)
            return process.returncode, out + err

    with running("--store", str(store), "--mesh", str(join)) as (_, address):
        token = told.read_text().strip()
        assert told.stat().st_mode & 0o777 == 0o600 and len(token) >= 43
        assert fetch(address, "/status")[0] == 401
        opens = request(address, "/status", Authorization=f"Bearer {token}")
        with urllib.request.urlopen(opens, timeout=10) as answer:
            assert json.load(answer)["agent"] == "relay"

        # A command is the member that its token names, whatever it calls itself.
        assert say("set", "main/map/plan/goal", "ship it")[0] == 0
        assert say("get", "main/map/plan/goal") == (0, "ship it\n")
        assert "agent      relay (relay)" in say("status")[1]
        code, text = say("peers")
        assert code == 1 and "--token-file" in text
        assert say("peers", "--token-file", str(told)) == (
            0,
            "AGENT  ROLE  LAG  QUEUED BYTES  ADDRESS\n",
        )
        code, text = say("page", "--token-file", str(told))
        assert (code, text) == (0, f"{address.replace('ws:', 'http:')}/#token={token}\n")
        assert say("page")[0] == 1

    with start("get", "main/map/plan/goal", "--peer", "ws://10.0.0.5:1") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "") and "`crdtstate mesh create`" in err


@asynchronous
async def test_who_was_refused_is_counted_by_why():
    async with site(listen=LOCAL) as relay:
        async with websockets.connect(f"{relay.replica.address}/mesh", proxy=None) as stranger:
            await stranger.send(b"let me in")
            with pytest.raises(websockets.ConnectionClosed):
                await stranger.recv()
        found = metrics_of(relay)

    assert found["crdtstate_refused_total{reason=not-admitted}"] == 1
    assert found["crdtstate_throttled_seconds_total"] == 0


def test_the_token_is_in_no_log_however_much_is_logged(tmp_path):
    script = "import logging; logging.basicConfig(level=1)\n" + BARE
    script = script.replace('sys.modules["typer"] = sys.modules["rich"] = None\n', "")
    listening = ["relay", "--listen", LOCAL]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, *listening], **pipes) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        (token,) = (each.removeprefix("Bearer ") for each in bearer().values())
        assert fetch(address, "/status")[0] == 200

        async def watch() -> None:
            async with page_of(address, token) as page:
                await page.recv()

        asyncio.run(watch())
        with blocking.Replica("a", peers=[address]) as a:
            a.map("plan")["goal"] = "ship it"
            a.synced(timeout=20)
        code, out, err = end(process, signal.SIGTERM)

    assert code == 0 and "GET /live" in err and "Authorization" in err
    secret = open_host_credentials().secrets[0]
    for hidden in (token, repr(secret)[2:-1], secret.hex()):
        assert hidden not in out + err


@asynchronous
async def test_a_viewer_that_does_not_keep_up_or_speaks_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(websocket, "STREAM_TIMEOUT", 0.1)
    ended = asyncio.Event()

    async def flood() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "x" * 10**6
        finally:
            ended.set()

    async def accept(connection: Any) -> None:
        raise AssertionError("this is no part of the mesh")

    listener = await listen(LOCAL, accept, http=lambda _: HttpStream(flood))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(listener.address[-5:]))
    key = "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13"
    head = f"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n{key}"
    writer.write(f"{head}\r\nConnection: Upgrade\r\n\r\n".encode())

    await ended.wait()
    writer.close()
    ended.clear()
    async with websockets.connect(f"{listener.address}/live", proxy=None) as talker:
        await talker.send("let me in")
        await ended.wait()
    await listener.close()


@asynchronous
async def test_those_who_arrive_while_it_closes_are_not_left_behind():
    async def accept(connection: Any) -> None:
        await connection.receive()

    for turns in range(8):
        listener = await listen(LOCAL, accept)
        host, port = listener.address.removeprefix("ws://").split(":")
        arriving = [socket.create_connection((host, int(port))) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        closing = asyncio.create_task(listener.close())
        await asyncio.sleep(0)
        for each in arriving:
            each.close()
        await closing
    # What was left behind would warn of it, which is an error.
    gc.collect()


def asked(address: str, path: str, *headers: str) -> int:
    """The status that a request for a websocket gets."""
    host, port = address.removeprefix("ws://").split(":")
    key = ("Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==", "Sec-WebSocket-Version: 13")
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", *key)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        lines = (f"GET {path} HTTP/1.1", *headers, *upgrade, "", "")
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(100).split()[1])


def test_only_the_relays_own_page_gets_the_stream_and_no_page_the_mesh():
    with running() as (_, address):
        host = address.removeprefix("ws://")
        port = host.rpartition(":")[2]
        for headers, code in (
            ((f"Host: {host}",), 101),
            ((f"Host: {host}", f"Origin: http://{host}"), 101),
            ((f"Host: LOCALHOST:{port}", f"Origin: http://localhost:{port}"), 101),
            ((f"Host: {host}", f"Origin: https://{host}"), 101),
            ((f"Host: {host}", f"Origin: http://localhost:{port}"), 403),
            ((f"Host: {host}", "Origin: http://127.0.0.1"), 403),
            ((f"Host: {host}", "Origin: https://evil.example"), 403),
            ((f"Host: {host}", "Origin: null"), 403),
            ((f"Host: {host}", "Origin:"), 403),
            ((f"Host: {host}", f"Origin: file://{host}"), 403),
            ((f"Host: {host}", f"Origin: http://{host}", "Origin: https://evil.example"), 400),
            ((f"Host: {host}", f"Host: {host}"), 421),
            ((f"Host: {host}", "Sec-Fetch-Site: cross-site"), 403),
            ((f"Host: {host}", "Sec-Fetch-Site: same-site"), 403),
            ((f"Host: {host}", "Sec-Fetch-Site: same-origin"), 101),
            (("Host: evil.example", "Origin: http://evil.example"), 421),
            ((), 421),
        ):
            assert asked(address, "/live", *headers) == code, headers
        for path in ("/mesh", "/"):
            assert asked(address, path, f"Host: {host}") == 101
            for browser in (f"Origin: http://{host}", "Sec-Fetch-Site: same-origin"):
                assert asked(address, path, f"Host: {host}", browser) == 403
        for path in ("/healthz", "/page.js", "/live/more"):
            assert asked(address, path, f"Host: {host}") == 404
        assert fetch(address, "/live") == (426, "Open a websocket.\n")


# Draining


@contextmanager
def one_that_lags(address: str) -> Iterator[Callable[[], None]]:
    """A connected peer that takes nothing in, and something it lacks; and what lets it catch up."""
    with (
        blocking.Replica("busy", peers=[address], config=Config(link_timeout=60.0)) as busy,
        blocking.Replica("a", peers=[address]) as a,
        ExitStack() as held,
    ):
        busy.synced(timeout=20)
        held.enter_context(busy.transaction())
        a.map("plan")["goal"] = "ship it"
        a.synced(timeout=20)
        version = a.version()

        def catch_up() -> None:
            held.close()
            busy.wait_for(version, timeout=20)

        yield catch_up


def until_it_drains(address: str) -> Any:
    while (found := fetch(address, "/healthz"))[0] == 200:
        pass
    return found


def test_told_to_stop_it_says_so_and_waits_for_those_who_lag():
    with running("--drain", "60") as (process, address), one_that_lags(address) as catch_up:
        process.send_signal(signal.SIGTERM)
        code, said = until_it_drains(address)
        assert code == 503 and json.loads(said)["why"] == ["draining"]
        # Longer than closing alone would take.
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert fetch(address, "/healthz")[0] == 503

        catch_up()

        assert process.wait(timeout=20) == 0


def test_it_waits_no_longer_than_it_may():
    with running("--drain", "0.3") as (process, address), one_that_lags(address):
        assert end(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path, second):
    store = tmp_path / "relay.db"
    with running("--drain", "60", "--store", str(store)) as (process, address):
        with one_that_lags(address):
            process.send_signal(signal.SIGTERM)
            until_it_drains(address)

            assert end(process, second)[0] == -second

    with blocking.Replica("reader", store=store) as kept:
        assert kept.map("plan")["goal"] == "ship it"


def test_nothing_it_has_acknowledged_is_lost_and_agents_find_it_again(tmp_path):
    store = str(tmp_path / "relay.db")
    acknowledged: list[int] = []
    stopped = threading.Event()

    def write(agent: blocking.Replica) -> None:
        number = 0
        while not stopped.is_set():
            agent.map("plan")[f"key-{number}"] = number
            try:
                agent.synced(timeout=0.2)
            except WaitTimeout:
                continue  # The relay is away; the write counts when it has been told.
            acknowledged.append(number)
            number += 1

    with blocking.Replica("reader", config=Config(reconnect_max=0.2)) as reader:
        with running("--store", store) as (process, address):
            writer = blocking.Replica("writer", peers=[address], config=Config(reconnect_max=0.2))
            with writer:
                reader.connect(address)
                writing = threading.Thread(target=write, args=[writer])
                writing.start()
                while len(acknowledged) < 50:
                    assert writing.is_alive()
                assert end(process, signal.SIGTERM) == (0, "", "")
                before = len(acknowledged)
                restarted = start("relay", "--listen", address, "--store", store)
                try:
                    while len(acknowledged) < before + 50:
                        assert writing.is_alive() and restarted.poll() is None
                finally:
                    stopped.set()
                    writing.join()
        # The writer is gone; the relay has it all, and the reader gets it from there.
        with blocking.Replica("late", peers=[address]) as late:
            late.synced(timeout=20)
            reader.wait_for(late.version(), timeout=20)
            for replica in (late, reader):
                assert set(acknowledged) <= set(replica.map("plan").values())
        assert end(restarted, signal.SIGTERM)[0] == 0


def test_systemd_is_told_what_it_does(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(path)
        told.settimeout(20)
        env = {**os.environ, "NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000"}
        with running("--store", str(tmp_path / "relay.db"), env=env) as (process, _):
            assert told.recv(1000) == b"READY=1"
            for _ in range(3):
                assert told.recv(1000) == b"WATCHDOG=1\nSTATUS=0 peers, 0 documents"
            process.send_signal(signal.SIGTERM)
            while (last := told.recv(1000)).startswith(b"WATCHDOG=1"):
                pass
            assert last == b"STOPPING=1\nSTATUS=draining"
            assert process.wait(timeout=20) == 0


# Digests


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
