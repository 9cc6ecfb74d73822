"""
Asking members what they have, wherever in the mesh they are: the ground of `confirm` and of
strong reads and writes.

A *question* names members (or nobody: then it is for all), a document and a version, and is
answered by each of them once it has that version: committed, or with *durable* synced, so that a
power cut does not undo the answer. With the empty version it is answered at once, and with *tell*
the answer says which version that member has. Questions travel along the tree and answers go back
the way the question came; both may be lost, so a question is asked again until it is settled.

Two things are built of this, in `Replica`: *write concern*, which waits until so many members have
what was written; and multi-writer registers after Attiya, Bar-Noy and Dolev ("Sharing Memory
Robustly in Message-Passing Systems", 1995; several writers: Lynch and Shvartsman 1997), which ask
a majority, catch up with what it says, and wait until a majority has the outcome.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.link import Link

RETRY = 0.5
"""Seconds after which a question is asked again, while some of those it names have not answered."""

RETRY_MAX = 5.0

ROUTES_MAX = 20_000
"""Questions of others of whom it is remembered where they came from."""

WAITING_MAX = 10_000
"""Questions that wait here until they can be answered."""

WAITING_EACH = 1000
"""The same, that came by one link."""

ATTEMPTS_MAX = 2**32
"""More often nothing is asked."""

PATIENCE = 60.0
"""Seconds for which a question waits to be answered. Who still wants to know asks again."""


@dataclass(eq=False, slots=True)
class Question:
    """A question of this replica; *answers* grows: agent -> the version it told."""

    nonce: int
    names: frozenset[str]
    document: str
    version: Version
    durable: bool
    tell: bool
    asked_at: float
    attempt: int = 0
    answers: dict[str, Version] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        """Whether everybody it names has answered."""
        return bool(self.names) and self.names <= self.answers.keys()


@dataclass(eq=False, slots=True)
class _Waiting:
    """A question that is to be answered here. *peer* is None for an own one."""

    frame: wire.Ask
    peer: int | None
    until: float
    # What is committed here, once that is enough; and what has to be synced for it to be durable.
    told: Version | None = None
    number: int = 0


class Quorum:
    """The questions that one replica asks, passes on and answers.

    Args:
        agent: Its name.
        is_durable: Whether it has a store. Without one it never says that anything is durable.
        committed: Returns what of a document is committed here.
        send: Sends a frame on a link.
        hurry: Has the store synced soon.
    """

    def __init__(
        self,
        agent: str,
        is_durable: bool,
        committed: Callable[[str], Version],
        send: Callable[[int, wire.Frame], None],
        hurry: Callable[[], None],
        prove: Callable[[wire.Answer], wire.Answer] = lambda answer: answer,
        is_proven: Callable[[wire.Answer], bool] = lambda answer: True,
    ) -> None:
        self._agent = agent
        self._is_durable = is_durable
        self._committed = committed
        self._send = send
        self._hurry = hurry
        self._prove = prove
        self._is_proven = is_proven
        self._questions: dict[int, Question] = {}
        # Nonce -> attempt and link of a question that came by.
        self._routes: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def routes(self) -> int:
        """How many questions of others are remembered."""
        return len(self._routes)

    # Asking

    def ask(self, question: Question, persisted: int, synced: int) -> None:
        """Begin to ask: `due` says what to send. Take it back with `forget`."""
        self._questions[question.nonce] = question
        # It may come back, also when it is of no more interest.
        self._note_route(question.nonce, ATTEMPTS_MAX, 0)
        if self._is_asked(question.names):
            self._wait(_to_frame(question), None, question.asked_at, persisted, synced)

    def forget(self, question: Question) -> None:
        """Ask it no more."""
        self._questions.pop(question.nonce, None)
        self._waiting.pop(question.nonce, None)

    def due(self, now: float) -> list[wire.Ask]:
        """The own questions to be asked now, for the first time or again."""
        found = []
        for question in self._questions.values():
            if question.asked_at <= now and not question.is_settled:
                question.attempt += 1
                pause = min(RETRY * 1.5 ** (question.attempt - 1), RETRY_MAX)
                question.asked_at = now + pause
                found.append(_to_frame(question))
        return found

    def next_deadline(self) -> float | None:
        """When to call `due`."""
        open_ones = [q.asked_at for q in self._questions.values() if not q.is_settled]
        return min(open_ones, default=None)

    # Answering

    def on_ask(self, link: Link, frame: wire.Ask, now: float, persisted: int, synced: int) -> bool:
        """Take in a question. True if it is to be passed on."""
        attempt, _ = self._routes.get(frame.nonce, (0, 0))
        if attempt >= frame.attempt:
            return False
        self._note_route(frame.nonce, frame.attempt, link.peer)
        if self._is_asked(frame.names):
            self._wait(frame, link.peer, now, persisted, synced)
        return any(name != self._agent for name in frame.names) or not frame.names

    def _note_route(self, nonce: int, attempt: int, peer: int) -> None:
        self._routes[nonce] = attempt, peer
        self._routes.move_to_end(nonce)
        if len(self._routes) > ROUTES_MAX:
            self._routes.popitem(last=False)

    def _is_asked(self, names: Collection[str]) -> bool:
        return not names or self._agent in names

    def _wait(
        self, frame: wire.Ask, peer: int | None, now: float, persisted: int, synced: int
    ) -> None:
        if frame.durable and not self._is_durable:
            return
        waiting = self._waiting.get(frame.nonce)
        if waiting is not None and waiting.peer is not None:
            # What has to be synced stays the same: if it rose with each attempt, a slow disk that
            # is always busy would never get there.
            waiting.peer, waiting.until = peer, now + PATIENCE
        elif waiting is None:
            if peer is not None and self._is_full(peer):
                return
            self._waiting[frame.nonce] = waiting = _Waiting(frame, peer, now + PATIENCE)
        self._try(waiting, persisted, synced)

    def _is_full(self, peer: int) -> bool:
        same = sum(1 for waiting in self._waiting.values() if waiting.peer == peer)
        return len(self._waiting) >= WAITING_MAX or same >= WAITING_EACH

    def _try(self, waiting: _Waiting, persisted: int, synced: int) -> None:
        """Answer if that can be done now."""
        frame = waiting.frame
        if waiting.told is None:
            committed = self._committed(frame.document)
            if not frame.version <= committed:
                return
            # All that is committed by now was persisted by now.
            waiting.told, waiting.number = committed, persisted
            if frame.durable and synced < persisted:
                self._hurry()
        if frame.durable and synced < waiting.number:
            return
        del self._waiting[frame.nonce]
        told = waiting.told if frame.tell else Version()
        if waiting.peer is None:
            self._take(frame.nonce, self._agent, told)
        else:
            answer = wire.Answer(frame.nonce, self._agent, told)
            self._send(waiting.peer, self._prove(answer))

    def progressed(self, documents: Iterable[str] | None, persisted: int, synced: int) -> None:
        """Something was committed in *documents*, or with None: synced. Answer what waited."""
        for waiting in list(self._waiting.values()):
            if documents is None or waiting.frame.document in documents:
                self._try(waiting, persisted, synced)

    def on_answer(self, frame: wire.Answer) -> None:
        """Take in an answer to an own question, or pass it on towards who asked."""
        if frame.nonce in self._questions:
            if self._is_proven(frame):
                self._take(frame.nonce, frame.agent, frame.version)
        elif (route := self._routes.get(frame.nonce)) is not None and frame.hops:
            self._send(route[1], replace(frame, hops=frame.hops - 1))

    def _take(self, nonce: int, agent: str, version: Version) -> None:
        question = self._questions.get(nonce)
        if question is not None and (not question.names or agent in question.names):
            question.answers[agent] = version

    def reset(self) -> None:
        """Answer nothing of what waits, as what is committed here has changed: others ask again,
        and what was answered here to own questions is to be answered anew."""
        self._waiting.clear()
        for question in self._questions.values():
            question.answers.pop(self._agent, None)
            if self._is_asked(question.names) and (self._is_durable or not question.durable):
                frame = _to_frame(question)
                self._waiting[question.nonce] = _Waiting(frame, None, question.asked_at)

    def expire(self, now: float) -> None:
        """Forget questions that waited too long."""
        for nonce, waiting in list(self._waiting.items()):
            if waiting.until <= now and waiting.peer is not None:
                del self._waiting[nonce]


def _to_frame(question: Question) -> wire.Ask:
    return wire.Ask(
        question.nonce,
        max(question.attempt, 1),
        tuple(sorted(question.names)),
        question.document,
        question.version,
        question.durable,
        question.tell,
    )
