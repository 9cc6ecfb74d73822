"""
What a replica can do about conflicts: vote, resolve, and read in the audit what was done.

The part of `Replica` that users see of `votes` and `audit`, which do the work.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any, Literal

from crdtstate.audit import KINDS, Query, Record
from crdtstate.certificates import WRITE
from crdtstate.config import Config
from crdtstate.conflict import Conflict
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError, NotAllowed, StoreError, UsageError
from crdtstate.events import ConflictFound
from crdtstate.link import takes
from crdtstate.membership import Member, rendezvous
from crdtstate.slots import SEPARATOR
from crdtstate.stores import Store
from crdtstate.votes import ELECTORATE, Electorate

log = logging.getLogger("crdtstate")


class Resolving(DocumentSet):
    """Documents whose conflicts are decided here; a replica knows who else could."""

    config: Config
    role: Literal["agent", "relay"]
    _store: Store
    _subscribe: tuple[str, ...] | None
    _state: Literal["new", "checking", "open", "closed"]

    def members(self) -> list[Member]:
        """All known members of the mesh, this one included, by name."""
        raise NotImplementedError

    def is_controller(self, agent: str) -> bool:
        """Whether an agent may command, by its certificate; where there are none, everybody."""
        raise NotImplementedError

    def _may_write(self, document: str) -> bool:
        """Whether this replica may write a document."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Seal what is open and hand it to the store."""
        raise NotImplementedError

    # Conflicts

    def vote(self, conflict: Conflict | ConflictFound, value: Any) -> None:
        """Vote for *value*, one of the candidates of *conflict*, in place of what this agent
        voted before. It counts where the strategy is ``"vote"``: the value that more than half
        of `Config.voters` voted for is read on all replicas, from when they have the votes; else
        the last write. It counts for these candidates only: with another one it is another
        conflict, and all are asked anew. In a mesh with certificates the voters are those of a
        controller, whatever this replica's `Config` says. See `crdtstate.votes`.

        Raises:
            NotAllowed: This replica may not write the document.
            UsageError: It would not count: there are no voters, or this agent is none of
                them; the strategy is another; *value* is none of the candidates; they are not
                what conflicts there now; `Config.vote_deadline` has passed. Nothing changed.
        """
        self._check_usable()
        found, own = _as_conflict(conflict), self._own_electorate()
        if own is None and not self.polls.are_certified:
            raise UsageError("a vote needs voters: give all replicas the same Config(voters=[...])")
        if not self._may_write(found.document):
            raise NotAllowed(self.agent, WRITE, found.document)
        self.polls.cast(found, value, own)

    def _own_electorate(self) -> Electorate | None:
        """Who votes, if this replica has a say in that."""
        config = self.config
        if not config.voters or not self.is_controller(self.agent):
            return None
        return Electorate.of(config.voters, config.vote_deadline)

    def _tell_electorate(self) -> None:
        """Where there are certificates, a controller says who votes before anybody does."""
        own = self._own_electorate()
        if own is None or not self.polls.are_certified or not takes(self._subscribe, ELECTORATE):
            return
        try:
            self.polls.tell(own)
        except CRDTStateError as exc:
            log.warning("%s: nobody can be told who votes: %s", self.agent, exc)

    def resolve(self, conflict: Conflict | ConflictFound, value: Any) -> None:
        """Write *value* over the candidates of *conflict*, as a resolution. For who has decided
        in the meantime: unlike `Map.resolve`, it never writes over a candidate that was not
        among them.

        Raises:
            UsageError: They are not what conflicts there now: somebody wrote. Nothing changed.
        """
        self._check_usable()
        found = _as_conflict(conflict)
        document = self.find(found.document)
        now = document.conflict(found.kind[0] + found.name, found.key) if document else None
        if document is None or now is None or now.dots != found.dots:
            where = f"{found.document}: {found.path}"
            raise UsageError(f"{where}: not in conflict as given any more; see conflicts()")
        if found.kind == "map":
            document.map(found.name).resolve(found.key, value)
        else:
            document.register(found.name).resolve(value)

    def is_responsible(self, conflict: Conflict | ConflictFound) -> bool:
        """Whether this agent is the one to resolve *conflict*, if all agents try alike: the same
        one everywhere, drawn by a hash from those that are up, relays excepted. While members
        see each other differently it may be two, or none; two resolutions at once are a conflict
        again, none is found by who asks again, such as at `MemberDown`."""
        self._check_usable()
        subject = _as_conflict(conflict).poll
        names = {
            m.agent for m in self.members() if m.state in ("up", "suspected") and m.role == "agent"
        }
        return self.role == "agent" and self.agent == rendezvous(subject, names | {self.agent})

    def audit(
        self,
        since: datetime | Record | None = None,
        *,
        document: str | None = None,
        agent: str | None = None,
        kind: str | None = None,
        limit: int = 1000,
    ) -> list[Record]:
        """What was resolved, decided, voted, refused and commanded, as far as it is known here:
        the newest *limit* records, oldest first. See `crdtstate.audit`.

        Args:
            since: Recorded here from then on, or after this record.
            agent: Who did it.
            kind: See `Record`.

        Raises:
            UsageError: An argument cannot be.
            StoreError: The store cannot be read.
        """
        self._check_usable()
        if kind is not None and kind not in KINDS:
            raise UsageError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        if type(limit) is not int or limit < 1:
            raise UsageError(f"limit is a number above 0, not {limit!r}")
        after, since_ms = 0, 0
        if isinstance(since, Record):
            after = since.number
        elif isinstance(since, datetime) and since.tzinfo is not None:
            since_ms = int(since.timestamp() * 1000)
        elif since is not None:
            raise UsageError(f"since is an aware datetime or a record of the audit, not {since!r}")
        self._settle()
        query = Query(after, since_ms, document, None, agent, kind, limit)
        return [Record.read(row) for row in self._store.audit(query)]

    def _recall(self, document: str, container: str, key: str) -> tuple[Record, ...]:
        """The resolutions at a path; none while the store cannot tell."""
        query = Query(document=document, place=container + SEPARATOR + key, kind="resolution")
        if self._state != "open":
            return ()
        try:
            return tuple(Record.read(row) for row in self._store.audit(query._replace(limit=20)))
        except StoreError as exc:
            log.warning("%s: the audit cannot be read: %s", self.agent, exc)
            return ()


def _as_conflict(conflict: Conflict | ConflictFound) -> Conflict:
    if isinstance(conflict, ConflictFound):
        return conflict.conflict
    if isinstance(conflict, Conflict):
        return conflict
    raise UsageError(f"give what conflicts() or ConflictFound gave, not {conflict!r}")
