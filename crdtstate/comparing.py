"""
Comparing state with peers: whoever has taken in the same must say the same. Sans-I/O; driven by
`sync`.

Versions and hashes say that a replica took in what it should have; whether it then *holds* that,
nobody knows who does not compare. What makes the difference: memory or an engine that failed, two
processes that wrote as one writer (a cloned store that fooled every check), a bug. `digests` says
what can be compared, and why sound replicas never differ there.

How. A replica asks a peer about a document (`Compare`): first with one number for all of it,
which is the answer where versions are equal; else lane by lane, with each lane's seq, and those of
which both have the same seq are compared. Who is asked says what is the same (`Compared`). Where
it is not, both go down to the path, each in turn sending sums of what lies below where they
differ (`Digests`): 256 at a time, by the hash of the paths, until few slots are left, which are
named. Neither keeps anything meanwhile: a frame that is lost, or a lane that moves on, ends it
until the next time.

When it is an alarm. Two different slots at one path of one lane at one seq: at once. A slot that
only one side has may have been dropped by an adopter of whom it has not heard. So the side that has
it waits until it has taken in all that the other had taken in when it lacked the slot (told by the
heads of its history), looks again, and only then raises the alarm and tells the other (`Diverged`).
So no race, snapshot, rollback or adoption under way makes a false alarm.

What an alarm is: a `DivergenceDetected` on both sides, a line in the log, and `alarms`, until the
two agree again about that lane. Nothing is changed: which of two is right, nobody can tell from
two. A peer that lies gets an alarm that names it, and nothing else. What its questions cost is
bounded: a credit of slots to be gone through for it, which fills up slowly.

By itself a replica compares one document with one peer every `Config.compare_interval`. With an
`Inquiry` it compares all of them with a few peers.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crdtstate import digests, wire
from crdtstate.config import Config
from crdtstate.digests import WHOLE, Memory, Node, Portions, Sums
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.events import DivergenceDetected, Event
from crdtstate.link import Link
from crdtstate.wire import Verdict

PORTION = 500
"""Slots that are gone through at a time, and the rest of a segment: a few ms of work,"""

REST = 0.002
REST_ASKED = 0.015
"""and seconds between two portions, in which others have their turn: more of them if a peer has
asked, so that nobody can have this replica do nothing else."""

TRUSTED_FOR = 900.0
"""Seconds for which the digest of a segment in which nothing was written is used again,"""

FRESH_FOR = 1.0
"""and for an inquiry of somebody else."""

CREDIT_MAX = 500_000
"""Slots that are gone through for one peer,"""

CREDIT_RATE = 20_000
"""and how many more with each second."""

CREDIT_EACH = 200
"""What any question costs at least."""

JOBS_MAX = 64
JOBS_EACH = 4
"""Questions that wait to be answered, of all peers and of one."""

LANES_MAX = wire.COMPARED_MAX
"""Lanes compared by one frame, and by a replica that compares by itself."""

DESCENTS = 4
"""Lanes in which a path is looked for after one question."""

PATIENCE = 10.0
"""Seconds to wait for an answer, or until a slot that only one side has proves to be a fault."""

LOOK = 0.1
"""Seconds between two looks at what is waited for."""

PAUSE = 0.3
"""Seconds before an inquiry asks again about lanes that had moved on."""

ROUNDS = 4
"""How often it asks."""

ALARMS_MAX = 1000
ALARMS_EACH = 64
"""Alarms that are remembered: in all, and of one agent. What is beyond is not told."""

BULK_MAX = 2**18
"""Bytes under way to a peer above which it gets no answer."""


# What comes of it


class Divergence(NamedTuple):
    """A lane that says something else at another agent, although both have taken in the same.

    Attributes:
        agent: With whom this replica differs; it may be either that is wrong.
        document: Where.
        path: A place at which they differ, such as ``plan['goal']``; there may be more.
        writer: Whose lane it is; 0 for all of a document of native types.
    """

    agent: str
    document: str
    path: str
    writer: int


class Uncompared(NamedTuple):
    """What could not be compared with an agent, and why."""

    agent: str
    document: str
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `Replica.compare` found.

    Attributes:
        agreed: Agents with whom everything that could be compared is the same.
        diverged: What is not.
        unanswered: Agents that were asked and did not say: too old, too busy, or gone.
        uncompared: What was changing all the time, or could not be told for another reason.
    """

    agreed: tuple[str, ...] = ()
    diverged: tuple[Divergence, ...] = ()
    unanswered: tuple[str, ...] = ()
    uncompared: tuple[Uncompared, ...] = ()


