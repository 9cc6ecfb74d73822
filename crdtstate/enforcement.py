"""
Enforcing a document's rules: what they make of own changes, and of others'.

The rules are part of the document and hold from the change on that set them (`rules`). An own write
that they refuse raises before anything is written, or when the transaction ends. A change of
somebody else that they refuse is delivered all the same and hidden (`hiding`), by everybody alike:
the verdict is a function of the change and of what it builds on. A replica that does not ask its
own rules is judged by the others, and by itself when the change is sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from crdtstate.change import RESOLUTION, Change, Origin
from crdtstate.errors import (
    ChangeRefused,
    InvalidUpdate,
    NotAllowed,
    UnknownValidator,
    UsageError,
)
from crdtstate.hiding import NO_COUNTS, REASON_CHARS_MAX, Refusal, net_of
from crdtstate.rules import RULES, Force, Use, propose, rule_of
from crdtstate.slots import Slot
from crdtstate.values import pack
from crdtstate.withholding import Withholding

if TYPE_CHECKING:
    from crdtstate.document import Document
    from crdtstate.lanes import Plan


class Enforcement:
    """The rules of one document at work.

    Args:
        document: The document.
        withholding: Hides what is refused.
        on_write: Called with the document when it should be sealed now.
    """

    def __init__(
        self,
        document: Document,
        withholding: Withholding,
        on_write: Callable[[Document], None],
    ) -> None:
        self._document = document
        self._withholding = withholding
        self._on_write = on_write
        # By which state of the rules, and as whose, the open change was admitted; None: it was not
        # judged. And whether what is written now is to be judged at once.
        self.admitted: tuple[int, Origin] | None = None
        self.judges = True

    def set_rule(self, key: str, text: str) -> None:
        """Set a rule, in a change of its own."""
        document = self._document
        if document.shared or document.name.startswith("@"):
            raise UsageError(
                f"{document.name!r} has no rules: it holds native types, or is the system's"
            )
        if document.is_grouped():
            raise UsageError("rules are set outside of transactions, in a change of their own")
        card = document.prover.card if document.prover is not None else b""
        if not document.may_rule(document.writer, card):
            raise NotAllowed(document.agent, "c", document.name)
        if document.rules.is_full(document.writer):
            raise UsageError(f"{document.name!r}: this writer has set too many rules")
        if document.is_open:
            # What is open is sealed when it says so a second time.
            self._on_write(document)
        self.judges = False
        try:
            document.put(RULES, key, pack(text, "rule"))
        finally:
            self.judges = True
        self._on_write(document)

    # Own changes

    def admit_open(self, origin: Origin, kind: int) -> None:
        """Judge the open change, as one of a *kind* that *origin* makes.

        Raises:
            ChangeRefused: The rules refuse it.
            UnknownValidator: It cannot be judged here.
        """
        document = self._document
        force = document.rules.now
        admitted = document.rules.revision, origin
        if not force or not document.unsealed or self.admitted == admitted:
            return
        slots = {path: document.lanes.own_slot(path) for path in document.unsealed}
        self._admit(force, slots, origin, kind)
        self.admitted = admitted

    def admit_write(self, path: str, slot: Slot, kind: int) -> None:
        """Judge the open change with one slot more. Raises what `admit_open` does."""
        document = self._document
        force = document.rules.now
        if not force or not self.judges or document.is_grouped():
            return
        slots = {path: document.lanes.own_slot(path) for path in document.unsealed}
        origin = Origin(document.agent)
        self._admit(force, {**slots, path: slot}, origin, kind)
        self.admitted = document.rules.revision, origin

    def _admit(
        self, force: Force, slots: Mapping[str, Slot | None], origin: Origin, kind: int
    ) -> None:
        document, lanes = self._document, self._document.lanes
        before = {path: document.unsealed.get(path, lanes.own_slot(path)) for path in slots}
        if all(rule_of(path) is not None for path in slots):
            return
        sealed = after = Use()
        if force.measures:
            sealed = after = lanes.use(document.writer)
            for path in slots:
                now = lanes.own_slot(path)
                sealed = sealed.plus(path, now, -1).plus(path, before[path])
                after = after.plus(path, now, -1).plus(path, slots[path])
        writes = {
            path: slot for path, slot in slots.items() if slot is not None and slot != before[path]
        }
        proposal = propose(
            document.name, document.writer, origin, kind == RESOLUTION, writes, before
        )
        if (reason := force.judge(proposal, sealed, after)) is not None:
            raise ChangeRefused(document.name, reason[:REASON_CHARS_MAX])

    def unadmitted(self) -> tuple[dict[str, Slot | None], Use]:
        """What the open change writes over, and how much was here before it, if there are rules
        and it was not admitted: whoever saw to that is no better off than others."""
        document = self._document
        if not document.rules.now or self.admitted is not None:
            return {}, Use()
        use = Use()
        if document.rules.now.measures:
            use = document.lanes.use(document.writer)
            for path, slot in document.unsealed.items():
                use = use.plus(path, document.lanes.own_slot(path), -1).plus(path, slot)
        return dict(document.unsealed), use

    def judge_own(
        self, change: Change, before: Mapping[str, Slot | None], use: Use
    ) -> Refusal | None:
        """Judge an own change that was sealed without that, as all others do."""
        document, lanes = self._document, self._document.lanes
        slots = {
            path: slot
            for path in before
            if (slot := lanes.own_slot(path)) is not None and slot.seq == change.seq
        }
        if not self._needs_verdict(document.rules.now, change, slots):
            return None
        after = lanes.use(document.writer) if document.rules.now.measures else use
        try:
            refused = self._verdict(document.rules.now, change, slots, before, use, after)
        except UnknownValidator:
            # It is sealed; who can tell will.
            return None
        if refused is not None:
            document.hiding.refuse(change.dot, refused)
            self._withholding.prune_some(change.writer)
            lanes.watch()
            lanes.review(change.writer, refused.paths)
        return refused

    # Others' changes

    def judge(self, plan: Plan, change: Change) -> Refusal | None:
        """What the rules make of a change of another that was checked and is ready.

        Raises:
            InvalidUpdate: It deletes where nobody may.
            UnknownValidator: It cannot be judged here.
        """
        document = self._document
        is_adopting = any(owner != plan.writer for owner, _ in plan.drops)
        if is_adopting and document.rules.are_known_to(change.dot, change.deps):
            raise InvalidUpdate("deletes in another lane where there are rules")
        dot, lanes = change.dot, document.lanes
        force = document.rules.for_change(dot, plan.builds_on(change.deps))
        slots = plan.written(change.seq)
        if not self._needs_verdict(force, change, slots):
            return None
        before = {path: lanes.slot(plan.writer, path) for path in slots}
        use = after = Use()
        if force.measures:
            use = after = lanes.use(plan.writer)
            for owner, path in plan.drops:
                if owner == plan.writer:
                    after = after.plus(path, lanes.slot(owner, path), -1)
            for path, slot in slots.items():
                after = after.plus(path, before[path], -1).plus(path, slot)
        return self._verdict(force, change, slots, before, use, after)

    # Both

    def _needs_verdict(self, force: Force, change: Change, slots: Mapping[str, Slot]) -> bool:
        rules = sum(rule_of(path) is not None for path in slots)
        if rules and not self._may_rule(change):
            return True
        return bool(force) and rules < len(slots)

    def _may_rule(self, change: Change) -> bool:
        document = self._document
        card = change.card or document.cards.get(change.writer, b"")
        return document.may_rule(change.writer, card)

    def _verdict(
        self,
        force: Force,
        change: Change,
        slots: Mapping[str, Slot],
        before: Mapping[str, Slot | None],
        use: Use,
        after: Use,
    ) -> Refusal | None:
        """What *force* makes of a change that writes *slots* over what was *before*."""
        document = self._document
        is_resolution = change.kind == RESOLUTION
        proposal = propose(
            document.name, change.writer, change.origin, is_resolution, slots, before
        )
        reason: str | None = "rules: who made it may not set them"
        if all(rule_of(path) is None for path in slots) or self._may_rule(change):
            try:
                reason = force.judge(proposal, use, after)
            except UnknownValidator:
                if not document.admits_unjudged:
                    raise
                reason = None
        if reason is None:
            return None
        counts = {
            path: added
            for path, slot in slots.items()
            if path[0] == "c" and (added := net_of(slot) - net_of(before[path]))
        }
        paths, reason = tuple(sorted(slots)), reason[:REASON_CHARS_MAX]
        return Refusal(change.origin.agent, change.stamp, reason, paths, counts or NO_COUNTS)
