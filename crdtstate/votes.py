"""
Votes: a majority of the voters chooses among conflicting values, the same one on every replica.

A vote is ordinary replicated content. The document ``@votes`` has a slot for each voter and
*poll*, so that two votes of one agent are one, the newest; and it has the *electorate*: who votes,
and for how long. A replica that is told to vote writes its `Config.voters` and
`Config.vote_deadline` there if they are not what stands there; where settings differ, those of
who voted last count, for all. So a relay, a page or a command
line, which have no such settings, read what the voters read.

**In a mesh with certificates** members are not believed about who votes. The electorate stands in a
document that only controllers write, ``@electorate``, and nowhere else: a controller with
`Config.voters` says it when it opens and when it votes, and of several the newest counts. A vote
counts if its voter may write the document that it is about, by the newest card of the lane that the
vote stands in. No settings of who reads take part in that, as they may differ: both documents, with
the cards, replicate. So there must be a controller; until one has said who votes, nobody can, and
the last write wins.

**Which conflict.** A poll is named by document, place and the *dots* of all candidates. Whoever
sees one candidate more, or one less, sees another poll: a vote counts only for exactly the choice
that its voter had before him. Overlapping conflicts ({a, b} here, {b, c} there, {a, b, c} once
they met) are thus three polls; the votes on the first two are void when the third is what there
is, and everybody is asked anew. Nobody's vote is ever taken for an answer to another question.

**Why all replicas read the same.** `count` is a function of the candidates, the votes on them and
the electorate, and of nothing else: it knows no order of arrival and no clock. These three are
replicated content, so replicas of equal versions read the same, whatever came first, whoever died.

- A majority is more than half of all *voters*, not of those who voted. Two values cannot both have
  it, so a minority never decides, and the dead need no announcement: they just do not vote.
- Without a majority (too few voted, or a tie) the last write wins, as if there were no votes.
- The deadline is a *stamp*: that of the newest candidate and `Config.vote_deadline` later. A vote
  counts if its own stamp is not beyond that. No replica asks what time it is when it reads, so it
  does not matter when it reads, nor how slow its clock is; a vote that was in time but arrives
  late still counts, on all replicas, from when it arrives. The one clock that matters is that of
  the voter, at the moment of voting, and `Polls.cast` refuses what would be too late.
- So what is read may change as votes arrive: from the last write to what the majority says, and
  if voters change their minds in time, to what another majority says. It is final once somebody
  writes over the conflict (`resolve`), and not before.

A vote counts only from a lane of the agent it is for: others cannot vote in its name by mistake,
and where changes are signed not by intent. They can take its vote away, as whoever resolves does.

**What is left.** Who writes over a conflict removes its votes. Some come later, from those who had
not heard of it yet; each vote that is cast sweeps a few dozen others, and removes those that can
never count again: one of their candidates is known here, and is not live. That is for good, since
a slot that was covered or replaced never comes back. (One candidate *more* is not: its author may
take it back.) So ``@votes`` holds the votes on open conflicts, and a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from crdtstate.certificates import WRITE, Certificate, read_certificate
from crdtstate.change import CARD_HEAD, SIGNED
from crdtstate.clock import COUNTER_BITS, Dot, Stamp
from crdtstate.conflict import VOTE, Candidate, Conflict, Decision, Vote, decide, poll, same
from crdtstate.errors import InvalidCertificate, UsageError
from crdtstate.values import pack

if TYPE_CHECKING:
    from crdtstate.crdts import Map
    from crdtstate.document import Document

VOTES = "@votes"
"""The document in which votes stand."""

ELECTORATE = "@electorate"
"""The document in which controllers say who votes, where there are certificates."""

RULES, BALLOTS = "rules", "ballots"

SWEEP = 64
"""Votes that are looked at, to see whether they can go, for each one that is cast."""

VOTERS_MAX = 1000

DEADLINE_MS_MAX = 2**42 - 1
"""139 years: with it, a stamp is still one."""


class Electorate(NamedTuple):
    """Who votes, and for how long after the newest candidate was written."""

    voters: tuple[str, ...]
    deadline_ms: int

    @classmethod
    def of(cls, voters: tuple[str, ...], seconds: float) -> Electorate:
        """The electorate of these settings."""
        return cls(voters, max(1, int(min(seconds * 1000, DEADLINE_MS_MAX))))

    @property
    def majority(self) -> int:
        return len(self.voters) // 2 + 1

    def end(self, candidates: Sequence[Candidate]) -> Stamp:
        """The last stamp with which a vote on *candidates* counts."""
        newest = max(candidate.stamp for candidate in candidates)
        return Stamp(newest + (self.deadline_ms << COUNTER_BITS))


class Ballot(NamedTuple):
    """One vote, as it stands in ``@votes``: for the candidate that *choice* wrote."""

    agent: str
    choice: Dot
    stamp: Stamp
    writer: int = 0


def count(
    candidates: Sequence[Candidate], ballots: Iterable[Ballot], electorate: Electorate
) -> Decision:
    """What the *electorate* has decided on *candidates* (oldest first), if it has; else the last
    write wins. Candidates of equal values stand together."""
    end = electorate.end(candidates)
    by_dot = {candidate.dot: candidate for candidate in candidates}
    voters = frozenset(electorate.voters)
    # Of each voter the newest that is in time; else the newest, to be shown.
    found: dict[str, tuple[bool, Stamp, int, Ballot]] = {}
    for ballot in ballots:
        if ballot.agent not in voters or ballot.choice not in by_dot:
            continue
        rank = (ballot.stamp <= end, ballot.stamp, ballot.writer, ballot)
        if ballot.agent not in found or rank > found[ballot.agent]:
            found[ballot.agent] = rank
    votes = tuple(
        Vote(agent, by_dot[ballot.choice].value, stamp, counts)
        for agent, (counts, stamp, _, ballot) in sorted(found.items())
    )
    tally: dict[bytes, int] = {}
    for vote in votes:
        if vote.counts:
            value = pack(vote.value, VOTE)
            tally[value] = tally.get(value, 0) + 1
    for value, supporters in tally.items():
        if supporters >= electorate.majority:
            winner = next(c for c in reversed(candidates) if pack(c.value, VOTE) == value)
            return Decision(winner.value, VOTE, votes)
    return decide(VOTE, candidates)._replace(votes=votes)


class Documents(Protocol):
    """What `Polls` needs of a `DocumentSet`."""

    agent: str
    scheme: int

    def find(self, name: str) -> Document | None:
        """The document *name* if there is one."""

    def system_document(self, name: str) -> Document:
        """The document *name*, made on first use."""

    def seal_now(self, document: Document) -> None:
        """Seal what is open in a document."""

    def next_stamp(self) -> Stamp:
        """A stamp above those of all that was written here or taken in."""


class Polls:
    """The votes of one set of documents: what was voted, and the door for own votes."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        # Keys of votes that `cast` has not looked at in this round.
        self._unswept: list[str] = []

    def _book(self, name: str, document: str = VOTES) -> Map | None:
        """A map of the document of votes, if there is that document."""
        book = self._documents.find(document)
        return None if book is None or book.shared else book.map(name)

    @property
    def are_certified(self) -> bool:
        """Whether it counts what certificates say of who votes. Who only reads what others wrote
        sees it by their cards."""
        if self._documents.scheme == SIGNED:
            return True
        return any(book is not None and book.cards for book in map(self._documents.find, _BOOKS))

    def _certificate(self, document: str, writer: int) -> Certificate | None:
        """The newest certificate of a writer in a document, which was checked when it came."""
        book = self._documents.find(document)
        card = book.cards.get(writer) if book is not None else None
        if card is None and book is not None and writer == book.writer and book.prover is not None:
            # The first own change is not sealed yet.
            card = book.prover.card
        return _read(card[CARD_HEAD:]) if card else None

    # Reading

    def electorate(self) -> Electorate | None:
        """Who votes, as it is told."""
        document = ELECTORATE if self.are_certified else VOTES
        rules = self._book(RULES, document)
        found = rules.live("electorate") if rules is not None else []
        if document == ELECTORATE:
            told = ((each, self._certificate(document, each.writer)) for each in found)
            found = [each for each, by in told if by is not None and by.is_controller]
        match found[-1].value if found else None:
            case [int(deadline_ms), *voters] if 0 < deadline_ms <= DEADLINE_MS_MAX:
                if 0 < len(voters) <= VOTERS_MAX and all(type(v) is str for v in voters):
                    return Electorate(tuple(voters), deadline_ms)
        return None

    def decide(
        self, document: str, container: str, key: str, candidates: Sequence[Candidate]
    ) -> Decision:
        """What is read where *candidates* (oldest first) conflict and votes decide."""
        ballots, electorate = self._book(BALLOTS), self.electorate()
        if ballots is None or electorate is None:
            return decide(VOTE, candidates)
        name = poll(document, container, key, (candidate.dot for candidate in candidates))
        cast = _cast_in(ballots, name, electorate.voters)
        if self.are_certified:
            cast = (each for each in cast if self._may_vote(each.writer, document))
        return count(candidates, cast, electorate)

    def _may_vote(self, writer: int, document: str) -> bool:
        """Whether who has a lane in ``@votes`` may write a document."""
        found = self._certificate(VOTES, writer)
        return found is not None and found.allows(WRITE, document)

    def vote_at(self, key: str) -> tuple[Dot, tuple[str, str, str]] | None:
        """What the vote at *key* of the ballots is for, and about: document, container, key."""
        ballots = self._book(BALLOTS)
        for candidate in reversed(ballots.live(key) if ballots is not None else []):
            if (parsed := _parse(candidate.value)) is not None:
                return parsed[:2]
        return None

    def places(self) -> set[tuple[str, str, str]]:
        """What there are votes about: document, container, key."""
        ballots = self._book(BALLOTS)
        found = (self.vote_at(key) for key in ballots or ())
        return {vote[1] for vote in found if vote is not None}

    # Voting

    def tell(self, electorate: Electorate) -> None:
        """Say who votes, unless that is what is told. Where there are certificates, a controller
        does. Raises NotAllowed."""
        if electorate != self.electorate():
            book = self._documents.system_document(ELECTORATE if self.are_certified else VOTES)
            book.map(RULES)["electorate"] = [electorate.deadline_ms, *electorate.voters]

    def cast(self, conflict: Conflict, value: Any, own: Electorate | None) -> None:
        """Vote for *value* in *conflict*, in place of what this agent voted before.

        Args:
            own: Who votes; None if this agent has no say in that.

        Raises:
            UsageError: It would not count; says why. Nothing changed.
        """
        documents, agent = self._documents, self._documents.agent
        where = f"{conflict.document}: {conflict.path}"
        electorate = own or self.electorate()
        if electorate is None:
            raise UsageError(
                f"{where}: nobody has said who votes; in a mesh with certificates a controller "
                "does, whose replica is opened with Config(voters=[...])"
            )
        if agent not in electorate.voters:
            voters = ", ".join(electorate.voters)
            raise UsageError(f"{agent!r} has no vote: it is not among the voters ({voters})")
        document = documents.find(conflict.document)
        if document is not None:
            documents.seal_now(document)
        container = conflict.kind[0] + conflict.name
        now = document.conflict(container, conflict.key) if document is not None else None
        if now is None or now.dots != conflict.dots:
            raise UsageError(f"{where}: not in conflict as given any more; see conflicts()")
        if now.strategy != VOTE:
            raise UsageError(
                f"{where}: {now.strategy!r} decides there, not votes; see use_strategy('vote')"
            )
        choice = _choose(where, now.candidates, value)
        end = electorate.end(now.candidates)
        if documents.next_stamp() > end:
            raise UsageError(
                f"{where}: votes counted until {end.time.isoformat(timespec='seconds')} "
                "(Config.vote_deadline); resolve() it"
            )
        book = documents.system_document(VOTES)
        self.tell(electorate)
        flat = [number for dot in sorted(conflict.dots) for number in dot]
        name = poll(conflict.document, container, conflict.key, conflict.dots)
        place = [conflict.document, container, conflict.key]
        book.map(BALLOTS)[f"{name}/{agent}"] = [*choice.dot, *place, flat]
        self._sweep()

    # Cleaning

    def remove(self, conflict: Conflict) -> None:
        """Remove the votes in *conflict*, which was resolved."""
        ballots, electorate = self._book(BALLOTS), self.electorate()
        if ballots is None or electorate is None:
            return
        container = conflict.kind[0] + conflict.name
        name = poll(conflict.document, container, conflict.key, conflict.dots)
        for agent in electorate.voters:
            _drop(ballots, f"{name}/{agent}")

    def _sweep(self) -> None:
        """Look at a few votes, and remove those that can never count again."""
        ballots = self._book(BALLOTS)
        assert ballots is not None
        if not self._unswept:
            self._unswept = list(ballots)
        part, self._unswept = self._unswept[-SWEEP:], self._unswept[:-SWEEP]
        for key in part:
            if all(self._is_void(candidate.value) for candidate in ballots.live(key)):
                _drop(ballots, key)

    def _is_void(self, value: Any) -> bool:
        """Whether one of a vote's candidates is known here and not live, which is for good."""
        if (parsed := _parse(value)) is None:
            # Of a newer crdtstate, perhaps.
            return False
        _, (name, container, key), dots = parsed
        document = self._documents.find(name)
        if document is None or document.is_open:
            # What is open may be rolled back.
            return False
        live = document.live_dots(container, key)
        return any(document.version.covers(dot) and dot not in live for dot in dots)


