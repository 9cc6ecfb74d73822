"""
Browsers that write with crdtstate.js, in Chromium as Debian has it.

Relays are processes, so that they can be killed. Screenshots go where ``CRDTSTATE_SCREENSHOTS``
says, to be looked at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from test_page import browser as browser
from test_relay import end, running, start

from crdtstate import blocking
from crdtstate.credentials import open_host_credentials
from crdtstate.relay.tokens import token_of

PATIENCE = 20
NODE = Path(__file__).parent / "node"
EXAMPLE = Path(__file__).parent.parent / "examples" / "browser_room.py"


@pytest.fixture(scope="module")
def relay() -> Iterator[str]:
    with running("--name", "relay-1") as (_, address):
        yield address


@contextmanager
def reader(name: str, address: str) -> Iterator[blocking.Replica]:
    with blocking.Replica(name, peers=[address]) as replica:
        yield replica


def host_token() -> str:
    return token_of(open_host_credentials())


def wait(replica: blocking.Replica, found: Any, document: str = "main") -> None:
    """Wait until a document reads like this."""
    inner = replica._replica

    def reads() -> bool:
        held = inner.find(document)
        return held is not None and bool(found(held))

    replica._wait(lambda: inner._wait_until(reads, f"{document} to change", PATIENCE))


# In Chromium, with crdtstate.js. `live` in a page is what it is connected to.

OPEN = """
async ([document, token, name]) => {
  const { connect, encode, decode, Refused, Unsure } = await import("/crdtstate.js")
  window.live = connect(document, { token, name })
  window.kinds = { Refused, Unsure }
  window.until = (check) => new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`not in time: ${check}`)), 20000)
    const look = () => { if (check()) { clearTimeout(timer); resolve() } }
    live.addEventListener("change", look)
    look()
  })
  await until(() => live.state === "live")
}
"""


@contextmanager
def page_of(browser: Browser, address: str, document: str, name: str) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    # Any page of the relay's own; this one has no scripts.
    page.goto(address.replace("ws:", "http:") + "/healthz")
    page.evaluate(OPEN, [document, host_token(), name])
    yield page
    assert complaints == []
    context.close()


def test_pages_and_python_write_maps_counters_registers_and_sets(browser, relay):
    with (
        reader("ann", relay) as ann,
        page_of(browser, relay, "main", "Eve <b>") as eve,
        page_of(browser, relay, "main", "Bob") as bob,
    ):
        eve.evaluate(
            """async () => {
              const done = [
                live.map("plan").set("goal", "ship it"),
                live.map("plan").set("odd", {deep: [1, 2.5, null, true]}),
                live.map("plan").set("big", 2n ** 70n),
                live.map("plan").set("bytes", new Uint8Array([0, 255])),
                live.counter("tokens").add(5),
                live.register("leader").set("eve"),
                live.set("skills").add("js"),
              ]
              // Seen before it is acknowledged.
              const seen = [live.map("plan").get("goal"), live.counter("tokens").value]
              if (`${seen}` !== "ship it,5") throw new Error("not at once")
              await Promise.all(done)
              if (live.unacknowledged) throw new Error("not acknowledged")
            }"""
        )
        bob.evaluate("() => until(() => live.set('skills').has('js'))")
        bob.evaluate(
            "() => Promise.all([live.counter('tokens').add(2), live.set('skills').add('css')])"
        )
        wait(ann, lambda d: d.counter("tokens").value == 7)
        assert dict(ann.map("plan")) == {
            "goal": "ship it",
            "odd": {"deep": [1, 2.5, None, True]},
            "big": 2**70,
            "bytes": b"\x00\xff",
        }
        assert ann.register("leader").value == "eve" and set(ann.set("skills")) == {"js", "css"}
        found = {(change.agent, change.message) for change in ann.history("main")}
        assert found == {("relay-1", "Eve <b>"), ("relay-1", "Bob")}
        runs = {change.run for change in ann.history("main")}
        assert len(runs) == 2 and all(run.startswith("browser/") for run in runs)

        ann.map("plan")["goal"] = "<script>document.title = 'owned'</script>"
        ann.map("plan")["when"] = -(2**60)
        del ann.map("plan")["odd"]
        ann.counter("tokens").decrement(10)
        ann.set("skills").discard("css")
        for page in (eve, bob):
            page.evaluate(
                "() => until(() => live.set('skills').values().length === 1"
                " && live.counter('tokens').value === -3)"
            )
            read = page.evaluate(
                """() => ({
                  goal: live.map("plan").get("goal"),
                  keys: live.map("plan").entries().map(([key]) => key).sort(),
                  when: `${live.map("plan").get("when")} ${typeof live.map("plan").get("when")}`,
                  leader: live.register("leader").value,
                  skills: live.set("skills").values(),
                })"""
            )
            assert read == {
                "goal": "<script>document.title = 'owned'</script>",
                "keys": ["big", "bytes", "goal", "when"],
                "when": f"{-(2**60)} bigint",
                "leader": "eve",
                "skills": ["js"],
            }
        # What cannot be is refused, and the rest goes on.
        refused = eve.evaluate(
            """() => Promise.allSettled([
              live.counter("tokens").add(0.5),
              live.set("skills").add({no: "element"}),
              live.map("plan").set("k".repeat(900), 1),
              live.map("@sessions").set("me", 1),
              live.map("plan").set("fine", 1),
            ]).then((all) => all.map(({ reason }) => reason instanceof kinds.Refused))"""
        )
        assert refused == [True, True, True, True, False]
        wait(ann, lambda d: d.map("plan").get("fine") == 1)


def test_a_page_shows_what_conflicts_and_settles_it(browser, relay):
    with blocking.Replica("cat") as cat, blocking.Replica("dan") as dan:
        for replica in (cat, dan):
            replica.map("contested")["goal"] = replica.agent
            replica.register("who").value = replica.agent
            replica.connect(relay)
        for replica in (cat, dan):
            wait(
                replica, lambda d: d.map("contested").conflicts() and d.register("who").conflicts()
            )
        with page_of(browser, relay, "main", "judge") as page:
            found = page.evaluate(
                """() => [live.map("contested").conflicts("goal"), live.register("who").conflicts(),
                  live.map("contested").get("goal")]"""
            )
            assert sorted(found[0]) == sorted(found[1]) == [["cat", "cat"], ["dan", "dan"]]
            assert found[2] == dan.map("contested")["goal"]
            page.evaluate(
                """() => Promise.all([
                  live.map("contested").set("goal", "both"), live.register("who").set("me")
                ]).then(() => until(() => !live.map("contested").conflicts("goal").length))"""
            )
        wait(dan, lambda d: d.map("contested")["goal"] == "both" and not d.conflicts())


YJS = """
<!doctype html><title>Yjs</title><script type="importmap">{imports}</script>
<script type="module">
import * as Y from "yjs"
import {{ WebsocketProvider }} from "y-websocket"
const given = new URLSearchParams(location.hash.slice(1))
const protocols = ["crdtstate", `crdtstate.token.${{given.get("token")}}`]
window.doc = new Y.Doc()
window.provider = new WebsocketProvider(given.get("relay") + "/yjs", "notes", doc, {{ protocols }})
window.Y = Y
</script>
"""


def import_map() -> str:
    """Where a page finds what npm has installed."""
    found = {"yjs": "/node_modules/yjs/dist/yjs.mjs"}
    for package in ("lib0", "y-protocols", "y-websocket"):
        told = json.loads((NODE / "node_modules" / package / "package.json").read_text())
        for name, where in told["exports"].items():
            while isinstance(where, dict):
                where = next((where[k] for k in ("browser", "import", "default") if k in where), "")
            if where and "*" not in name:
                found[f"{package}{name[1:]}"] = f"/node_modules/{package}{where[1:]}"
    return json.dumps({"imports": found})


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802  # the name is the base class's
        if self.path != "/":
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(YJS.format(imports=import_map()).encode())


def test_yjs_in_a_page_of_another_site_that_is_named(browser):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(NODE)))
    Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    with running("--origin", site) as (_, address), running() as (_, closed):
        with reader("ann", address) as ann:
            context = browser.new_context()
            page = context.new_page()
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(f"{site}/#relay={address}&token={host_token()}")
            page.wait_for_function("() => window.provider?.synced")
            page.evaluate("() => doc.getText('text').insert(0, 'from a page')")
            wait(ann, lambda d: d.text("text").to_py() == "from a page", "notes")
            ann.call(
                lambda r: r.document("notes", shared=True).native_map("map").update({"by": "ann"})
            )
            page.wait_for_function("() => doc.getMap('map').get('by') === 'ann'")
            assert page.evaluate("() => doc.getText('text').toString()") == "from a page"
            # Who has not named the site lets none of its pages in, token or not.
            refused = page.evaluate(
                """(url) => new Promise((resolve) => {
                  const socket = new WebSocket(url, provider.protocols)
                  socket.onopen = () => resolve("open")
                  socket.onclose = ({ code }) => resolve(code)
                })""",
                f"{closed}/yjs/notes",
            )
            assert refused == 1006
            context.close()
    server.shutdown()
    server.server_close()


def test_nothing_acknowledged_is_lost_and_nothing_counts_twice(browser, tmp_path):
    store = str(tmp_path / "relay.db")
    with running("--store", store) as (process, address):
        port = address.rpartition(":")[2]
        context = browser.new_context()
        page = context.new_page()
        page.goto(address.replace("ws:", "http:") + "/healthz")
        page.evaluate(OPEN, ["main", host_token(), "eve"])
        page.evaluate(
            """() => {
              window.acked = 0
              const each = async (at) => {
                const written = live.map("plan").set(`k${at}`, at)
                await Promise.all([live.counter("tokens").add(1), written])
                acked += 1
              }
              window.all = (async () => {
                for (let round = 0; round < 40; round++) {
                  await Promise.all(Array.from({length: 5}, (_, at) => each(5 * round + at)))
                }
              })()
            }"""
        )
        for wanted in (40, 120):
            page.wait_for_function(f"() => acked >= {wanted}")
            process.kill()
            process.wait()
            known = page.evaluate("() => acked")
            assert wanted <= known < 200
            listen = ("--listen", f"ws://127.0.0.1:{port}")
            again = start("relay", "--store", store, *listen)
            assert again.stdout is not None and again.stdout.readline().startswith(
                "relay listening"
            )
            process.stdout.close()
            process.stderr.close()
            process = again
        page.evaluate("() => all")
        with reader("ann", address) as ann:
            wait(ann, lambda d: len(d.map("plan")) == 200)
            assert ann.counter("tokens").value == 200
            # The session says goodbye, and leaves no trace of itself.
            assert len(ann.map("@sessions")) == 1
            page.evaluate("() => live.close()")
            wait(ann, lambda d: not len(d.map("@sessions")))
        context.close()
        end(process, signal.SIGTERM)


def test_the_page_of_the_example_works(browser):
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--stay"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        context = browser.new_context(viewport={"width": 700, "height": 480})
        page = context.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url)
        expect(page.locator("#state")).to_have_text("live")
        box = page.get_by_role("checkbox", name="write a test")
        expect(box).not_to_be_checked()
        box.check()
        page.locator("#task").fill("<b>release</b>")
        page.keyboard.press("Enter")
        page.locator("#spend").click()
        expect(page.locator("#tokens")).to_have_text("10")
        expect(page.locator("#state")).to_have_text("live")
        expect(page.locator("li span")).to_have_text(["<b>release</b>", "write a test"])
        # The token stands in no URL that is seen or sent.
        assert "token" not in page.url
        if folder := os.environ.get("CRDTSTATE_SCREENSHOTS"):
            page.screenshot(path=Path(folder, "browser_room.png"))
        out, err = process.communicate("\n", timeout=PATIENCE)
        assert "{'write a test': 'done', '<b>release</b>': 'open'} 10" in out and not err
        assert complaints == []
        context.close()
