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
from typing import Any

import pytest

from crdtstate import wire
from crdtstate.authors import Signed
from crdtstate.certificates import Grant, issue
from crdtstate.change import Change, Origin, Snapshot, decode_change, encode_change
from crdtstate.clock import Dot
from crdtstate.events import ClockSkew, Equivocation, Event, PeerRejected
from crdtstate.signing import public_of, sign
from crdtstate.simulation.byzantine import DAY_MS, EPOCH_MS, MALLORY, Mallory, Member, World
from crdtstate.sync import Sync


class Scene(World):
    """The members, connected, each with a change."""

    def __init__(self) -> None:
        super().__init__(seed=1, honest=2)
        self.mallory: Mallory = self.mallory
        self.mallory._forks_at = 10**9
        self.mallory.corrupt = lambda frames, to: iter([wire.encode_message(frames)])  # type: ignore[method-assign]
        self.ann, self.bob = self.honest
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
