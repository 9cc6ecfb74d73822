"""
Rules: what a document admits, as the document itself says.

The container ``@rules`` of a document names its validators (`validators`) and its quota: how many
bytes and keys each *writer* may have in it. Whoever may write the document may set them; in a mesh
with certificates, who has the role to control it, and what others set is refused (`may_rule` of
`Document`, which looks at the writer's card). A change that the rules refuse is delivered and
hidden (`hiding`), on all replicas alike.

**Which rules hold for a change.** Those that it builds on: a rule holds for a change if the one
that set it is among the changes that it builds on, directly or not, and no later one among these
has set it anew. So it does not matter what a replica knows when the change arrives. It follows:

- Who has not heard of a rule is not bound by it, and what they write meanwhile is never refused
  because of it, wherever and whenever it arrives. A rule binds from when it is heard.
  Who only says that it has not heard of it can go on so, at places that nobody has written to
  since: what a change covers, it builds on. For the rest there is `Ceiling`.
- Two that set a rule at the same time: validators hold that either of them uses, and of limits
  the lower one, until somebody who has heard of both sets it anew.
- A change that sets rules, and does nothing else, is never refused: else there could be rules that
  nobody can take back. `Document` makes such changes only. Rules in a change that was refused are
  void, for good, also when it is released.

To tell what a change builds on from the heads that it names, it is remembered of each rule which
change of each writer was the first to build on it: all later ones of that writer do as well, and so
does whatever names one of these. That is one number for each rule and writer, and is carried by
snapshots. Rules that were set anew are remembered, as somebody may still build on them alone.

**Quotas** are of one writer's lane: what it holds is a function of that writer's changes. What all
writers hold together is not, at no point that two replicas agree on. A key belongs to who wrote it
last; that others wrote over it counts once its owner has dropped it, with its next changes. What
was refused counts too, as it lies in the lane. Over the limit a change is admitted that makes the
lane no larger. An agent that goes on as another writer has a new quota.

**What cannot be told alike is not told.** Nothing here looks at what a document reads as. Of a
lane only its owner's changes alter what counts here, with one exception: adopters drop what is
settled in the lane of a writer that is closed (L6 of `lanes`). So where there are rules nobody
adopts. What is left, and could be judged differently by two replicas: a late change of a writer
that is closed, if it knows a rule that an adopter of its lane had not heard of; and what builds on
the rules of a writer that has told two replicas two different ones (`forks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from crdtstate import validators
from crdtstate.change import Origin
from crdtstate.clock import SEQ_MAX, WRITER_MAX, Dot
from crdtstate.errors import InvalidUpdate
from crdtstate.hiding import net_of
from crdtstate.slots import SEPARATOR, Slot
from crdtstate.validators import KINDS, Proposal, Write
from crdtstate.values import pack, unpack, unpack_key

RULES = "@rules"
"""The container in which a document keeps its rules."""

VALIDATOR = "validator/"
"""In front of a validator's name, in the key of a rule; its value is `ON` or empty."""

QUOTA = "quota"
"""The key of the quota; its value is bytes and keys with a slash between, either may be empty."""

ON = "on"

SAID_MAX = 1000
"""Rules that one writer can set in a document, counted each time; later ones are void."""

NUMBER_MAX = 2**53


class Said(NamedTuple):
    """A rule as one change has set it.

    Attributes:
        known: Writer -> its first change that builds on it; of its own writer, that change.
    """

    dot: Dot
    key: str
    text: str
    known: dict[int, int]

    def is_known_to(self, dot: Dot) -> bool:
        """Whether a change builds on it, or is it."""
        return self.known.get(dot.writer, SEQ_MAX + 1) <= dot.seq


class Quota(NamedTuple):
    """How much one writer may have in a document; None: as much as it likes."""

    size: int | None = None
    keys: int | None = None


class Use(NamedTuple):
    """How much one writer has in a document: bytes of all slots, and how many hold a value."""

    size: int = 0
    keys: int = 0

    def plus(self, path: str, slot: Slot | None, sign: int = 1) -> Use:
        """With one slot more, or less."""
        if slot is None or path[0] == "@":
            return self
        size = size_of(path, slot.value)
        return Use(self.size + sign * size, self.keys + sign * (slot.value is not None))


