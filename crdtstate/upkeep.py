"""
Keeping documents small: what a replica does about its own lanes when there is time. Sans-I/O;
driven by `sync`.

Two chores. *Tidying*: a document that holds what others cover (L3 of `lanes`) is tidied some time
later, at random, so that not all replicas do it at once, by a change that only drops. *Adoption*:
lanes of writers that this replica wrote as before are looked after by the present one, once
nobody has more of them than is here (L6).
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from crdtstate.config import Config
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.ledger import Ledger


class Upkeep:
    """The chores of one replica.

    Args:
        documents: The documents; it seals changes in them.
        ledger: Knows the documents, and when each is to be tidied.
        config: Settings.
        rng: For jitter.
    """

    def __init__(
        self, documents: DocumentSet, ledger: Ledger, config: Config, rng: random.Random
    ) -> None:
        self._documents = documents
        self._ledger = ledger
        self._config = config
        self._rng = rng
        # Writers that this replica wrote as in earlier sessions.
        self.former: set[int] = set()
        # When to call `tidy`; None while nothing is to be tidied.
        self.tidy_at: float | None = None

    # Tidying

    def note(self, document: Document, now: float) -> None:
        """The document has changed: tidy it later if it needs that."""
        page = self._ledger.page(document.name)
        if document.needs_tidying and page.tidy_at is None:
            page.tidy_at = now + self._config.tidy_delay * (0.5 + self._rng.random())
            self._arm(page.tidy_at)

    def tidy(self, now: float) -> None:
        """Tidy the documents that are due."""
        self.tidy_at = None
        for name, page in self._ledger.pages.items():
            if page.tidy_at is not None and page.tidy_at <= now:
                page.tidy_at = None
                document = self._documents.find(name)
                if document is not None and document.needs_tidying:
                    self._documents.seal_tidying(document)
                    self.note(document, now)
            if page.tidy_at is not None:
                self._arm(page.tidy_at)

    def put_off(self, until: float) -> None:
        """Nothing may be written now: tidy at *until*."""
        self.tidy_at = until

    def _arm(self, at: float) -> None:
        if self.tidy_at is None or at < self.tidy_at:
            self.tidy_at = at

    # Adopting

    def unadopted(self) -> list[tuple[Document, int]]:
        """Lanes of own former writers that nobody looks after."""
        found = []
        if self.former:
            for document in map(self._documents.find, self._ledger.pages):
                if document is not None:
                    lanes = document.lanes
                    waiting = self.former.intersection(lanes.lanes).difference(lanes.tended)
                    found += [(document, writer) for writer in sorted(waiting)]
        return found

    def adopt(self, lanes: Iterable[tuple[Document, int]], now: float) -> None:
        """Look after some of these, of whose writers everything is here."""
        for document, writer in lanes:
            document.adopt(writer)
            self.note(document, now)