@dataclass(eq=False, slots=True)
class _Course:
    """An inquiry with one peer."""

    peer: int
    agent: str
    # Documents to be compared: name, lanes (None: all), and how often that was tried.
    todo: deque[tuple[str, frozenset[int] | None, int]]
    at: float
    has_answered: bool = False
    is_lost: bool = False
    exchange: _Exchange | None = None
    diverged: dict[tuple[str, int], Divergence] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)
    # Documents in which something differs that is not traced to a place.
    doubtful: set[str] = field(default_factory=set)

    @property
    def has_agreed(self) -> bool:
        """Whether all that could be compared is the same."""
        return self.has_answered and not self.diverged and not self.doubtful

    @property
    def is_done(self) -> bool:
        return self.is_lost or (not self.todo and self.exchange is None)


@dataclass(eq=False, slots=True)
class Inquiry:
    """A comparison of all documents with some peers, on its way. `Comparing` drives it."""

    began: float
    courses: list[_Course]

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to come."""
        return all(course.is_done for course in self.courses)

    def result(self) -> Comparison:
        """What is known by now; who is not done counts as not having answered."""
        done = [c for c in self.courses if c.is_done and not c.is_lost]
        diverged = [each for c in self.courses for each in c.diverged.values()]
        return Comparison(
            tuple(sorted(c.agent for c in done if c.has_agreed)),
            tuple(sorted(diverged)),
            tuple(sorted(c.agent for c in self.courses if c not in done or not c.has_answered)),
            tuple(
                Uncompared(c.agent, *each) for c in done for each in sorted(c.uncompared.items())
            ),
        )


@dataclass(eq=False, slots=True)
class _Exchange:
    """One document that is being compared with one peer, at this side's wish."""

    peer: int
    document: str
    nonce: int
    since: float
    until: float
    course: _Course | None
    # The lanes it is about; None: all.
    writers: frozenset[int] | None
    sums: Sums | None = None
    # Lanes to ask about, and those that were asked about now.
    left: list[tuple[int, int, int]] = field(default_factory=list)
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    # Lanes that are not known to be the same.
    open: dict[int, Verdict] = field(default_factory=dict)


class _Job(NamedTuple):
    """Work that is done in portions for a link, and whom to tell what came of it."""

    link: Link
    work: Portions
    done: Callable[[Any, float], None]
    is_asked: bool


class _Missing(NamedTuple):
    """A slot that a peer lacks, while this side had not taken in all that the peer had."""

    link: Link
    document: str
    writer: int
    mark: int
    path: str
    heads: Mapping[int, int]
    until: float


