"""Commanding a fleet from threads and from the command line."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crdtstate import (
    CommandError,
    Config,
    Fulfilled,
    MemberUp,
    Rejected,
    SystemCheckpoint,
    UsageError,
    cli,
)
from crdtstate.blocking import Controller, Replica

LOCAL = "ws://127.0.0.1:0"


@pytest.fixture
def fleet() -> Iterator[tuple[Replica, Replica]]:
    """A queen and an agent, each on a thread of its own."""
    config = Config(command_grace=0.05, controllers=["queen", "operator"])
    with Replica("queen", listen=LOCAL, config=config) as queen:
        met = threading.Event()
        queen.on(MemberUp, lambda event: met.set())
        with Replica("agent-1", peers=[str(queen.address)], config=config) as agent:
            assert met.wait(10)
            yield queen, agent


def test_a_controller_for_threads_does_what_the_other_does(fleet: tuple[Replica, Replica]) -> None:
    queen, agent = fleet
    end = agent.serve_command("add", lambda command: sum(command.arguments["numbers"]))
    agent.map("plan")["goal"] = "before"
    controller = Controller(queen)
    saved = controller.checkpoint_all("nightly", timeout=10)
    agent.map("plan")["goal"] = "after"
    added = controller.issue("add", target="agent-1", numbers=[1, 2, 3])

    assert added["agent-1"] == Fulfilled(6)
    assert isinstance(saved, SystemCheckpoint) and set(saved.checkpoints) == {"agent-1", "queen"}
    assert controller.restore_system(saved.id, timeout=10).is_complete
    assert agent.map("plan")["goal"] == "before"
    assert controller.resolve_conflicts("merge").is_complete
    assert [each.verb for each in controller.commands()][-1] == "@resolve"
    assert controller.result(added.id)["agent-1"] == Fulfilled(6)
    controller.withdraw(added.id)
    assert controller.report()["agent-1"].checkpoints == 1
    assert repr(controller) == "<Controller queen>"
    end()
    assert isinstance(controller.issue("add", target="agent-1")["agent-1"], Rejected)
    with pytest.raises(CommandError, match="'agent-1' is not a controller"):
        Controller(agent)
    with pytest.raises(UsageError, match="blocking.Replica"):
        Controller("queen")  # type: ignore[arg-type]


def test_threads_share_too(fleet: tuple[Replica, Replica]) -> None:
    queen, agent = fleet
    queen.map("plan")["goal"] = "ship it"
    results = queen.share(queen.map("plan"), to=["agent-1"], timeout=10)

    assert results.is_complete
    (got,) = agent.shared("plan")
    assert (got.agent, got.value) == ("queen", {"goal": "ship it"})
    agent.trust("queen")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crdtstate", *arguments])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def test_the_command_line_commands(
    fleet: tuple[Replica, Replica], run: Callable[..., tuple[int, str, str]]
) -> None:
    queen, agent = fleet
    agent.serve_command("pause", lambda command: command.arguments)
    peer = ("--peer", str(queen.address), "--as", "operator")

    done = run("command", "pause", "reason=budget", "n=3", "--target", "agent-*", *peer)
    assert done == (0, 'agent-1  fulfilled  {"reason": "budget", "n": 3}\n', "")
    code, out, _ = run("command", "dance", "--json", *peer)
    found: dict[str, Any] = json.loads(out)["results"]
    assert code == 1
    assert found.keys() == {"agent-1", "queen"}
    assert found["agent-1"] == {"state": "rejected", "reason": "no handler for 'dance' here"}
    code, out, _ = run("command", "pause", "--target", "agent-1", "--peer", peer[1])
    assert (code, out) == (1, "agent-1  rejected  not a controller\n")
    assert run("command", "pause", "oops", *peer)[0] == 2
    assert run("command", "@restore", *peer)[0] == 1


def test_the_command_line_reports(
    fleet: tuple[Replica, Replica], run: Callable[..., tuple[int, str, str]]
) -> None:
    queen, agent = fleet
    peer = ("--peer", str(queen.address), "--as", "operator")
    checkpoint = agent.checkpoint()

    code, out, _ = run("report", *peer)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["AGENT", "STATE"],
        ["agent-1", "up"],
        ["queen", "up"],
    ]
    code, out, _ = run("report", "--json", *peer)
    assert code == 0 and json.loads(out)["agent-1"]["checkpoint"] == checkpoint.id
