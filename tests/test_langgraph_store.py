"""The LangGraph store: items, namespaces, filters, words, expiry, and two replicas that meet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from test_replica import LOCAL, url

from crdtstate import Changed, CRDTStateError, Replica, UnsupportedValue, UsageError, blocking
from crdtstate.integrations.langgraph import CrdtSaver, CrdtStore

MINUTE_MS = 60_000


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.ms

    def pass_minutes(self, minutes: float) -> None:
        self.ms += round(minutes * MINUTE_MS)


@pytest.fixture(scope="module")
def replica() -> Iterator[blocking.Replica]:
    with blocking.Replica("a") as opened:
        yield opened


@pytest.fixture
def store(replica: blocking.Replica) -> Iterator[CrdtStore]:
    made = CrdtStore(replica)
    yield made
    for namespace in made.list_namespaces(limit=10_000):
        for item in made.search(namespace, limit=10_000):
            made.delete(item.namespace, item.key)
    assert made.list_namespaces() == []


def keys(found: Any) -> list[str]:
    return sorted(item.key for item in found)


# Items


def test_an_item_is_put_read_replaced_and_deleted(replica: blocking.Replica) -> None:
    clock = Clock()
    store = CrdtStore(replica, now_ms=clock)
    store.put(("users", "7"), "likes", {"food": ["pizza"], "n": 1})
    first = store.get(("users", "7"), "likes")
    clock.pass_minutes(1)
    store.put(("users", "7"), "likes", {"food": []})
    second = store.get(("users", "7"), "likes")
    store.delete(("users", "7"), "likes")

    assert first is not None and second is not None
    assert (first.namespace, first.key) == (("users", "7"), "likes")
    assert (first.value, second.value) == ({"food": ["pizza"], "n": 1}, {"food": []})
    assert first.created_at == first.updated_at == second.created_at
    assert first.created_at == datetime.fromtimestamp(1_800_000_000, UTC)
    assert (second.updated_at - first.updated_at).total_seconds() == 60
    assert store.get(("users", "7"), "likes") is None
    assert store.get(("users", "8"), "likes") is None
    store.delete(("users", "8"), "likes")


def test_a_batch_answers_in_order_and_reads_what_was_before_it(store: CrdtStore) -> None:
    store.put(("t", "foo"), "one", {"data": 1})
    answers = store.batch(
        [
            GetOp(("t", "foo"), "one"),
            PutOp(("t", "foo"), "two", {"data": 2}),
            PutOp(("t", "foo"), "two", {"data": 3}),
            GetOp(("t", "foo"), "two"),
            SearchOp(("t",)),
            ListNamespacesOp(),
            PutOp(("t", "foo"), "one", None),
        ]
    )

    assert answers[0].value == {"data": 1}  # type: ignore[union-attr]
    assert answers[1:4] == [None, None, None]
    assert keys(answers[4]) == ["one"]
    assert answers[5:] == [[("t", "foo")], None]
    assert keys(store.search(("t",))) == ["two"]
    assert store.search(("t",))[0].value == {"data": 3}


def test_values_are_what_json_knows_and_what_more_can_be_shared(store: CrdtStore) -> None:
    value = {"ü": "↑", "n": 2**70, "f": 1.5, "l": [None, True, {"a": []}], "b": b"x"}
    store.put(("v",), "k", value)

    assert store.search(("v",))[0].value == value
    with pytest.raises(UnsupportedValue, match="the item 'k' in 'v'"):
        store.batch([PutOp(("v",), "other", {}), PutOp(("v",), "k", {"x": object()})])
    with pytest.raises(UnsupportedValue, match="larger than"):
        store.put(("v",), "k", {"x": "x" * 2**20})
    assert keys(store.search(("v",))) == ["k"]


def test_a_large_batch_is_written_whole(store: CrdtStore) -> None:
    store.batch([PutOp(("large",), str(number), {"x": "x" * 10_000}) for number in range(200)])

    assert len(store.search(("large",), limit=1000)) == 200


# Namespaces


def test_namespaces_are_listed_by_prefix_suffix_wildcards_and_depth(store: CrdtStore) -> None:
    spaces = [
        ("a", "b", "c"),
        ("a", "b", "d"),
        ("a", "x", "c"),
        ("z", "b", "c"),
        ("a",),
        ("A", "b"),
    ]
    for space in spaces:
        store.put(space, "k", {})

    assert store.list_namespaces() == sorted(spaces)
    assert store.list_namespaces(prefix=("a",)) == sorted(spaces[:3] + [("a",)])
    assert store.list_namespaces(prefix=("a", "*", "c")) == [("a", "b", "c"), ("a", "x", "c")]
    assert store.list_namespaces(suffix=("c",), prefix=("a",)) == [("a", "b", "c"), ("a", "x", "c")]
    assert store.list_namespaces(suffix=("*", "d")) == [("a", "b", "d")]
    assert store.list_namespaces(max_depth=1) == [("A",), ("a",), ("z",)]
    assert store.list_namespaces(limit=2, offset=1) == sorted(spaces)[1:3]


def test_labels_are_compared_whole_and_to_the_letter(store: CrdtStore) -> None:
    spaces = [("docs",), ("docs2",), ("docs", "x"), ("d*cs",), ("Docs",), ("docs\n",), ("~x",)]
    spaces += [("l" * 300, "m"), ("l" * 300, "n")]
    for space in spaces:
        store.put(space, "k", {"space": list(space)})

    for space in spaces:
        found = store.search(space, limit=100)
        wanted = [each for each in spaces if each[: len(space)] == space]
        assert sorted(item.namespace for item in found) == sorted(wanted)
        assert all(item.value["space"] == list(item.namespace) for item in found)
    assert len(store.search((), limit=100)) == len(spaces)


@pytest.mark.parametrize("bad", [("a.b",), ("",), ("a", 1), ("a\0",)])
def test_labels_that_cannot_be_are_refused(store: CrdtStore, bad: Any) -> None:
    for op in (GetOp(bad, "k"), PutOp(bad, "k", {}), SearchOp(bad)):
        with pytest.raises(InvalidNamespaceError):
            store.batch([op])
    condition = MatchCondition("prefix", bad)
    with pytest.raises(InvalidNamespaceError):
        store.batch([ListNamespacesOp((condition,))])


def test_what_an_operation_cannot_be_is_refused_and_nothing_is_written(store: CrdtStore) -> None:
    good = PutOp(("a",), "k", {})
    bad: list[Any] = [
        PutOp((), "k", {}),
        PutOp(("a",), "k" * 900, {}),
        PutOp(("a",), "k", {}, ttl=0),
        PutOp(("a",), "k", {}, ttl=float("nan")),
        PutOp(("a",), "k", {}, ttl=1e12),
        PutOp(("a",), "k", {}, index="text"),  # type: ignore[arg-type]
        PutOp(("x",) * 65, "k", {}),
        SearchOp(("a",), limit=-1),
        SearchOp(("a",), offset=-1),
        ListNamespacesOp(max_depth=0),
        ListNamespacesOp((MatchCondition("infix", ("a",)),)),  # type: ignore[arg-type]
        "op",
    ]
    store.put(("b",), "k", {"n": 1})
    bad.append(SearchOp(("b",), {"n": {"$near": 1}}))
    for op in bad:
        with pytest.raises(UsageError):
            store.batch([good, op])
    assert store.get(("a",), "k") is None


# Search


def test_filters_compare_fields(store: CrdtStore) -> None:
    items: dict[str, Any] = {
        "a": {"n": 1, "s": "x", "on": True, "deep": {"k": 1}, "tags": ["t"]},
        "b": {"n": 2.5, "s": "y", "on": False, "deep": {"k": 2}, "a-b": 1},
        "c": {"n": 2**70, "s": "z", "none": None},
    }
    for key, value in items.items():
        store.put(("f",), key, value)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n": 1}, "a"),
        ({"n": 1.0}, "a"),
        ({"s": "x", "n": 2}, ""),
        ({"n": {"$gt": 1, "$lt": 3}}, "b"),
        ({"n": {"$gte": 2.5}}, "bc"),
        ({"n": {"$lte": 2.5}}, "ab"),
        ({"n": {"$ne": 1}}, "bc"),
        ({"s": {"$eq": "y"}}, "b"),
        ({"s": {"$gt": "x"}}, "bc"),
        ({"s": {"$gt": 1}}, ""),
        ({"on": False}, "b"),
        ({"on": {"$ne": True}}, "bc"),
        ({"deep": {"k": 1}}, "a"),
        ({"deep.k": {"$gt": 1}}, "b"),
        ({"a-b": 1}, "b"),
        ({"tags": ["t"]}, "a"),
        ({"none": None}, "abc"),
        ({"x') OR 1=1 --": "x"}, ""),
    ]
    for filter, found in cases:
        assert keys(store.search(("f",), filter=filter)) == list(found), filter


def test_pages_of_a_search_are_the_whole_search(replica: blocking.Replica) -> None:
    clock = Clock()
    store = CrdtStore(replica, now_ms=clock)
    for number in range(25):
        store.put(("pages", str(number % 3)), str(number), {})
        clock.pass_minutes(number % 2)
    whole = store.search(("pages",), limit=100)
    pages = [
        each for at in range(0, 30, 7) for each in store.search(("pages",), limit=7, offset=at)
    ]

    assert len(whole) == 25
    assert pages == whole
    assert [item.updated_at for item in whole] == sorted(
        (item.updated_at for item in whole), reverse=True
    )
    store.batch([PutOp(item.namespace, item.key, None) for item in whole])


def test_a_query_finds_items_by_their_words_and_ranks_them(store: CrdtStore) -> None:
    texts = {
        "one": {"text": "Ann likes pizza, and pizza likes Ann"},
        "two": {"text": "Bob likes soup", "about": {"tags": ["Lunch", "PIZZA"]}},
        "three": {"text": "nothing of the sort"},
    }
    for key, value in texts.items():
        store.put(("q",), key, value)
    found = store.search(("q",), query="Pizza! for Ann?")

    assert [item.key for item in found] == ["one", "two"]
    assert found[0].score is not None and found[1].score is not None
    assert 1 > found[0].score > found[1].score > 0
    assert keys(store.search(("q",), query="lunch", filter={"text": "Bob likes soup"})) == ["two"]
    assert store.search(("q",), query="pizzeria") == []
    assert store.search(("q",), query="likes", limit=1, offset=1)[0].key == "two"
    assert [item.score for item in store.search(("q",))] == [None] * 3


def test_index_says_in_which_fields_words_are_looked_for(replica: blocking.Replica) -> None:
    store = CrdtStore(replica, index={"fields": ["title", "notes[*].text"]})
    value = {"title": "apple", "body": "pear", "notes": [{"text": "plum"}, {"text": "fig"}]}
    store.put(("i",), "by the store", value)
    store.put(("i",), "by itself", value, index=["body"])
    store.put(("i",), "not at all", value, index=False)

    assert keys(store.search(("i",), query="apple")) == ["by the store"]
    assert keys(store.search(("i",), query="fig")) == ["by the store"]
    assert keys(store.search(("i",), query="pear")) == ["by itself"]
    assert len(store.search(("i",))) == 3
    for key in ("by the store", "by itself", "not at all"):
        store.delete(("i",), key)
    with pytest.raises(UsageError, match="vectors, which there are not"):
        CrdtStore(replica, index={"dims": 3, "embed": lambda texts: []})


# Expiry


def test_items_expire_by_their_own_time_or_the_stores(replica: blocking.Replica) -> None:
    clock = Clock()
    store = CrdtStore(replica, ttl={"default_ttl": 10}, now_ms=clock)
    store.put(("e",), "default", {})
    store.put(("e",), "short", {}, ttl=1)
    store.put(("e",), "never", {}, ttl=None)

    clock.pass_minutes(2)
    assert keys(store.search(("e",))) == ["default", "never"]
    assert store.get(("e",), "short") is None
    assert store.sweep_ttl() == 1
    clock.pass_minutes(9)
    assert keys(store.search(("e",))) == ["never"]
    store.delete(("e",), "never")
    assert store.list_namespaces() == []  # all that is left has expired
    assert store.sweep_ttl() == 1
    assert store.sweep_ttl() == 0


def test_reading_prolongs_an_item_if_that_is_wanted(replica: blocking.Replica) -> None:
    clock = Clock()
    store = CrdtStore(replica, ttl={"default_ttl": 10, "refresh_on_read": True}, now_ms=clock)
    for key in ("get", "search", "neither"):
        store.put(("r",), key, {"key": key})
    clock.pass_minutes(6)
    store.get(("r",), "get")
    store.search(("r",), filter={"key": "search"})
    store.get(("r",), "neither", refresh_ttl=False)
    store.search(("r",), refresh_ttl=False)
    clock.pass_minutes(6)

    assert keys(store.search(("r",), refresh_ttl=False)) == ["get", "search"]
    assert store.sweep_ttl() == 1
    clock.pass_minutes(6)
    assert store.sweep_ttl() == 2


def test_expired_items_are_read_until_they_are_swept_if_that_is_wanted(
    replica: blocking.Replica,
) -> None:
    clock = Clock()
    store = CrdtStore(replica, ttl={"omit_expired": False}, now_ms=clock)
    store.put(("o",), "k", {}, ttl=1)
    clock.pass_minutes(2)

    assert store.get(("o",), "k") is not None
    assert store.sweep_ttl() == 1
    assert store.get(("o",), "k") is None
    for bad in ({"default_ttl": 0}, {"sweep_interval_minutes": -1}):
        with pytest.raises(UsageError, match="a number of minutes"):
            CrdtStore(replica, ttl=bad)  # type: ignore[arg-type]


@asynchronous
async def test_expired_items_are_swept_by_themselves() -> None:
    clock = Clock()
    async with Replica("a") as replica:
        store = CrdtStore(replica, ttl={"sweep_interval_minutes": 1e-4}, now_ms=clock)  # type: ignore[typeddict-item]
        await store.aput(("s",), "k", {}, ttl=1)
        clock.pass_minutes(2)
        async with asyncio.timeout(20):
            async for event in replica.events(Changed):
                if isinstance(event, Changed) and event.value is None:
                    break
        found = [replica.document(name).map("i/s") for name in replica.documents()]

    assert [len(items) for items in found] == [0]


# Replicas


@asynchronous
async def test_what_one_agent_remembers_all_do() -> None:
    async with Replica("a", listen=LOCAL) as a, Replica("b", peers=[url(a)]) as b:
        one, two = CrdtStore(a), CrdtStore(b)
        await asyncio.gather(
            *(one.aput(("m",), f"a{number}", {"n": number}) for number in range(20)),
            *(two.aput(("m",), f"b{number}", {"n": number}) for number in range(20)),
        )
        version, other = a.version(), b.version()
        await asyncio.gather(b.wait_for(version, 20), a.wait_for(other, 20))
        found = [await store.asearch(("m",), limit=100) for store in (one, two)]

        assert len(found[0]) == 40
        assert found[0] == found[1]


@asynchronous
async def test_a_put_elsewhere_survives_a_sweep_at_the_same_time() -> None:
    clock = Clock()
    async with Replica("a", listen=LOCAL) as a, Replica("b") as b:
        one, two = CrdtStore(a, now_ms=clock), CrdtStore(b, now_ms=clock)
        await one.aput(("m",), "k", {"n": 1}, ttl=1)
        b.connect(url(a))
        await b.wait_for(a.version(), 20)
        clock.pass_minutes(2)
        await asyncio.gather(one.asweep_ttl(), two.aput(("m",), "k", {"n": 2}, ttl=10))
        version, other = a.version(), b.version()
        await asyncio.gather(b.wait_for(version, 20), a.wait_for(other, 20))

        for store in (one, two):
            item = await store.aget(("m",), "k")
            assert item is not None and item.value == {"n": 2}


def test_it_is_kept_in_a_file_beside_a_checkpointer(tmp_path: Path) -> None:
    with CrdtSaver.open(tmp_path / "a.db") as saver:
        CrdtStore(saver).put(("a",), "k", {"n": 1})
        with pytest.raises(CRDTStateError, match="happens once"):
            CrdtStore(saver).__enter__()
    with CrdtStore.open(tmp_path / "a.db", shared=True) as store:
        item = store.get(("a",), "k")

    assert item is not None and item.value == {"n": 1}


@asynchronous
async def test_what_somebody_else_spoiled_reads_as_if_it_were_not_there() -> None:
    async with Replica("a") as replica:
        store = CrdtStore(replica)
        await store.aput(("m",), "k", {"n": 1}, ttl=1)
        [document] = (replica.document(name) for name in replica.documents())
        for bad in (None, 1, [], [1, 2, 3, 4, 5], {"a": 1}, [1, 1, [1], "x", None]):
            document.map("i/m")["k"] = bad
            document.map("x/m")["k"] = bad
            assert await store.aget(("m",), "k") is None
            assert await store.asearch(("m",)) == []
        document.map("i/~nothing")["k"] = [1, 1, None, {}, ["else", "where"]]
        assert await store.asearch(()) == []
        assert await store.asweep_ttl() >= 0
