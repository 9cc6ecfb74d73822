"""
Whose changes count: what follows from proofs of forks, and from revocations.

Both are replicated and hold for ever, so all replicas come to hide the same (`hiding`), whatever
they had taken in by then:

- A writer that is proven to have gone on in two ways (`forks`) is *closed* in that document. Its
  lane is hidden whole, as replicas may hold different ones, and nobody takes in or waits for more
  of it: it counts as delivered to the end. Proofs stand in ``@forks``, and anybody may add one.
- Of a key that was revoked (`revocations`) the changes above the cuts are hidden. They are taken in
  all the same, if somebody has taken them in: else versions would differ for ever. Revocations
  stand in ``@mesh``, which only who controls may write. A counter that goes on above its cut counts
  what the revocation says beside the cuts.

Sans-I/O; a shell tells of what was delivered and found.
"""

from __future__ import annotations

import hashlib
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
from crdtstate.slots import Slot

REVOKED = "revoked"
"""The map of revocations in ``@mesh``: hash of the key and of who signed it -> revocation."""

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
    ) -> None:
        self._documents = documents
        self._authors = authors
        self._root = root
        self._emit = emit
        self._closed = closed
        self._is_own = is_own
        # (document, writer) -> the proof of a fork.
        self._proofs: dict[tuple[str, int], bytes] = {}
        # Who was revoked, and what is told of it: by key, the newest.
        self._revoked = Revocations()
        self._revocations: dict[bytes, Revocation] = {}
        # (document, writer, seq of a cut) -> what the writer had counted until then.
        self._counts: dict[tuple[str, int, int], Mapping[str, int]] = {}
        # Documents of which something was delivered that may matter.
        self._noted: dict[str, Document] = {}
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

    def open(self) -> None:
        """Everything was loaded."""
        if self._root is None:
            return
        self._look_at_revocations()
        self._look_at_proofs()
        for name in list(self._documents.documents()):
            document = self._documents.find(name)
            if document is not None:
                self._apply_to(document, document.cards)

    def note(self, delivery: Delivery) -> None:
        """Something was delivered; `look` at what follows once that is done."""
        if self._root is None:
            return
        document, change = delivery.document, delivery.change
        if (
            change is None
            or document.name in (MESH, forks.DOCUMENT)
            or (document.name, change.writer) in self._proofs
            or (change.card and len(self._revoked))
        ):
            self._noted[document.name] = document

    def reloaded(self, document: Document) -> None:
        """A document was loaded anew."""
        if self._root is not None:
            self._noted[document.name] = document

    def look(self) -> None:
        """Do what follows from what was delivered. Not while something is."""
        while self._noted:
            name, document = self._noted.popitem()
            if name == MESH:
                self._look_at_revocations()
            elif name == forks.DOCUMENT:
                self._look_at_proofs()
            self._apply_to(document, document.cards)
            self._close_again(document)

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
            forks.decode(proof, self._authors)
        except InvalidUpdate:
            return
        self._publish(forks.key_of(change), proof)
        self._close(change.document, change.writer, proof)

    # Forks

    def _publish(self, key: str, proof: bytes) -> None:
        try:
            view = self._documents.system_document(forks.DOCUMENT).map(forks.PROOFS)
            if not self._is_told(view, key):
                view[key] = proof
        except CRDTStateError:
            # This one may not write, or takes no part in it; others have seen both as well.
            pass

    def _look_at_proofs(self) -> None:
        document = self._documents.find(forks.DOCUMENT)
        if document is None or document.shared:
            return
        view = document.map(forks.PROOFS)
        for key in list(view):
            for candidate in view.live(key):
                self._take_proof(candidate.value)
        for (name, writer), proof in self._proofs.items():
            # Somebody may have written over it.
            key = f"{writer:x}/{name}"
            if not any(candidate.value == proof for candidate in view.live(key)):
                self._publish(key, proof)

    def _is_told(self, view: Map, key: str) -> bool:
        """Whether what stands at a key proves what the key says."""
        for candidate in view.live(key):
            try:
                name, writer, _ = forks.decode(candidate.value, self._authors)
            except InvalidUpdate:
                continue
            if f"{writer:x}/{name}" == key:
                return True
        return False

    def _take_proof(self, value: Any) -> None:
        if type(value) is bytes and value in self._proofs.values():
            return
        try:
            name, writer, agent = forks.decode(value, self._authors)
        except InvalidUpdate:
            return
        if (name, writer) not in self._proofs and self._is_of(value, name, writer):
            self._emit(Equivocation(agent, name, writer, 0))
            self._close(name, writer, value)

    def _is_of(self, proof: bytes, name: str, writer: int) -> bool:
        """Whether a proof is by the key that the writer has here: another key gives the same number
        once in 2**53 tries."""
        document = self._documents.find(name)
        card = document.cards.get(writer) if document is not None else None
        if card is None:
            return True
        mine = self._authors.certificate(writer, card)
        other = self._authors.certificate(writer, forks.card_of(proof))
        return mine is not None and other is not None and mine.key == other.key

    def _close(self, name: str, writer: int, proof: bytes) -> None:
        if (name, writer) in self._proofs:
            return
        self._proofs[name, writer] = proof
        document = self._documents.find(name)
        if document is not None:
            self._close_in(document, writer)

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

    def say_again(self) -> None:
        """Write again, as another writer, what stood in own lanes that were closed."""
        unsaid, self._unsaid = self._unsaid, []
        for document, own in unsaid:
            try:
                document.rewrite(own, document.writer)
            except CRDTStateError as exc:
                self._emit(EditsUndone(f"{document.name!r}: what was written before: {exc}"))

    def _close_again(self, document: Document) -> None:
        """A snapshot was taken in, or the document is new here."""
        for name, writer in list(self._proofs):
            if name == document.name:
                self._close_in(document, writer)

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
