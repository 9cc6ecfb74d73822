"""Whether a store's changes are what their writers made: `crdtstate verify`, with and without a
mesh."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import Agent

from crdtstate import blocking, cli
from crdtstate.authors import authors_of
from crdtstate.change import CARD_HEAD, CHECKSUM, Change, decode_change, encode_change
from crdtstate.credentials import open_credentials
from crdtstate.stores import chains
from crdtstate.stores.chains import Chains
from crdtstate.stores.file import checksum, connect
from tests.fleet_mesh import Mesh

Run = Callable[[str], tuple[int, str, str]]

WORDS = "the words that all of them know"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crdtstate", *shlex.split(line)])
        return cli.main(), *capsys.readouterr()

    return run


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return private(tmp_path / "ann.join", Mesh().invite("ann").encode())


def written(store: Path, mesh: Path | str | None, count: int = 3) -> None:
    with blocking.Replica("ann", store=store, mesh=mesh) as ann:
        for number in range(count):
            ann.map("plan")["goal"] = number
            ann.durable()


def alter(store: Path, row: int, change: Callable[[Change], bytes]) -> None:
    """What somebody can do who may write to the file: every checksum is right."""
    with closing(connect(str(store))) as db:
        fields: Any = db.execute("SELECT writer, seq, data FROM journal WHERE id = ?", (row,))
        writer, seq, data = next(iter(fields))
        made = change(decode_change(data))
        crc = checksum("main", writer, seq, made)
        db.execute("UPDATE journal SET data = ?, crc = ? WHERE id = ?", (made, crc, row))


def said_otherwise(change: Change) -> bytes:
    """The change with another message and the proof that it had."""

    class Same:
        scheme, card = change.scheme, change.card

        def prove(self, body: bytes) -> bytes:
            return change.proof

    fields = {name: getattr(change, name) for name in ("document", "dot", "stamp", "kind")}
    deps = {dep.writer: dep.seq for dep in change.deps}
    origin = change.origin._replace(message="I never said that")
    more: Any = {"prev": change.prev, "card": change.card}
    if change.scheme != CHECKSUM:
        more["prover"] = Same()
    return encode_change(
        **fields, deps=deps, shared=False, update=change.update, origin=origin, **more
    ).data


def test_a_sound_store_is_proven(run: Run, tmp_path: Path, token: Path) -> None:
    store = tmp_path / "ann.db"
    written(store, token)

    code, out, _ = run(f"verify {store} --mesh {token}")
    assert code == 0 and "3 changes, " in out and out.endswith("; 3 changes proven)\n")
    assert json.loads(run(f"verify {store} --mesh {token} --json")[1])["proven"] == 3
    code, out, _ = run(f"verify {store}")
    assert code == 0 and "changes proven" not in out
    assert "proven" not in json.loads(run(f"verify {store} --json")[1])


def test_what_was_altered_in_the_midst_breaks_the_chain(
    run: Run, tmp_path: Path, token: Path
) -> None:
    store = tmp_path / "ann.db"
    written(store, None)
    alter(store, 2, said_otherwise)

    code, out, err = run(f"verify {store}")

    assert code == 1 and "is damaged: " in err
    assert "table journal, row 3, document 'main': <Change main " in out
    assert "does not follow the change before it" in out


@pytest.mark.parametrize("words", [False, True], ids=["signed", "keyed"])
def test_what_was_altered_at_the_end_is_found_by_its_proof(
    run: Run, tmp_path: Path, token: Path, words: bool
) -> None:
    store = tmp_path / "ann.db"
    mesh = private(tmp_path / "words", WORDS) if words else token
    written(store, mesh)
    alter(store, 3, said_otherwise)

    assert run(f"verify {store}")[0] == 0, "nothing follows it"
    code, out, err = run(f"verify {store} --mesh {mesh}")

    assert code == 1 and "is damaged, or not of this mesh: 1 problem" in err
    assert out.startswith("table journal, row 3, document 'main': <Change main ")
    assert ("does not know the secret" if words else "is not signed by ann") in out


def test_of_another_mesh_it_is_not_proven(
    run: Run, tmp_path: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "TOLD_MAX", 2)
    other = private(tmp_path / "other.join", Mesh().invite("ann").encode())
    for store, mesh in ((tmp_path / "a.db", None), (tmp_path / "b.db", other)):
        written(store, mesh, 5)
        code, out, _ = run(f"verify {store} --mesh {token}")
        lines = out.splitlines()
        assert code == 1 and lines[-1] == "table journal: 3 more changes are not proven"
        assert len(lines) == 3
        assert ("is not signed, as" if mesh is None else "of another mesh") in lines[0]


def test_changes_follow_the_snapshot() -> None:
    agent = Agent(1)
    agent.map("plan")["x"] = 1
    (first,) = agent.sealed()
    snapshot = agent.document("main").snapshot()
    agent.map("plan")["x"] = 2
    (second,) = agent.sealed()
    agent.map("plan")["x"] = 3
    (third,) = agent.sealed()
    wrong = decode_change(said_otherwise(first))

    def problems(data: bytes, *found: Change) -> list[str]:
        chain = Chains(None)
        rows = [(row, "main", each.data) for row, each in enumerate(found, 1)]
        return [*chain.snapshots([("main", data)]), *chain.changes(rows)]

    assert problems(snapshot.encode(), first, second, third) == []
    assert problems(snapshot.encode(), second, third) == []
    assert "row 1" in problems(snapshot.encode(), wrong)[0]
    other = snapshot._replace(ids={1: wrong.id})
    assert len(problems(other.encode(), second, third)) == 1
    assert len(problems(other.encode(), first, second, third)) == 2
    assert "table snapshot" in problems(b"rubbish", second, third)[0]


def test_a_snapshot_says_who_the_writers_are(token: Path) -> None:
    with blocking.Replica("ann", mesh=token) as ann:
        ann.map("plan")["x"] = 1
        ann.durable()
        snapshot = ann.call(lambda replica: replica.document("main").snapshot())
    assert snapshot.cards
    chain = Chains(authors_of(open_credentials(token), None))
    assert list(chain.snapshots([("main", snapshot.encode())])) == []
    size = CARD_HEAD
    cards = {writer: bytes(size) + card[size:] for writer, card in snapshot.cards.items()}
    lying = snapshot._replace(cards=cards)
    (problem,) = chain.snapshots([("main", lying.encode())])
    assert "another writer's" in problem
