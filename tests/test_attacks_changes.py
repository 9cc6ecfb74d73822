"""
Attacks by changes, of the list in the threat model: A52 to A61 and A64. (A59 and what else clocks
can do is in `test_quarantine`, A62 in `test_signed`, A63, commands that come again or too late, in
`test_commands`.)

Two honest members and mallory, who has a certificate to write and says what the test wants. What
frames and payloads can do is in the other files of attacks; here they are well-formed and signed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crdtstate import crdts, documents, forks, haves, rules, standing, wire
from crdtstate.authors import Signed
from crdtstate.certificates import Grant, issue
from crdtstate.change import (
    CARD_BYTES_MAX,
    DEPS_MAX,
    Change,
    Origin,
    Snapshot,
    decode_change,
    encode_change,
)
from crdtstate.clock import Dot, Version
from crdtstate.events import ClockSkew, Equivocation, Event, PeerRejected
from crdtstate.haves import UNHEARD_BEATS, UNHEARD_MAX
from crdtstate.signing import public_of, sign
from crdtstate.simulation.byzantine import CONFIG, DAY_MS, EPOCH_MS, MALLORY, Mallory, Member, World
from crdtstate.sync import Aside, Sync


class Scene(World):
    """The members, connected, each with a change."""

    def __init__(self, honest: int = 2) -> None:
        super().__init__(seed=1, honest=honest)
        self.mallory: Mallory = self.mallory
        self.mallory._forks_at = 10**9
        self.mallory.corrupt = lambda frames, to: iter([wire.encode_message(frames)])  # type: ignore[method-assign]
        self.ann, self.bob = self.honest[:2]
        self.run(2)
        for member in self.members:
            member.map("plan")[member.agent] = 1
            member.wrote[f"{member.agent}"] = 1
            member.pump()
        self.run(2)
        self.before = self.reading()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.now < end:
            self._pass_time()

    def reading(self) -> list[Any]:
        """What the honest ones read and have."""
        return [
            (dict(each.map("plan")), each.find("main").version.copy())  # type: ignore[union-attr]
            for each in self.honest
        ]

    def tell(self, to: Member, *frames: wire.Frame, by: Member | None = None) -> None:
        """Send frames to a member."""
        teller = by or self.mallory
        (peer,) = [number for number, (other, _) in teller.links.items() if other is to]
        message = wire.encode_message([wire.encode_frame(frame) for frame in frames])
        self._post(teller.links[peer], message)
        self.run(2)

    def last(self, member: Member) -> Change:
        """The newest change of a member."""
        store = self.ann.store if member is not self.ann else self.bob.store
        seq = self.ann.find("main").version[member.writer]  # type: ignore[union-attr]
        (data,), _ = store.read("main", [(member.writer, seq, seq)], 1)
        return decode_change(data)

    def blamed(self, member: Member, kind: type[Event] = PeerRejected) -> list[str]:
        """With whom a member finds fault."""
        return [event.agent for event in member.events if isinstance(event, kind)]

    def is_unhurt(self) -> bool:
        """Whether nothing that was there changed, and all goes on."""
        same = self.reading() == self.before
        for member in self.honest:
            member.map("plan")[f"{member.agent} goes on"] = 1
            member.pump()
        self.run(3)
        one, other = self.reading()
        return same and one == other and {"agent-0 goes on", "agent-1 goes on"} <= one[0].keys()


def test_a52_who_passes_on_a_bad_signature_is_blamed_and_its_author_is_not() -> None:
    scene = Scene()
    data = bytearray(scene.last(scene.bob).data)
    data[20] ^= 1
    late = scene.mallory._again(
        scene.last(scene.bob), dot=Dot(scene.bob.writer, 2), prev=scene.last(scene.bob).id
    )
    scene.tell(scene.ann, wire.Changes((late.data,)))

    assert scene.blamed(scene.ann) == [MALLORY]
    assert scene.is_unhurt()


def test_a53_the_same_change_again_is_nothing() -> None:
    scene = Scene()
    data = scene.last(scene.bob).data
    scene.tell(scene.ann, wire.Changes((data, data)), wire.Changes((data,)))

    assert scene.blamed(scene.ann) == []
    assert scene.is_unhurt()


@pytest.mark.parametrize("where", ["another document", "another mesh"])
def test_a54_a_change_is_of_one_document_and_mesh(where: str) -> None:
    scene = Scene()
    change = scene.last(scene.bob)
    if where == "another document":
        # Its bytes as they are, under another name: the name is part of what is signed.
        body = change.body.replace(b"\xa4main", b"\xa4mine")
        data = change.data.replace(change.body, body)
    else:
        data = World(2, 2).honest[0].authors.prove(change.body)
        data = change.data[:17] + data + change.data[17 + 64 :]
    scene.tell(scene.ann, wire.Changes((data,)))
    later = scene.mallory._again(change, document="mine", prev=b"", dot=Dot(change.writer, 1))
    scene.tell(scene.ann, wire.Changes((later.data,)))

    assert set(scene.blamed(scene.ann)) == {MALLORY}
    assert scene.ann.find("mine") is None
    assert scene.is_unhurt()


def test_a55_two_changes_of_one_dot_are_proof_for_everybody() -> None:
    scene = Scene()
    change = scene.last(scene.mallory)
    other = scene.mallory._again(change, origin=change.origin._replace(message="not that"))
    scene.tell(scene.ann, wire.Changes((other.data,)))
    scene.run(3)

    for member in scene.honest:
        assert scene.blamed(member, Equivocation) == [MALLORY]
        assert member.find("main").is_closed(change.writer)  # type: ignore[union-attr]
        assert change.writer not in {live.writer for live in member.map("plan").live(MALLORY)}
        ((_, proof),) = dict(member.find("@forks").map("proofs")).items()  # type: ignore[union-attr]
        assert change.id in proof and other.id in proof
    one, two = scene.reading()
    assert one == two


def test_a56_a_gap_waits_is_asked_for_and_takes_no_more_than_its_share() -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    changes = [last]
    for number in range(5):
        changes.append(
            scene.mallory._again(
                last,
                document="gaps",
                dot=Dot(last.writer, number + 1),
                prev=b"" if not number else changes[-1].id,
                update=b"\0\0",
            )
        )
    far = [
        scene.mallory._again(last, document="far", dot=Dot(last.writer, seq), prev=bytes(16))
        for seq in range(1000, 1000 + 12_000)
    ]
    for at in range(0, len(far), 1000):
        scene.tell(scene.ann, wire.Changes(tuple(each.data for each in far[at : at + 1000])))

    pending = scene.ann.core._pending
    limits = scene.ann.core.config
    assert 0 < len(pending) <= limits.pending_changes // 4
    assert pending.size_bytes <= limits.pending_bytes // 4
    # Others' gaps still wait, and close.
    assert scene.is_unhurt()


def test_a57_what_does_not_follow_is_proof_of_a_fork() -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    wrong = scene.mallory._again(last, dot=Dot(last.writer, last.seq + 1), prev=b"x" * 16)
    scene.tell(scene.ann, wire.Changes((wrong.data,)))

    assert scene.blamed(scene.ann, Equivocation) == [MALLORY]
    assert scene.ann.find("main").is_closed(last.writer)  # type: ignore[union-attr]


def test_a58_a_clock_ten_years_ahead_drags_nobody_along() -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    stamp = (EPOCH_MS + 3650 * DAY_MS) << 16
    late = scene.mallory._again(
        last, dot=Dot(last.writer, last.seq + 1), prev=last.id, stamp=stamp, update=b"\0\0"
    )
    scene.tell(scene.ann, wire.Changes((late.data,)))

    # Its certificate is not valid then.
    assert scene.blamed(scene.ann) == [MALLORY]
    assert scene.blamed(scene.ann, ClockSkew) == []
    scene.ann.map("plan")["now"] = 1
    (live,) = scene.ann.map("plan").live("now")
    assert live.stamp.wall_ms < EPOCH_MS + DAY_MS
    scene.before = scene.reading()
    assert scene.is_unhurt()


@pytest.mark.parametrize("grant", [Grant("*", frozenset("r")), Grant("other*", frozenset("w"))])
def test_a60_a61_who_may_not_write_is_refused_by_everybody(grant: Grant) -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    seed = bytes(32)
    certificate = issue(
        scene.root_seed,
        agent=MALLORY,
        key=public_of(seed),
        grants=[grant],
        not_before_ms=EPOCH_MS - DAY_MS,
        not_after_ms=EPOCH_MS + DAY_MS,
        serial=bytes(16),
    )
    weak = Signed(
        certificate.mesh, scene.root, lambda: certificate, lambda why, what: sign(seed, why, what)
    )
    writer = weak.draw(random.Random(1))
    sealed = encode_change(
        "main",
        Dot(writer, 1),
        {},
        last.stamp,
        0,
        False,
        b"\0\0",
        last.origin,
        card=weak.card(writer),
        prover=weak.prover(writer),
    )
    for _ in range(3):
        scene.tell(scene.ann, wire.Changes((sealed.data,)))

    assert MALLORY in scene.blamed(scene.ann)
    assert scene.is_unhurt()


def test_a64_a_snapshot_is_only_taken_from_who_may_hand_it() -> None:
    scene = Scene()
    document = scene.mallory.find("main")
    assert document is not None
    snapshot = document.snapshot()
    lie = snapshot._replace(agents={writer: "queen" for writer in snapshot.agents})
    data = lie.encode()
    scene.tell(scene.ann, wire.Offer("main", hashlib.sha256(data).digest(), len(data)))

    assert scene.blamed(scene.ann) == [MALLORY]
    assert scene.is_unhurt()
    # And whoever may hand one cannot say who somebody is.
    assert scene.ann.authors.vouch(lie).agents == snapshot.agents
    assert Snapshot.decode(data).agents != snapshot.agents


# What a review found beyond the list.


@pytest.mark.parametrize("name", ["squatted", "@forks"])
def test_nobody_makes_a_document_with_what_nothing_proves(name: str) -> None:
    scene = Scene()
    made = encode_change(
        name, Dot(4711, 2), {}, 1, 0, not name.startswith("@"), b"\0\0", Origin(""), prev=bytes(16)
    )
    scene.tell(scene.ann, wire.Changes((made.data,)))
    scene.bob.system_document(name).map("plan")["ours"] = 1
    scene.bob.pump()
    scene.run(3)

    assert dict(scene.ann.system_document(name).map("plan")) == {"ours": 1}
    assert scene.blamed(scene.ann) == []


@pytest.mark.parametrize("name", ["@control", "@forks", "@votes"])
def test_a_document_of_the_system_cannot_be_made_native(name: str) -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    made = scene.mallory._again(last, document=name, shared=True, dot=Dot(last.writer, 1), prev=b"")
    scene.tell(scene.ann, wire.Changes((made.data,)))

    assert scene.blamed(scene.ann) == [MALLORY]
    assert scene.ann.find(name) is None
    assert scene.is_unhurt()


def test_junk_in_place_of_a_proof_keeps_none_out() -> None:
    scene = Scene()
    change = scene.last(scene.mallory)
    key = f"{change.writer:x}/main"
    scene.mallory.system_document("@forks").map("proofs")[key] = 1
    scene.mallory.pump()
    scene.run(3)
    other = scene.mallory._again(change, origin=change.origin._replace(message="not that"))
    scene.tell(scene.ann, wire.Changes((other.data,)))
    scene.run(3)

    for member in scene.honest:
        assert member.find("main").is_closed(change.writer)  # type: ignore[union-attr]


def test_many_closed_lanes_are_one_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    saved: list[str] = []
    save = Sync._save
    monkeypatch.setattr(Sync, "_save", lambda self, it: (saved.append(it.name), save(self, it))[1])
    for writer in range(50):
        scene.ann.find("main").close_lane(writer + 1)  # type: ignore[union-attr]
        scene.ann.core.closed("main", writer + 1, scene.now)
    saved.clear()
    scene.ann.pump()

    assert saved == ["main"]


def test_what_is_stored_fits_together_before_an_own_closed_lane_is_left() -> None:
    scene = Scene()
    ann = scene.ann
    ann.find("main").close_lane(ann.writer)  # type: ignore[union-attr]
    ann.core.closed("main", ann.writer, scene.now)

    kinds = [type(effect).__name__ for effect in ann.core.effects()]
    assert kinds.index("SaveSnapshot") < kinds.index("Reidentify")


def fork(scene: Scene, name: str = "main") -> tuple[Change, Change]:
    """Two changes of mallory that cannot both be."""
    last = scene.last(scene.mallory)
    dot = Dot(last.writer, last.seq if name == "main" else 1)
    fields: dict[str, Any] = {"document": name, "dot": dot, "deps": {}, "update": b"\0\0"}
    one = last if name == "main" else scene.mallory._again(last, prev=b"", **fields)
    return one, scene.mallory._again(one, origin=one.origin._replace(message="not that"))


def said_of_forks(scene: Scene) -> int:
    """How many changes of ``@forks`` the honest ones have made."""
    document = scene.ann.find("@forks")
    assert document is not None
    return sum(document.version.get(each.writer, 0) for each in scene.honest)


def test_a_proof_that_is_written_over_is_said_again_by_few() -> None:
    scene = Scene(honest=8)
    scene.tell(scene.ann, wire.Changes((fork(scene)[1].data,)))
    scene.run(30)
    told = said_of_forks(scene)
    proofs = scene.mallory.document("@forks").map("proofs")
    (key,) = proofs

    for _ in range(3):
        del proofs[key]
        scene.mallory.pump()
        scene.run(30)
        assert list(scene.bob.find("@forks").map("proofs")) == [key]  # type: ignore[union-attr]
    again = said_of_forks(scene) - told
    assert 3 <= again <= 6, "one says it, seldom two"


def test_what_proves_nothing_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    decoded: list[object] = []
    decode = forks.decode
    monkeypatch.setattr(forks, "decode", lambda *what: (decoded.append(what), decode(*what))[1])
    proofs = scene.mallory.system_document("@forks").map("proofs")
    for number in range(20):
        proofs[f"{number + 1:x}/main"] = b"junk"
    scene.mallory.pump()
    scene.run(3)
    for number in range(20):
        proofs["other"] = number
        proofs["1/main"] = b"junk"
        scene.mallory.pump()
        scene.run(3)

    assert len(decoded) == 20 * len(scene.members)


def test_proofs_make_few_documents_and_the_others_wait_for_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standing, "MADE_MAX", 10)
    scene = Scene()
    one, other = fork(scene, "late")
    card = scene.mallory.authors.card(scene.mallory.writer)
    proofs = scene.mallory.system_document("@forks").map("proofs")
    for number in range(100):
        elsewhere = [scene.mallory._again(each, document=f"no {number}") for each in (one, other)]
        proofs[f"{one.writer:x}/no {number}"] = forks.encode(*elsewhere, card)
        scene.mallory.pump()
    scene.run(3)
    proofs[f"{one.writer:x}/late"] = forks.encode(one, other, card)
    scene.mallory.pump()
    scene.run(3)
    for member in scene.honest:
        assert len(member.standing._proofs) == 10
        assert len([name for name in member.documents() if name.startswith("no ")]) == 10
        assert member.find("late") is None
    scene.ann.document("late").map("notes")["a"] = 1
    scene.ann.pump()
    scene.run(3)

    for member in scene.honest:
        assert member.find("late").is_closed(one.writer)  # type: ignore[union-attr]
        assert dict(member.document("late").map("notes")) == {"a": 1}
        assert len(member.standing._proofs) == 11
    scene.before = scene.reading()
    assert scene.is_unhurt()


def test_who_comes_later_gets_a_document_of_nothing_but_a_closed_lane() -> None:
    scene = Scene()
    one, other = fork(scene, "late")
    for member in (scene.ann, scene.bob):
        member.authors.may_hand = lambda document: False  # type: ignore[method-assign]
    for peer in list(scene.bob.links):
        scene.disconnect(scene.bob, peer, "apart")
    scene._due = {pair: scene.now + 30 for pair in scene._due}
    scene.tell(scene.ann, wire.Changes((one.data,)), wire.Changes((other.data,)))
    assert scene.ann.find("late").is_closed(one.writer)  # type: ignore[union-attr]
    assert scene.bob.find("late") is None
    scene.run(60)

    assert scene.bob.find("late").is_closed(one.writer)  # type: ignore[union-attr]
    assert scene.ann.core.is_synced() and scene.bob.core.is_synced()


def test_a_lane_that_a_snapshot_says_is_closed_is_hidden_before_the_proof_comes() -> None:
    scene = Scene()
    writer = scene.mallory.writer
    assert dict(scene.bob.map("plan"))[MALLORY] == 1
    main = scene.ann.find("main")
    assert main is not None
    main.close_lane(writer)
    scene.bob.core.take_in(main.snapshot(), (), "agent-0", scene.now)
    scene.bob.pump()

    assert scene.bob.find("main").is_closed(writer)  # type: ignore[union-attr]
    assert MALLORY not in dict(scene.bob.map("plan"))


def test_a_proof_by_another_key_closes_nobody() -> None:
    scene = Scene()
    bob, (one, other) = scene.bob, fork(scene)
    card = scene.mallory.authors.card(scene.mallory.writer)
    # As if mallory's number were bob's, too.
    checked = scene.ann.authors._checked
    certificate = scene.mallory.certificate
    checked[bob.writer, card] = certificate
    pair = [scene.mallory._again(each, dot=Dot(bob.writer, 1), prev=b"") for each in (one, other)]
    proofs = scene.mallory.system_document("@forks").map("proofs")
    proofs[f"{bob.writer:x}/main"] = forks.encode(*pair, card)
    scene.mallory.pump()
    scene.run(3)

    assert forks.decode(forks.encode(*pair, card), scene.ann.authors)[:2] == ("main", bob.writer)
    assert not scene.ann.find("main").is_closed(bob.writer)  # type: ignore[union-attr]
    assert scene.is_unhurt()


def test_names_of_documents_that_are_made_up_take_no_places() -> None:
    scene = Scene()

    def tell_of(first: int, count: int) -> None:
        for at in range(first, first + count, 1000):
            names = [f"made up {number}" for number in range(at, at + 1000)]
            version = Version({scene.mallory.writer: 1})
            haves = [wire.Have(name, version, False) for name in names]
            wants = [wire.Want(name, ((scene.mallory.writer, 1, 1),)) for name in names[:50]]
            (peer,) = [n for n, (who, _) in scene.ann.links.items() if who is scene.mallory]
            for frame in (*haves, *wants):
                scene.ann.core.receive(peer, frame, scene.now)
            scene.ann.pump()

    tell_of(0, 102_000)
    core = scene.ann.core
    (link,) = [each for each in core.peers if each.agent == MALLORY]
    assert len(core._ledger.pages) < 10
    assert len(link.acked) <= UNHEARD_MAX + 10
    # Whoever has so many is told of again, and is nobody's enemy yet.
    assert scene.blamed(scene.ann) == []
    # Who has something gets it through; what the system itself needs, also from who has said much.
    scene.bob.document("new").map("notes")["b"] = 1
    scene.mallory.system_document("@votes").map("notes")["m"] = 1
    scene.bob.pump()
    scene.mallory.pump()
    scene.run(3)
    assert dict(scene.ann.document("new").map("notes")) == {"b": 1}
    assert scene.ann.find("@votes") is not None

    scene.run((UNHEARD_BEATS + 2) * CONFIG.heartbeat)
    tell_of(200_000, 1000)
    assert set(scene.blamed(scene.ann)) == {MALLORY}
    assert link.bye is wire.ByeCode.PROTOCOL
    scene.before = scene.reading()
    assert scene.is_unhurt()


def test_who_has_more_documents_than_are_heard_of_at_once_hands_over_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(haves, "UNHEARD_MAX", 10)
    scene = Scene()
    for peer in list(scene.ann.links):
        scene.disconnect(scene.ann, peer, "apart")
    for number in range(95):
        scene.bob.document(f"of bob {number}").map("notes")["b"] = number
        scene.bob.pump()
    scene.run(60)

    assert len([name for name in scene.ann.documents() if name.startswith("of bob")]) == 95
    assert scene.blamed(scene.ann) == []


def test_what_is_quarantined_is_not_asked_for_before_it_is_released() -> None:
    scene = Scene()
    ann, bob = scene.ann, scene.bob
    for peer in list(ann.links):
        scene.disconnect(ann, peer, "apart")
    bob.map("plan")["deadly"] = 1
    bob.pump()
    seq = bob.find("main").version[bob.writer]  # type: ignore[union-attr]
    (data,), _ = bob.store.read("main", [(bob.writer, seq, seq)], 1)
    change = decode_change(data)
    ann.core.quarantine(Aside(change.id, *change[:3], "agent-1", "it kills", change.stamp))
    bob.map("plan")["after"] = 1
    bob.pump()
    sent: Counter[bytes] = Counter()
    post = scene._post

    def note(to: tuple[Member, int], message: bytes) -> None:
        for frame in wire.decode_message(message):
            if isinstance(frame, wire.Changes) and to[0] is ann:
                sent.update(decode_change(data).id for data in frame.changes)
        post(to, message)

    scene._post = note  # type: ignore[method-assign]
    scene.run(60)
    assert sent[change.id] == 0
    assert "after" not in ann.map("plan")

    assert ann.core.release(change.id, scene.now)
    ann.pump()
    scene.run(10)
    assert ann.map("plan")["deadly"] == ann.map("plan")["after"] == 1


def test_two_changes_that_name_as_much_as_they_may_still_make_a_proof() -> None:
    scene = Scene()
    last = scene.last(scene.mallory)
    most = {2**53 - 1 - number: 2**31 - 1 for number in range(DEPS_MAX)}
    text = "\N{GRINNING FACE}" * 1000
    found = [
        scene.mallory._again(
            last,
            document="\N{GRINNING FACE}" * 200,
            dot=Dot(last.writer, 7),
            deps=most,
            prev=bytes(16),
            card=scene.mallory.authors.card(last.writer).ljust(CARD_BYTES_MAX, b"\0"),
            origin=Origin(text, text, text[:-1] + letter),
        )
        for letter in "ab"
    ]
    proof = forks.encode(*found, bytes(CARD_BYTES_MAX))
    assert [decode_change(each.data) for each in found] == found
    assert len(proof) <= forks.PROOF_BYTES_MAX
    scene.ann.system_document("@forks").map("proofs")["1/x"] = proof
    assert scene.ann.document("@forks").map("proofs")["1/x"] == proof


def test_the_documents_of_the_system_are_those_that_there_are() -> None:
    named = {
        value
        for path in Path(documents.__file__).parent.glob("*.py")
        for value in re.findall(r"^[A-Z]+ = \"(@[a-z]+)\"$", path.read_text(), re.MULTILINE)
    }
    # Those are views in documents.
    assert named - {crdts.STRATEGIES, rules.RULES} == documents.SYSTEM_DOCUMENTS
