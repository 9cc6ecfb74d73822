"""The demo: its parts, and the whole with real processes on a small tree."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest
from harness import asynchronous
from rich.console import Console

from crdtstate import Config, PeerConnected, PeerDisconnected, Replica, TransportError, blocking
from crdtstate.clock import Version
from crdtstate.demo import survey
from crdtstate.demo.command import judge
from crdtstate.demo.fleet import DemoFailure, Fleet
from crdtstate.demo.proxy import Proxy
from crdtstate.demo.screen import Table, verdict
from crdtstate.demo.story import Outage, Report
from crdtstate.demo.survey import Survey, differences, names, owner, read, record, summarise
from crdtstate.transports import dial

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TREE = STDLIB / "email"


def write(root: Path, name: str, source: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.encode() if isinstance(source, str) else source)
    return path


# The survey


def test_a_file_is_summarised(tmp_path):
    source = """
import os.path, sys
from json import dumps
from . import sibling
from .. import parent

class A:
    def f(self): return lambda: 0
    async def g(self): pass
"""
    summary = summarise(write(tmp_path, "a.py", source))

    assert (summary.lines, summary.functions, summary.classes) == (9, 2, 1)
    assert summary.modules == ("json", "os", "sys") and not summary.unparsable
    assert summary.entry() == {"lines": 9, "functions": 2, "classes": 1, "imports": 3}


@pytest.mark.parametrize(
    "source",
    [b"print 'two'\n\n", b"x = '\xff'\n\n", b"a\0b\n\n", b"# coding: klingon\n\n"],
    ids=["syntax", "encoding", "null", "codec"],
)
def test_of_a_file_that_does_not_parse_the_lines_count(tmp_path, source):
    summary = summarise(write(tmp_path, "a.py", source))

    assert summary.unparsable and summary.lines == 2 and summary.functions == 0


def test_a_file_with_doubtful_escapes_parses(tmp_path):
    assert not summarise(write(tmp_path, "a.py", r"x = '\d'")).unparsable


def test_the_files_are_the_same_everywhere(tmp_path):
    for name in ("b.py", "a/c.py", "a/__pycache__/c.py", "site-packages/x.py", "a/readme.md"):
        write(tmp_path, name, "")
    (tmp_path / "gone.py").symlink_to("nowhere")
    (tmp_path / "folder.py").mkdir()

    assert names(tmp_path) == ["a/c.py", "b.py"]


def test_every_file_has_one_owner_and_always_the_same():
    assert owner("decoder.py", 10) == 0
    assert len({owner(f"file-{n}.py", 10) for n in range(1000)}) == 10


@asynchronous
async def test_what_is_recorded_reads_as_the_survey_of_one_process():
    async with Replica("agent-1") as replica:
        document = replica.document("survey")
        for name in reversed(names(TREE)):
            with replica.transaction(message=name):
                record(document, name, summarise(TREE / name))

        wanted = survey.survey(TREE)
        assert differences(wanted, read(document)) == []
        assert wanted.counters["files"] == len(wanted.files) > 20


def test_differences_are_named():
    wanted = survey.survey(STDLIB / "json")
    files = dict(wanted.files)
    del files["tool.py"]
    files["extra.py"] = files["scanner.py"]
    files["decoder.py"] = {**files["decoder.py"], "lines": 0}
    found = Survey(
        files,
        {**wanted.counters, "lines": wanted.counters["lines"] + 1},
        [*wanted.modules[1:], "zzz"],
        [1, "tool.py"],
    )

    said = differences(wanted, found)

    assert any(line.startswith("file decoder.py is {'lines': 0, ") for line in said)
    assert "file extra.py is too many" in said and "file tool.py is missing" in said
    assert f"counter lines is {found.counters['lines']}, not {wanted.counters['lines']}" in said
    assert f"module {wanted.modules[0]} is missing" in said and "module zzz is too many" in said
    assert f"largest is [1, 'tool.py'], not {wanted.largest}" in said
    assert len(said) == 7


def test_of_many_differences_some_are_named():
    wanted = survey.survey(STDLIB / "json")

    said = differences(wanted, Survey())

    assert len(said) == 11 and said[-1].startswith("and ")


# The network


@asynchronous
async def test_a_cut_is_a_cut_both_ways():
    async with Replica("relay", listen="ws://127.0.0.1:0") as relay:
        assert relay.address is not None
        proxy = Proxy(int(relay.address.rpartition(":")[2]))
        await proxy.mend()
        config = Config(reconnect_max=0.1)
        url = f"ws://127.0.0.1:{proxy.port}"
        async with Replica("agent", peers=[url], config=config) as agent:
            events = agent.events(PeerConnected, PeerDisconnected)
            await agent.synced(timeout=20)

            proxy.cut()
            lost = await anext(events)
            agent.counter("n").increment()
            relay.counter("n").increment()
            with pytest.raises(TransportError, match="refused"):
                await dial(url)
            assert isinstance(lost, PeerDisconnected)
            assert (agent.counter("n").value, relay.counter("n").value) == (1, 1)
            assert relay.peers() == []

            await proxy.mend()
            assert isinstance(await anext(events), PeerConnected)
            await agent.synced(timeout=20)
            assert (agent.counter("n").value, relay.counter("n").value) == (2, 2)
            await events.aclose()
        proxy.close()


# The verdict

GOOD = Report(
    agents=4, path="tree", seed=1, cut=["agent-1", "agent-2"], killed="agent-3", replicas=5
)


def test_a_good_end_is_said():
    said = list(verdict(GOOD, None))

    assert ("ok", "it is exactly what one process finds alone") in said
    judge(GOOD)


def test_a_difference_is_named_and_fails_the_demo():
    bad = replace(GOOD, differences=["counter lines is 2, not 1", "file a.py is missing"])

    said = list(verdict(bad, None))

    assert ("WRONG", "counter lines is 2, not 1") in said and (
        "WRONG",
        "file a.py is missing",
    ) in said
    assert not any(label == "ok" for label, _ in said)
    with pytest.raises(DemoFailure, match=r"counter lines is 2, not 1 \(and 1 more, see above\)"):
        judge(bad)


def test_what_an_outage_held_up_does_not_count_as_latency():
    outage = Outage("agent-1", begin_ms=10_000, end_ms=20_000)

    assert outage.held_up(15_000, "agent-1", "agent-2")
    assert outage.held_up(15_000, "agent-2", "agent-1")
    assert not outage.held_up(15_000, "agent-2", "agent-3")
    assert not outage.held_up(20_001, "agent-1", "agent-2")


# The screen


@asynchronous
async def test_the_table_shows_everybody():
    fleet = Fleet(Path("folder"), Path("tree"), 3, "run")
    fleet.url = "ws://127.0.0.1:1"
    one, two, three = fleet.agents
    for agent, done in zip(fleet.agents, (5, 7, 2), strict=True):
        agent.said["ready"] = True
        agent.done, agent.of, agent.peers = done, 7, 1
        agent.version = Version({1: done, 2: 1})
    one.trouble, one.peers = "cut off", 0
    three.trouble = "killed"
    out = io.StringIO()

    with Table(fleet, Console(file=out, width=100)) as table:
        table.say("a thing [bold]happened[/bold]")
        table.show()
    rows = [re.sub("[━╸╺]+", "=", line).split("  ") for line in out.getvalue().splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]

    assert ["agent-1", "=", "5/7", "0", "6", "2", "cut off"] in cells
    assert ["agent-2", "=", "7/7", "1", "8", "0", "done"] in cells
    assert ["agent-3", "=", "2/7", "-", "-", "-", "killed"] in cells
    assert ["relay", "-", "-", "-", "up"] in cells
    assert "a thing [bold]happened[/bold]" in out.getvalue()
    assert "14 of 21 files (67%), 8 changes" in out.getvalue()


# The whole


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "crdtstate", "demo", *arguments]


def processes(folder: Path) -> list[str]:
    """The processes whose command line names *folder*."""
    listed = subprocess.run(["ps", "-axww", "-o", "command="], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if str(folder) in line]


def test_a_fleet_surveys_a_tree_through_cuts_and_a_kill(tmp_path):
    result = subprocess.run(
        command("--agents", "4", "--path", str(TREE), "--keep", str(tmp_path), "--json"),
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    wanted = survey.survey(TREE)
    assert report["ok"] and report["differences"] == []
    for counter, count in wanted.counters.items():
        assert report[counter] == count
    assert report["modules"] == len(wanted.modules)
    assert report["replicas"] == report["stores_verified"] == 5
    assert report["changes"] >= report["files"] and report["changes_per_s"] > 0
    assert len(report["cut"]) == 2 and report["killed"] not in report["cut"]
    assert report["cut_s"] >= 2 and report["recovery_s"] > 0
    # It may have been killed between saving and saying so.
    assert 0 <= report["files_in_store"] - report["files_when_killed"] <= 1
    assert report["at_rest_ms"]["p50"] > 0
    assert processes(tmp_path) == []
    with blocking.Replica("reader", store=tmp_path / "agent-1.db") as kept:
        assert kept.document("survey").counter("files").value == report["files"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_however_it_ends_no_process_stays(tmp_path, number, code):
    for package in ("asyncio", "email", "unittest", "importlib"):
        shutil.copytree(STDLIB / package, tmp_path / "tree" / package)
    with subprocess.Popen(
        command("--agents", "3", "--path", f"{tmp_path}/tree", "--keep", f"{tmp_path}/kept"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert "3 agents connected" in demo.stdout.readline()
        assert any("lost the network" in line for line in demo.stdout), demo.communicate()
        assert len(processes(tmp_path)) >= 5
        demo.send_signal(number)
        _, err = demo.communicate(timeout=30)

    assert (demo.returncode, err) == (code, "")
    deadline = time.monotonic() + 30
    while processes(tmp_path) and time.monotonic() < deadline:
        pass
    assert processes(tmp_path) == []


def test_an_agent_that_fails_ends_the_demo_with_one_clear_line(tmp_path):
    for number in range(12):
        write(tmp_path / "tree", f"m{number}.py", "")
    (tmp_path / "tree" / os.fsdecode(b"\xff.py")).touch()

    result = subprocess.run(
        command(
            "--agents", "3", "--path", str(tmp_path / "tree"), "--keep", str(tmp_path / "kept")
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("crdtstate: agent-") and "not valid Unicode" in result.stderr
    assert processes(tmp_path) == []


def test_stores_of_another_run_are_not_mixed_in(tmp_path):
    write(tmp_path, "relay.db", "")

    result = subprocess.run(command("--keep", str(tmp_path)), capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr == (
        f"crdtstate: {tmp_path} holds stores already; name an empty directory\n"
    )