class Comparing:
    """The comparisons of one replica.

    Args:
        documents: The documents.
        links: The connections by number; `sync` adds and removes them.
        config: Settings.
        rng: For jitter, and whom to ask.
        takes: Tells whether this replica takes part in a document.
        send: Sends a frame to a peer.
        emit: Tells the user.
        now: The time.
    """

    def __init__(
        self,
        documents: DocumentSet,
        links: Mapping[int, Link],
        config: Config,
        rng: random.Random,
        takes: Callable[[str], bool],
        send: Callable[[int, wire.Frame], None],
        emit: Callable[[Event], None],
        now: float,
    ) -> None:
        self._documents = documents
        self._links = links
        self._config = config
        self._rng = rng
        self._takes = takes
        self._send = send
        self._emit = emit
        # (agent, document, writer) -> what differs, until it does no more.
        self.alarms: OrderedDict[tuple[str, str, int], Divergence] = OrderedDict()
        self._memories: dict[str, Memory] = {}
        self._exchanges: dict[int, _Exchange] = {}
        self._inquiries: list[Inquiry] = []
        # Slots that peers lack, and when to look whether that is a fault.
        self._missing: list[_Missing] = []
        self._look_at = now
        # Work under way, and until when others have their turn.
        self._jobs: deque[_Job] = deque()
        self._is_working = False
        self._rest_until = now
        # Peer -> slots to be gone through for it, and as of when.
        self._credits: dict[int, tuple[float, float]] = {}
        # Slots gone through so far.
        self.spent = 0
        # When to compare by itself, and the document that had its turn.
        self._next_at: float | None = None
        self._last = ""
        if config.compare_interval:
            self._plan(now)

    def __len__(self) -> int:
        """How much waits here."""
        return len(self._jobs) + len(self._missing)

    # Time

    def next_deadline(self) -> float | None:
        """When to call `tick`."""
        found = [self._next_at] if self._next_at is not None else []
        if self._jobs:
            found.append(self._rest_until)
        if self._missing:
            found.append(self._look_at)
        found += [exchange.until for exchange in self._exchanges.values()]
        for inquiry in self._inquiries:
            found += [c.at for c in inquiry.courses if not c.is_done and c.exchange is None]
        return min(found, default=None)

    def tick(self, now: float) -> None:
        """Do what is due at *now*."""
        self._work(now)
        if self._missing and self._look_at <= now:
            self._look(now)
        for exchange in [e for e in self._exchanges.values() if e.until <= now]:
            self._lose(exchange)
        for inquiry in list(self._inquiries):
            for course in inquiry.courses:
                self._go_on(course, inquiry.began, now)
            if inquiry.is_done:
                self._inquiries.remove(inquiry)
        if self._next_at is not None and self._next_at <= now:
            self._plan(now)
            self._compare_one(now)

    def _plan(self, now: float) -> None:
        self._next_at = now + self._config.compare_interval * (0.5 + self._rng.random())

    def _work(self, now: float) -> None:
        """Go through a portion of what is to be gone through."""
        if self._is_working or now < self._rest_until:
            return
        self._is_working = True
        budget, rest = PORTION, REST
        try:
            while self._jobs and budget > 0:
                job = self._jobs[0]
                if not job.link.is_up or job.link.peer not in self._links:
                    self._jobs.popleft()
                    continue
                try:
                    took = job.work.send(now)
                except StopIteration as stop:
                    self._jobs.popleft()
                    job.done(stop.value, now)
                    continue
                budget -= took
                self.spent += took
                if job.is_asked:
                    rest = REST_ASKED
                    self._charge(job.link, took, now)
        finally:
            self._is_working = False
        if budget <= 0:
            self._rest_until = now + rest

    def _start(
        self,
        link: Link,
        work: Portions,
        done: Callable[[Any, float], None],
        now: float,
        *,
        is_asked: bool,
    ) -> None:
        """Have work done in portions, from now on."""
        next(work)
        self._jobs.append(_Job(link, work, done, is_asked))
        self._work(now)

    # What a peer may have done for it

    def _charge(self, link: Link, slots: int, now: float) -> None:
        self._credits[link.peer] = self._credit(link, now) - slots, now

    def _credit(self, link: Link, now: float) -> float:
        left, at = self._credits.get(link.peer, (CREDIT_MAX, now))
        return min(CREDIT_MAX, left + (now - at) * CREDIT_RATE)

    def _may_ask(self, link: Link, now: float) -> bool:
        """Whether something may be gone through for a peer now; it costs something."""
        mine = sum(1 for job in self._jobs if job.link is link and job.is_asked)
        if mine >= JOBS_EACH or len(self._jobs) >= JOBS_MAX or self._credit(link, now) <= 0:
            return False
        self._charge(link, CREDIT_EACH, now)
        return link.outbox.bulk_bytes <= BULK_MAX

    def _find(self, link: Link, name: str) -> Document | None:
        """The document *name* if it can be compared with a peer."""
        if not (self._takes(name) and link.takes(name)):
            return None
        found = self._documents.find(name)
        return None if found is None or found.is_broken else found

    def _memory(self, name: str) -> Memory:
        return self._memories.setdefault(name, Memory())

    def forget(self, document: str) -> None:
        """A document was loaded: nothing that was summed up of it before counts."""
        self._memories.pop(document, None)

    def reset(self) -> None:
        """All documents are loaded anew, under another writer."""
        self._memories.clear()
        self._missing.clear()

    def peer_down(self, peer: int) -> None:
        """A connection is gone."""
        self._credits.pop(peer, None)
        self._missing = [each for each in self._missing if each.link.peer != peer]
        for exchange in [e for e in self._exchanges.values() if e.peer == peer]:
            self._lose(exchange)
        for inquiry in self._inquiries:
            for course in inquiry.courses:
                course.is_lost |= course.peer == peer and not course.is_done

    # Asking

    def _peers(self) -> list[Link]:
        """Who can be asked."""
        return [link for link in self._links.values() if link.is_member and link.is_greeted]

    def begin(self, count: int, now: float) -> Inquiry:
        """Compare all documents with up to *count* peers, drawn by chance. See `Inquiry`; take it
        back with `withdraw`."""
        links = self._peers()
        chosen = self._rng.sample(links, min(count, len(links)))
        names = sorted(name for name, version in self._documents.versions() if version)
        courses = []
        for link in chosen:
            todo: deque[tuple[str, frozenset[int] | None, int]] = deque(
                (n, None, 1) for n in names if self._takes(n) and link.takes(n)
            )
            courses.append(_Course(link.peer, link.agent, todo, now, has_answered=not todo))
        inquiry = Inquiry(now, courses)
        self._inquiries.append(inquiry)
        for course in courses:
            self._go_on(course, now, now)
        return inquiry

    def withdraw(self, inquiry: Inquiry) -> None:
        """It is of no more interest."""
        if inquiry in self._inquiries:
            self._inquiries.remove(inquiry)
        for course in inquiry.courses:
            if course.exchange is not None:
                self._exchanges.pop(course.exchange.nonce, None)

    def _go_on(self, course: _Course, since: float, now: float) -> None:
        """Have a course compare its next document, if it is time to."""
        if course.is_done or course.exchange is not None or course.at > now:
            return
        link = self._links.get(course.peer)
        if link is None or not link.is_up:
            course.is_lost = True
            return
        name, writers, _ = course.todo[0]
        if writers is not None:
            writers = self._without_alarms(course, name, writers)
        document = self._find(link, name)
        if document is None or writers == frozenset():
            course.todo.popleft()
            course.uncompared.pop(name, None)
            course.doubtful.discard(name)
            if document is None:
                course.uncompared[name] = "it cannot be read now"
            return
        course.exchange = self._exchange(link, document, writers, since, now, course)

    def _without_alarms(
        self, course: _Course, name: str, writers: frozenset[int]
    ) -> frozenset[int]:
        """These lanes without those that are known to differ, which are noted."""
        for writer in writers:
            found = self.alarms.get((course.agent, name, writer))
            if found is not None:
                course.diverged[name, writer] = found
        return frozenset(w for w in writers if (name, w) not in course.diverged)

    def _compare_one(self, now: float) -> None:
        """Compare the next document with one of those who take part in it."""
        names = sorted(name for name, version in self._documents.versions() if version)
        for name in [n for n in names if n > self._last] + [n for n in names if n <= self._last]:
            links = [
                link
                for link in self._peers()
                if not link.is_congested and self._find(link, name) is not None
            ]
            if links:
                self._last = name
                link = self._rng.choice(links)
                document = self._find(link, name)
                if document is not None and not self._exchanges:
                    self._exchange(link, document, None, now - TRUSTED_FOR, now, None)
                return

    def _exchange(
        self,
        link: Link,
        document: Document,
        writers: frozenset[int] | None,
        since: float,
        now: float,
        course: _Course | None,
    ) -> _Exchange:
        nonce, until = self._rng.getrandbits(64), now + PATIENCE
        found = _Exchange(link.peer, document.name, nonce, since, until, course, writers)
        self._exchanges[nonce] = found
        work = digests.sum_up(document, self._memory(document.name), since, writers)
        self._start(
            link, work, lambda sums, at: self._ask(link, found, sums, at), now, is_asked=False
        )
        return found

    def _ask(self, link: Link, exchange: _Exchange, sums: Sums | None, now: float) -> None:
        """The own digests are known: send them."""
        if exchange.nonce not in self._exchanges:
            return
        exchange.until = now + PATIENCE
        if sums is None:
            self._end(exchange, now)
            return
        exchange.sums = sums
        document = self._find(link, exchange.document)
        if exchange.writers is not None or (document is not None and not document.shared):
            wanted = exchange.writers or (document.version if document is not None else ())
            hides = document.hiding.hides_all if document is not None else lambda writer: False
            exchange.open = {
                w: Verdict.OTHER for w in wanted if w not in sums.lanes and not hides(w)
            }
        exchange.left = [(writer, *told) for writer, told in sorted(sums.lanes.items())]
        if exchange.writers is None and sums.mark is not None:
            is_fresh = exchange.course is not None
            whole = (sums.mark, sums.digest)
            self._send(
                link.peer, wire.Compare(exchange.nonce, exchange.document, whole, (), is_fresh)
            )
        else:
            self._ask_lanes(link, exchange, now)

    def _ask_lanes(self, link: Link, exchange: _Exchange, now: float) -> None:
        left = exchange.left
        if not left:
            self._end(exchange, now)
            return
        if exchange.course is None and len(left) > LANES_MAX:
            # By itself, it compares others the next time.
            begin = self._rng.randrange(len(left))
            left = (left[begin:] + left[:begin])[:LANES_MAX]
        exchange.asked, exchange.left = left[:LANES_MAX], left[LANES_MAX:]
        exchange.until = now + PATIENCE
        is_fresh = exchange.course is not None
        lanes = tuple(exchange.asked)
        self._send(
            link.peer, wire.Compare(exchange.nonce, exchange.document, None, lanes, is_fresh)
        )

    def on_compared(self, link: Link, frame: wire.Compared, now: float) -> None:
        """A peer says what is the same."""
        exchange = self._exchanges.get(frame.nonce)
        if exchange is None or exchange.peer != link.peer or exchange.sums is None:
            return
        if exchange.course is not None:
            exchange.course.has_answered = True
        if len(frame.verdicts) != len(exchange.asked or (WHOLE,)):
            return
        agent, name = link.agent, exchange.document
        if not exchange.asked:
            (verdict,) = frame.verdicts
            if verdict is Verdict.SAME:
                self._clear(agent, name, None)
                exchange.left = []
            elif not exchange.left:
                exchange.open[WHOLE] = verdict
            self._ask_lanes(link, exchange, now)
            return
        for (writer, _, _), verdict in zip(exchange.asked, frame.verdicts, strict=True):
            if verdict is Verdict.SAME:
                self._clear(agent, name, writer)
            else:
                exchange.open[writer] = verdict
        if exchange.course is None:
            exchange.left = []
        self._ask_lanes(link, exchange, now)

    def _end(self, exchange: _Exchange, now: float) -> None:
        """An exchange is through."""
        self._exchanges.pop(exchange.nonce, None)
        course = exchange.course
        if course is None:
            return
        course.exchange = None
        course.at = now
        name, before, tries = course.todo.popleft()
        lanes = exchange.writers if exchange.sums is None else frozenset(exchange.open)
        if lanes is not None:
            lanes = self._without_alarms(course, name, lanes)
        course.uncompared.pop(name, None)
        course.doubtful.discard(name)
        if lanes == frozenset():
            return
        if any(exchange.open.get(writer) is Verdict.DIFFERENT for writer in lanes or ()):
            course.doubtful.add(name)
        is_whole = lanes is None or WHOLE in lanes
        reason = "it cannot be read now" if exchange.sums is None else _why(exchange.open.values())
        course.uncompared[name] = (
            reason if lanes is None or is_whole else f"{len(lanes)} lanes: {reason}"
        )
        # As long as it gets on, it goes on.
        tries += not (before and lanes and len(lanes) < len(before))
        if tries <= ROUNDS:
            course.todo.append((name, None if is_whole else lanes, tries))
            course.at = now + PAUSE * tries

    def _lose(self, exchange: _Exchange) -> None:
        """No answer came."""
        self._exchanges.pop(exchange.nonce, None)
        if exchange.course is not None:
            exchange.course.exchange = None
            exchange.course.is_lost = True

    # Answering

    def on_compare(self, link: Link, frame: wire.Compare, now: float) -> None:
        """A peer asks whether something is the same."""
        count = len(frame.lanes) or 1
        document = self._find(link, frame.document)
        if document is None or not self._may_ask(link, now):
            verdict = Verdict.OTHER if document is None else Verdict.BUSY
            self._answer(link, frame.nonce, (verdict,) * count)
            return
        since = now - (FRESH_FOR if frame.is_fresh else TRUSTED_FOR)
        memory = self._memory(frame.document)
        if frame.whole is not None:
            if digests.version_mark(document) != frame.whole[0]:
                self._answer(link, frame.nonce, (Verdict.OTHER,))
                return
            work = digests.sum_up(document, memory, since)
            self._start(
                link,
                work,
                lambda sums, at: self._say_whole(link, frame, sums, at),
                now,
                is_asked=True,
            )
            return
        version = document.version
        writers = [writer for writer, seq, _ in frame.lanes if version.get(writer, 0) == seq]
        work = digests.sum_up(document, memory, since, writers)
        self._start(
            link, work, lambda sums, at: self._say_lanes(link, frame, sums, at), now, is_asked=True
        )

    def _answer(self, link: Link, nonce: int, verdicts: tuple[Verdict, ...]) -> None:
        if link.outbox.bulk_bytes <= BULK_MAX:
            self._send(link.peer, wire.Compared(nonce, verdicts))

    def _say_whole(self, link: Link, frame: wire.Compare, sums: Sums | None, now: float) -> None:
        assert frame.whole is not None
        mark, digest = frame.whole
        verdict = Verdict.OTHER
        if sums is None or sums.mark is None:
            verdict = Verdict.BUSY
        elif sums.mark == mark:
            verdict = Verdict.SAME if sums.digest == digest else Verdict.DIFFERENT
        self._answer(link, frame.nonce, (verdict,))
        if verdict is Verdict.SAME:
            self._clear(link.agent, frame.document, None)
        document = self._find(link, frame.document)
        if verdict is Verdict.DIFFERENT and document is not None and document.shared:
            self._descend(link, document, WHOLE, b"", now)

    def _say_lanes(self, link: Link, frame: wire.Compare, sums: Sums | None, now: float) -> None:
        verdicts: list[Verdict] = []
        differing: list[int] = []
        for writer, seq, digest in frame.lanes:
            verdict = Verdict.OTHER
            if sums is None:
                verdict = Verdict.BUSY
            elif (found := sums.lanes.get(writer)) is not None and found[0] == seq:
                verdict = Verdict.SAME if found[1] == digest else Verdict.DIFFERENT
            if verdict is Verdict.SAME:
                self._clear(link.agent, frame.document, writer)
            elif verdict is Verdict.DIFFERENT:
                differing.append(writer)
            verdicts.append(verdict)
        self._answer(link, frame.nonce, tuple(verdicts))
        document = self._find(link, frame.document)
        if document is not None:
            # First what nobody knows of yet.
            differing.sort(key=lambda w: (link.agent, frame.document, w) in self.alarms)
            for writer in differing[:DESCENTS]:
                self._descend(link, document, writer, b"", now)

    # Down to the path

    def _descend(
        self, link: Link, document: Document, writer: int, prefix: bytes, now: float
    ) -> None:
        """Send the peer what lies below *prefix* here, for it to go on."""

        def done(node: Node | None, now: float) -> None:
            if node is not None:
                self._send_node(link, document.name, writer, prefix, node)

        work = digests.list_slots(document, self._memory(document.name), writer, prefix)
        self._start(link, work, done, now, is_asked=True)

    def _send_node(self, link: Link, name: str, writer: int, prefix: bytes, node: Node) -> None:
        is_leaf = node.is_leaf or len(prefix) >= digests.PREFIX_BYTES_MAX
        children = () if is_leaf else node.children
        slots = tuple(node.entries.items())[: digests.LEAF_MAX] if is_leaf else ()
        if link.outbox.bulk_bytes <= BULK_MAX:
            self._send(
                link.peer,
                wire.Digests(name, writer, node.mark, prefix, children, slots, node.heads),
            )

    def on_digests(self, link: Link, frame: wire.Digests, now: float) -> None:
        """A peer says what it has below a prefix of a lane that differs."""
        document = self._find(link, frame.document)
        if document is None or digests.mark_of(document, frame.writer) != frame.mark:
            return
        if not self._may_ask(link, now):
            return
        wanted = [path for path, _ in frame.slots]
        memory, writer = self._memory(frame.document), frame.writer
        work = digests.list_slots(document, memory, writer, frame.prefix, wanted)

        def done(node: Node | None, now: float) -> None:
            if node is None or node.mark != frame.mark:
                return
            if not frame.children:
                self._judge(link, document, frame, node, now)
            elif node.is_leaf:
                self._send_node(link, frame.document, writer, frame.prefix, node)
            elif len(frame.prefix) < digests.PREFIX_BYTES_MAX:
                pairs = zip(node.children, frame.children, strict=True)
                at = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
                if at is not None:
                    self._descend(link, document, writer, frame.prefix + bytes((at,)), now)

        self._start(link, work, done, now, is_asked=True)

    def _judge(
        self, link: Link, document: Document, frame: wire.Digests, node: Node, now: float
    ) -> None:
        """The peer has named its slots. Find one that is not the same here."""
        theirs, mine = dict(frame.slots), node.entries
        for path, digest in theirs.items():
            if path in mine and mine[path] != digest:
                self._alarm(link, frame.document, frame.writer, path)
                self._tell(link, document, frame.writer, node.mark, path, mine[path])
                return
        for path in mine:
            if path not in theirs:
                self._await(link, document, frame.writer, node.mark, path, frame.heads, now)
                return
        for path in theirs:
            if path not in mine:
                # It is for the peer to find out whether that is a fault.
                self._tell(link, document, frame.writer, node.mark, path, None)
                return

    def _tell(
        self, link: Link, document: Document, writer: int, mark: int, path: str, digest: int | None
    ) -> None:
        heads = dict(document.heads)
        self._send(link.peer, wire.Diverged(document.name, writer, mark, path, digest, heads))

    def on_diverged(self, link: Link, frame: wire.Diverged, now: float) -> None:
        """A peer says what it has at a path where we differ."""
        document = self._find(link, frame.document)
        if document is None or not self._may_ask(link, now):
            return
        mark = digests.mark_of(document, frame.writer)
        if mark != frame.mark:
            # This lane has moved on. Of what differed before only the other's word is left.
            if frame.digest is not None and frame.writer != WHOLE and mark > frame.mark:
                self._alarm(link, frame.document, frame.writer, frame.path)
            return
        memory = self._memory(frame.document)
        mine = digests.slot_digest(document, memory, frame.writer, frame.path)
        if frame.digest is not None and mine != frame.digest:
            self._alarm(link, frame.document, frame.writer, frame.path)
        elif frame.digest is None and mine is not None:
            self._await(link, document, frame.writer, mark, frame.path, frame.heads, now)

    def _await(
        self,
        link: Link,
        document: Document,
        writer: int,
        mark: int,
        path: str,
        heads: Mapping[int, int],
        now: float,
    ) -> None:
        """The peer lacks a slot: a fault if it is still here with all that the peer had."""
        missing = _Missing(link, document.name, writer, mark, path, heads, now + PATIENCE)
        if len(self._missing) < JOBS_MAX:
            self._missing.append(missing)
            self._look(now)

    def _look(self, now: float) -> None:
        self._look_at = now + LOOK
        self._missing = [each for each in self._missing if not self._is_settled(each, now)]

    def _is_settled(self, missing: _Missing, now: float) -> bool:
        """Whether there is nothing more to wait for, an alarm included."""
        link, name, writer, mark, path, heads, until = missing
        document = self._find(link, name)
        if document is None or not link.is_up or until <= now:
            return True
        if digests.mark_of(document, writer) != mark:
            return True
        digest = digests.slot_digest(document, self._memory(name), writer, path)
        if digest is None:
            return True
        if not all(document.version.get(w, 0) >= seq for w, seq in heads.items()):
            return False
        self._alarm(link, name, writer, path)
        self._tell(link, document, writer, mark, path, digest)
        return True

    # Alarms

    def _alarm(self, link: Link, document: str, writer: int, path: str) -> None:
        key = (link.agent, document, writer)
        found = Divergence(link.agent, document, digests.describe(path), writer)
        before = self.alarms.get(key)
        if before == found:
            return
        if before is None:
            same = sum(1 for agent, _, _ in self.alarms if agent == link.agent)
            if same >= ALARMS_EACH or len(self.alarms) >= ALARMS_MAX:
                return
        self.alarms[key] = found
        self._emit(DivergenceDetected(*found))

    def _clear(self, agent: str, document: str, writer: int | None) -> None:
        """The two agree: about a lane, or with None about all of a document."""
        for key in [k for k in self.alarms if k[:2] == (agent, document)]:
            if writer is None or key[2] == writer:
                del self.alarms[key]


def _why(verdicts: Iterable[Verdict]) -> str:
    found: Collection[Verdict] = set(verdicts)
    if Verdict.DIFFERENT in found:
        return "something differs that could not be traced to a place"
    if Verdict.BUSY in found:
        return "the other is too busy to tell"
    return "it changes all the time, or is at another version there"
