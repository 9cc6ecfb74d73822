"""
A set of documents, as one writer holds them: what an agent's code reads and writes.

`Replica` and the simulated replica are both a `DocumentSet` with something around it that moves
changes. The set seals open changes and hands them over in order (`take_sealed`); it knows no disk,
network or clock but the ones it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from crdtstate import quarantine
from crdtstate.change import CHECKSUM, Change, Origin, Prover, Snapshot, decode_change
from crdtstate.clock import Cut, Dot, HybridClock, Stamp, Version
from crdtstate.conflict import Conflict
from crdtstate.crdts import Counter, Map, Register, Set
from crdtstate.document import Delivery, Document, Witness
from crdtstate.errors import InvalidUpdate, UnsupportedValue, UsageError
from crdtstate.hiding import Ceiling
from crdtstate.quarantine import QUARANTINE, Quarantined
from crdtstate.votes import Polls

MAIN = "main"
"""The document that `map`, `counter`, `register` and `set` of a replica use."""

DOCUMENTS_MAX = 100_000
"""Documents of one replica; a peer cannot make it hold more."""

ORIGIN_CHARS_MAX = 1000

WALL_MS_MAX = 2**47

SYSTEM = "@"
"""The names of documents that are the system's begin so."""

SYSTEM_DOCUMENTS = frozenset(
    (
        "@checkpoints",
        "@control",
        "@electorate",
        "@forks",
        "@mesh",
        "@quarantine",
        "@recovery",
        "@votes",
    )
)
"""Those that there are."""


