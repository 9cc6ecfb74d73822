"""
Whose checkpoints these are: proving own ones, and saying which of all there are to be believed.

A manifest names all of its checkpoint by hash, and ends with a proof of what comes before that
(`authors`): so one proof is for everything. What a mesh takes for a proof it takes here, too:
nothing, a keyed hash, or a signature and the certificate of who made it.

Where there are certificates, believed is what this replica has made under its own key, and of
others what their certificates let them hand out (`certificates.SNAPSHOT`); documents that one does
not are left out, as nothing else proves what a snapshot holds. (The changes after it prove
themselves: who takes care of an agent that died takes those.) Its name is that of the agent whose
checkpoint it says it is, it was valid then, and it was not revoked since.

A proof that is wrong is damage. Where there is none, such as from before there was a mesh, nobody
can tell: nothing of it is used by itself, and an agent reads its own by their ids. Sans-I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from crdtstate.authors import Authors, Unsigned
from crdtstate.certificates import SNAPSHOT, Certificate, is_valid_at
from crdtstate.errors import Unproven
from crdtstate.manifest import Damaged, Manifest

PURPOSE = "checkpoint/1"

CHECKED_MAX = 10_000
"""Proofs that are remembered as right."""


class Attestation:
    """What one replica proves and believes of checkpoints.

    Args:
        authors: What its mesh takes for a proof.
        own: Returns the own certificate, where there are any.
        is_revoked: Whether who has a certificate is, or may be, a member no more.
        needs_proof: Whether a manifest without a proof is none at all.
    """

    def __init__(
        self,
        authors: Authors,
        own: Callable[[], Certificate | None] = lambda: None,
        is_revoked: Callable[[Certificate], bool] = lambda certificate: False,
        *,
        needs_proof: bool = False,
    ) -> None:
        self._authors = authors
        self._own = own
        self._is_revoked = is_revoked
        self._needs_proof = needs_proof
        # Proofs that are right, and whose they are; None where nobody has a certificate.
        self._checked: dict[bytes, Certificate | None] = {}

    def of_others(self) -> Attestation:
        """The same for checkpoints of other agents, which have a proof."""
        authors, own = self._authors, self._own
        return Attestation(authors, own, self._is_revoked, needs_proof=True)

    def prove(self, manifest: Manifest) -> bytes:
        """The proof for a manifest of this replica. From any thread.

        Raises:
            Damaged: Nobody would believe it, because the own certificate is not valid then.
        """
        own = self._own()
        if self._authors.have_cards and own is not None:
            if not is_valid_at(own, manifest.stamp >> 16):
                raise Damaged("the own certificate has expired, or is not valid yet: renew it")
        return self._authors.attest(PURPOSE, manifest.body())

    def check(self, manifest: Manifest) -> None:
        """Check a manifest that may come from anybody.

        Raises:
            Damaged: Its proof is wrong, or it has none and needs one.
        """
        if self.is_proven(manifest):
            self._verify(manifest)
        elif self._needs_proof:
            raise Damaged("nothing proves whose it is")

    def is_proven(self, manifest: Manifest) -> bool:
        """Whether a manifest that was checked has a proof, where this mesh asks for one."""
        return not self._authors.are_checked or manifest.proof[:1] == bytes([self._authors.scheme])

    def is_own(self, manifest: Manifest) -> bool:
        """Whether a manifest that was checked is proven to be this replica's, under its present
        key. In a mesh of words everybody is one."""
        if not self.is_proven(manifest):
            return False
        maker, own = self._maker(manifest), self._own()
        return maker is None or (own is not None and maker.key == own.key)

    def left_out(self, manifest: Manifest) -> Collection[str]:
        """The documents that are not to be believed of a manifest that was checked.

        Raises:
            Damaged: None of it is.
        """
        found = self.in_pieces(manifest)
        if found and len(found) == len(manifest.documents):
            raise Damaged(f"{manifest.agent} may not hand out snapshots of what is in it")
        return found

    def in_pieces(self, manifest: Manifest) -> Collection[str]:
        """The documents of a manifest that was checked whose snapshots are not to be believed: of
        these each change has to prove itself.

        Raises:
            Damaged: It is not proven, or who made it was revoked.
        """
        if not self.is_proven(manifest):
            raise Damaged("nothing proves whose it is")
        maker = self._maker(manifest)
        if maker is None:
            return ()
        if self._is_revoked(maker):
            raise Damaged(f"it is proven by a key of {maker.agent} that was, or may be, revoked")
        if self.is_own(manifest):
            return ()
        names = (entry.name for entry in manifest.documents)
        return frozenset(name for name in names if not maker.allows(SNAPSHOT, name))

    def believes(self, manifest: Manifest) -> bool:
        """Whether a manifest that was checked may be used by itself, all of it or in part."""
        try:
            self.left_out(manifest)
        except Damaged:
            return False
        return True

    def is_known(self, manifest: Manifest) -> bool:
        """Whether a manifest that was checked is that of a member, who it says it is."""
        try:
            self.in_pieces(manifest)
        except Damaged:
            return False
        return True

    def _maker(self, manifest: Manifest) -> Certificate | None:
        if not self._authors.have_cards:
            return None
        if manifest.proof not in self._checked:
            self._verify(manifest)
        return self._checked[manifest.proof]

    def _verify(self, manifest: Manifest) -> None:
        """Check a proof. Raises Damaged."""
        try:
            maker = self._authors.attestant(PURPOSE, manifest.body(), manifest.proof)
        except Unproven as exc:
            raise Damaged(str(exc)) from exc
        if maker is not None and maker.agent != manifest.agent:
            raise Damaged(f"it is {maker.agent}'s, not {manifest.agent}'s")
        # Not by when it says it was made, which sorts nothing: it cannot be the newest for ever.
        if maker is not None and not is_valid_at(maker, manifest.stamp >> 16):
            raise Damaged(f"it was made when {maker.agent}'s certificate was not valid")
        while len(self._checked) >= CHECKED_MAX:
            del self._checked[next(iter(self._checked))]
        self._checked[manifest.proof] = maker


BELIEVED = Attestation(Unsigned())
"""Where nothing is proven."""
