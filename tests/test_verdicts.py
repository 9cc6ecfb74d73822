"""What waits for a verdict: order, pipelining, and what a refusal does to the rest."""

from __future__ import annotations

import random
from typing import Any

import pytest
from harness import Agent

from crdtstate import Config, wire
from crdtstate.change import Change, Snapshot
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.events import ChangeQuarantined, PeerRejected
from crdtstate.lanes import Lanes
from crdtstate.sync import Aside, Emit, Examine, Rebuild, Sync
from crdtstate.verdicts import SNAPSHOTS_MAX, Asked, Verdicts

HELLO = wire.Hello(1, 1, 7, 70, "agent-7")
CONFIG = Config(want_delay=0.1, want_retry=0.5)


class Core(DocumentSet):
    """A core that examines, one peer, and the questions that it asks."""

    def __init__(self, config: Config = CONFIG) -> None:
        super().__init__("core", 9, lambda: 1_700_000_000_000)
        hello = wire.Hello(1, 1, 9, 90, self.agent)
        self.core = Sync(self, hello, config, random.Random(1), 0.0)
        self.core.examines = True
        self.questions: list[Examine] = []
        self.events: list[Any] = []
        self.rebuilds: list[str] = []
        self.core.peer_up(1, 0.0, url=None)
        self.core.receive(1, HELLO, 0.0)
        self.act()

    def act(self) -> None:
        while effects := self.core.effects():
            for effect in effects:
                match effect:
                    case Examine():
                        self.questions.append(effect)
                    case Emit(event):
                        self.events.append(event)
                    case Rebuild(name):
                        self.rebuilds.append(name)

    def receive(self, *changes: Change) -> None:
        frame = wire.Changes(tuple(change.data for change in changes), False, False)
        self.core.receive(1, frame, 1.0)
        self.act()

    def asked(self) -> list[Change | Snapshot]:
        return [question.item for question in self.questions]

    def answer(self, at: int, fault: str | None = None) -> None:
        self.core.examined(self.questions[at].number, fault, 1.0)
        self.act()

    def body(self, name: str = "notes") -> str:
        found = self.find(name)
        return str(found.text("body")) if found is not None else ""


def typed(agent: Agent, *lines: str, name: str = "notes") -> list[Change]:
    """Type each line at the end; returns the changes."""
    changes = []
    for line in lines:
        body = agent.document(name, shared=True).text("body")
        body.insert(len(body), line)
        changes += agent.sealed()
    return changes


def test_changes_that_follow_each_other_are_asked_about_at_once_and_delivered_in_order() -> None:
    core, (one, two, three) = Core(), typed(Agent(7), "1", "2", "3")
    core.receive(one, two, three)

    assert core.asked() == [one, two, three]
    assert core.body() == "" and core.core.pending_count == 3
    for at in range(3):
        core.answer(at)
        assert core.body() == "123"[: at + 1]
    assert core.core.pending_count == 0


def test_what_came_too_early_is_asked_about_once_it_is_ready() -> None:
    core, (one, two, three) = Core(), typed(Agent(7), "1", "2", "3")
    core.receive(two)
    assert core.asked() == []
    core.receive(one)
    assert core.asked() == [one]
    # It comes again, and its follower.
    core.receive(one, two, three)
    assert core.asked() == [one]

    core.answer(0)
    assert core.asked() == [one, two]
    core.answer(1)
    core.answer(2)

    assert core.body() == "123"


def test_documents_of_lanes_wait_for_nobody() -> None:
    core, writer = Core(), Agent(7)
    writer.map("plan")["a"] = 1
    core.receive(*writer.sealed())

    assert core.asked() == [] and core.map("plan")["a"] == 1


def test_a_refused_change_is_quarantined_the_peer_struck_and_the_rest_asked_about_anew() -> None:
    core, writer, other = Core(), Agent(7), Agent(8)
    good, bad, after = typed(writer, "1", "2", "3")
    (theirs,) = typed(other, "x")
    core.receive(good, bad, after, theirs)
    core.answer(0)
    core.questions, first = [], core.questions

    core.core.examined(first[1].number, "it kills", 1.0)
    core.act()

    # What builds on it waits.
    assert core.asked() == [theirs]
    assert core.core.pending_count == 2
    core.answer(0)
    assert sorted(core.body()) == ["1", "x"]
    assert core.core.quarantined() == [
        Aside(bad.id, "notes", 7, 2, "agent-7", "it kills", bad.stamp),
    ]
    told = [type(event) for event in core.events]
    assert ChangeQuarantined in told and PeerRejected in told
    # Verdicts on what was forgotten mean nothing.
    for question in first:
        core.core.examined(question.number, None, 1.0)
    core.act()
    assert sorted(core.body()) == ["1", "x"]

    # It comes again, from whomever; and once it is released, all is taken in.
    core.receive(bad)
    assert core.asked() == [theirs]
    assert core.core.release(bad.id, 1.0)
    core.receive(bad)
    assert core.asked() == [theirs, bad]
    core.answer(1)
    core.answer(2)
    assert sorted(core.body()) == ["1", "2", "3", "x"]
    assert not core.core.release(bad.id, 1.0)