class DocumentSet:
    """The documents of one replica.

    Args:
        agent: The agent's name.
        writer: The replica's writer.
        wall: Returns the wall time in milliseconds since 1970.
    """

    def __init__(self, agent: str, writer: int, wall: Callable[[], int]) -> None:
        self.agent = agent
        self._writer = writer
        self._wall = wall
        self._clock = HybridClock()
        self._documents: dict[str, Document] = {}
        # Documents with an open change, in the order in which they were opened.
        self._open: dict[str, Document] = {}
        # Sealed changes that nobody has taken yet, with the paths they wrote.
        self._sealed: list[tuple[Change, list[str]]] = []
        self._transaction: Origin | None = None
        # What proves the changes of a writer, where that is asked for.
        self.prover_of: Callable[[int], Prover | None] = lambda writer: None
        # Whether a writer with a card may set the rules of a document.
        self.may_rule: Callable[[str, int, bytes], bool] = lambda document, writer, card: True
        # Documents of which changes were loaded with other proofs than these: from another mesh.
        self.scheme = CHECKSUM
        self.foreign: set[str] = set()
        # Told of all that pycrdt is given.
        self.witness: Witness | None = None
        # See `Document.admits_unjudged`.
        self.admits_unjudged = False
        self.polls = Polls(self)

    # Reading and writing

    def map(self, name: str, *, strategy: str | None = None) -> Map:
        """The map *name* of the document "main"."""
        return self.document(MAIN).map(name, strategy=strategy)

    def counter(self, name: str) -> Counter:
        """The counter *name* of the document "main"."""
        return self.document(MAIN).counter(name)

    def register(self, name: str, *, strategy: str | None = None) -> Register:
        """The register *name* of the document "main"."""
        return self.document(MAIN).register(name, strategy=strategy)

    def set(self, name: str) -> Set:
        """The set *name* of the document "main"."""
        return self.document(MAIN).set(name)

    def document(self, name: str, *, shared: bool = False) -> Document:
        """The document *name*, made on first use. Names that begin with "@" are the system's: such
        a document can be looked at here once there is one, and none is made.

        Args:
            shared: It holds native Yjs types, for editors and browsers.

        Raises:
            UsageError: It exists, and is of the other type; or there is no such document of the
                system's.
        """
        if isinstance(name, str) and name.startswith(SYSTEM) and name not in self._documents:
            raise UsageError(
                f"{name!r}: names that begin with {SYSTEM!r} are the system's, and there is no "
                "such document here; take another name for one of your own"
            )
        return self.system_document(name, shared=shared)

    def system_document(self, name: str, *, shared: bool = False) -> Document:
        """The document *name*, made on first use, also if it is the system's: for crdtstate itself
        only. Raises what `document` does."""
        self._check_usable()
        found = self._documents.get(name)
        if found is None:
            return self._add(name, shared)
        if shared and not found.shared:
            raise UsageError(f"document {name!r} exists and is not shared=True")
        return found

    def documents(self) -> Iterator[str]:
        """The names of all documents, sorted."""
        return iter(sorted(self._documents))

    def conflicts(self) -> list[Conflict]:
        """The open conflicts of all documents, but for those of the system (``@...``)."""
        names = (name for name in self.documents() if not name.startswith(SYSTEM))
        return [found for name in names for found in self._documents[name].conflicts()]

    def count_conflicts(self) -> int:
        """How many conflicts are open in all documents, without reading their values."""
        return sum(
            document.count_conflicts()
            for name, document in self._documents.items()
            if not name.startswith(SYSTEM)
        )

    def quarantined(self, document: str | None = None) -> list[Quarantined]:
        """The changes of others that all replicas have and hide, because the rules of their
        documents refuse them (see `Document.use_validator`, `Document.limit`), of all documents or
        of one, each document's oldest first. Those that their writers have since written over are
        gone."""
        names = self.documents() if document is None else [document]
        found = (self._documents[name] for name in names if name in self._documents)
        return [item for each in found for item in quarantine.withheld(each)]

    def release(self, item: Quarantined, *, message: str = "") -> None:
        """Let a change that is quarantined count after all, on all replicas. It then reads as if
        it had never been refused: what was written over it since stays over it.

        Args:
            message: Why, for people; it goes into the audits.

        Raises:
            UsageError: It is not quarantined any more; nothing changed.
        """
        self._check_usable()
        if not isinstance(item, Quarantined):
            raise UsageError(f"give what quarantined() gave, not {item!r}")
        if item.dot not in {found.dot for found in self.quarantined(item.document)}:
            raise UsageError(f"{item.document!r}: {item.dot} is not quarantined; see quarantined()")
        book = self.system_document(QUARANTINE)
        with self.transaction(message=message):
            book.map(item.document)[quarantine.key_of(item.dot)] = [item.agent, item.reason]

    def version(self) -> Cut:
        """What this replica has taken in so far, its own writes included: a causal token.

        Raises:
            UsageError: Inside a transaction, whose writes have no place in time yet.
        """
        self._check_settled()
        self._seal_open()
        versions = {name: document.version for name, document in self._documents.items()}
        for name, document in self._open.items():
            # It could not be sealed now; what is open becomes its next change.
            writer = document.writer
            versions[name] = Version({**versions[name], writer: versions[name].get(writer, 0) + 1})
        return Cut(versions)

    @contextmanager
    def transaction(self, *, message: str = "", run: str = "") -> Iterator[None]:
        """Make all writes inside one change (one for each document written to).

        Everybody sees all of a change or nothing. An exception inside undoes the writes and goes
        on to the caller: nothing of it happened, here or elsewhere. So does `ChangeRefused` at the
        end, if the rules of a document refuse what was written to it. A transaction inside another
        joins it. Never ``await`` inside: other tasks' writes would become part of it.

        Args:
            message: Why, for people; up to 1,000 characters.
            run: To which run of the agent it belongs; up to 1,000 characters.
        """
        self._check_usable()
        if self._transaction is not None:
            yield
            return
        for label, text in (("message", message), ("run", run)):
            if type(text) is not str or len(text) > ORIGIN_CHARS_MAX:
                raise UnsupportedValue(label, f"a str of at most {ORIGIN_CHARS_MAX} characters")
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                raise UnsupportedValue(label, f"not valid Unicode: {exc}") from exc
        self._seal_open()
        # What is open still cannot be sealed now, and must stay as it is.
        marks = {name: document.mark() for name, document in self._open.items()}
        self._transaction = Origin(self.agent, message, run)
        try:
            yield
            for name, document in self._open.items():
                if name not in marks:
                    document.admit_open(self._transaction)
        except BaseException:
            for name, document in self._open.items():
                document.rollback(marks.get(name))
            # A native document says in its next change that its edits were undone.
            self._open = {name: d for name, d in self._open.items() if d.is_open}
            raise
        else:
            self._seal_open(self._transaction)
        finally:
            self._transaction = None

    # For whoever moves the changes

    def _check_usable(self) -> None:
        """Raise if this set cannot be used now; a replica overrides it."""

    def _check_settled(self) -> None:
        """Raise inside a transaction."""
        if self._transaction is not None:
            raise UsageError("not inside a transaction: leave the 'with' block first")

    def _written(self) -> None:
        """There is something to seal, or something was sealed; a replica overrides it."""

    def _add(self, name: str, shared: bool) -> Document:
        document = self._make(name, shared)
        document.polls, document.on_delivered = self.polls, self._delivered
        document.is_grouped = lambda: self._transaction is not None
        document.release(quarantine.released(self.find(QUARANTINE), name))
        return document

    def _shown(self, document: Document, paths: list[str], agent: str) -> None:
        """What is hidden of a document changed, so *paths* read differently, by a change of
        *agent* elsewhere; a replica tells observers."""

    def hide(self, name: str, writer: int, ceiling: Ceiling | None) -> None:
        """Hide all changes of *writer* in a document above a seq, or show them again; see
        `Document.hide`."""
        document = self.find(name)
        if document is None:
            return
        paths = document.hide(writer, ceiling)
        if paths:
            self._shown(document, paths, "")
        if name == QUARANTINE:
            self._review_releases((about for about, _ in quarantine.heard(paths)), "")

    def _review_releases(self, names: Iterable[str], agent: str) -> None:
        book = self.find(QUARANTINE)
        for name in sorted(frozenset(names)):
            document = self.find(name)
            if document is not None:
                paths = document.release(quarantine.released(book, name))
                if paths:
                    self._shown(document, paths, agent)

    def _delivered(self, delivery: Delivery) -> None:
        """Something was taken in; a replica adds to it."""
        if delivery.document.name == QUARANTINE:
            agent = delivery.change.origin.agent if delivery.change is not None else ""
            self._review_releases((name for name, _ in quarantine.heard(delivery.paths)), agent)
        if delivery.local and not delivery.document.name.startswith(SYSTEM):
            for resolution in delivery.resolutions:
                self.polls.remove(resolution.conflict)

    def _make(self, name: str, shared: bool) -> Document:
        if len(self._documents) >= DOCUMENTS_MAX:
            raise UsageError(f"a replica holds at most {DOCUMENTS_MAX} documents")
        document = Document(
            name,
            writer=self._writer,
            agent=self.agent,
            clock=self._clock,
            wall=self._wall,
            on_write=self._on_write,
            shared=shared,
        )
        document.prover = self.prover_of(self._writer)
        document.may_rule = partial(self.may_rule, name)
        document.witness = self.witness
        document.admits_unjudged = self.admits_unjudged
        self._documents[name] = document
        return document

    def _on_write(self, document: Document) -> None:
        if document.name not in self._open:
            self._check_usable()
            self._open[document.name] = document
            self._written()
        elif self._transaction is None:
            # It says so a second time because it has grown.
            self._seal(document)

    def _seal_open(self, origin: Origin | None = None) -> None:
        """Seal all open changes.

        Raises:
            UsageError: Native edits of a document cannot be sent and were undone; all other
                documents are sealed.
        """
        refused: UsageError | None = None
        stuck: set[str] = set()
        # Sealing what resolves a conflict opens the document of votes, sealed already or not.
        while opened := [name for name in self._open if name not in stuck]:
            for name in opened:
                try:
                    if name in self._open:
                        self._seal(self._open[name], origin)
                except UsageError as exc:
                    refused = exc
                if name in self._open:
                    stuck.add(name)
        if refused is not None:
            raise refused

    def _seal(self, document: Document, origin: Origin | None = None) -> None:
        if document.is_broken:
            # Its writes stay open until it was rebuilt.
            return
        self._open.pop(document.name, None)
        change = document.seal(origin)
        if change is not None:
            self._sealed.append((change, document.written))
            self._written()

    def take_sealed(self) -> list[tuple[Change, list[str]]]:
        """Seal what is open, unless in a transaction, and return what was sealed, in order, with
        the paths each change wrote."""
        if self._transaction is None:
            self._seal_open()
        return self._hand_over()

    def _hand_over(self) -> list[tuple[Change, list[str]]]:
        sealed, self._sealed = self._sealed, []
        return sealed

    def seal_now(self, document: Document) -> None:
        """Seal what is open in a document, so that its version counts it."""
        self._check_settled()
        if document.is_open:
            self._seal(document)

    def write_above(self, document: Document, container: str, key: str, value: bytes) -> Dot:
        """Write the packed *value* at a path in a change of its own, with a stamp above those of
        all values there."""
        self.seal_now(document)
        document.put_above(container, key, value)
        self._seal(document)
        return Dot(document.writer, document.version[document.writer])

    def seal_tidying(self, document: Document) -> None:
        """Seal a change that only drops what others cover (L3)."""
        if self._transaction is None:
            self._seal(document)

    def find(self, name: str) -> Document | None:
        """The document *name* if there is one."""
        return self._documents.get(name)

    def find_or_make(self, name: str, shared: bool) -> Document:
        """The document *name*; made if there is none, because a peer has it."""
        return self._documents.get(name) or self._add(name, shared)

    def load_snapshot(self, name: str, data: bytes, only: Document | None = None) -> None:
        """Take in a stored snapshot of the document *name*, or of *only*.

        Raises:
            InvalidUpdate: It is damaged, or breaks the rules.
            EngineFailure: pycrdt failed on it.
        """
        snapshot = Snapshot.decode(data)
        document = only or self.find_or_make(name, snapshot.shared)
        document.join(snapshot)

    def load_change(self, name: str, data: bytes, only: Document | None = None) -> None:
        """Take in a stored change, if it is not contained yet; raises what `load_snapshot` does."""
        change = decode_change(data)
        if change.scheme != self.scheme:
            self.foreign.add(name)
        document = only or self.find_or_make(name, change.shared)
        if not document.version.covers(change.dot):
            if not document.is_ready(change):
                raise InvalidUpdate("it comes before what it builds on")
            document.apply(change)

    def reload(self, document: Document, writer: int, load: Callable[[Document], None]) -> None:
        """Empty *document*, let *load* fill it again, to be written by *writer* from now on, and
        write again what the own lane said and what was loaded does not."""
        self._open.pop(document.name, None)
        # Nobody has heard of what was sealed and not taken; it is written again too.
        self._sealed = [sealed for sealed in self._sealed if sealed[0].document != document.name]
        old = document.writer
        own = document.reset(writer)
        document.prover = self.prover_of(writer)
        load(document)
        document.rewrite(own, old)
        self._reloaded(document)

    def _reloaded(self, document: Document) -> None:
        """A document was loaded anew; a replica adds to it."""

    def start_over(self, writer: int) -> None:
        """Forget all documents, to be loaded anew and written by *writer*. Only while nobody has
        been given one."""
        self._close_documents()
        self._documents.clear()
        self._open.clear()
        self._sealed.clear()
        self._writer = writer
        self.polls = Polls(self)

    def versions(self) -> Iterator[tuple[str, Version]]:
        """The versions of all documents, open changes not included."""
        return ((name, document.version) for name, document in self._documents.items())

    def _close_documents(self) -> None:
        for document in self._documents.values():
            document.close()

    def _describe(self) -> dict[str, Any]:
        return {name: document.version.total for name, document in self._documents.items()}

    def observe(self, stamp: int) -> bool:
        """Let the clock follow a remote *stamp*; False if it is too far ahead to be believed."""
        return self._clock.observe(stamp, self._wall())

    def resume_clock(self, document: Document) -> None:
        """Let the clock go on from a document that was loaded: from what others said only as far
        as they would be believed now, from what this writer said in any case."""
        if not self.observe(document.stamp):
            own = document.own_slots(self._writer).values()
            self._clock.observe(max((slot.stamp for slot in own), default=0), WALL_MS_MAX)

    def next_stamp(self) -> Stamp:
        """A stamp above those of all that was written here or taken in."""
        return self._clock.issue(self._wall())

    def wall_ms(self) -> int:
        """The wall time in milliseconds since 1970."""
        return self._wall()