def size_of(path: str, value: bytes | None) -> int:
    """The bytes that a slot counts for."""
    return (len(path) if path.isascii() else len(path.encode())) - 1 + len(value or b"")


class Force(NamedTuple):
    """The rules that hold for a change."""

    validators: tuple[str, ...] = ()
    quota: Quota = Quota()

    def __bool__(self) -> bool:
        return bool(self.validators) or self.measures

    @property
    def measures(self) -> bool:
        """Whether it matters how much a writer has."""
        return self.quota != Quota()

    def unknown(self) -> str | None:
        """A validator that is not registered here."""
        return next((name for name in self.validators if not validators.is_known(name)), None)

    def judge(self, proposal: Proposal, before: Use, after: Use) -> str | None:
        """Why a change is refused that brings its lane from *before* to *after*; None if not.

        Raises:
            UnknownValidator: Nobody can tell here.
        """
        size, keys = self.quota
        if size is not None and before.size < after.size > size:
            return f"quota: {after.size} bytes of one writer, {size} is the limit"
        if keys is not None and before.keys < after.keys > keys:
            return f"quota: {after.keys} keys of one writer, {keys} is the limit"
        for name in self.validators:
            if (reason := validators.ask(name, proposal)) is not None:
                return reason
        return None


NOTHING = Force()


class Rules:
    """The rules of one document, as far as it was told."""

    def __init__(self) -> None:
        # Every rule that was ever set.
        self.said: list[Said] = []
        # Writer -> how many of them it has set.
        self._counts: dict[int, int] = {}
        # All of them together; and it changes with each.
        self.now = NOTHING
        self.revision = 0

    # Looking

    def __bool__(self) -> bool:
        """Whether any were ever set."""
        return bool(self.said)

    def for_change(self, dot: Dot, deps: Iterable[Dot]) -> Force:
        """The rules that hold for a change that builds on *deps*, and is about to be delivered."""
        if not self.said:
            return NOTHING
        deps = tuple(deps)
        known = [said for said in self.said if self._builds_on(dot, deps, said)]
        return self.now if len(known) == len(self.said) else _together(known)

    def _builds_on(self, dot: Dot, deps: Iterable[Dot], said: Said) -> bool:
        if said.known.get(dot.writer, SEQ_MAX + 1) < dot.seq:
            return True
        return any(said.is_known_to(dep) for dep in deps)

    def are_known_to(self, dot: Dot, deps: Iterable[Dot]) -> bool:
        """Whether a change that is about to be delivered builds on any."""
        deps = tuple(deps)
        return any(self._builds_on(dot, deps, said) for said in self.said)

    def is_full(self, writer: int) -> bool:
        """Whether a writer can set no more rules."""
        return self._counts.get(writer, 0) >= SAID_MAX

    # Changing

    def note(self, dot: Dot, deps: Iterable[Dot], says: Mapping[str, str]) -> None:
        """A change was delivered, which set the rules *says*."""
        if self.said:
            deps = tuple(deps)
            for said in self.said:
                if dot.writer not in said.known and self._builds_on(dot, deps, said):
                    said.known[dot.writer] = dot.seq
        for key, text in sorted(says.items()):
            self._add(Said(dot, key, text, {dot.writer: dot.seq}))
        if says:
            self._renew()

    def _add(self, said: Said) -> None:
        if not self.is_full(said.dot.writer):
            self._counts[said.dot.writer] = self._counts.get(said.dot.writer, 0) + 1
            self.said.append(said)

    def _renew(self) -> None:
        self.said.sort(key=lambda said: (said.dot, said.key))
        self.now = _together(self.said)
        self.revision += 1

    def joined(self, other: Rules) -> Rules:
        """What both were told. Of a writer each side knows the same, as far as it has come."""
        known: dict[tuple[Dot, str], Said] = {}
        for said in (*self.said, *other.said):
            at = (said.dot, said.key)
            before = known[at].known if at in known else {}
            first = {
                writer: min(seq, before.get(writer, seq)) for writer, seq in said.known.items()
            }
            known[at] = said._replace(known={**before, **first})
        found = Rules()
        for _, said in sorted(known.items()):
            found._add(said)
        found._renew()
        found.revision = self.revision + 1
        return found

    # As bytes

    def flat(self) -> list[Any]:
        """All of it as plain values, for a snapshot."""
        return [
            [
                *said.dot,
                said.key,
                said.text,
                [n for pair in sorted(said.known.items()) for n in pair],
            ]
            for said in self.said
        ]

    @classmethod
    def from_flat(cls, flat: Any) -> Rules:
        """Read what may come from anybody. Raises InvalidUpdate."""
        found = cls()
        try:
            for writer, seq, key, text, known in flat:
                numbers = (writer, seq, *known)
                if not all(type(n) is int and n > 0 for n in numbers) or len(known) % 2:
                    raise InvalidUpdate("a snapshot's rules are malformed")
                if max(writer, *known[::2]) > WRITER_MAX or max(seq, *known[1::2]) > SEQ_MAX:
                    raise InvalidUpdate("a snapshot's rules are out of range")
                if type(key) is not str or type(text) is not str:
                    raise InvalidUpdate("a snapshot's rules are no text")
                pairs = dict(zip(known[::2], known[1::2], strict=True))
                found._add(Said(Dot(writer, seq), key, text, {**pairs, writer: seq}))
        except (TypeError, ValueError) as exc:
            raise InvalidUpdate(f"a snapshot's rules are malformed: {exc}") from exc
        found._renew()
        return found


