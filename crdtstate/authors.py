"""
Whose changes these are: proving own ones, and checking those of others.

What stands in for a proof depends on the mesh (`Config.signing`):

    none     nothing; only the hashes are checked. Whoever may connect is believed.
    keyed    a keyed hash under the mesh's secret (BLAKE2b): somebody who knows the secret made it
    signed   an Ed25519 signature under the writer's own key, which a certificate of the mesh names

In a signed mesh the number of a writer is the hash of its key, of the serial of its certificate and
of a small random *count*, so nobody can write under another's number: the *card* that comes with a
writer's first change holds the count and the certificate. What is proved is the body of a change,
which names the update and the change before it by their hashes (`change`), under the id of the
mesh.

Numbers have 53 bits, so who can try 2**36 inputs finds one of 100,000 writers. Nobody can. The
serial is the issuer's, who draws it from its own secret and the key, always the same for one key
(`authority`): who makes its own key does not know it beforehand, and renewing keeps the numbers.
What is left to choose is the count, of `COUNTS`: all of them together meet one of 100,000 writers
with a chance of 1 in 65,000, and that is all that trying can buy.

So few counts have their price: an agent that loses its store each time, or has none, draws one that
it had before in 1 of 1,000 times once it has had 1,000. It is told before anything leaves: nothing
is sent on a connection before the peer has said what it has, nor where that is more of the own
writer, or something else, than is here, until that was looked at (`Link.doubts`). Then it goes on
as another writer, and nothing is lost. Without that, 2**20 would be too few; 2**40 numbers would be
too many. Sans-I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import msgpack
from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey

from crdtstate.certificates import (
    CONTROL,
    FORWARD,
    SNAPSHOT,
    WRITE,
    Certificate,
    decode_certificate,
    is_valid_at,
)
from crdtstate.change import (
    CARD_HEAD,
    CHECKSUM,
    KEYED,
    PROOF_BYTES,
    SIGNED,
    Change,
    Prover,
    Snapshot,
)
from crdtstate.clock import WRITER_BITS
from crdtstate.errors import InvalidCertificate, Unproven, UsageError
from crdtstate.signing import verify
from crdtstate.wire import Answer, Hello

K = TypeVar("K")

PURPOSE = "change/2"
ANSWER = "answer/1"

UNPROVEN = " (not proven)"

COUNTS = 2**20
"""How many writers one key can be."""

CARDS_CACHED = 10_000
"""Cards that are remembered as checked."""


class Credentials(Protocol):
    """What a process has to show; see `credentials.Credentials`."""

    @property
    def kind(self) -> str: ...

    @property
    def mesh(self) -> bytes: ...

    @property
    def root(self) -> bytes | None: ...

    @property
    def certificate(self) -> Certificate | None: ...

    @property
    def secrets(self) -> Sequence[bytes]: ...

    @property
    def former(self) -> Sequence[bytes]: ...

    def sign(self, purpose: str, message: bytes) -> bytes: ...


class Authors(Protocol):
    """What a mesh takes for a proof."""

    are_checked: bool
    """Whether there are proofs to check,"""

    have_cards: bool
    """and who a writer is, is told by its card."""

    scheme: int
    """What changes begin with here."""

    def draw(self, rng: random.Random) -> int:
        """A new writer for this process."""

    def prover(self, writer: int) -> Prover | None:
        """What proves the changes of a *writer* that was drawn here, or in an earlier life."""

    def check(self, change: Change, card: bytes) -> None:
        """Check that a change is its writer's, who may write it. Of the writer *card* is known,
        if anything, from an earlier change or a snapshot.

        Raises:
            Unproven: It is not, or not provably.
        """

    def certificate(self, writer: int, card: bytes) -> Certificate | None:
        """What the certificate on a writer's card says. Raises Unproven if it is not its own."""

    def vouch(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot with the names of its writers as they are proven. Raises Unproven if they
        are not."""
        raise NotImplementedError

    def unproven(self, agents: Mapping[int, str], cards: Mapping[int, bytes]) -> dict[int, str]:
        """How writers are called of whom nothing proves who they are: from before the documents
        were part of this mesh. It is no name that a member can have."""
        raise NotImplementedError

    def head(self, writer: int) -> bytes:
        """What an own writer's number is made of beside the certificate, for Hello."""

    def is_right(self, hello: Hello, certificate: Certificate) -> bool:
        """Whether who has proved to have a certificate says hello under its own name and
        number."""

    def prove_answer(self, answer: Answer) -> Answer:
        """An own answer to a question, with what proves it."""
        raise NotImplementedError

    def is_answer(self, answer: Answer) -> bool:
        """Whether an answer is that of the agent that it names."""
        raise NotImplementedError

    def may_take(self, document: str) -> bool:
        """Whether this replica may have a document,"""

    def may_write(self, document: str, ms: int) -> bool:
        """write it, at a time in milliseconds since 1970,"""

    def may_hand(self, document: str) -> bool:
        """and is believed when it hands a snapshot of it to others."""

    def may_rule(self, document: str, writer: int, card: bytes) -> bool:
        """Whether a writer with this card may set the rules of a document."""

    def is_own(self, writer: int, card: bytes) -> bool:
        """Whether this process may go on as a *writer* that its store knows with this card."""

    def attest(self, purpose: str, message: bytes) -> bytes:
        """A proof that a message for a purpose is this member's; its first byte is `scheme`. Empty
        where nothing is proven."""

    def attestant(self, purpose: str, message: bytes, proof: bytes) -> Certificate | None:
        """Who proves that a message is theirs; None where nobody has a certificate. Raises Unproven
        if nobody of this mesh does."""


class Unsigned:
    """No proofs: whoever may connect is believed."""

    are_checked = have_cards = False
    scheme = CHECKSUM

    def draw(self, rng: random.Random) -> int:
        return rng.getrandbits(WRITER_BITS) or 1

    def prover(self, writer: int) -> Prover | None:
        return None

    def check(self, change: Change, card: bytes) -> None:
        pass

    def certificate(self, writer: int, card: bytes) -> Certificate | None:
        return None

    def vouch(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    def unproven(self, agents: Mapping[int, str], cards: Mapping[int, bytes]) -> dict[int, str]:
        return {}

    def head(self, writer: int) -> bytes:
        return b""

    def is_right(self, hello: Hello, certificate: Certificate) -> bool:
        return True

    def prove_answer(self, answer: Answer) -> Answer:
        return answer

    def is_answer(self, answer: Answer) -> bool:
        return True

    def may_take(self, document: str) -> bool:
        return True

    def may_write(self, document: str, ms: int) -> bool:
        return True

    def may_hand(self, document: str) -> bool:
        return True

    def may_rule(self, document: str, writer: int, card: bytes) -> bool:
        return True

    def is_own(self, writer: int, card: bytes) -> bool:
        return True

    def attest(self, purpose: str, message: bytes) -> bytes:
        return b""

    def attestant(self, purpose: str, message: bytes, proof: bytes) -> Certificate | None:
        return None


class Keyed(Unsigned):
    """Keyed hashes under the mesh's secret.

    Args:
        secrets: Returns the secrets that there are and were, 32 bytes each, newest first.
    """

    are_checked = True
    scheme = KEYED
    card = b""

    def __init__(self, secrets: Callable[[], Sequence[bytes]]) -> None:
        self._secrets = secrets

    def prover(self, writer: int) -> Prover | None:
        return self

    def prove(self, body: bytes) -> bytes:
        return _keyed(body, self._secrets()[0])

    def check(self, change: Change, card: bytes) -> None:
        if change.scheme != KEYED:
            raise Unproven(f"{change!r} has no keyed hash, as this mesh asks for")
        body, proof = change.body, change.proof
        if not any(hmac.compare_digest(_keyed(body, each), proof) for each in self._secrets()):
            raise Unproven(f"{change!r} was made by who does not know the secret of this mesh")

    def attest(self, purpose: str, message: bytes) -> bytes:
        return bytes([KEYED]) + _keyed(_named(purpose, message), self._secrets()[0])

    def attestant(self, purpose: str, message: bytes, proof: bytes) -> Certificate | None:
        named, given = _named(purpose, message), bytes([KEYED])
        if not any(hmac.compare_digest(given + _keyed(named, s), proof) for s in self._secrets()):
            raise Unproven("it was made by who does not know the secret of this mesh")
        return None


def _named(purpose: str, message: bytes) -> bytes:
    # The body of a change begins with no letter.
    return purpose.encode() + b"\0" + message


def _keyed(body: bytes, secret: bytes) -> bytes:
    size = PROOF_BYTES[KEYED]
    return hashlib.blake2b(body, key=secret, digest_size=size, person=b"crdtstate-change").digest()


class Signed:
    """Signatures of members, who have certificates.

    Args:
        mesh: The id of the mesh.
        root: Its public key.
        own: Returns the own certificate, which may be renewed.
        sign: Signs a message for a purpose with the own key.
    """

    are_checked = have_cards = True
    scheme = SIGNED

    def __init__(
        self,
        mesh: bytes,
        root: bytes,
        own: Callable[[], Certificate],
        sign: Callable[[str, bytes], bytes],
    ) -> None:
        self._mesh = mesh
        self._root = root
        self._own = own
        self._sign = sign
        # Own writers that were drawn or found, with their counts.
        self._heads: dict[int, bytes] = {}
        # Cards that are right: (writer, card) -> what the certificate says. And certificates.
        self._checked: dict[tuple[int, bytes], Certificate] = {}
        self._decoded: dict[bytes, Certificate] = {}
        self._keys: dict[bytes, VerifyKey] = {}

    # Own changes

    def draw(self, rng: random.Random) -> int:
        known = {writer for writer, _ in self._checked} | self._heads.keys()
        while True:
            head = rng.randrange(COUNTS).to_bytes(CARD_HEAD, "big")
            writer = _number(self._own(), head)
            if writer not in known:
                self._heads[writer] = head
                return writer

    def prover(self, writer: int) -> Prover | None:
        return _Signer(self, writer)

    def head(self, writer: int) -> bytes:
        return self._heads[writer]

    def prove_answer(self, answer: Answer) -> Answer:
        proof = self._sign(ANSWER, self._told(answer))
        return replace(answer, certificate=self._own().data, proof=proof)

    def is_answer(self, answer: Answer) -> bool:
        try:
            found = self._decode(answer.certificate)
        except InvalidCertificate:
            return False
        is_its = found.agent == answer.agent
        return is_its and verify(ANSWER, self._told(answer), answer.proof, found.key)

    def _told(self, answer: Answer) -> bytes:
        fields = [answer.nonce, answer.agent, answer.version.flat()]
        told: bytes = msgpack.packb(fields)
        return self._mesh + told

    def may_take(self, document: str) -> bool:
        return self._own().allows(FORWARD, document)

    def may_write(self, document: str, ms: int) -> bool:
        own = self._own()
        return is_valid_at(own, ms) and own.allows(WRITE, document)

    def may_hand(self, document: str) -> bool:
        return self._own().allows(SNAPSHOT, document)

    def may_rule(self, document: str, writer: int, card: bytes) -> bool:
        try:
            return self.certificate(writer, card).allows(CONTROL, document)
        except Unproven:
            # From before the mesh asked for signatures.
            return False

    def is_own(self, writer: int, card: bytes) -> bool:
        head = card[:CARD_HEAD]
        if _number(self._own(), head) != writer:
            return False
        self._heads[writer] = head
        return True

    def card(self, writer: int) -> bytes:
        return self._heads[writer] + self._own().data

    def prove(self, body: bytes) -> bytes:
        return self._sign(PURPOSE, self._mesh + body)

    def attest(self, purpose: str, message: bytes) -> bytes:
        return bytes([SIGNED]) + self._sign(purpose, self._mesh + message) + self._own().data

    # Others' changes

    def check(self, change: Change, card: bytes) -> None:
        if change.scheme != SIGNED:
            raise Unproven(f"{change!r} is not signed, as this mesh asks for")
        certificate = self.certificate(change.writer, change.card or card)
        if change.card and card and self.certificate(change.writer, card).key != certificate.key:
            # That of another key gives the same number: see above how rarely.
            raise Unproven(f"{change!r} is not by the key that {change.writer:x} began with")
        if change.origin.agent != certificate.agent:
            raise Unproven(f"{change!r} is by {certificate.agent}, not {change.origin.agent!r}")
        if not is_valid_at(certificate, change.stamp >> 16):
            raise Unproven(f"{change!r} was made when its writer's certificate was not valid")
        if not certificate.allows(WRITE, change.document):
            raise Unproven(f"{certificate.agent} may not write {change.document!r}")
        message = b"crdtstate/" + PURPOSE.encode() + b"\0" + _hash(self._mesh + change.body)
        key = self._keys.get(certificate.key)
        if key is None:
            key = self._keys[certificate.key] = VerifyKey(certificate.key)
        try:
            key.verify(message, change.proof)
        except (CryptoError, ValueError) as exc:
            raise Unproven(f"{change!r} is not signed by {certificate.agent}") from exc

    def attestant(self, purpose: str, message: bytes, proof: bytes) -> Certificate | None:
        end = 1 + PROOF_BYTES[SIGNED]
        scheme, signature, data = proof[:1], proof[1:end], proof[end:]
        try:
            found = self._decoded.get(data) or decode_certificate(data, self._root)
        except InvalidCertificate as exc:
            raise Unproven(str(exc)) from exc
        _keep(self._decoded, data, found)
        is_right = verify(purpose, self._mesh + message, signature, found.key)
        if scheme != bytes([SIGNED]) or not is_right:
            raise Unproven(f"it is not signed by {found.agent}")
        return found

    def is_right(self, hello: Hello, certificate: Certificate) -> bool:
        number = _number(certificate, hello.head)
        return (hello.agent, hello.writer) == (certificate.agent, number)

    def vouch(self, snapshot: Snapshot) -> Snapshot:
        names = self.unproven(snapshot.agents, snapshot.cards)
        for writer, card in snapshot.cards.items():
            names[writer] = self.certificate(writer, card).agent
        return snapshot._replace(agents=names)

    def unproven(self, agents: Mapping[int, str], cards: Mapping[int, bytes]) -> dict[int, str]:
        return {
            writer: agent if agent.endswith(UNPROVEN) else agent[:80] + UNPROVEN
            for writer, agent in agents.items()
            if writer not in cards
        }

    def _decode(self, data: bytes) -> Certificate:
        found = self._decoded.get(data)
        if found is None:
            found = decode_certificate(data, self._root)
            _keep(self._decoded, data, found)
        return found

    def certificate(self, writer: int, card: bytes) -> Certificate:
        """The certificate on a writer's card. Raises Unproven if it is not that writer's."""
        found = self._checked.get((writer, card))
        if found is None:
            if not card:
                raise Unproven(f"nothing tells who {writer:x} is")
            try:
                found = self._decode(card[CARD_HEAD:])
            except InvalidCertificate as exc:
                raise Unproven(f"the card of {writer:x}: {exc}") from exc
            if _number(found, card[:CARD_HEAD]) != writer:
                raise Unproven(f"the card of {writer:x} is another writer's")
            _keep(self._checked, (writer, card), found)
        return found


def authors_of(credentials: Credentials, signing: str | None) -> Authors:
    """What stands in for a proof with these credentials, by `Config.signing`.

    Raises:
        UsageError: They do not give what that asks for.
    """
    kind = credentials.kind
    wanted = signing or {"secret": "keyed", "member": "signed"}.get(kind)
    if wanted is None:
        return Unsigned()
    if wanted == "keyed" and credentials.secrets:
        return Keyed(lambda: (*credentials.secrets, *credentials.former))
    root, own = credentials.root, credentials.certificate
    if wanted == "keyed" or root is None or own is None:
        needs = "a secret or a join token" if wanted == "keyed" else "a join token"
        raise UsageError(f"Config.signing={wanted!r} needs {needs} (mesh=...)")

    def present() -> Certificate:
        assert credentials.certificate is not None
        return credentials.certificate

    return Signed(credentials.mesh, root, present, credentials.sign)


class _Signer:
    """Proves the changes of one own writer."""

    scheme = SIGNED

    def __init__(self, authors: Signed, writer: int) -> None:
        self._authors = authors
        self._writer = writer

    @property
    def card(self) -> bytes:
        return self._authors.card(self._writer)

    def prove(self, body: bytes) -> bytes:
        return self._authors.prove(body)


def _number(certificate: Certificate, head: bytes) -> int:
    """The number of a writer; 0, which is nobody's, if the head of its card is none."""
    if len(head) != CARD_HEAD or int.from_bytes(head, "big") >= COUNTS:
        return 0
    named = certificate.mesh + certificate.key + certificate.serial + head
    found = hashlib.blake2b(named, digest_size=8, person=b"crdtstate-writer").digest()
    return int.from_bytes(found, "big") & (2**WRITER_BITS - 1) or 1


def _keep(cache: dict[K, Certificate], key: K, found: Certificate) -> None:
    while len(cache) >= CARDS_CACHED:
        del cache[next(iter(cache))]
    cache[key] = found


def _hash(message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=32).digest()
