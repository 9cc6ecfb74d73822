"""
Whose changes count: what follows from proofs of forks, and from revocations.

Both are replicated and hold for ever, so all replicas come to hide the same (`hiding`), whatever
they had taken in by then:

- A writer that is proven to have gone on in two ways (`forks`) is *closed* in that document. Its
  lane is hidden whole, as replicas may hold different ones, and nobody takes in or waits for more
  of it: it counts as delivered to the end. Proofs stand in ``@forks``, and anybody may add one. If
  somebody writes over one, one of those who know it says it again.
- Of a key that was revoked (`revocations`) the changes above the cuts are hidden. They are taken in
  all the same, if somebody has taken them in: else versions would differ for ever. Revocations
  stand in ``@mesh``, which only who controls may write. A counter that goes on above its cut counts
  what the revocation says beside the cuts.

Sans-I/O; a shell tells of what was delivered and found.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from crdtstate import forks
from crdtstate.authors import Authors
from crdtstate.certificates import MESH, Certificate
from crdtstate.change import Change
from crdtstate.crdts import Map
from crdtstate.document import Delivery, Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError, InvalidRevocation, InvalidUpdate, UsageError
from crdtstate.events import EditsUndone, Equivocation, Event, KeyRevoked
from crdtstate.hiding import Ceiling
from crdtstate.revocations import Revocation, Revocations, decode_revocation
from crdtstate.slots import SEPARATOR, Slot

REVOKED = "revoked"
"""The map of revocations in ``@mesh``: hash of the key and of who signed it -> revocation."""

REFUSED_MAX = 10_000
"""Values in ``@forks`` of which is remembered that they prove nothing."""

MADE_MAX = 1_000
"""Documents that are made because of proofs about one key."""

AGAIN_MAX = 20.0
CROWD = 10_000
"""Seconds until somebody has said again what all know, at most, and how many that may be."""

Counts = Mapping[str, Mapping[int, Mapping[str, int]]]
"""Document -> writer -> path of a counter -> what the writer had counted there."""


class Standing:
    """Who counts, in the documents of one replica.

    Args:
        documents: The documents.
        authors: Tells whose changes are whose.
        root: The public key of the mesh's root; None where nothing is signed.
        emit: Gets events.
        closed: Called with a document's name and a writer that is closed there now.
        is_own: Whether a writer is, or was, this replica's.
        takes: Whether this replica takes part in a document, and may.
    """

    def __init__(
        self,
        documents: DocumentSet,
        authors: Authors,
        root: bytes | None,
        *,
        emit: Callable[[Event], None],
        closed: Callable[[str, int], None],
        is_own: Callable[[int], bool],
        takes: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._documents = documents
        self._authors = authors
        self._root = root
        self._emit = emit
        self._closed = closed
        self._is_own = is_own
        self._takes = takes
        # (document, writer) -> the proof of a fork, of lanes that are closed here; which of them
        # somebody has written over, and when to say them again.
        self._proofs: dict[tuple[str, int], bytes] = {}
        self._unheard: dict[tuple[str, int], float] = {}
        # Where something was written in ``@forks``; and what proves nothing, by hash, the newest.
        self._touched: dict[str, None] = {}
        # Documents that are not here -> of whom there is said something in ``@forks``.
        self._waiting: dict[str, set[int]] = {}
        # How many documents were made for proofs alone, by the keys they are of.
        self._made: Counter[bytes] = Counter()
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        # Who was revoked, and what is told of it: by key, the newest.
        self._revoked = Revocations()
        self._revocations: dict[bytes, Revocation] = {}
        # (document, writer, seq of a cut) -> what the writer had counted until then.
        self._counts: dict[tuple[str, int, int], Mapping[str, int]] = {}
        # Documents of which something was delivered that may matter: of whom; None for all.
        self._noted: dict[str, set[int] | None] = {}
        # What stood in own lanes that were closed, until it was said again.
        self._unsaid: list[tuple[Document, Mapping[str, Slot]]] = []

    # Looking

    @property
    def revocations(self) -> list[Revocation]:
        """The revocations that are known, by time."""
        return sorted(self._revocations.values(), key=lambda each: (each.at_ms, each.key))

    def is_revoked(self, certificate: Certificate) -> bool:
        """Whether who has this certificate is a member no more, or never was: its key was revoked,
        or that of the controller who invited it."""
        return self._revoked.is_revoked(certificate)

    # What happened

    def open(self, now: float) -> None:
        """Everything was loaded."""
        if self._root is None:
            return
        for name in self._documents.documents():
            self._noted[name] = None
        view = self._proofs_view()
        self._touched.update(dict.fromkeys(view if view is not None else ()))
        self.look(now)

    def note(self, delivery: Delivery) -> None:
        """Something was delivered; `look` at what follows once that is done."""
        if self._root is None:
            return
        name, change = delivery.document.name, delivery.change
        if name == forks.DOCUMENT:
            paths = (path.partition(SEPARATOR) for path in delivery.paths)
            keys = (key for view, _, key in paths if view == Map.kind + forks.PROOFS)
            self._touched.update(dict.fromkeys(keys))
        waiting = self._waiting.pop(name, ())
        if change is None:
            self._noted[name] = None
        elif change.card or waiting or name in (MESH, forks.DOCUMENT):
            writers = self._noted.setdefault(name, set())
            if writers is not None:
                writers.update(waiting)
                if change.card:
                    writers.add(change.writer)

    def reloaded(self, document: Document) -> None:
        """A document was loaded anew."""
        if self._root is not None:
            self._noted[document.name] = None

    def look(self, now: float) -> None:
        """Do what follows from what was delivered, and what is due. Not while something is
        delivered."""
        while self._noted:
            name, writers = self._noted.popitem()
            document = self._documents.find(name)
            if document is None:
                continue
            if name == MESH:
                self._look_at_revocations()
            elif name == forks.DOCUMENT:
                self._look_at_proofs(now)
            if writers is None:
                self._hide_closed(document)
                known = (writer for where, writer in self._proofs if where == name)
                writers = {*document.cards, *known, *self._waiting.pop(name, ())}
            self._apply_to(document, writers)
            self._close_proven(document, writers)
        if self._unheard:
            self._say_unheard(now)

    def next_deadline(self) -> float:
        """When to `look` at the latest."""
        return min(self._unheard.values(), default=math.inf)

    def found(self, change: Change, held: Change) -> None:
        """A change came that does not fit to one that is here."""
        document = self._documents.find(change.document)
        if document is None or not forks.has_forked(held, change):
            return
        self._emit(Equivocation(change.origin.agent, change.document, change.writer, change.seq))
        if self._root is None:
            return
        card = document.cards.get(change.writer, b"") or change.card
        proof = forks.encode(held, change, card)
        try:
            name, writer, _ = forks.decode(proof, self._authors)
        except InvalidUpdate:
            return
        self._publish(name, writer, proof)
        self._proofs.setdefault((name, writer), proof)
        self._close_in(document, writer)

    # Forks

    def _publish(self, name: str, writer: int, proof: bytes) -> None:
        key = forks.key_of(name, writer)
        try:
            view = self._documents.system_document(forks.DOCUMENT).map(forks.PROOFS)
            if self._proof_at(view, name, writer) is None:
                view[key] = proof
        except CRDTStateError:
            # This one may not write, or takes no part in it; others have seen both as well.
            pass

    def _proofs_view(self) -> Map | None:
        document = self._documents.find(forks.DOCUMENT)
        return None if document is None or document.shared else document.map(forks.PROOFS)

    def _look_at_proofs(self, now: float) -> None:
        """Look at the places in ``@forks`` that were written to."""
        view = self._proofs_view()
        touched, self._touched = self._touched, {}
        if view is None:
            return
        for key in touched:
            place = forks.place_of(key)
            if place is None:
                continue
            name, writer = place
            document = self._documents.find(name) or self._make(view, name, writer)
            if document is not None:
                self._close_proven(document, [writer])
            else:
                self._waiting.setdefault(name, set()).add(writer)
            if place in self._proofs and self._proof_at(view, name, writer) is None:
                # Somebody has written over it. All know that at once, and one has to say it again.
                self._unheard.setdefault(place, now + self._delay(key))

    def _make(self, view: Map, name: str, writer: int) -> Document | None:
        """A document of which nothing is here but the proof: who has closed a lane has none of its
        changes any more to give. Of each key only so many; else its proof waits."""
        proof = self._proof_at(view, name, writer) if self._takes(name) else None
        if proof is None:
            return None
        found = self._authors.certificate(writer, forks.card_of(proof))
        if found is None or self._made[found.key] >= MADE_MAX:
            return None
        try:
            made = self._documents.find_or_make(name, forks.is_shared(proof))
        except UsageError:
            # There are too many.
            return None
        self._made[found.key] += 1
        return made

    def _delay(self, key: str) -> float:
        """How long to wait for others to say what all know: few come first, however many there are
        (Nonnenmacher and Biersack, "Scalable feedback for large groups", 1999)."""
        hashed = hashlib.blake2b(f"{self._documents.agent}/{key}".encode(), digest_size=8).digest()
        share = int.from_bytes(hashed, "big") / 2**64
        return AGAIN_MAX * math.log(1 + share * (CROWD - 1)) / math.log(CROWD)

    def _say_unheard(self, now: float) -> None:
        """Publish proofs again that others have written over, and nobody has said since."""
        for place in [place for place, at in self._unheard.items() if at <= now]:
            del self._unheard[place]
            self._publish(*place, self._proofs[place])

    def _proof_at(self, view: Map, name: str, writer: int) -> bytes | None:
        """What stands at a place in ``@forks``, if it proves what it has to."""
        key = forks.key_of(name, writer)
        for candidate in view.live(key):
            value = candidate.value
            if value == self._proofs.get((name, writer), b""):
                return self._proofs[name, writer]
            if type(value) is not bytes or len(value) > forks.PROOF_BYTES_MAX:
                continue
            hashed = hashlib.blake2b(f"{key}\0".encode() + value, digest_size=16).digest()
            if hashed in self._refused:
                continue
            try:
                if forks.decode(value, self._authors)[:2] == (name, writer):
                    return value
            except InvalidUpdate:
                pass
            self._refused[hashed] = None
            if len(self._refused) > REFUSED_MAX:
                self._refused.popitem(last=False)
        return None

    def _close_proven(self, document: Document, writers: Iterable[int]) -> None:
        """Close the lanes of those whose forks are proven."""
        view = self._proofs_view()
        for writer in list(writers):
            place = (document.name, writer)
            if place not in self._proofs and view is not None:
                proof = self._proof_at(view, *place)
                if proof is None or not self._is_of(proof, document, writer):
                    continue
                self._proofs[place] = proof
                self._emit(Equivocation(document.agents[writer], *place, 0))
            if place in self._proofs:
                self._close_in(document, writer)

    def _is_of(self, proof: bytes, document: Document, writer: int) -> bool:
        """Whether a proof is by the key that the writer has here. That of another one can give the
        same number, if hardly ever. If nothing of the writer is here, the proof tells who it is, as
        a change would: what comes later of another key is refused (`authors`)."""
        told = forks.card_of(proof)
        try:
            other = self._authors.certificate(writer, told)
            if writer in document.cards:
                mine = self._authors.certificate(writer, document.cards[writer])
                return mine is not None and other is not None and mine.key == other.key
        except InvalidUpdate:
            return False
        if other is None or writer in document.version:
            # From before the mesh asked for signatures.
            return False
        document.cards[writer], document.agents[writer] = told, other.agent
        return True

    def _close_in(self, document: Document, writer: int) -> None:
        if document.is_closed(writer):
            # It was before: a restart, or a snapshot of somebody who knew.
            self._documents.hide(document.name, writer, Ceiling(0))
            return
        own = document.live_slots(writer) if self._is_own(writer) else {}
        document.close_lane(writer)
        self._documents.hide(document.name, writer, Ceiling(0))
        if own:
            # Nobody lied here: a store was copied. What it said is said again.
            self._unsaid.append((document, own))
        self._closed(document.name, writer)
        if writer != document.writer:
            self.say_again()

    def _hide_closed(self, document: Document) -> None:
        """A snapshot was taken in, or the document is new here: who handed it may have known of
        lanes that are closed, and that proof may be on its way."""
        for writer in list(document.version):
            if document.is_closed(writer) and not document.hiding.hides_all(writer):
                self._documents.hide(document.name, writer, Ceiling(0))

    def say_again(self) -> None:
        """Write again, as another writer, what stood in own lanes that were closed."""
        unsaid, self._unsaid = self._unsaid, []
        for document, own in unsaid:
            try:
                document.rewrite(own, document.writer)
            except CRDTStateError as exc:
                self._emit(EditsUndone(f"{document.name!r}: what was written before: {exc}"))

    # Revocations

    def take(self, revocation: Revocation, counts: Counts | None = None) -> None:
        """Take in a revocation and tell everybody.

        Raises:
            NotAllowed: This replica may not write ``@mesh``.
            UsageError: Nothing is signed in this mesh.
        """
        if self._root is None:
            raise UsageError("only members of a mesh with certificates can be revoked")
        document = self._documents.system_document(MESH)
        key = f"{revocation.key.hex()}/{hash_of(revocation)}"
        told = counts if counts is not None else self.count(revocation)
        document.map(REVOKED)[key] = [revocation.data, _plain(told)]
        self._take(revocation, told)

    def count(self, revocation: Revocation) -> Counts:
        """What a key's writers have counted up to the cuts, as far as it is known here."""
        found: dict[str, dict[int, dict[str, int]]] = {}
        for name, writers in revocation.cuts.items():
            document = self._documents.find(name)
            for writer, seq in writers.items():
                if document is not None and document.version.get(writer, 0) == seq:
                    found.setdefault(name, {})[writer] = document.counted(writer)
        return found

    def _look_at_revocations(self) -> None:
        document = self._documents.find(MESH)
        if document is None or document.shared or self._root is None:
            return
        view = document.map(REVOKED)
        for key in list(view):
            for candidate in view.live(key):
                try:
                    data, counts = candidate.value
                    revocation = decode_revocation(data, self._root)
                    self._take(revocation, _read_counts(counts))
                except (InvalidRevocation, ValueError, TypeError):
                    continue

    def _take(self, revocation: Revocation, counts: Counts) -> None:
        for name, writers in revocation.cuts.items():
            for writer, seq in writers.items():
                told = counts.get(name, {}).get(writer, {})
                place = (name, writer, seq)
                known = self._counts.get(place, told)
                # They are the same, unless a controller lies; then for everybody one of them.
                self._counts[place] = min(known, told, key=lambda each: sorted(each.items()))
        if not self._revoked.add(revocation):
            return
        self._revocations[revocation.key] = revocation
        self._emit(KeyRevoked(revocation.agent, revocation.key, revocation.reason))
        for name in list(self._documents.documents()):
            document = self._documents.find(name)
            if document is not None:
                self._apply_to(document, document.cards)

    def _apply_to(self, document: Document, writers: Iterable[int]) -> None:
        """Hide what was revoked of these writers. What they told of others' revocations and forks
        proves itself, and stays."""
        if not len(self._revoked) or document.name in (MESH, forks.DOCUMENT):
            return
        for writer in list(writers):
            try:
                card = document.cards[writer]
                certificate = self._authors.certificate(writer, card)
            except (InvalidUpdate, KeyError):
                continue
            name = document.name
            seq = self._revoked.cut(certificate, name, writer) if certificate else None
            if seq is not None and not document.is_closed(writer):
                counts = self._counts.get((name, writer, seq), {})
                self._documents.hide(name, writer, Ceiling(seq, counts))


def hash_of(revocation: Revocation) -> str:
    """Tells the revocations of one key apart."""
    return hashlib.blake2b(revocation.data, digest_size=8).hexdigest()


def _plain(counts: Counts) -> dict[str, Any]:
    return {
        name: {f"{writer:x}": dict(paths) for writer, paths in writers.items()}
        for name, writers in counts.items()
    }


def _read_counts(value: Any) -> Counts:
    found: dict[str, dict[int, dict[str, int]]] = {}
    try:
        for name, writers in value.items():
            for writer, paths in writers.items():
                read = {str(path): int(net) for path, net in paths.items()}
                found.setdefault(str(name), {})[int(writer, 16)] = read
    except (AttributeError, ValueError, TypeError):
        return {}
    return found
