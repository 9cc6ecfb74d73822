"""
Revoking members: the part of `Replica` that users see of `standing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from crdtstate.authors import Authors
from crdtstate.certificates import CONTROL, MESH, Certificate, is_valid_at
from crdtstate.commands import CONTROL as CONTROL_DOCUMENT
from crdtstate.commands import Command
from crdtstate.credentials import Credentials
from crdtstate.documents import DocumentSet
from crdtstate.errors import InvalidRevocation, InvalidUpdate, NotAllowed, UsageError
from crdtstate.revocations import PREFIX, Revocation, decode_revocation, revoke
from crdtstate.standing import Standing
from crdtstate.sync import Sync


class Revoking(DocumentSet):
    """Documents of a mesh with members; a replica keeps them."""

    _authors: Authors
    _credentials: Credentials
    _standing: Standing
    _sync: Sync

    def revoke(self, who: str | Revocation, *, reason: str = "") -> list[Revocation]:
        """Revoke a member for ever, on all replicas: it is parted from and let in no more, and what
        it wrote after what this replica has of it is hidden wherever it turns up. To come back it
        is invited anew.

        Args:
            who: The agent's name, all of whose keys are revoked that are known here; or a
                revocation that the root key has signed (``crdtrevoke1...``).
            reason: For people; with a name.

        Raises:
            NotAllowed: The own certificate does not let this replica control the mesh.
            UsageError: Nothing is known of such an agent, or this mesh has no certificates.
        """
        self._check_usable()
        root, own = self._credentials.root, self._credentials.certificate
        if root is None or own is None:
            raise UsageError("only members of a mesh with certificates can be revoked")
        if not own.is_controller:
            raise NotAllowed(self.agent, CONTROL, MESH)
        if isinstance(who, Revocation) or who.startswith(PREFIX):
            data = who.data if isinstance(who, Revocation) else who
            try:
                found = [decode_revocation(data, root)]
            except InvalidRevocation as exc:
                raise UsageError(str(exc)) from exc
        else:
            found = list(self._revocations_of(who, reason))
        for each in found:
            self._standing.take(each)
        return found

    def revocations(self) -> list[Revocation]:
        """Who was revoked, oldest first."""
        return self._standing.revocations

    def may_command(self, command: Command) -> bool:
        """Whether who wrote a command might, then: by the certificate of the lane that it stands
        in, not by any other that the same name has. Where there are none, everybody."""
        if not self._authors.have_cards:
            return True
        document = self.find(CONTROL_DOCUMENT)
        card = document.cards.get(command.writer) if document is not None else None
        if card is None:
            # Not sealed yet, or from before there was a mesh.
            own = self._credentials.certificate
            is_own = command.writer == self._writer and own is not None
            found = own if is_own else None
        else:
            try:
                found = self._authors.certificate(command.writer, card)
            except InvalidUpdate:
                return False
        if found is None or found.agent != command.by or not found.is_controller:
            return False
        if self._standing.is_revoked(found):
            return False
        return is_valid_at(found, command.stamp.wall_ms)

    def is_controller(self, agent: str) -> bool:
        """Whether an agent may command, by its certificate; where there are none, everybody."""
        own = self._credentials.certificate
        if not self._authors.have_cards or own is None:
            return True
        if agent == self.agent:
            return own.is_controller
        document = self.find(CONTROL_DOCUMENT)
        found = []
        for writer, card in document.cards.items() if document is not None else ():
            try:
                certificate = self._authors.certificate(writer, card)
            except InvalidUpdate:
                continue
            if certificate is not None and certificate.agent == agent:
                found.append(certificate)
        # Who was a controller once may be one no more.
        newest = max(found, key=lambda each: (each.not_before_ms, each.serial), default=None)
        if newest is None or not newest.is_controller or self._standing.is_revoked(newest):
            return False
        return is_valid_at(newest, self.wall_ms())

    def _revocations_of(self, agent: str, reason: str) -> Iterator[Revocation]:
        if agent == self.agent:
            raise UsageError("a replica does not revoke itself")
        self.version()
        keys = {each.key: each for each in self._certificates_of(agent)}
        if not keys:
            raise UsageError(f"nothing is known here of an agent {agent!r}; revoke its key")
        for key in keys:
            cuts: dict[str, dict[int, int]] = {}
            for name, writer, certificate in self._writers():
                document = self.find(name)
                # Whom it invited is revoked with it.
                is_its = key in (certificate.key, certificate.issuer)
                if is_its and document is not None:
                    cuts.setdefault(name, {})[writer] = document.version[writer]
            yield revoke(
                self._credentials.seed,
                agent=agent,
                key=key,
                cuts=cuts,
                at_ms=time.time_ns() // 1_000_000,
                reason=reason,
                by=self._credentials.certificate,
            )

    def _certificates_of(self, agent: str) -> Iterator[Certificate]:
        for _, _, certificate in self._writers():
            if certificate.agent == agent:
                yield certificate
        for link in self._sync.peers:
            if link.certificate is not None and link.certificate.agent == agent:
                yield link.certificate

    def _writers(self) -> Iterator[tuple[str, int, Certificate]]:
        """(document, writer, certificate) of all that are known."""
        for name in self.documents():
            document = self.find(name)
            for writer, card in document.cards.items() if document is not None else ():
                try:
                    certificate = self._authors.certificate(writer, card)
                except InvalidUpdate:
                    continue
                if certificate is not None:
                    yield name, writer, certificate
