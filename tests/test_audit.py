"""The audit: what is recorded, that it is never lost with its change, and that tampering shows."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from harness import asynchronous
from hypothesis import given
from hypothesis import strategies as st

from crdtstate import (
    Changed,
    Config,
    ConflictFound,
    PeerRejected,
    Record,
    Replica,
    StoreError,
    UsageError,
)
from crdtstate import audit as audit_module
from crdtstate.audit import NO_HASH, Audit, Chain, Draft, Query, Row, broken, draft
from crdtstate.change import RESOLUTION, decode_change
from crdtstate.conflict import Conflict
from crdtstate.documents import DocumentSet
from crdtstate.stores import Entry, Store
from crdtstate.stores.file import MIGRATIONS, changes, connect, read_audit, reading, verify
from crdtstate.stores.journal import Journal
from crdtstate.stores.memory import MemoryStore

LOCAL = "ws://127.0.0.1:0"
CHILD = Path(__file__).with_name("audit_child.py")


def drafts(count: int) -> list[Draft]:
    return [
        Draft("command", f"agent-{at % 3}", "main", "mplan\0goal", at, 1000 * at, b"x" * at)
        for at in range(1, count + 1)
    ]


# The chain


def chained(count: int) -> tuple[list[Row], Chain]:
    chain = Chain()
    return [chain.add(each) for each in drafts(count)], chain


def problems(rows: list[Row], chain: Chain, dropped: int = 0, anchor: bytes = NO_HASH) -> list[str]:
    return list(broken(rows, dropped, anchor, chain.newest, chain.head))


fields = st.sampled_from([name for name in Row._fields if name != "number"])


@given(count=st.integers(1, 9), at=st.integers(0, 8), field=fields, data=st.data())
def test_any_altered_field_of_any_row_is_found(
    count: int, at: int, field: str, data: st.DataObject
) -> None:
    rows, chain = chained(count)
    at %= count
    old = getattr(rows[at], field)
    kinds = {int: st.integers(0, 2**63 - 1), str: st.text(), bytes: st.binary()}
    new = data.draw(kinds[type(old)].filter(lambda value: value != old))
    rows[at] = rows[at]._replace(**{field: new})

    (problem,) = problems(rows, chain)

    # The last row's own hash is what the chain ends with, else it shows in that very row.
    assert problem.startswith(f"table audit, row {at + 1}: was altered")


@given(count=st.integers(2, 9), at=st.integers(0, 8), to=st.integers(0, 8))
def test_rows_removed_added_or_moved_are_found(count: int, at: int, to: int) -> None:
    rows, chain = chained(count)
    at, to = at % count, to % count
    assert problems(rows, chain) == []

    without = [*rows[:at], *rows[at + 1 :]]
    (problem,) = problems(without, chain)
    assert problem.startswith(f"table audit, row {at + 1}: missing")
    added = [*rows, chained(count + 1)[0][-1]._replace(number=count + 1)]
    assert problems(added, chain)
    if at != to:
        swapped = rows.copy()
        swapped[at], swapped[to] = rows[to], rows[at]
        assert problems(swapped, chain)
        renumbered = [row._replace(number=n) for n, row in enumerate(swapped, 1)]
        (problem,) = problems(renumbered, chain)
        assert problem.startswith(f"table audit, row {min(at, to) + 1}: was altered")


@given(count=st.integers(1, 30), rows_max=st.integers(1, 40), bytes_max=st.integers(300, 9000))
def test_a_trimmed_chain_is_whole_from_its_anchor(
    count: int, rows_max: int, bytes_max: int
) -> None:
    rows, chain = chained(count)

    dropped = chain.trim(rows_max, bytes_max)

    kept = rows[dropped:]
    anchor = rows[dropped - 1].hash if dropped else NO_HASH
    assert problems(kept, chain, dropped, anchor) == []
    assert len(kept) <= rows_max
    assert sum(audit_module.size_of(len(row.data)) for row in kept) <= bytes_max
    again = Chain(
        dropped, chain.newest, chain.head, [audit_module.size_of(len(r.data)) for r in kept]
    )
    assert again.trim(rows_max, bytes_max) == dropped
    assert again.add(drafts(1)[0]) == chain.add(drafts(1)[0])
    if dropped:
        assert problems(kept, chain, dropped - 1, NO_HASH)


# In stores


def entry(seq: int) -> Entry:
    return Entry("main", 7, seq, b"change %d" % seq)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def started(path: Path, **options: Any) -> Journal:
    journal = Journal(path, **options)
    journal.start("agent", 7, lambda: None)
    return journal


@pytest.fixture(params=["memory", "process", "power"])
def store(request: pytest.FixtureRequest, path: Path) -> Any:
    found: Store
    if request.param == "memory":
        found = MemoryStore()
        found.start("agent", 7, lambda: None)
    else:
        found = started(path, durability=request.param)
    with closing(found):
        yield found


def test_a_store_gives_back_the_newest_records_of_a_kind(store: Store) -> None:
    for seq, each in enumerate(drafts(9), 1):
        store.append([entry(seq)], [each])
    store.append([], [drafts(1)[0]._replace(kind="vote", place="mplan\0other")])

    assert [row.number for row in store.audit(Query())] == list(range(1, 11))
    assert [row.number for row in store.audit(Query(limit=3))] == [8, 9, 10]
    assert [row.number for row in store.audit(Query(agent="agent-0", limit=2))] == [6, 9]
    assert [row.number for row in store.audit(Query(after=8))] == [9, 10]
    assert [row.number for row in store.audit(Query(since_ms=8000))] == [8, 9]
    assert [row.number for row in store.audit(Query(kind="vote"))] == [10]
    assert [row.number for row in store.audit(Query(place="mplan\0other"))] == [10]
    assert [row.number for row in store.audit(Query(document="main", kind="vote"))] == [10]
    assert store.audit(Query(document="other")) == []
    assert problems(store.audit(Query()), _chain_of(store)) == []


def _chain_of(store: Any) -> Chain:
    chain: Chain = store._chain
    return chain


def test_a_store_drops_the_oldest_records(store: Store) -> None:
    for each in drafts(300):
        store.append([], [each])
        store.trim_audit(100, 2**20)

    rows = store.audit(Query())
    assert 36 <= len(rows) <= 100 and rows[-1].number == 300


def test_the_chain_goes_on_after_closing_and_trimming(path: Path) -> None:
    for _ in range(5):
        with closing(started(path)) as journal:
            for each in drafts(40):
                journal.append([], [each])
                journal.trim_audit(70, 2**20)

    found = verify(path)
    assert found.problems == []
    assert 35 <= found.records <= 70
    with reading(path) as db:
        assert read_audit(db, Query())[-1].number == 200


TAMPERING = {
    "an altered row": "UPDATE audit SET data = x'00' WHERE id = 170",
    "a later date": "UPDATE audit SET at_ms = at_ms + 1 WHERE id = 170",
    "another agent": "UPDATE audit SET agent = 'nobody' WHERE id = 170",
    "a text that is none": "UPDATE audit SET agent = CAST(x'ff' AS TEXT) WHERE id = 170",
    "a missing row": "DELETE FROM audit WHERE id = 170",
    "a row too many": "INSERT INTO audit SELECT 0, kind, agent, document, place, stamp, at_ms, "
    "data, sha256 FROM audit WHERE id = 170",
    "the end": "DELETE FROM audit WHERE id >= 190",
    "the beginning": "DELETE FROM audit WHERE id < 170",
    "all of it": "DELETE FROM audit",
    "the anchor": "UPDATE audit_chain SET anchor = zeroblob(32)",
    "the ends": "DELETE FROM audit_chain",
    "two rows exchanged": "UPDATE audit SET id = -1 WHERE id = 170; "
    "UPDATE audit SET id = 170 WHERE id = 171; UPDATE audit SET id = 171 WHERE id = -1",
}


@pytest.mark.parametrize("how", TAMPERING)
def test_verify_names_the_first_broken_row(path: Path, how: str) -> None:
    with closing(started(path)) as journal:
        journal.append([], drafts(200))
        journal.trim_audit(100, 2**20)
    assert verify(path).problems == []
    with closing(connect(path)) as db:
        db.execute(TAMPERING[how])

    (problem,) = verify(path).problems

    first = {"the end": 190}
    if how in ("the beginning", "all of it", "the anchor", "a row too many"):
        assert problem.startswith("table audit, row ")
    elif how == "the ends":
        assert problem == "table audit_chain: its row is missing"
    else:
        assert problem.startswith(f"table audit, row {first.get(how, 170)}: ")
    # And it is no reason not to start, nor to tell the rest.
    started(path).close()


@asynchronous
async def test_a_damaged_record_says_so(path: Path) -> None:
    async with Replica("ann", store=path) as ann:
        for number in range(3):
            ann._emit(PeerRejected("eve", f"nonsense {number}"))
        assert len(ann.audit()) == 3
    with closing(connect(path)) as db:
        db.execute("UPDATE audit SET data = x'c1' WHERE id = 2")
    async with Replica("ann", store=path) as ann:
        assert [r.detail for r in ann.audit()] == [
            "nonsense 0",
            "this record is damaged; see: crdtstate verify",
            "nonsense 2",
        ]


def test_a_store_of_the_older_schema_gets_an_audit(path: Path) -> None:
    with closing(connect(path)) as db:
        from crdtstate.stores.file import migrate

        migrate(db, path, MIGRATIONS[:1])
    assert verify(path).problems == [] and verify(path).records == 0
    with closing(started(path)) as journal:
        journal.append([], drafts(2))

    assert verify(path).records == 2
    assert path.with_name(f"state.pre-v{len(MIGRATIONS)}.db").exists()


def test_a_commit_that_failed_is_written_again(path: Path) -> None:
    with closing(started(path)) as journal:
        journal.append([entry(1)], drafts(100))
        with closing(apsw.Connection(str(path), vfs="cksmvfs")) as other:
            other.execute("BEGIN IMMEDIATE")
            journal.append([entry(2)], drafts(1))
            journal.trim_audit(50, 2**20)
            assert isinstance(journal.failure, StoreError)
            other.execute("ROLLBACK")
        journal.retry()
        assert journal.failure is None

    found = verify(path)
    assert [problem for problem in found.problems if "audit" in problem] == []
    assert found.changes == 2
    assert found.records <= 50


# Records


def test_a_record_reads_as_it_was_written() -> None:
    documents = DocumentSet("ann", 1, lambda: 1000)
    documents.map("plan")["goal"] = 1
    (change, _) = documents.take_sealed()[0]
    found = documents.map("plan").live("goal")
    long = dataclasses.replace(found[0], value="x" * 2000)
    conflict = Conflict("main", "map", "plan", "goal", (found[0], long))
    chain = Chain()

    row = chain.add(
        draft(
            "resolution",
            "ann",
            change.stamp,
            5000,
            conflict=conflict,
            chosen=[1, None],
            rule="resolve",
            heads=documents.document("main").version,
            detail="why",
        )
    )
    record = Record.read(row)

    assert (record.number, record.kind, record.agent, record.rule) == (
        1,
        "resolution",
        "ann",
        "resolve",
    )
    assert (record.document, record.path) == ("main", "plan['goal']")
    assert record.at == datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)
    assert record.stamp == change.stamp and record.chosen == [1, None]
    assert record.version == {1: 1} and record.detail == "why" and record.hash == chain.head
    assert record.candidates[0] == found[0]
    assert record.candidates[1].value.startswith("<2003 bytes packed, SHA-256 ")
    assert "resolution by ann: main: plan['goal'] = [1, None] (resolve) over 1 by ann" in str(
        record
    )


def test_of_many_rejections_only_some_are_recorded() -> None:
    clock = [0]
    audit = Audit(DocumentSet("ann", 1, lambda: clock[0]))
    found = [audit.rejected("eve", "nonsense") for _ in range(1000)]
    assert sum(each is not None for each in found) == audit_module.REJECTIONS_AT_ONCE
    assert audit.rejected("bob", "nonsense") is not None

    clock[0] += audit_module.REJECTIONS_EVERY_MS
    late = audit.rejected("eve", "nonsense")
    assert late is not None
    assert Record.read(Chain().add(late)).detail == "nonsense (number 1001)"
    assert audit.rejected("eve", "nonsense") is None
    # Nor under ever new names.
    many = [audit.rejected(f"eve-{n}", "nonsense") for n in range(1000)]
    assert sum(each is not None for each in many) == audit_module.REJECTIONS_MAX - 1


# Replicas


async def even(*replicas: Replica) -> None:
    """Wait until all have what each has."""
    for replica in replicas:
        for other in replicas:
            await other.wait_for(replica.version(), timeout=20)


def disagree(*replicas: Replica, key: str = "goal") -> None:
    for replica in replicas:
        replica.map("plan")[key] = replica.agent


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(r.kind, r.agent, r.chosen, r.rule) for r in records]


@asynchronous
async def test_a_resolution_is_recorded_where_it_is_made_and_once_where_it_is_delivered(
    path: Path,
) -> None:
    async with Replica("ann", listen=LOCAL) as ann:
        async with Replica("bob", store=path, peers=[str(ann.address)]) as bob:
            await bob.synced()
            disagree(ann, bob)
            await even(ann, bob)
            before = datetime.now(UTC) - timedelta(seconds=1)
            ann.map("plan").resolve("goal", "both")
            await even(ann, bob)
            disagree(ann, bob, key="other")
            await even(ann, bob)
            bob.map("plan")["other"] = "new"
            await even(ann, bob)
            disagree(ann, bob, key="third")
            await even(ann, bob)
            bob.map("plan")["third"] = bob.map("plan")["third"]
            disagree(ann, bob, key="last")
            await even(ann, bob)
            del ann.map("plan")["last"]
            await even(ann, bob)

            expected = [
                ("resolution", "ann", "both", "resolve"),
                ("resolution", "bob", "new", "write"),
                ("resolution", "bob", ann.map("plan")["third"], "lww"),
                ("resolution", "ann", None, "write"),
            ]
            assert told(ann.audit()) == told(bob.audit()) == expected
            record = bob.audit()[0]
            assert {c.value for c in record.candidates} == {"ann", "bob"}
            assert record.version and record.version <= bob.document("main").version
            assert bob.audit()[-1].detail == "removed"
            assert told(bob.audit(agent="bob", limit=1)) == expected[2:3]
            assert told(bob.audit(bob.audit()[1])) == expected[2:]
            assert told(bob.audit(before, document="main")) == expected
            assert bob.audit(datetime.now(UTC) + timedelta(1)) == bob.audit(document="x") == []
            explanation = bob.map("plan").explain("goal")
            assert told(list(explanation.earlier)) == expected[:1]
            assert "earlier: " in str(explanation)
            await bob.durable()
        async with Replica("bob", store=path, peers=[str(ann.address)]) as bob:
            await bob.synced()
            assert told(bob.audit()) == expected
            assert told(list(bob.map("plan").explain("goal").earlier)) == expected[:1]
    assert verify(path).problems == [] and verify(path).records == 4


@asynchronous
async def test_what_a_snapshot_resolved_is_recorded_once(path: Path) -> None:
    # So little log that who was away gets a snapshot.
    small = Config(log_bytes=1, snapshot_after_bytes=2000)
    async with Replica("ann", listen=LOCAL, config=small) as ann:
        async with Replica("bob", store=path, peers=[str(ann.address)]) as bob:
            await bob.synced()
            disagree(ann, bob)
            await even(ann, bob)
            assert bob.conflicts()
        ann.map("plan").resolve("goal", "both")
        for number in range(100):
            ann.map("plan")[f"k{number}"] = "x" * 100
            await ann.durable()
        for _ in range(2):
            async with Replica("bob", store=path, peers=[str(ann.address)]) as bob:
                await bob.synced()
                assert told(bob.audit()) == [("resolution", "ann", "both", "write")]
    assert verify(path).problems == []


@asynchronous
async def test_votes_and_what_they_decide_are_recorded(path: Path) -> None:
    config = Config(voters=["ann", "bob"])
    async with (
        Replica("ann", listen=LOCAL, config=config) as ann,
        Replica("bob", store=path, peers=[str(ann.address)], config=config) as bob,
        Replica("eve", peers=[str(ann.address)]) as eve,
    ):
        await even(ann, bob, eve)
        ann.map("plan", strategy="vote")
        disagree(ann, bob)
        await even(ann, bob, eve)
        seen: list[Changed] = []
        eve.on(Changed, seen.append)
        for voter in (ann, bob):
            voter.vote(voter.conflicts()[0], "ann")
            await even(ann, bob, eve)
        # What is read there changed, though nobody wrote there.
        changed = [event for event in seen if event.document == "main"]
        bob.map("plan").resolve("goal", "ann")
        await even(ann, bob, eve)

        decided = ("decision", "bob", "ann", "vote")
        resolved = ("resolution", "bob", "ann", "vote")
        assert told(ann.audit()) == [("vote", "ann", "ann", "vote"), decided, resolved]
        assert told(bob.audit()) == [("vote", "bob", "ann", "vote"), decided, resolved]
        assert told(eve.audit()) == [decided, resolved]
        assert eve.audit()[0].detail == "ann for 'ann', bob for 'ann'"
        assert [(e.path, e.value, e.agent) for e in changed] == [("plan['goal']", "ann", "bob")]


@asynchronous
async def test_a_decision_is_not_recorded_again_after_a_restart(path: Path) -> None:
    config = Config(voters=["ann"])
    async with (
        Replica("eve", listen=LOCAL) as eve,
        Replica("ann", store=path, peers=[str(eve.address)], config=config) as ann,
    ):
        await even(eve, ann)
        ann.map("plan", strategy="vote")
        disagree(eve, ann)
        await even(eve, ann)
        ann.vote(ann.conflicts()[0], "eve")
        await even(eve, ann)
    async with Replica("ann", store=path, config=config) as ann:
        assert ann.map("plan")["goal"] == "eve"
        ann.map("plan")["other"] = 1
        ann.vote(ann.conflicts()[0], "eve")
        assert [r.kind for r in ann.audit()] == ["vote", "decision", "vote"]
        ann.vote(ann.conflicts()[0], "ann")
        await ann.durable()
        assert told(ann.audit(kind="decision")) == [
            ("decision", "ann", "eve", "vote"),
            ("decision", "ann", "ann", "vote"),
        ]


@asynchronous
async def test_rejections_are_recorded() -> None:
    async with Replica("ann") as ann:
        ann._emit(PeerRejected("eve", "nonsense"))
        (record,) = ann.audit(kind="rejection")

        assert (record.agent, record.detail, record.document) == ("eve", "nonsense", "")


@asynchronous
async def test_the_audit_is_bounded(path: Path) -> None:
    config = Config(audit_max=20)
    async with (
        Replica("ann", listen=LOCAL, store=path, config=config) as ann,
        Replica("bob", peers=[str(ann.address)], config=config) as bob,
    ):
        await even(ann, bob)
        for number in range(50):
            disagree(ann, bob, key=f"k{number}")
        await even(ann, bob)
        for conflict in ann.conflicts():
            ann.resolve(conflict, 1)
            await ann.durable()
        await even(ann, bob)
        for replica in (ann, bob):
            assert 5 <= len(replica.audit()) <= 20
            assert replica.audit()[-1].number == 50
    assert verify(path).problems == []


@asynchronous
async def test_bad_questions_are_refused() -> None:
    async with Replica("ann") as ann:
        with pytest.raises(UsageError, match="kind is one of resolution, decision"):
            ann.audit(kind="resolutions")
        with pytest.raises(UsageError, match="limit"):
            ann.audit(limit=0)
        with pytest.raises(UsageError, match="aware datetime"):
            ann.audit(datetime(2026, 1, 1))
        with pytest.raises(UsageError, match="Config\\(voters="):
            ann.vote(Conflict("main", "map", "plan", "goal", ()), 1)
        with pytest.raises(UsageError, match="what conflicts\\(\\)"):
            ann.resolve("goal", 1)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="not in conflict as given any more"):
            ann.resolve(Conflict("main", "map", "plan", "goal", ()), 1)


@asynchronous
async def test_a_resolver_does_not_write_over_what_it_did_not_see() -> None:
    async with (
        Replica("ann", listen=LOCAL) as ann,
        Replica("bob", peers=[str(ann.address)]) as bob,
    ):
        await even(ann, bob)
        found: list[ConflictFound] = []
        ann.on(ConflictFound, found.append)
        disagree(ann, bob)
        await even(ann, bob)
        bob.map("plan")["goal"] = "newer"
        ann.map("plan")["goal"] = "also"
        await even(ann, bob)

        assert len(found) == 2, "another candidate is another conflict"
        with pytest.raises(UsageError, match="not in conflict as given"):
            ann.resolve(found[0], "old news")
        ann.resolve(found[1], "settled")
        await even(ann, bob)
        assert bob.map("plan")["goal"] == "settled" and not bob.conflicts()


@asynchronous
async def test_a_record_goes_into_the_store_with_its_change_and_not_otherwise(path: Path) -> None:
    async with (
        Replica("ann", listen=LOCAL, store=path) as ann,
        Replica("bob", peers=[str(ann.address)]) as bob,
    ):
        await even(ann, bob)
        handed: list[tuple[set[int], set[int]]] = []
        honest = ann._store.append

        def append(entries: Any, records: Any = ()) -> int:
            made = {decode_change(each.data).stamp for each in entries}
            handed.append((made, {each.stamp for each in records}))
            return honest(entries, records)

        ann._store.append = append  # type: ignore[method-assign]
        for number in range(10):
            disagree(ann, bob, key=f"k{number}")
            await even(ann, bob)
            (ann, bob)[number % 2].map("plan").resolve(f"k{number}", number)
            await even(ann, bob)
        await ann.durable()
        assert sum(len(records) for _, records in handed) == 10
        assert all(records <= made for made, records in handed)


# kill -9


@pytest.mark.parametrize("durability", ["process", "power"])
@asynchronous
async def test_no_record_is_lost_or_ahead_of_its_change(path: Path, durability: str) -> None:
    rng = random.Random(4)
    for number in range(8):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CHILD),
            str(path),
            durability,
            str(number),
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"open\n"
        for _ in range(rng.randrange(1, 15)):
            assert (await child.stdout.readline()).startswith(b"resolved")
        # Not a wait for something: the moment is the point.
        await asyncio.sleep(rng.random() * 0.01)
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()

        assert verify(path).problems == []
        with reading(path) as db:
            made = [decode_change(each.data) for _, each, _ in changes(db)]
            records = [Record.read(row) for row in read_audit(db, Query(limit=10**6))]
        resolved = [(c.origin.agent, c.stamp) for c in made if c.kind == RESOLUTION]
        recorded = [(r.agent, r.stamp) for r in records if r.rule == "resolve"]
        assert recorded == resolved, f"life {number}"
        voted = {c.stamp for c in made if c.document == "@votes" and c.origin.agent == "victim"}
        assert {r.stamp for r in records if r.kind == "vote"} <= voted
    assert len(resolved) > 20
