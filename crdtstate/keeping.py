"""
What a replica keeps and can go back to: its checkpoints, and the past.

The part of `Replica` that users see of `checkpoints` and `lookback`, which do the work.
"""

from __future__ import annotations

from collections.abc import Iterable

from crdtstate.checkpoints import Checkpoint, Checkpoints, Pruning, Verification
from crdtstate.clock import Cut
from crdtstate.documents import DocumentSet
from crdtstate.lookback import HistoryReader, Lookback, Point
from crdtstate.past import Difference, Past
from crdtstate.rewrite import Reverted


class Keeping(DocumentSet):
    """Documents with checkpoints and a past; a replica opens both."""

    _checkpoints: Checkpoints
    _lookback: Lookback

    # Checkpoints

    async def checkpoint(self, label: str = "") -> Checkpoint:
        """Make a checkpoint: all documents at one moment, everything written so far included.

        It is in the primary tier when this returns, read back and verified; the other tiers get
        it afterwards. One with a *label* is kept longer, see `Retention`.

        Raises:
            CheckpointFailed: The primary tier, or the store, does not work. Nothing was made.
            UsageError: *label* cannot be one; up to 200 printable characters can.
        """
        self._check_usable()
        self._check_settled()
        return await self._checkpoints.create(label)

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of this agent, oldest first."""
        return self._checkpoints.saved()

    async def verify(self, id: str, *, tier: str | None = None) -> Verification:
        """Read all of a checkpoint, in all tiers that have it or in the one with the URL *tier*,
        and compare it with its hashes.

        Raises:
            CorruptCheckpoint: No tier that was asked has all of it as it was written.
            TierError: The tiers that may have it cannot be asked.
            UnknownCheckpoint: There is none with this id.
        """
        self._check_usable()
        return await self._checkpoints.verify(id, tier)

    async def prune_checkpoints(self, *, dry_run: bool = False) -> Pruning:
        """Let go of the checkpoints that *retention* does not keep, as is done after each new one;
        with *dry_run* only say which."""
        self._check_usable()
        return await self._checkpoints.prune(dry_run=dry_run)

    def why_kept(self, id: str) -> str:
        """Why a checkpoint is kept, in words. Raises UnknownCheckpoint."""
        return self._checkpoints.why_kept(id)

    # The past

    async def at(self, point: Point, *, documents: Iterable[str] | None = None) -> Past:
        """The documents as they were: ``past = await replica.at(id); past.map("plan")["goal"]``.

        A `Past` can be read like a replica and not be written. *point* is a checkpoint or its id,
        which are read from the tiers that have it, or a version that `version()` gave, which is
        rebuilt from the journal, or from the checkpoint before it and the journal.

        Args:
            documents: Only these; the others then read as empty.

        Raises:
            PastForgotten: Nothing leads to this version any more: the journal keeps the newest
                `Config.log_bytes` of changes. It says what is the oldest that can be had.
            UnknownCheckpoint, CorruptCheckpoint, TierError: The checkpoint cannot be read.
            UsageError: The version has changes that are not here yet.
        """
        self._check_usable()
        self._check_settled()
        return await self._lookback.at(point, documents)

    async def diff(
        self,
        since: Point,
        until: Point | None = None,
        *,
        documents: Iterable[str] | None = None,
        paths: Iterable[str] | None = None,
    ) -> list[Difference]:
        """What reads differently at *until*, or now, than at *since*: place by place, by document
        and name. Points are those of `at`, and what it raises can be raised.

        Args:
            documents: Only these. All but those of the system (``@...``) if it is None.
            paths: Only these: names of views (``plan``), and places in them (``plan['goal']``).
        """
        self._check_usable()
        self._check_settled()
        return await self._lookback.diff(since, until, documents, paths)

    def history(
        self,
        document: str,
        *,
        since: Cut | Checkpoint | None = None,
        until: Cut | Checkpoint | None = None,
        agent: str | None = None,
        run: str | None = None,
        path: str | None = None,
        limit: int | None = None,
        tidying: bool = False,
    ) -> HistoryReader:
        """The changes of a document in causal order, oldest first, with who made them, why, when,
        and what they wrote. What the store has not committed yet is not among them.

        Use it with ``for``, or with ``async for`` where there is much: others have their turn
        after each portion. It takes about as much memory as the document.

        Args:
            since: What is not to be told. None: from where the journal begins. There, the names
                of some places may be forgotten, see `PastChange.is_partial`.
            until: How far to go; None: up to now.
            agent, run, path: Only changes of this agent, of this run, that wrote this view
                (``plan``) or place (``plan['goal']``).
            limit: How many at most.
            tidying: Also those that changed nothing that can be read.

        Raises:
            PastForgotten: The journal does not reach back to *since*, or, while it is iterated
                over, forgets what has not been read yet.
            UsageError: There is no such document, or *until* is not committed here.
        """
        self._check_usable()
        return self._lookback.history(document, since, until, agent, run, path, limit, tidying)

    async def restore(
        self,
        point: Point,
        *,
        documents: Iterable[str] | None = None,
        paths: Iterable[str] | None = None,
        message: str = "",
        run: str = "",
    ) -> list[Difference]:
        """Bring back what was: afterwards, documents read as they did at *point* (see `at`), and
        what did not exist then is gone. Returns what it changed; twice in a row, nothing.

        Nothing is rolled back: it is a new change like any other, in one transaction; in several,
        one after the other, if more than 20,000 places or 2 MB of a document differ. If it fails
        in the midst, those that were made stay, and can be completed by the same call. It writes
        over what this replica has seen, conflicts included. What others write at the same time
        merges as always: at the same place both values stay, and the strategy decides; an
        increment counts on top; elsewhere nothing is lost. A counter is brought back by the
        difference: two agents that restore it at once do so twice.

        Args:
            documents: Only these. All but those of the system (``@...``) if it is None.
            paths: Only these, as in `diff`; what lies elsewhere stays as it is.
            message: Why; "restore of ..." if it is empty.
            run: To which run of the agent it belongs.

        Raises:
            UsageError: Names or paths name nothing, then or now. Nothing changed.
        """
        self._check_usable()
        self._check_settled()
        return await self._lookback.restore(point, documents, paths, message, run)

    async def revert(
        self,
        *,
        run: str,
        document: str | None = None,
        agent: str | None = None,
        message: str = "",
    ) -> Reverted:
        """Undo what one run wrote, and keep what everybody else has written since.

        Where a value of the run stands, what was there before comes back: the newest value that
        was not the run's own. What it added to counters is taken off, what it removed comes back.
        Where others have written over it, it stays as they left it. A text, array or native map
        comes back if nobody else has edited it since the run began. `Reverted` says what was
        changed, and what was left and why. Values that the run wrote before the journal begins
        cannot be told from others' and stay.

        It is a new change, in the run "revert <run>": reverting that brings everything back, and
        reverting the same run twice does nothing more. Two agents that revert it at the same
        time take what it added to counters off twice.

        Args:
            document: Only there; None: in all documents but those of the system.
            agent: Only what this agent wrote in the run.
            message: Why; "revert of ..." if it is empty.

        Raises:
            UsageError: The journal has no changes of such a run. Nothing changed.
        """
        self._check_usable()
        self._check_settled()
        return await self._lookback.revert(run, document, agent, message)