def test_a_verdict_after_a_jump_is_of_no_more_interest() -> None:
    core, writer = Core(), Agent(7)
    one, two = typed(writer, "1", "2")
    core.receive(one, two)
    document = core.find("notes")
    assert document is not None
    document.join(writer.document("notes").snapshot())
    core.core.rebuilt("notes", 1.0)

    core.answer(0)
    core.answer(1)

    assert core.body() == "12" and core.core.pending_count == 0


def test_what_does_not_fit_is_forgotten_and_wanted_again() -> None:
    core = Core(Config(want_delay=0.1, want_retry=0.5, pending_changes=2))
    changes = typed(Agent(7), "1", "2", "3")
    core.receive(*changes)

    assert core.asked() == changes[:2]
    core.answer(0)
    core.answer(1)
    core.receive(*changes)
    core.answer(2)

    assert core.body() == "123"


def test_a_snapshot_waits_too_and_only_a_few_at_a_time() -> None:
    core, writer = Core(), Agent(7)
    for n in range(SNAPSHOTS_MAX + 1):
        typed(writer, "x" * (n + 1), name=f"notes-{n}")
        snapshot = writer.document(f"notes-{n}").snapshot()
        core.core.take_in(snapshot, (), "agent-7", 1.0)
    core.act()

    assert len(core.asked()) == SNAPSHOTS_MAX
    assert [load for load in core.core.loads() if load[0] == "snapshots to examine"] == [
        ("snapshots to examine", SNAPSHOTS_MAX, SNAPSHOTS_MAX)
    ]
    core.answer(0)
    core.answer(1, "it kills")

    assert core.body("notes-0") == "x" and core.body("notes-1") == ""


def test_a_checkpoints_changes_wait_for_its_snapshot() -> None:
    core, writer = Core(), Agent(7)
    typed(writer, "1")
    snapshot = writer.document("notes").snapshot()
    later = typed(writer, "2", "3")
    core.core.take_in(snapshot, later, "agent-7", 1.0)
    core.act()

    for at in range(3):
        core.answer(at)

    assert core.body() == "123"


def test_questions_end_with_their_document() -> None:
    writer = Agent(7)
    one, two = typed(writer, "1", "2")
    document, asked = Agent(9).find_or_make("notes", True), []
    verdicts = Verdicts(asked.append)
    verdicts.ask(document, Asked("notes", one, 1))

    assert verdicts.is_ready(document, two)
    assert verdicts.forget("notes") == [Asked("notes", one, 1)]
    assert not verdicts.is_ready(document, two)
    assert verdicts.answer(asked[0].number) is None and len(verdicts) == 0


# What pycrdt raises, in the agent itself


class PanicException(BaseException):
    """As pyo3 raises it: no Exception."""


def test_a_panic_rebuilds_the_document_and_quarantines_the_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, writer = Core(), Agent(7)
    writer.map("plan")["good"] = 1
    (good,) = writer.sealed()
    writer.map("plan")["bad"] = "PANIC"
    (bad,) = writer.sealed()
    apply = Lanes.apply

    def panic(self: Lanes, update: bytes, plan: Any) -> list[str]:
        if b"PANIC" in update:
            raise PanicException("from Rust")
        return apply(self, update, plan)

    monkeypatch.setattr(Lanes, "apply", panic)
    core.receive(good, bad)
    core.core.committed(core.core.persisted, 1.0)
    core.act()

    assert core.rebuilds == ["main"]
    (aside,) = core.core.quarantined()
    assert (aside.writer, aside.seq) == (7, 2) and "PanicException: from Rust" in aside.reason
    document = core.find("main")
    assert isinstance(document, Document) and document.is_broken

    def load(document: Document) -> None:
        document.apply(good)

    core.reload(document, 9, load)
    core.core.rebuilt("main", 1.0)
    core.receive(bad)
    assert dict(core.map("plan")) == {"good": 1}