_BOOKS = (VOTES, ELECTORATE)


@lru_cache(maxsize=1000)
def _read(data: bytes) -> Certificate | None:
    try:
        return read_certificate(data)
    except InvalidCertificate:
        return None


def _drop(ballots: Map, key: str) -> None:
    if key in ballots:
        del ballots[key]


def _cast_in(ballots: Map, name: str, voters: Iterable[str]) -> Iterator[Ballot]:
    """The votes in the poll *name*, from lanes of those whose votes they are."""
    for agent in voters:
        for candidate in ballots.live(f"{name}/{agent}"):
            parsed = _parse(candidate.value)
            if parsed is not None and candidate.agent == agent:
                yield Ballot(agent, parsed[0], candidate.stamp, candidate.writer)


def _parse(value: Any) -> tuple[Dot, tuple[str, str, str], list[Dot]] | None:
    """A vote as it stands in ``@votes``: choice, place, all candidates; None if it is none."""
    match value:
        case [int(writer), int(seq), str(document), str(container), str(key), list(flat)]:
            if len(flat) % 2 == 0 and all(type(number) is int for number in flat):
                dots = list(map(Dot, flat[::2], flat[1::2]))
                return Dot(writer, seq), (document, container, key), dots
    return None


def _choose(where: str, candidates: Sequence[Candidate], value: Any) -> Candidate:
    """The newest candidate with *value*."""
    # As they are packed: NaN is not equal to itself.
    packed = pack(value, where)
    for candidate in reversed(candidates):
        if pack(candidate.value, where) == packed:
            return candidate
    for candidate in reversed(candidates):
        if same(candidate.value, value):
            return candidate
    choices = ", ".join(repr(candidate.value)[:40] for candidate in candidates[:10])
    raise UsageError(f"{where}: {value!r} is none of the candidates: {choices}")