def _together(known: Iterable[Said]) -> Force:
    """What rules come to of which some set others anew."""
    said = list(known)
    latest: dict[str, list[str]] = {}
    for one in said:
        if not any(
            other.key == one.key and other.dot != one.dot and one.is_known_to(other.dot)
            for other in said
        ):
            latest.setdefault(one.key, []).append(one.text)
    names = [
        key.removeprefix(VALIDATOR)
        for key, texts in latest.items()
        if key.startswith(VALIDATOR) and ON in texts
    ]
    quotas = [read_quota(text) for text in latest.get(QUOTA, ())]
    sizes = [quota.size for quota in quotas if quota.size is not None]
    keys = [quota.keys for quota in quotas if quota.keys is not None]
    quota = Quota(min(sizes, default=None), min(keys, default=None))
    return Force(tuple(sorted(names)), quota)


def write_quota(quota: Quota) -> str:
    """A quota as it stands in a document."""
    return "/".join("" if number is None else str(number) for number in quota)


def read_quota(text: str) -> Quota:
    """Read one that may come from anybody; what is malformed limits nothing."""
    numbers = [
        int(part) if part.isascii() and part.isdigit() and len(part) <= 16 else None
        for part in text.split("/")
    ]
    return Quota(*numbers) if len(numbers) == 2 else Quota()


def rules_of(slots: Mapping[str, Slot | None]) -> dict[str, str]:
    """The rules among what a change writes."""
    found = {}
    for path, slot in slots.items():
        key = rule_of(path)
        if key is not None and slot is not None and slot.value is not None:
            text = unpack(slot.value)
            found[key] = text if type(text) is str else ""
    return found


def propose(
    document: str,
    writer: int,
    origin: Origin,
    is_resolution: bool,
    slots: Mapping[str, Slot],
    before: Mapping[str, Slot | None],
) -> Proposal:
    """What validators are told of a change that writes *slots* in place of what was *before*."""
    writes = tuple(_write(path, slot, before[path]) for path, slot in sorted(slots.items()))
    kind = "resolution" if is_resolution else "write"
    return Proposal(document, origin.agent, writer, origin.message, origin.run, kind, writes)


def _write(path: str, slot: Slot, before: Slot | None) -> Write:
    container, _, key = path.partition(SEPARATOR)
    kind, shown = container[0], None
    value, was = slot.value, before.value if before is not None else None
    if kind == "c":
        net = net_of(before)
        value, was = pack(net_of(slot) - net, "counter"), pack(net, "counter")
    elif kind == "s":
        shown = unpack_key(key)
    elif kind != "r":
        shown = key
    return Write(KINDS[kind], container[1:], shown, size_of(path, slot.value), value, was)


def rule_of(path: str) -> str | None:
    """The key of the rule at a path; None if there is none."""
    container, _, key = path.partition(SEPARATOR)
    return key if container == RULES else None
