"""
The status page of a relay, in Chromium as Debian has it.

The relay and one agent are processes, so that the agent can be killed; what is waited for is what
the page shows. Screenshots go where ``CRDTSTATE_SCREENSHOTS`` says, to be looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Request, expect, sync_playwright
from test_relay import end, fetch, running, start

from crdtstate import blocking
from crdtstate.credentials import open_host_credentials
from crdtstate.relay.pages import ASSETS
from crdtstate.relay.tokens import page_of, token_of

CHROMIUM = "/usr/bin/chromium"
PATIENCE_MS = 20_000

# An agent that somebody may kill: it writes once and says so.
AGENT = """
import sys
from crdtstate import blocking
with blocking.Replica(sys.argv[1], peers=[sys.argv[2]]) as replica:
    replica.map("plan")[sys.argv[1]] = "here"
    replica.synced(timeout=20)
    print("ready", flush=True)
    sys.stdin.read()
"""

SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.fail("no Chromium here: apt-get install -y --no-install-recommends chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def relay() -> Iterator[str]:
    with running("--name", "relay-1") as (_, address):
        yield address


class Watched:
    """An open page, and all that should not happen on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        expect.set_options(timeout=PATIENCE_MS)
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._note)
        # A violation of the policy that says nothing on the console still says this.
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective))"
        )

    def _note(self, request: Request) -> None:
        self.requests.append(request.url)

    def member(self, agent: str) -> Locator:
        return self.page.locator(f'#member-rows tr[data-agent="{agent}"]')

    def node(self, agent: str) -> Locator:
        return self.page.locator(f'.node[data-agent="{agent}"]')

    def save(self, name: str) -> None:
        if folder := os.environ.get("CRDTSTATE_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


@contextmanager
def watching(browser: Browser, address: str, **options: Any) -> Iterator[Watched]:
    """The page of a relay, which must not have complained about anything in the end."""
    context = browser.new_context(**options)
    watched = Watched(context.new_page())
    url = address.replace("ws:", "http:")
    watched.page.goto(page_of(address, token_of(open_host_credentials())))
    expect(watched.page.locator("#link")).to_have_attribute("data-state", "live")
    yield watched
    assert watched.complaints == [] and watched.page.url == f"{url}/"
    assert {request.rpartition("/")[0] for request in watched.requests} == {url}
    context.close()


@contextmanager
def agent_process(name: str, address: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", AGENT, name, address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_shows_who_is_there_and_who_goes(browser, relay, scheme):
    with (
        blocking.Replica("ann", peers=[relay]) as ann,
        blocking.Replica("bob", peers=[relay]),
        agent_process("eve", relay) as eve,
        watching(browser, relay, color_scheme=scheme) as watched,
    ):
        page = watched.page
        for agent in ("ann", "bob", "eve", "relay-1"):
            expect(watched.member(agent)).to_have_attribute("data-state", "up")
            expect(watched.node(agent)).to_have_attribute("data-state", "up")
        expect(page.locator("#name")).to_have_text("relay-1")
        expect(page.locator("#health")).to_have_text("ready")
        expect(page.locator("#total-up")).to_have_text("4 of 4")
        expect(page.locator("#mesh svg")).to_have_attribute("data-layout", "circle")
        expect(page.locator(".edge")).to_have_count(3)
        expect(page.locator('#document-rows tr[data-document="main"] td').nth(1)).to_have_text("1")
        expect(page).to_have_title("relay-1 · 4 of 4 up")

        ann.counter("tokens").increment()
        expect(page.locator("#total-changes")).to_have_text("2")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert light == {"light": "rgb(245, 246, 248)", "dark": "rgb(14, 18, 23)"}[scheme]
        watched.save(f"page-{scheme}")

        eve.kill()
        expect(watched.member("eve")).to_have_attribute("data-state", "down")
        expect(watched.node("eve")).to_have_attribute("data-state", "down")
        expect(page.locator("#total-up")).to_have_text("3 of 4")
        event = page.locator('#event-rows li[data-kind="PeerDisconnected"]')
        expect(event).to_contain_text("Peer disconnected")
        expect(event).to_contain_text("eve")
        watched.save(f"page-down-{scheme}")


def test_what_agents_write_is_text(browser, relay):
    with (
        blocking.Replica(SCRIPT) as ann,
        blocking.Replica("bob", peers=[relay]) as bob,
        watching(browser, relay) as watched,
    ):
        page = watched.page
        for replica, value in ((ann, SCRIPT), (bob, "ship it")):
            replica.document(SCRIPT).map(SCRIPT)[SCRIPT] = value
            replica.document(SCRIPT).counter("tokens").increment()
        ann.connect(relay)

        conflict = page.locator("#conflict-rows > li")
        expect(conflict.locator(".place")).to_have_text(f"{SCRIPT} / {SCRIPT} / {SCRIPT}")
        values = conflict.locator(".value")
        expect(values).to_have_count(2)
        assert sorted(values.all_inner_texts()) == sorted([repr(SCRIPT), "'ship it'"])
        expect(page.locator("#document-rows td").first).to_have_text(SCRIPT)
        expect(page.locator("#member-rows td").filter(has_text=SCRIPT)).to_have_count(1)
        expect(page.locator("#event-rows").get_by_text("Conflict found")).to_be_visible()
        assert page.locator("main script, main img").count() == 0
        assert "owned" not in page.title()

        bob.document(SCRIPT).map(SCRIPT)[SCRIPT] = "decided"
        bob.synced(timeout=20)
        expect(page.locator("#no-conflicts")).to_be_visible()
        expect(page.locator("#total-conflicts")).to_have_text("0")


def test_the_keyboard_reaches_everything(browser, relay):
    with (
        blocking.Replica("ann", peers=[relay]) as ann,
        blocking.Replica("bob", peers=[relay]),
        watching(browser, relay) as watched,
    ):
        page = watched.page
        ann.map("plan")["goal"] = "ship it"
        expect(page.locator("#total-documents")).to_have_text("1")
        expect(watched.member("bob")).to_be_visible()

        seen = []
        while True:
            page.keyboard.press("Tab")
            here = page.evaluate(
                """() => {
                    const e = document.activeElement, style = getComputedStyle(e);
                    const ring = e.querySelector('.halo');
                    return {
                        name: e.getAttribute('aria-label') || e.textContent.trim(),
                        by: e.getAttribute('aria-labelledby'),
                        body: e === document.body,
                        outlined: style.outlineStyle !== 'none'
                            || (ring && getComputedStyle(ring).stroke !== 'none'),
                    };
                }"""
            )
            if here["body"]:
                break
            assert here["outlined"], here
            seen.append(here["by"] or here["name"])
        titles = [f"{name}-title" for name in ("conflicts", "documents", "events")]
        node, *rest = seen[1:]
        assert seen[0] == "Skip to the members" and node.startswith(
            "relay-1: this relay, up, ws://"
        )
        assert rest == ["members", *titles, "healthz"]

        watched.node("relay-1").focus()
        about = page.locator("#about")
        for key, agent in (("ArrowRight", "ann"), ("ArrowDown", "bob"), ("ArrowRight", "relay-1")):
            page.keyboard.press(key)
            expect(watched.node(agent)).to_be_focused()
            expect(watched.node(agent)).to_have_attribute("aria-selected", "true")
            expect(about).to_contain_text(f"{agent}: ")
        page.keyboard.press("End")
        expect(about).to_have_text("bob: agent, up")
        expect(watched.member("bob")).to_have_class("chosen")
        assert page.locator("#mesh svg").get_attribute("role") == "listbox"
        assert page.locator("#mesh [tabindex='0']").count() == 1


def test_it_says_when_the_relay_is_gone_and_finds_it_again(browser, tmp_path):
    store = str(tmp_path / "relay.db")
    with running("--store", store) as (process, address):
        context = browser.new_context()
        page = Watched(context.new_page()).page
        page.goto(page_of(address, token_of(open_host_credentials())))
        expect(page.locator("#link")).to_have_attribute("data-state", "live")

        assert end(process, 15)[0] == 0
        expect(page.locator("#gone")).to_contain_text("The relay is gone. This is how it was at ")
        expect(page.locator("#health")).to_have_text("unknown")
        expect(page).to_have_title("relay · not connected")

    with start("relay", "--listen", address, "--store", store) as again:
        expect(page.locator("#link")).to_have_attribute("data-state", "live")
        expect(page.locator("#gone")).to_be_hidden()
        expect(page.locator("#health")).to_have_text("ready")
        context.close()
        again.terminate()


def test_without_the_token_it_shows_nothing_and_says_what_to_do(browser, relay):
    context = browser.new_context()
    for url in (f"{relay.replace('ws:', 'http:')}/", page_of(relay, "guessed")):
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#gone")).to_contain_text("Open the URL that crdtstate page prints")
        assert page.evaluate("sessionStorage.length") == 0
        assert page.locator("#member-rows tr").count() == 0

    # In the same tab, of which only what follows the # differs.
    page.evaluate(
        "(url) => { location.href = url }", page_of(relay, token_of(open_host_credentials()))
    )
    expect(page.locator("#link")).to_have_attribute("data-state", "live")
    page.reload()
    expect(page.locator("#link")).to_have_attribute("data-state", "live")
    context.close()


def test_it_says_what_keeps_a_relay_from_its_peers(browser):
    nobody = "ws://127.0.0.1:9"
    with running("--peer", nobody) as (_, relay), watching(browser, relay) as watched:
        expect(watched.page.locator("#unreachable")).to_have_text(
            f"It cannot reach {nobody}: connection refused: is a relay listening there?"
        )


def test_it_is_of_use_with_two_hundred_members(browser, relay):
    # Shown from a stream of our own making; two hundred replicas would be another test.
    states = ["up"] * 7 + ["suspected", "down", "retired"]
    members = [
        {
            "agent": f"agent-{number}",
            "writer": f"{number:x}",
            "role": "agent",
            "state": states[number % 10],
            "address": None,
            "links": [],
            "self": False,
            "lag": number % 4 * 100,
            "lag_seconds": 1.5,
            "queued": 0,
        }
        for number in range(200)
    ]
    with watching(browser, relay, viewport={"width": 1280, "height": 900}) as watched:
        page = watched.page
        page.evaluate("(members) => { show.members(found.members = members) }", members)

        expect(page.locator("#mesh svg")).to_have_attribute("data-layout", "dense")
        expect(page.locator(".node[role=option]")).to_have_count(200)
        expect(page.locator("#total-up")).to_have_text("140 of 180")
        boxes = [node.bounding_box() for node in page.locator(".node .label").all()]
        assert all(box and box["height"] >= 10 for box in boxes)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        mesh = page.locator("#mesh").bounding_box()
        assert mesh and mesh["height"] < 900
        watched.save("page-200")

        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_on_it_comes_from_elsewhere_or_may_run(relay):
    for path, (name, content_type) in ASSETS.items():
        url = relay.replace("ws:", "http:") + path
        with urllib.request.urlopen(url, timeout=10) as answer:
            text, headers = answer.read().decode(), answer.headers
        policy = headers["Content-Security-Policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert not any("unsafe" in part or "*" in part for part in policy)
        assert headers["Content-Type"] == content_type
        assert headers["X-Content-Type-Options"] == "nosniff"
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "//cdn",
        ):
            assert word not in text, name
    assert fetch(relay, "/page/page.js")[0] == fetch(relay, "/../page.js")[0] == 404


def test_the_wheel_has_the_page(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert {f"crdtstate/relay/page/{name}" for name, _ in ASSETS.values()} <= names
