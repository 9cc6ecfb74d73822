"""
How a replica came by its documents when it was opened, and whether others have the same.

The part of `Replica` that users see of `recovery`, which does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from crdtstate import casebook
from crdtstate.checkpoints import Checkpoints
from crdtstate.clock import Cut
from crdtstate.comparing import Comparison
from crdtstate.config import Config
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError
from crdtstate.events import Event, Recovered, RecoveryEscalated
from crdtstate.ladder import Attempt, Recovery
from crdtstate.link import takes
from crdtstate.recovery import Opened, Unusable, admit
from crdtstate.sync import Sync

log = logging.getLogger("crdtstate")

Check = Callable[[Any], Awaitable[object] | object]
"""The user's own check of what was recovered: gets the replica, to read it."""

WITNESSES = 2
"""Peers that are asked whether they have the same."""

COMPARE_TIMEOUT = 60.0


class Recovering(DocumentSet):
    """Documents that were recovered; a replica opens them."""

    config: Config
    _checkpoints: Checkpoints
    _sync: Sync
    _subscribe: tuple[str, ...] | None
    _check: Check | None
    _recovery: Recovery | None

    def _emit(self, event: Event) -> None:
        """Tell the user."""
        raise NotImplementedError

    async def _wait_until(
        self, ready: Callable[[], bool], what: str, timeout: float | None = None
    ) -> None:
        """Wait until something is so."""
        raise NotImplementedError

    async def compare(self, *, peers: int = 2, timeout: float | None = None) -> Comparison:
        """Ask peers whether they have the same."""
        raise NotImplementedError

    @property
    def recovery(self) -> Recovery | None:
        """How this replica came by its documents when it was opened; None before. What peers said
        of it is added when they have been asked."""
        return self._recovery

    def _tell_recovery(self, recovery: Recovery) -> None:
        """The documents are here: say where from."""
        self._recovery = recovery
        if recovery.changes or recovery.aside or recovery.is_escalated:
            level = logging.WARNING if recovery.aside else logging.INFO
            log.log(level, "%s: %s", self.agent, recovery)
            self._emit(Recovered(self.agent, recovery))
        if recovery.is_escalated:
            self._escalate()

    def _escalate(self) -> None:
        """Nothing gave what is needed: tell everybody."""
        assert self._recovery is not None
        self._recovery = replace(self._recovery, is_escalated=True)
        attempts = self._recovery.attempts
        log.error("%s: somebody should look at this: %s", self.agent, self._recovery)
        self._emit(RecoveryEscalated(self.agent, attempts, True))
        if takes(self._subscribe, casebook.DOCUMENT):
            try:
                casebook.escalate(self, attempts, Cut(dict(self.versions())))
            except CRDTStateError as exc:
                log.warning("%s: nobody can be told: %s", self.agent, exc)

    def _tell_taken_back(self, writer: int, kept: Mapping[str, int]) -> None:
        """Changes of *writer* were taken back, those above *kept*: no checkpoint that has them may
        be taken in any more, by whoever finds one."""
        if kept and takes(self._subscribe, casebook.DOCUMENT):
            try:
                casebook.disown(self, writer, kept)
            except CRDTStateError as exc:
                log.warning("%s: nobody can be told: %s", self.agent, exc)

    async def _validate(self, opened: Opened) -> None:
        """Once peers are there: the check, if it waits for them, and whether they have the same."""

        def has_caught_up() -> bool:
            core = self._sync
            is_told = any(link.is_greeted for link in core.peers)
            return is_told and not core.missing_count() and not core.pending_count

        try:
            await self._wait_until(has_caught_up, "peers")
            await self._ask_for_agreement(opened)
        except CRDTStateError as exc:
            log.info("%s: what was recovered is not compared: %s", self.agent, exc)

    async def _ask_for_agreement(self, opened: Opened) -> None:
        assert self._recovery is not None
        if opened.checks_later and self._check is not None:
            check = self._check
            try:
                await admit(lambda: check(self), self.config.check_timeout)
            except Unusable as exc:
                self._fail(str(exc))
                return
            self._recovery = replace(self._recovery, is_checked=True)
        comparison = await self.compare(peers=WITNESSES, timeout=COMPARE_TIMEOUT)
        self._recovery = replace(self._recovery, agreed=comparison.agreed)
        against = {each.agent for each in comparison.diverged}
        if against and not comparison.agreed:
            # Nobody sides with this one.
            places = ", ".join(f"{each.document}: {each.path}" for each in comparison.diverged[:3])
            self._fail(f"{', '.join(sorted(against))} have something else at {places}")
        elif comparison.agreed:
            self._emit(Recovered(self.agent, self._recovery))

    def _fail(self, reason: str) -> None:
        """What was taken for recovered is not."""
        assert self._recovery is not None
        *before, last = self._recovery.attempts
        self._recovery = replace(self._recovery, attempts=(*before, Attempt(last.source, reason)))
        self._escalate()
